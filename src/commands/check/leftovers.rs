//! What others have in the kernel that answers for Services, too.

use super::Finding;
use crate::model::Family;
use crate::nft::kernel::LoadError;
use crate::nft::names::TABLE;
use crate::nft::netlink::NetlinkKernel;

/// kube-proxy's table in its nftables mode.
const KUBE_PROXY: &str = "kube-proxy";

/// What was found, and how to remove it.
struct Leftover {
    what: String,
    remove: String,
}

pub(super) fn findings(kernel: &mut NetlinkKernel) -> Vec<Finding> {
    let mut findings = Vec::new();
    match (find(kernel), others(kernel)) {
        (Err(error), _) | (_, Err(error)) => {
            findings.push(Finding::attention("leftovers", error.to_string(), "look again"));
        }
        (Ok(found), Ok(others)) => {
            for Leftover { what, remove } in &found {
                findings.push(Finding::attention("leftovers", what.clone(), remove.clone()));
            }
            if found.is_empty() {
                findings.push(Finding::good("leftovers", "no table of kube-proxy's nftables mode"));
            }
            if !others.is_empty() {
                let found = format!("other tables: {}", others.join(", "));
                findings.push(Finding::good("neighbours", found));
            }
        }
    }
    findings
}

fn find(kernel: &mut NetlinkKernel) -> Result<Vec<Leftover>, LoadError> {
    let mut found = Vec::new();
    for family in Family::BOTH {
        if kernel.table_names(family)?.iter().any(|name| name == KUBE_PROXY) {
            found.push(Leftover {
                what: format!(
                    "kube-proxy runs here, or left its table {family} {KUBE_PROXY}, which answers \
                     for Services, too"
                ),
                remove: "stop kube-proxy and run `kube-proxy --cleanup`".into(),
            });
        }
    }
    Ok(found)
}

/// Tables of neither.
fn others(kernel: &mut NetlinkKernel) -> Result<Vec<String>, LoadError> {
    let mut others = Vec::new();
    for family in Family::BOTH {
        let names = kernel.table_names(family)?;
        let theirs = names.into_iter().filter(|name| ![TABLE, KUBE_PROXY].contains(&name.as_str()));
        others.extend(theirs.map(|name| format!("{family} {name}")));
    }
    Ok(others)
}
