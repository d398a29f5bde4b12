//! `nftproxy bundle`: one archive with what somebody else needs to see who is to help.
//!
//! Every part is made by the command or page that shows it by itself, so that there is nothing in it
//! that an operator could not look at first. Credentials are not left out of what was read: they are
//! never read. What cannot be had is named in the archive, and the rest is in it all the same.

use std::fmt::Write as _;
use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use nix::sys::utsname::uname;

use super::check::check;
use super::daemon::Daemon;
use super::diff::diff;
use super::list::{Filter, list};
use super::tables::Tables;
use super::{Answer, CommandError, Output};
use crate::config::{self, Config, Format, Loaded};
use crate::host;
use crate::model::Family;
use crate::nft::text;

/// Sysctls that packets, Services or this program's speed depend on.
const SYSCTLS: [&str; 17] = [
    "kernel/osrelease",
    "kernel/version",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/ipv4/conf/all/forwarding",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/conf/all/forwarding",
    "net/netfilter/nf_conntrack_buckets",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_be_liberal",
];

/// The archive.
#[derive(Debug)]
pub struct Bundle {
    /// A name that says where and when.
    pub name: String,
    /// A gzipped tar archive.
    pub bytes: Vec<u8>,
    /// What could not be had, and why.
    pub missing: Vec<String>,
}

/// The archive cannot be put together.
#[derive(Debug, thiserror::Error)]
#[error("cannot put the archive together: {0}")]
pub struct BundleError(#[from] std::io::Error);

/// Puts it together; says each part before it is made.
pub async fn bundle(loaded: &Loaded, mut say: impl FnMut(&str)) -> Result<Bundle, BundleError> {
    let config = &loaded.config;
    let mut parts = Parts { dir: name(config), files: Vec::new(), missing: Vec::new() };
    say("configuration and host");
    parts.add("version.txt", Ok::<_, CommandError>(version(config)));
    parts.add("config.txt", Ok::<_, CommandError>(config::show(loaded, Format::Text)));
    parts.add("sysctls.txt", Ok::<_, CommandError>(sysctls()));
    say("check, Services");
    // Together, since an API server that is silent is waited for by each of them.
    let filter = Filter::default();
    let (findings, listed, rows, changes) = tokio::join!(
        check(config, Output::Text),
        list(config, &filter, Output::Text),
        list(config, &filter, Output::Json),
        diff(config, Output::Text),
    );
    parts.add("check.txt", findings.map(in_full));
    parts.add("list.txt", listed.map(in_full));
    parts.add("list.json", rows.map(in_full));
    parts.add("diff.txt", changes.map(in_full));
    say("tables");
    parts.add("kernel.nft", kernel_tables(config));
    say("daemon");
    let pages = [
        ("daemon/recent.json", "/debug/recent"),
        ("daemon/ruleset.nft", "/debug/ruleset"),
        ("daemon/services.json", "/debug/services"),
        ("daemon/status.html", "/"),
        ("daemon/metrics.txt", "/metrics"),
        ("daemon/log.txt", "/debug/log"),
    ];
    match Daemon::of(config) {
        Ok(daemon) => {
            for (file, path) in pages {
                parts.add(file, daemon.get(path).await);
            }
        }
        Err(error) => parts.add("daemon", Err::<String, _>(error)),
    }
    parts.archive()
}

struct Parts {
    dir: String,
    files: Vec<(&'static str, String)>,
    missing: Vec<String>,
}

impl Parts {
    fn add<E: std::fmt::Display>(&mut self, file: &'static str, text: Result<String, E>) {
        match text {
            Ok(text) => self.files.push((file, plain(&text))),
            Err(error) => self.missing.push(plain(&format!("{file}: {error}"))),
        }
    }

    fn archive(mut self) -> Result<Bundle, BundleError> {
        if !self.missing.is_empty() {
            self.files.insert(0, ("missing.txt", self.missing.join("\n") + "\n"));
        }
        let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
        let now = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
        for (file, text) in &self.files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len().try_into().expect("a text in memory"));
            header.set_mode(0o600);
            header.set_mtime(now);
            archive.append_data(&mut header, format!("{}/{file}", self.dir), text.as_bytes())?;
        }
        let mut packed = archive.into_inner()?;
        packed.flush()?;
        let bytes = packed.finish()?;
        Ok(Bundle { name: format!("{}.tar.gz", self.dir), bytes, missing: self.missing })
    }
}

fn name(config: &Config) -> String {
    let node: String = config
        .node_name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') { c } else { '_' })
        .collect();
    format!("nftproxy-{node}-{}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ"))
}

fn version(config: &Config) -> String {
    let kernel = uname().map_or_else(
        |error| format!("unknown: {error}"),
        |name| {
            let [release, version, machine] =
                [name.release(), name.version(), name.machine()].map(|s| s.to_string_lossy());
            format!("{release} {version} {machine}")
        },
    );
    format!(
        "nftproxy {}\nkernel {kernel}\nnode {}\nobjects from {}\nat {}\n",
        env!("CARGO_PKG_VERSION"),
        config.node_name,
        config.source,
        Timestamp::now(),
    )
}

fn sysctls() -> String {
    let value = |key: &&str| {
        let read = std::fs::read_to_string(format!("/proc/sys/{key}"));
        let value = read.map_or_else(|error| format!("({error})"), |text| text.trim().to_owned());
        format!("{} = {value}\n", key.replace('/', "."))
    };
    SYSCTLS.iter().map(value).collect()
}

/// What the kernel holds, in nft's words, with remarks on what is not as it should be.
fn kernel_tables(config: &Config) -> Result<String, CommandError> {
    let options = config.live.settings.options(&host::node_facts(&config.node_name));
    let tables = Tables::load(&options)?;
    let mut out = String::new();
    for family in Family::BOTH {
        let remarks = [tables.missing(family), tables.changed(family)];
        for remark in remarks.into_iter().flatten() {
            let _ = writeln!(out, "# {remark}");
        }
        if tables.missing(family).is_none() {
            out += &text::table(&tables.ruleset, family);
        }
        out.push('\n');
    }
    Ok(out)
}

fn in_full(answer: Answer) -> String {
    answer.text
}

/// Text without colours, and without the user and password that a URL can have.
fn plain(text: &str) -> String {
    let text = anstream::adapter::strip_str(text).to_string();
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out += before;
        let end = after
            .find(|c: char| c.is_whitespace() || matches!(c, '/' | '"' | '\'' | '?' | '#'))
            .unwrap_or(after.len());
        let user = after[..end].rfind('@').map_or(0, |at| at + 1);
        if user > 0 {
            out += "[removed]@";
        }
        rest = &after[user..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_and_passwords_are_taken_out() {
        assert_eq!(plain("\x1b[1mbold\x1b[0m"), "bold");
        assert_eq!(plain("https://me:secret@api:6443/x @"), "https://[removed]@api:6443/x @");
        assert_eq!(plain("a http://h/p@q b https://u@h"), "a http://h/p@q b https://[removed]@h");
        assert_eq!(plain("no url"), "no url");
    }
}
