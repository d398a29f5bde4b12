//! What others have in the kernel, and whether it answers for Services, too.

use super::Finding;
use crate::nft::kernel::LoadError;
use crate::nft::names::TABLE;
use crate::nft::netlink::NetlinkKernel;
use crate::takeover;

pub(super) fn findings(kernel: &mut NetlinkKernel) -> Vec<Finding> {
    let found = takeover::find();
    let mut findings = Vec::new();
    for leftover in &found.leftovers {
        findings.push(Finding::attention(
            "leftovers",
            format!("kube-proxy runs here, or left: {leftover}"),
            "stop kube-proxy; `nftproxy run` then removes this, as does `nftproxy cleanup --kube-proxy`",
        ));
    }
    for error in &found.unknown {
        findings.push(Finding::attention("leftovers", error.to_string(), "look there yourself"));
    }
    if findings.is_empty() {
        findings.push(Finding::good("leftovers", "nothing of kube-proxy, in any of its modes"));
    }
    match others(kernel) {
        Err(error) => {
            findings.push(Finding::attention("neighbours", error.to_string(), "look again"));
        }
        Ok(others) if others.is_empty() => {}
        Ok(others) => {
            let found = format!("other tables: {}", others.join(", "));
            findings.push(Finding::good("neighbours", found));
        }
    }
    findings
}

/// Tables of neither.
fn others(kernel: &mut NetlinkKernel) -> Result<Vec<String>, LoadError> {
    let tables = kernel.foreign_tables()?.into_iter();
    let others = tables.filter(|table| ![TABLE, takeover::TABLE].contains(&table.name.as_str()));
    Ok(others.map(|table| format!("{} {}", table.family, table.name)).collect())
}
