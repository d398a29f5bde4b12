//! The dashboard and the alert rules under `deploy/monitoring` ask for what the program exports: every
//! word of every expression is a metric with that name, a label that this metric has, or PromQL. A
//! metric that is renamed would leave an empty panel, or an alert that never fires, without a word.
//!
//! Whether the alerts fire when they should is for `promtool`, see `tests/deploy/check`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use nftproxy::metrics::Metrics;
use serde_json::Value;

/// Functions, operators and keywords that are used.
const PROMQL: [&str; 15] = [
    "absent",
    "and",
    "bool",
    "by",
    "changes",
    "count",
    "histogram_quantile",
    "increase",
    "label_values",
    "max",
    "rate",
    "sum",
    "time",
    "topk",
    "on",
];

/// What Prometheus adds to every sample.
const ADDED: [&str; 2] = ["instance", "job"];

fn text(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn dashboard() -> Value {
    serde_json::from_str(&text("deploy/monitoring/dashboard.json")).unwrap()
}

fn alerts() -> Vec<Value> {
    let file: Value = serde_saphyr::from_str(&text("deploy/monitoring/alerts.yaml")).unwrap();
    let groups = file["groups"].as_array().unwrap().iter();
    groups.flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

/// The names of samples, each with its labels.
fn exported() -> BTreeMap<String, BTreeSet<String>> {
    let metrics = Metrics::default();
    metrics.rest_client.observe("GET", "192.0.2.1:6443", Some(200), Duration::ZERO);
    let mut samples = BTreeMap::<String, BTreeSet<String>>::new();
    for line in metrics.text().lines().filter(|line| !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels = labels.split(',').filter_map(|label| label.split_once('='));
        let labels = labels.map(|(label, _)| label.to_owned());
        samples.entry(name.to_owned()).or_default().extend(labels);
    }
    samples.insert("up".into(), BTreeSet::new());
    samples
}

/// Every expression, with where it is.
fn expressions() -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = alerts()
        .iter()
        .map(|rule| (rule["alert"].as_str().unwrap().into(), rule["expr"].as_str().unwrap().into()))
        .collect();
    let dashboard = dashboard();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        for target in panel["targets"].as_array().into_iter().flatten() {
            all.push((title.into(), target["expr"].as_str().unwrap().into()));
        }
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        if let Some(query) = variable["query"]["query"].as_str() {
            all.push((variable["name"].as_str().unwrap().into(), query.into()));
        }
    }
    all
}

/// The words of an expression; what is quoted, numbers, durations and variables are none.
fn words(expression: &str) -> Vec<&str> {
    let unquoted = expression.split('"').step_by(2);
    let in_word = |c: char| c.is_ascii_alphanumeric() || "_$".contains(c);
    let words = unquoted.flat_map(move |part| part.split(move |c| !in_word(c)));
    words.filter(|word| word.starts_with(|c: char| c.is_ascii_alphabetic())).collect()
}

#[test]
fn every_word_of_an_expression_is_exported_or_promql() {
    let exported = exported();
    assert!(exported.len() > 60, "{exported:?}");
    let expressions = expressions();
    assert!(expressions.len() > 50, "{}", expressions.len());
    let mut used = BTreeSet::new();
    for (place, expression) in &expressions {
        let words = words(expression);
        let metrics: Vec<_> = words.iter().filter(|word| exported.contains_key(**word)).collect();
        assert!(!metrics.is_empty(), "{place} asks for nothing: {expression}");
        used.extend(metrics.iter().map(|metric| (**metric).to_owned()));
        for word in &words {
            let known = exported.contains_key(*word)
                || metrics.iter().any(|metric| exported[**metric].contains(*word))
                || ADDED.contains(word)
                || PROMQL.contains(word);
            assert!(known, "{place}: {word} is neither exported nor PromQL: {expression}");
        }
    }
    // Of our own, nothing that is exported is left unseen.
    let families = exported.keys().filter(|name| name.starts_with("nftproxy_"));
    let unseen: Vec<_> = families
        .filter(|name| {
            let family = ["_bucket", "_sum", "_count"];
            let family = family.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            !used.iter().any(|used| used.starts_with(family))
        })
        .collect();
    assert_eq!(unseen, ["nftproxy_conntrack_listed_total"], "for debugging only");
}

/// What a label or a template of an alert says about itself must come out of its expression.
#[test]
fn every_alert_says_what_to_do_about_it() {
    let runbook = text("deploy/monitoring/runbook.md");
    let headings = runbook.lines().filter_map(|line| line.strip_prefix("## "));
    let headings: Vec<String> = headings.map(str::to_owned).collect();
    let mut names = Vec::new();
    for rule in alerts() {
        let name = rule["alert"].as_str().unwrap().to_owned();
        let annotations = rule["annotations"].as_object().unwrap();
        let anchor = format!("deploy/monitoring/runbook.md#{}", name.to_lowercase());
        assert_eq!(annotations["runbook"], anchor);
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity), "{name}: {severity}");
        for key in ["summary", "description"] {
            let text = annotations[key].as_str().unwrap();
            assert!(text.ends_with('.'), "{name}: {text}");
        }
        // Aggregated away, a label is empty in the message.
        let expression = rule["expr"].as_str().unwrap();
        if expression.contains("sum") || expression.contains("absent") {
            let said = rule["annotations"].to_string();
            for label in said.split("$labels.").skip(1) {
                let end = label.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap();
                let kept = expression.contains(&format!("by ({}", &label[..end]));
                assert!(kept, "{name}: {} is aggregated away", &label[..end]);
            }
        }
        names.push(name);
    }
    assert_eq!(headings, names, "a section for each, in order");
}

#[test]
fn panels_do_not_overlap_and_say_what_they_show() {
    let dashboard = dashboard();
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(w > 0 && h > 0 && x + w <= 24, "{title}");
        for column in x..x + w {
            for line in y..y + h {
                assert!(taken.insert((column, line)), "{title} covers another panel");
            }
        }
        if panel["type"] != "row" {
            assert!(
                panel["description"].as_str().is_some_and(|text| text.ends_with('.')),
                "{title}"
            );
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
            assert!(!panel["targets"].as_array().unwrap().is_empty(), "{title}");
        }
    }
}
