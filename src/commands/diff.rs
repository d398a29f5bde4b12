//! `nftproxy diff`: what has to change in the kernel to be what is wanted, and for which object.

use std::fmt::Write as _;

use serde::Serialize;

use super::objects::{Gathered, gather};
use super::tables::TablesError;
use super::{Answer, CommandError, Output, Verdict};
use crate::config::Config;
use crate::host;
use crate::nft::names::TABLE;
use crate::nft::netlink::NetlinkKernel;
use crate::nft::text;
use crate::reconcile::Proxy;

/// What is told.
#[derive(Debug, Serialize)]
struct Difference {
    /// Where it is from.
    wanted: String,
    /// In the order that they would be made.
    changes: Vec<Change>,
}

/// One command of nft, behind a sign.
#[derive(Debug, Serialize)]
struct Change {
    change: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<String>,
}

/// Compares.
pub async fn diff(config: &Config, output: Output) -> Result<Answer, CommandError> {
    host::check_privileges()?;
    let kernel = NetlinkKernel::open().map_err(TablesError::from)?;
    let Gathered { state, source } = gather(config).await?;
    let wanted = format!("{source}, node {}", state.node_facts().name);
    let mut proxy = Proxy::new(state, kernel);
    let mut changes = Vec::new();
    for (op, contributor) in proxy.plan().map_err(TablesError::from)? {
        let object = contributor.map(|contributor| contributor.to_string());
        changes.extend(
            text::change(&op).into_iter().map(|change| Change { change, object: object.clone() }),
        );
    }
    let verdict = if changes.is_empty() { Verdict::Good } else { Verdict::Attention };
    let difference = Difference { wanted, changes };
    let text = match output {
        Output::Text => in_text(&difference),
        Output::Json => {
            serde_json::to_string_pretty(&difference).expect("plain values are JSON") + "\n"
        }
    };
    Ok(Answer { text, verdict })
}

fn in_text(Difference { wanted, changes }: &Difference) -> String {
    if changes.is_empty() {
        return format!("the kernel's tables are what is wanted ({wanted})\n");
    }
    let mut text = format!(
        "--- kernel: tables ip {TABLE} and ip6 {TABLE} of this network namespace\n+++ wanted: {wanted}\n"
    );
    for Change { change, object } in changes {
        text.push_str(change);
        if let Some(object) = object {
            let _ = write!(text, "    # {object}");
        }
        text.push('\n');
    }
    text
}
