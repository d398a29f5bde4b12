//! A client of the nftproxy that runs on this node: its pages on the loopback.
//!
//! Whoever listens on that port is believed as far as names go: what is in force, commands ask the
//! kernel itself.

use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::config::Config;
use crate::inspect::Objects;

/// How long it may take to be connected.
const CONNECT: Duration = Duration::from_secs(1);

/// How long an answer may take, if it is not asked to wait for something.
const ANSWER: Duration = Duration::from_secs(30);

/// More than the largest cluster's objects are.
const LIMIT: usize = 512 << 20;

/// The daemon does not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Its pages are not where they can be asked for.
    #[error("nftproxy answers commands on the loopback only, and metricsBindAddress is {0}")]
    Elsewhere(String),
    /// Nobody is there.
    #[error("no nftproxy answers on {0} (metricsBindAddress): {1}; does it run on this node?")]
    Silent(SocketAddr, String),
    /// It says no.
    #[error("nftproxy on {0} says: {1}")]
    Refused(SocketAddr, String),
    /// It is another program, or another version.
    #[error("what answers on {0} is not nftproxy {version}: {1}", version = env!("CARGO_PKG_VERSION"))]
    Other(SocketAddr, String),
}

/// The daemon of this node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Daemon {
    at: SocketAddr,
}

impl Daemon {
    /// Where the configuration has it.
    pub(super) fn of(config: &Config) -> Result<Self, DaemonError> {
        let Some(at) = config.metrics_bind_address else {
            return Err(DaemonError::Elsewhere("not set".into()));
        };
        if !at.ip().is_loopback() {
            return Err(DaemonError::Elsewhere(at.to_string()));
        }
        Ok(Self { at })
    }

    /// Where it is.
    pub(super) fn at(self) -> SocketAddr {
        self.at
    }

    /// The text of a page.
    pub(super) async fn get(self, path: &str) -> Result<String, DaemonError> {
        self.get_within(path, ANSWER).await
    }

    /// The same, where an answer may take longer.
    pub(super) async fn get_within(
        self,
        path: &str,
        within: Duration,
    ) -> Result<String, DaemonError> {
        let silent = |why: &dyn std::fmt::Display| DaemonError::Silent(self.at, why.to_string());
        let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(self.at));
        let stream = connecting.await.map_err(|_| silent(&"not connected in time"))?;
        let stream = stream.map_err(|error| silent(&error))?;
        match tokio::time::timeout(within, self.ask(stream, path)).await {
            Ok(answer) => answer,
            Err(_) => Err(silent(&format!("no answer within {within:?}"))),
        }
    }

    async fn ask(self, stream: TcpStream, path: &str) -> Result<String, DaemonError> {
        let other = |why: &dyn std::fmt::Display| DaemonError::Other(self.at, why.to_string());
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| other(&error))?;
        let connection = tokio::spawn(connection);
        let request = Request::get(path)
            .header("host", self.at.to_string())
            .body(Empty::<Bytes>::new())
            .expect("paths are made here");
        let response = sender.send_request(request).await.map_err(|error| other(&error))?;
        let code = response.status();
        let body = Limited::new(response.into_body(), LIMIT).collect().await;
        connection.abort();
        let body = body.map_err(|error| other(&error))?.to_bytes();
        let text = harmless(&String::from_utf8_lossy(&body));
        match code.as_u16() {
            200 => Ok(text),
            404 => Err(other(&"it has no such page")),
            _ => Err(DaemonError::Refused(self.at, text.trim_end().to_owned())),
        }
    }

    /// The value of a page in JSON.
    pub(super) async fn value<T: serde::de::DeserializeOwned>(
        self,
        path: &str,
        within: Duration,
    ) -> Result<T, DaemonError> {
        let text = self.get_within(path, within).await?;
        serde_json::from_str(&text).map_err(|error| DaemonError::Other(self.at, error.to_string()))
    }

    /// The objects that it goes by.
    pub(super) async fn objects(self) -> Result<Objects, DaemonError> {
        self.value("/debug/objects", ANSWER).await
    }
}

/// Without what could control a terminal: any user of this host can take the daemon's port while no
/// daemon runs. JSON stays JSON by it.
fn harmless(text: &str) -> String {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c })
        .collect();
    text.replace("\\u00", "\\ufffd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_controls_the_terminal_by_an_answer() {
        assert_eq!(harmless("a\n\tb\u{1b}[31m\u{9b}"), "a\n\tb\u{fffd}[31m\u{fffd}");
        let parsed: String = serde_json::from_str(&harmless(r#""x\u001b[0m\"y""#)).unwrap();
        assert_eq!(parsed, "x\u{fffd}1b[0m\"y");
    }
}
