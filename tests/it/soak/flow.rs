//! One UDP flow as the kernel tracks it: who answers it, and when it began.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flow {
    dialled: SocketAddr,
    answering: SocketAddr,
    pub(super) began: SystemTime,
}

impl Flow {
    /// The flow between these ends in a namespace, where the kernel notes when one begins.
    pub(super) fn of(netns: &str, from: SocketAddr, to: SocketAddr) -> Option<Self> {
        let family = if to.is_ipv4() { "ipv4" } else { "ipv6" };
        let (source, destination) = (from.ip().to_string(), to.ip().to_string());
        let (sport, dport) = (from.port().to_string(), to.port().to_string());
        let output = Command::new("ip")
            .args(["netns", "exec", netns, "conntrack", "-L", "-f", family, "-p", "udp"])
            .args(["-s", &source, "-d", &destination, "--sport", &sport, "--dport", &dport])
            .args(["-o", "xml,ktimestamp"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Self::read(&String::from_utf8(output.stdout).unwrap(), to)
    }

    fn read(xml: &str, dialled: SocketAddr) -> Option<Self> {
        let (_, reply) = xml.split_once("direction=\"reply\"")?;
        let field = |name: &str| {
            let (_, rest) = reply.split_once(&format!("<{name}>")).expect(name);
            rest.split('<').next().unwrap().to_owned()
        };
        let address: IpAddr = field("src").parse().unwrap();
        Some(Self {
            dialled,
            answering: SocketAddr::new(address, field("sport").parse().unwrap()),
            began: UNIX_EPOCH + Duration::from_nanos(field("start").parse().unwrap()),
        })
    }

    /// Whether its packets go to somebody else than was dialled.
    pub(super) fn is_translated(&self) -> bool {
        self.dialled != self.answering
    }
}
