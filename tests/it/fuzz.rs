//! Hostile input, made at random: whatever objects, manifests, configuration files and names hold, nothing
//! panics, every complaint is one line, and what is made of it loads.
//!
//! How many cases run is `PROPTEST_CASES`, else few enough for a normal run of the tests. What once failed
//! is kept in `fuzz/seeds/` and tried first, ever after.

mod configuration;
mod names;
mod objects;

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use serde_json::{Value, json};

/// So many cases, if the environment does not say how many; failures are kept in `seeds`.
pub(crate) fn cases(usually: u32, seeds: &'static str) -> ProptestConfig {
    let cases = crate::net::number("PROPTEST_CASES", usually);
    ProptestConfig {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(seeds))),
        max_shrink_iters: 500,
        ..ProptestConfig::default()
    }
}

/// Texts that mean something to whoever is careless: nft, YAML, shells, terminals, the kernel.
const NASTY: [&str; 28] = [
    "",
    "\"",
    "a\"b",
    "'",
    "\\",
    "a\nb",
    "a\r\nb",
    "} }\nadd table ip evil {",
    "\" drop comment \"",
    "{ 0.0.0.0/0 }",
    "; flush ruleset",
    "# comment",
    "include \"/etc/passwd\"",
    "$(id)",
    "`id`",
    "{{ table }}",
    "%s%n",
    "\u{1b}[31mred",
    "\u{1b}]0;title\u{7}",
    "\u{202e}txet",
    "\u{0}",
    "drop",
    "elements",
    "@endpoints",
    "-",
    "..",
    "a/b",
    "namespace/name/tcp/port",
];

/// Any text: a usual one most of the time.
fn text(usual: impl Strategy<Value = String> + 'static) -> BoxedStrategy<String> {
    prop_oneof![
        12 => usual,
        2 => proptest::sample::select(&NASTY[..]).prop_map(str::to_owned),
        1 => any::<String>(),
        1 => "[a-z0-9-]{60,260}",
    ]
    .boxed()
}

/// One of these, or any text.
fn one_of(usual: &'static [&'static str]) -> BoxedStrategy<String> {
    text(proptest::sample::select(usual).prop_map(str::to_owned))
}

/// Anything that JSON can be.
fn any_json() -> BoxedStrategy<Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text("[a-z]{0,5}").prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let map = proptest::collection::btree_map(text("[a-zA-Z]{1,8}"), inner.clone(), 0..4);
        prop_oneof![
            proptest::collection::vec(inner, 0..4).prop_map(Value::from),
            map.prop_map(|map| json!(map)),
        ]
    })
    .boxed()
}

/// A value as it should be, and now and then something else altogether.
fn value<T>(usual: impl Strategy<Value = T> + 'static) -> BoxedStrategy<Value>
where
    T: serde::Serialize + std::fmt::Debug + 'static,
{
    prop_oneof![
        40 => usual.prop_map(|usual| json!(usual)),
        1 => any_json(),
    ]
    .boxed()
}

/// An object of these fields, each of which may be missing.
fn object(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let (names, values): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
    let there = proptest::collection::vec(proptest::bool::weighted(0.85), names.len());
    (values, there)
        .prop_map(move |(values, there)| {
            let fields = names.iter().zip(values).zip(there).filter(|(_, there)| *there);
            Value::Object(fields.map(|((name, value), _)| ((*name).to_owned(), value)).collect())
        })
        .boxed()
}

fn list(item: BoxedStrategy<Value>, most: usize) -> BoxedStrategy<Value> {
    value(proptest::collection::vec(item, 0..=most))
}

/// Numbers around those that are ports.
fn number() -> BoxedStrategy<Value> {
    let ports = prop_oneof![
        8 => 1..9000_i64,
        4 => 30000..30010_i64,
        1 => -2..3_i64,
        1 => 65530..65540_i64,
        1 => any::<i64>(),
    ];
    value(ports)
}

/// Whether a line of a log, or an error on a terminal, can be taken for nothing but one line.
pub(crate) fn is_one_line(text: &str) -> bool {
    !text.trim().is_empty() && !text.chars().any(char::is_control)
}
