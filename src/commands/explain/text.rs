//! An explanation for people.

use std::fmt::Write as _;

use super::{Explanation, OutcomeRow, StepRow};
use crate::commands::text::{columns, labelled, wrap};

/// Width of the column of labels.
const LABEL: usize = 12;

/// How many endpoints are listed; with more, the rest is a number.
const LISTED: usize = 50;

pub(super) fn write(answer: &Explanation) -> String {
    let mut out = wrap(&format!("{} from {} ({})", answer.target, answer.from, answer.origin), 0);
    out += &wrap(&format!("=> {}", answer.summary), 0);
    out.push('\n');
    if let Some(service) = &answer.service {
        let port = if service.port.is_empty() {
            format!("port {}", service.number)
        } else {
            format!("port {} ({})", service.port, service.number)
        };
        let words = format!("{}, {port}, dialled on its {}", service.service, service.kind);
        out += &labelled("Service", &words, LABEL);
        let mut policy = format!("{}; scheduler {}", service.policy, service.scheduler);
        if let Some(seconds) = service.affinity_seconds {
            let _ = write!(policy, "; clients keep their endpoint for {seconds} s");
        }
        out += &labelled("Policy", &policy, LABEL);
        if !service.source_ranges.is_empty() {
            let ranges = format!("only from {}", service.source_ranges.join(", "));
            out += &labelled("Sources", &ranges, LABEL);
        }
    }
    out += &labelled("Tables", &answer.tables, LABEL);
    for note in &answer.notes {
        out += &labelled("Note", note, LABEL);
    }
    let shared = shared(&answer.paths);
    out.push('\n');
    out += &steps(answer.paths.first().map_or(&[][..], |path| &path[..shared]), None);
    for (number, path) in answer.paths.iter().enumerate() {
        let on_it: Vec<_> = answer.outcomes.iter().filter(|o| o.path == number).collect();
        if answer.paths.len() > 1 {
            let ways = answer.paths.len();
            let _ = writeln!(out, "\nFrom here on, way {} of {ways}", number + 1);
        }
        let before = shared.checked_sub(1).and_then(|last| path.get(last));
        out += &steps(&path[shared..], before.filter(|_| answer.paths.len() == 1));
        out += &ends(&on_it);
    }
    if !answer.left_out.is_empty() {
        out += "\nNot met\n";
        let rows: Vec<Vec<String>> = answer
            .left_out
            .iter()
            .take(LISTED)
            .map(|row| vec![row.endpoint.clone(), row.why.clone()])
            .collect();
        out += &columns(&rows, 2);
        out += &and_more(answer.left_out.len());
    }
    if !answer.others.is_empty() {
        out += "\nThe same from\n";
        for other in &answer.others {
            out += &labelled(&format!("  {}", other.from), &other.summary, LABEL + 2);
        }
    }
    out
}

fn and_more(all: usize) -> String {
    if all > LISTED { format!("  and {} more\n", all - LISTED) } else { String::new() }
}

/// How many steps all paths begin with.
fn shared(paths: &[Vec<StepRow>]) -> usize {
    let Some((first, others)) = paths.split_first() else { return 0 };
    let alike = |path: &Vec<StepRow>| first.iter().zip(path).take_while(|(a, b)| a == b).count();
    others.iter().map(alike).min().unwrap_or(first.len())
}

/// Rules under their chains, with what they met.
fn steps<'a>(path: &'a [StepRow], mut before: Option<&'a StepRow>) -> String {
    let mut out = String::new();
    for step in path {
        let moved = before.is_none_or(|b| (&b.base, &b.chain) != (&step.base, &step.chain));
        if moved {
            let depth = if step.chain == step.base { "" } else { "  " };
            let _ = writeln!(out, "{depth}chain {}", step.chain);
        }
        // Whole lines, however long: nft shows them so, and who looks for one pastes it.
        let indent = if step.chain == step.base { "  " } else { "    " };
        let _ = writeln!(out, "{indent}{}", step.rule);
        for element in &step.elements {
            let _ = writeln!(out, "{indent}  @ {element}");
        }
        before = Some(step);
    }
    out
}

/// What it comes to.
fn ends(outcomes: &[&OutcomeRow]) -> String {
    let mut out = String::new();
    let mut rows = Vec::new();
    for outcome in outcomes.iter().take(LISTED) {
        let share = format!("{:.1}%", outcome.share * 100.0);
        let to = outcome.to.clone().unwrap_or_default();
        let slots = match (&outcome.remembered_in, outcome.elements.as_slice()) {
            (Some(map), _) => format!("@ {map}"),
            (None, []) => String::new(),
            (None, [one]) => format!("@ {}", one.split(" : ").next().unwrap_or(one).trim()),
            (None, [first, ..]) => {
                let map = first.split(' ').next().unwrap_or_default();
                format!("@ {} slots of {map}", outcome.elements.len())
            }
        };
        let slots = if slots.ends_with('}') || !slots.contains('{') { slots } else { slots + " }" };
        if outcome.translated {
            rows.push(vec![format!("{share:>6}"), to, slots]);
        }
    }
    if !rows.is_empty() {
        out += "=> to\n";
        out += &columns(&rows, 0);
        out += &and_more(outcomes.len());
    }
    if let Some(first) = outcomes.first() {
        let verdict = match (first.fate, first.translated, first.masqueraded) {
            ("dropped", ..) => "dropped",
            ("rejected", ..) => "refused",
            (_, false, _) => "not translated",
            (_, _, true) => "masqueraded",
            _ => "not masqueraded",
        };
        out += &wrap(&format!("=> {verdict}: {}", first.why), 0);
    }
    out
}
