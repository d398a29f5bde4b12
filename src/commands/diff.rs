//! `nftproxy diff`: what has to change in the kernel to be what is wanted, and for which object.

use std::fmt::Write as _;

use super::objects::{Gathered, gather};
use super::tables::TablesError;
use super::{Answer, CommandError, Verdict};
use crate::config::Config;
use crate::host;
use crate::nft::names::TABLE;
use crate::nft::netlink::NetlinkKernel;
use crate::nft::text;
use crate::reconcile::Proxy;

/// Compares.
pub async fn diff(config: &Config) -> Result<Answer, CommandError> {
    host::check_privileges()?;
    let kernel = NetlinkKernel::open().map_err(TablesError::from)?;
    let Gathered { state, source } = gather(config).await?;
    let wanted = format!("{source}, node {}", state.node_facts().name);
    let mut proxy = Proxy::new(state, kernel);
    let plan = proxy.plan().map_err(TablesError::from)?;
    if plan.is_empty() {
        let text = format!("the kernel's tables are what is wanted ({wanted})\n");
        return Ok(Answer { text, verdict: Verdict::Good });
    }
    let mut text = format!(
        "--- kernel: tables ip {TABLE} and ip6 {TABLE} of this network namespace\n+++ wanted: {wanted}\n"
    );
    for (op, contributor) in plan {
        for line in text::change(&op) {
            text.push_str(&line);
            if let Some(contributor) = &contributor {
                let _ = write!(text, "    # {contributor}");
            }
            text.push('\n');
        }
    }
    Ok(Answer { text, verdict: Verdict::Attention })
}
