//! One of the two proxies as a process: with the same configuration file, in the node's namespace.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::control_plane;
use super::field::Field;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Nftproxy,
    KubeProxy,
}

/// A running proxy. A drop ends it.
pub(crate) struct Proxy {
    which: Which,
    child: Child,
    log: PathBuf,
    /// Holds the log and the configuration.
    _folder: tempfile::TempDir,
}

impl Proxy {
    pub(crate) fn start(field: &Field, which: Which, kubeconfig: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (config, log) = (folder.path().join("config.yaml"), folder.path().join("log"));
        // kube-proxy's sysctls of connection tracking cannot be written in a namespace.
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: node-1
clusterCIDR: 10.244.0.0/16
conntrack: {{maxPerCore: 0}}
clientConnection: {{kubeconfig: {}}}
",
            kubeconfig.display()
        );
        fs::write(&config, text).expect("the temporary folder can be written to");
        let config = config.display().to_string();
        let (program, arguments) = match which {
            Which::Nftproxy => {
                (PathBuf::from(env!("CARGO_BIN_EXE_nftproxy")), vec!["--config", &config])
            }
            Which::KubeProxy => (
                control_plane::find("kube-proxy").unwrap_or_else(|reason| panic!("{reason}")),
                vec!["--config", &config, "--v=2"],
            ),
        };
        let file = File::create(&log).expect("the temporary folder can be written to");
        // `ip netns exec` becomes the program: the process id is the program's. A bench that is
        // killed takes it along.
        let child = Command::new("ip")
            .args(["netns", "exec", &field.name("node"), "setpriv", "--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a file"))
            .stderr(file)
            .spawn()
            .expect("the proxy starts");
        Self { which, child, log, _folder: folder }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Seconds that each sync took, by the proxy's own word. nftproxy says so of the first only.
    pub(crate) fn syncs(&self) -> Vec<f64> {
        let log = self.log();
        let of_kube_proxy = |line: &str| {
            let is = line.contains("SyncProxyRules complete") && line.contains("IPv4");
            let elapsed = line.split("elapsed=\"").nth(1)?.split('"').next()?;
            is.then(|| go_seconds(elapsed)).flatten()
        };
        let of_nftproxy = |line: &str| {
            let took = line.split("took=").nth(1)?.split(' ').next()?;
            line.contains("synced").then(|| go_seconds(took)).flatten()
        };
        match self.which {
            Which::Nftproxy => log.lines().filter_map(of_nftproxy).collect(),
            Which::KubeProxy => log.lines().filter_map(of_kube_proxy).collect(),
        }
    }

    /// How many operations its first sync was, if it says so.
    pub(crate) fn operations(&self) -> f64 {
        let log = self.log();
        let said = log.lines().find_map(|line| line.split(" operations=").nth(1));
        let number = said.and_then(|rest| rest.split(' ').next()?.parse().ok());
        number.unwrap_or(f64::NAN)
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.child.id())).unwrap_or_default()
    }

    /// The most memory it ever had resident; its nft children are not in it.
    pub(crate) fn peak_mb(&self) -> f64 {
        figure(&self.file("status"), "VmHWM:") * 1024.0 / 1e6
    }

    pub(crate) fn cpu_seconds(&self) -> f64 {
        cpu_seconds(self.child.id())
    }

    /// How often its threads went to sleep of their own accord.
    pub(crate) fn wakeups(&self) -> f64 {
        super::wakeups::so_far(self.child.id()).values().sum()
    }

    pub(crate) fn end(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Seconds of CPU that a process and the children it waited for have used.
pub(crate) fn cpu_seconds(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    // utime, stime, cutime, cstime, in hundredths
    fields.skip(11).take(4).filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// How long events waited for their commits so far, if the proxy on the node says so.
pub(crate) fn waits(field: &Field) -> Waits {
    let metrics = field.within("node", || {
        let mut text = String::new();
        let mut stream = TcpStream::connect("127.0.0.1:10249").ok()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: node\r\n\r\n").ok()?;
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    });
    let bucket = |line: &str| {
        let rest = line.strip_prefix("nftproxy_event_to_kernel_seconds_bucket{le=\"")?;
        let (bound, count) = rest.split_once("\"} ")?;
        Some((bound.replace("+Inf", "inf").parse().ok()?, count.parse().ok()?))
    };
    Waits(metrics.unwrap_or_default().lines().filter_map(bucket).collect())
}

/// A histogram: bounds, and how many waits were within each.
pub(crate) struct Waits(Vec<(f64, f64)>);

impl Waits {
    /// The bounds that half of the waits since then, and 99 of 100, were within.
    pub(crate) fn since(&self, before: &Self) -> [f64; 2] {
        let waits = self.0.iter().zip(&before.0).map(|(now, then)| (now.0, now.1 - then.1));
        let waits: Vec<_> = waits.collect();
        let all = waits.last().map_or(0.0, |last| last.1);
        [0.5, 0.99].map(|share| {
            let within = waits.iter().find(|(_, count)| *count >= all * share);
            within.map_or(f64::NAN, |(bound, _)| *bound)
        })
    }
}

fn figure(status: &str, name: &str) -> f64 {
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(f64::NAN)
}

/// `1m2.5s`, `12.3ms`, `45µs`: as Go writes a duration, and Rust a short one.
fn go_seconds(text: &str) -> Option<f64> {
    let (mut total, mut rest) = (0.0, text);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit_end = rest[end..].find(|c: char| c.is_ascii_digit());
        let unit_end = unit_end.map_or(rest.len(), |len| end + len);
        let factor = match &rest[end..unit_end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total += rest[..end].parse::<f64>().ok()? * factor;
        rest = &rest[unit_end..];
    }
    Some(total)
}
