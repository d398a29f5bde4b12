//! Port 10256: `/healthz` for load balancers, `/livez` for the kubelet.

use std::sync::Arc;

use super::{Answers, Reply};
use crate::status::Status;

pub(super) struct Pages {
    pub(super) status: Arc<Status>,
}

impl Answers for Pages {
    fn reply(&self, path: &str) -> Reply {
        match path {
            "/healthz" => Reply::answer(self.status.healthz()),
            "/livez" => Reply::answer(self.status.livez()),
            _ => Reply::not_found(),
        }
    }
}
