//! A client of the program's HTTP servers, as probes and load balancers are: one request, one answer.

use std::collections::BTreeMap;
use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use crate::net::{Net, in_netns};

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) code: u16,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl Page {
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.headers["content-type"], "application/json");
        assert_eq!(self.headers["x-content-type-options"], "nosniff");
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

/// Asks from a namespace; None if nobody listens there, or stops to.
pub(crate) fn get(net: &Net, from: &str, at: SocketAddr, path: &str) -> Option<Page> {
    request(
        net,
        from,
        at,
        &format!("GET {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n"),
    )
}

/// Sends a request as it is.
pub(crate) fn request(net: &Net, from: &str, at: SocketAddr, request: &str) -> Option<Page> {
    in_netns(&net.name(from), || {
        let mut stream = match TcpStream::connect_timeout(&at, Duration::from_secs(3)) {
            Ok(stream) => stream,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => return None,
            Err(error) => panic!("{at}: {error}"),
        };
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut text = String::new();
        let sent = stream.write_all(request.as_bytes());
        match sent.and_then(|()| stream.read_to_string(&mut text)) {
            // The port was closed under the connection, before the request was read or later.
            Ok(0) => None,
            Ok(_) => Some(parsed(&text)),
            Err(error) if [ConnectionReset, BrokenPipe].contains(&error.kind()) => None,
            Err(error) => panic!("{at}: {error}"),
        }
    })
}

fn parsed(text: &str) -> Page {
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let mut lines = head.split("\r\n");
    let code = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: BTreeMap<_, _> = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    Page { code, headers, body: body.to_owned() }
}
