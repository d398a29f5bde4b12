//! A report for people: one finding a line, what to do below it.

use super::{Report, Verdict};
use crate::commands::text::{Paint, count, labelled};

const ABOUT: usize = 18;

pub(super) fn write(report: &Report) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        let sign = match finding.verdict {
            Verdict::Good => Paint::Good.on("ok  "),
            Verdict::Attention => Paint::Attention.on("look"),
            Verdict::Bad => Paint::Bad.on("BAD "),
        };
        let text = labelled(&format!("      {}", finding.about), &finding.found, ABOUT);
        out += &text.replacen("    ", &sign, 1);
        if let Some(advice) = &finding.advice {
            out += &labelled("", &format!("-> {advice}"), ABOUT);
        }
    }
    let of = |verdict| report.findings.iter().filter(|f| f.verdict == verdict).count();
    let (bad, attention) = (of(Verdict::Bad), of(Verdict::Attention));
    out += &match report.verdict {
        Verdict::Good => Paint::Good.on("everything is in order"),
        Verdict::Attention => {
            Paint::Attention.on(&format!("{} to look at", count(attention, "thing")))
        }
        Verdict::Bad => Paint::Bad.on(&format!("{bad} bad, {attention} to look at")),
    };
    out.push('\n');
    out
}
