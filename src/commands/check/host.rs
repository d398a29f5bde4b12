//! What the files of the host tell: its kernel, the sysctls that packets depend on, connection tracking.

use std::path::{Path, PathBuf};

use super::Finding;
use crate::model::Family;

/// The oldest kernel that the present layout of the tables was tested on: `tests/kernels/README.md`.
const TESTED: (u32, u32) = (6, 1);

/// Where the files are.
pub(super) struct HostFiles {
    proc: PathBuf,
    sys: PathBuf,
}

impl HostFiles {
    pub(super) fn system() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into() }
    }

    pub(super) fn findings(&self, families: &[Family]) -> Vec<Finding> {
        let mut findings = vec![self.version()];
        findings.extend(families.iter().map(|family| self.forwarding(*family)));
        findings.extend(self.bridges());
        findings.extend(self.conntrack());
        findings
    }

    fn read(path: &Path) -> Option<String> {
        Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
    }

    fn sysctl(&self, key: &str) -> Option<String> {
        Self::read(&self.proc.join("sys").join(key.replace('.', "/")))
    }

    fn version(&self) -> Finding {
        let release = self.sysctl("kernel.osrelease").unwrap_or_else(|| "unknown".into());
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
        let found = format!("Linux {release}");
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= TESTED => {
                Finding::good("version", found)
            }
            _ => Finding::attention(
                "version",
                found,
                format!("nftproxy was not tested on kernels before {}.{}", TESTED.0, TESTED.1),
            ),
        }
    }

    /// Without it nothing that was translated to a pod gets there.
    fn forwarding(&self, family: Family) -> Finding {
        let key = match family {
            Family::V4 => "net.ipv4.ip_forward",
            Family::V6 => "net.ipv6.conf.all.forwarding",
        };
        match self.sysctl(key).as_deref() {
            Some("1" | "2") => Finding::good("forwarding", format!("{key} is on")),
            Some(_) => Finding::bad(
                "forwarding",
                format!(
                    "{key} is off: packets to endpoints that are not on the host itself are dropped"
                ),
                format!("sysctl -w {key}=1, and a file in /etc/sysctl.d to keep it"),
            ),
            None => Finding::attention(
                "forwarding",
                format!("{key} cannot be read"),
                format!("see that {family} is enabled, if Services are to use it"),
            ),
        }
    }

    /// Between two pods on one bridge, answers pass the rules only if bridged packets do.
    fn bridges(&self) -> Option<Finding> {
        let links = std::fs::read_dir(self.sys.join("class/net")).ok()?;
        let mut bridges: Vec<String> = links
            .flatten()
            .filter(|link| link.path().join("bridge").exists())
            .map(|link| link.file_name().to_string_lossy().into_owned())
            .collect();
        bridges.sort();
        let first = bridges.first()?;
        let key = "net.bridge.bridge-nf-call-iptables";
        Some(match self.sysctl(key).as_deref() {
            Some("1") => Finding::good("bridges", format!("{key} is on, there is bridge {first}")),
            state => {
                let state = if state.is_none() { "there is no" } else { "off:" };
                Finding::attention(
                    "bridges",
                    format!("{state} {key}, and there is bridge {first}"),
                    "if pods are on that bridge, a pod that is given another pod of the same bridge \
                     gets no answer: load br_netfilter, and set it to 1",
                )
            }
        })
    }

    /// A full table drops every new connection.
    fn conntrack(&self) -> Option<Finding> {
        let number = |key: &str| self.sysctl(key)?.parse::<u64>().ok();
        let count = number("net.netfilter.nf_conntrack_count")?;
        let limit = number("net.netfilter.nf_conntrack_max").filter(|limit| *limit > 0)?;
        let found = format!("{count} of at most {limit} connections are tracked");
        let advice =
            "new connections are dropped when it is full: raise net.netfilter.nf_conntrack_max";
        Some(match count * 100 / limit {
            95.. => Finding::bad("conntrack", found, advice),
            80.. => Finding::attention("conntrack", found, advice),
            _ => Finding::good("conntrack", found),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::Verdict;

    fn judged(files: &[(&str, &str)]) -> Vec<(&'static str, Verdict)> {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let host = HostFiles { proc: dir.path().join("proc"), sys: dir.path().join("sys") };
        let findings = host.findings(&[Family::V4]);
        assert!(findings.iter().all(|f| f.advice.is_none() == (f.verdict == Verdict::Good)));
        findings.into_iter().map(|finding| (finding.about, finding.verdict)).collect()
    }

    #[test]
    fn files_of_the_host_are_judged() {
        use Verdict::{Attention, Bad, Good};
        let release = |text| ("proc/sys/kernel/osrelease", text);
        let forward = |text| ("proc/sys/net/ipv4/ip_forward", text);
        let good = judged(&[release("6.18.44-cloud\n"), forward("1\n")]);
        assert_eq!(good, [("version", Good), ("forwarding", Good)]);
        let bad = judged(&[release("5.4.0\n"), forward("0\n")]);
        assert_eq!(bad, [("version", Attention), ("forwarding", Bad)]);
        assert_eq!(judged(&[]), [("version", Attention), ("forwarding", Attention)]);
        let [count, max] =
            ["count", "max"].map(|k| format!("proc/sys/net/netfilter/nf_conntrack_{k}"));
        for (tracked, verdict) in [("10", Good), ("80", Attention), ("99", Bad)] {
            let found = judged(&[(&count, tracked), (&max, "100")]);
            assert_eq!(found.last(), Some(&("conntrack", verdict)));
        }
        let bridge = ("sys/class/net/cni0/bridge/bridge_id", "8000");
        let call = |text| ("proc/sys/net/bridge/bridge-nf-call-iptables", text);
        for (files, verdict) in [
            (vec![bridge], Attention),
            (vec![bridge, call("0")], Attention),
            (vec![bridge, call("1")], Good),
        ] {
            assert_eq!(judged(&files).last(), Some(&("bridges", verdict)));
        }
    }
}
