//! A listing for people: a block a Service port, in aligned columns.

use std::fmt::Write as _;

use super::{InKernel, Listing, PortRow};
use crate::commands::text::{Paint, columns, count, wrap};

/// How many endpoints of a port are named; with more, the rest is a number.
const ENDPOINTS: usize = 64;

pub(super) fn write(listing: &Listing) -> String {
    let (shown, all) = (listing.services.len(), listing.ports);
    let mut out = wrap(&format!("{}, node {}", listing.source, listing.node), 0);
    let number = if shown == all { String::new() } else { format!("{shown} of ") };
    out += &wrap(&format!("{number}{}; kernel {}", count(all, "Service port"), listing.kernel), 0);
    // Columns are those of all Services, so that the eye can run down them.
    let cells: Vec<Vec<Vec<String>>> = listing.services.iter().map(cells).collect();
    let rows: Vec<Vec<String>> = cells.iter().flatten().cloned().collect();
    let aligned = columns(&rows, 2);
    let mut lines = aligned.lines();
    for (row, cells) in listing.services.iter().zip(&cells) {
        out.push('\n');
        out += &head(row);
        for line in lines.by_ref().take(cells.len()) {
            out.push_str(line);
            out.push('\n');
        }
        if row.endpoints.len() > ENDPOINTS {
            let _ = writeln!(out, "    and {} more endpoints", row.endpoints.len() - ENDPOINTS);
        }
    }
    out
}

fn head(row: &PortRow) -> String {
    let port = if row.port.is_empty() { String::new() } else { format!(":{}", row.port) };
    let mut words = vec![row.protocol.clone(), row.family.to_owned()];
    if row.scheduler != "random" {
        words.push(row.scheduler.to_owned());
    }
    words.extend(row.affinity_seconds.map(|seconds| format!("affinity {seconds}s")));
    words.extend(row.connections.map(|number| count(number, "connection")));
    words.extend(row.in_kernel.map(|state| match state {
        InKernel::InForce => Paint::Good.on("in force"),
        InKernel::Differs => Paint::Bad.on("NOT IN FORCE: see nftproxy diff"),
    }));
    wrap(&format!("{}{port}  {}", Paint::Bold.on(&row.service), words.join("  ")), 0)
}

fn cells(row: &PortRow) -> Vec<Vec<String>> {
    let frontends = row.frontends.iter().map(|frontend| {
        let mut remarks = vec![frontend.policy.to_owned()];
        if let Some(owner) = &frontend.taken_by {
            remarks = vec![format!("served by {owner}")];
        } else if frontend.answering == 0 {
            remarks.push("nobody answers".into());
        }
        match frontend.source_ranges.as_slice() {
            [] => {}
            [one] => remarks.push(format!("from {one}")),
            several => remarks.push(format!("{} source ranges", several.len())),
        }
        vec![frontend.kind.to_owned(), frontend.frontend.clone(), remarks.join(", ")]
    });
    let endpoints = row
        .endpoints
        .iter()
        .take(ENDPOINTS)
        .map(|endpoint| vec!["  ->".to_owned(), endpoint.endpoint.clone(), endpoint.remarks()]);
    frontends.chain(endpoints).collect()
}
