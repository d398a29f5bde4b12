//! What is asked: a packet to an address and port, from somebody.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::model::{Family, Protocol};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// What is dialled.
    pub target: Target,
    /// Who dials; None for this host.
    pub from: Option<IpAddr>,
    /// The interface that the packet comes in by.
    pub interface: Option<String>,
    /// Whether to go by the objects alone.
    pub wanted: bool,
}

/// What is dialled: `ADDRESS:PORT[/PROTOCOL]`, or `ADDRESS/icmp` for a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The address.
    pub address: IpAddr,
    /// Protocol and port; None for a ping, which has none.
    pub port: Option<(Protocol, u16)>,
}

/// What is asked about makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// No address and port.
    #[error(
        "{0:?}: expected ADDRESS:PORT, as 10.96.0.10:80 or [fd00::10]:80, and /udp or /sctp behind it if it is not TCP; or ADDRESS/icmp for a ping"
    )]
    Address(String),
    /// No such protocol.
    #[error("{0:?}: expected the protocol tcp, udp, sctp or icmp")]
    Protocol(String),
    /// A port that nothing can have.
    #[error("{0:?}: expected a port from 1 to 65535")]
    NoPort(String),
    /// No address alone.
    #[error("{0:?}: a ping has no port; expected ADDRESS/icmp, as 10.96.0.10/icmp")]
    Ping(String),
    /// An address of each family.
    #[error("{from} cannot dial {to}: one is an IPv4 address, the other an IPv6 address")]
    Families {
        /// Who.
        from: IpAddr,
        /// Whom.
        to: IpAddr,
    },
}

impl Question {
    /// Whether it makes sense.
    pub(crate) fn check(&self) -> Result<(), TargetError> {
        let to = self.target.address;
        match self.from {
            Some(from) if Family::of(from) != Family::of(to) => {
                Err(TargetError::Families { from, to })
            }
            _ => Ok(()),
        }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let (address, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match protocol.to_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            "icmp" | "icmpv6" => {
                let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                let address = bare.unwrap_or(address).parse();
                let address = address.map_err(|_| TargetError::Ping(text.to_owned()))?;
                return Ok(Self { address, port: None });
            }
            other => return Err(TargetError::Protocol(other.into())),
        };
        let address: SocketAddr =
            address.parse().map_err(|_| TargetError::Address(text.to_owned()))?;
        if address.port() == 0 {
            return Err(TargetError::NoPort(text.to_owned()));
        }
        Ok(Self { address: address.ip(), port: Some((protocol, address.port())) })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            Some((protocol, port)) => {
                write!(f, "{}/{protocol}", SocketAddr::new(self.address, port))
            }
            None => write!(f, "{}/icmp", self.address),
        }
    }
}
