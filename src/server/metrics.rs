//! Port 10249: metrics, and what dashboards and tests of kube-proxy ask beside them.

use std::net::SocketAddr;
use std::sync::Arc;

use super::{Answers, Reply};
use crate::metrics::CONTENT_TYPE;
use crate::status::Status;

pub(super) struct Pages {
    status: Arc<Status>,
    /// None where others than this host could read it.
    configz: Option<String>,
}

impl Pages {
    pub(super) fn new(status: Arc<Status>, configz: String, address: SocketAddr) -> Self {
        Self { status, configz: address.ip().is_loopback().then_some(configz) }
    }
}

impl Answers for Pages {
    fn reply(&self, path: &str) -> Reply {
        match path {
            "/metrics" => {
                // A hundred kilobytes of text: not on the time of the watches.
                let text = tokio::task::block_in_place(|| self.status.metrics.text());
                Reply::new(200, CONTENT_TYPE, text)
            }
            "/healthz" => Reply::text("ok"),
            "/proxyMode" => Reply::text("nftables"),
            "/configz" => self.configz.as_ref().map_or_else(Reply::not_found, |text| {
                Reply::new(200, "application/json", text.clone())
            }),
            _ => Reply::not_found(),
        }
    }
}
