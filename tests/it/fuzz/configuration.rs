//! The configuration: whatever a file holds, it loads or is refused in one line, and what it says goes into
//! rules that load.

use std::fs;

use nftproxy::config::{self, FIELDS, Flags, Format, Loaded, Type};
use nftproxy::nft::fake::FakeKernel;
use nftproxy::nft::text as nft_text;
use nftproxy::reconcile::Proxy;
use nftproxy::state::State;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::objects::is_contained;
use super::{any_json, cases, is_one_line, one_of, text, value};
use crate::model::{all_listed, example, node};
use crate::namespace::{in_namespace, nft};

const SEEDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fuzz/seeds/configuration.txt");

/// A value of a type, at times of another.
fn of_type(ty: Type) -> BoxedStrategy<Value> {
    match ty {
        Type::Bool => value(any::<bool>()),
        Type::Int(low, high) => value(prop_oneof![
            4 => low..=high,
            1 => Just(low.saturating_sub(1)),
            1 => Just(high.saturating_add(1)),
            1 => any::<i64>(),
        ]),
        Type::Float => value(any::<f64>()),
        Type::Duration => value(one_of(&[
            "1s",
            "100ms",
            "1h0m0s",
            "0",
            "0s",
            "-1s",
            "1e9h",
            "1.5m",
            "9999999999h",
        ])),
        Type::OneOf(words) => value(text(proptest::sample::select(words).prop_map(str::to_owned))),
        Type::Text => value(one_of(&[
            "",
            "0.0.0.0:10256",
            "[::]:10249",
            "127.0.0.1",
            "10.244.0.0/16",
            "10.244.0.0/16,fd00::/56",
            "cbr0",
            "veth",
            "cali*",
            "a b",
            "node-1",
            "/tmp",
            "http://127.0.0.1:1",
        ])),
        Type::List => value(proptest::collection::vec(
            one_of(&[
                "10.0.0.0/8",
                "primary",
                "all",
                "localhost",
                "::/0",
                "0.0.0.0/0",
                "10.0.0.0/40",
            ]),
            0..3,
        )),
        Type::Switches => {
            value(proptest::collection::btree_map(one_of(&["AllAlpha"]), any::<bool>(), 0..2))
        }
        Type::Any => any_json(),
    }
}

/// A file as a tree: some known fields, and now and then an unknown one.
fn any_file() -> BoxedStrategy<Value> {
    let field = (0..FIELDS.len()).prop_flat_map(|i| {
        let path = FIELDS[i].path;
        of_type(FIELDS[i].ty).prop_map(move |value| (path.to_owned(), value))
    });
    let unknown = (text("[a-z]{1,8}(\\.[a-z]{1,4})?"), any_json());
    let fields = prop_oneof![12 => field, 1 => unknown];
    proptest::collection::vec(fields, 0..12)
        .prop_map(|fields| {
            let mut file = json!({
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            });
            for (path, value) in fields {
                let mut at = &mut file;
                for name in path.split('.') {
                    if !at.is_object() {
                        *at = json!({});
                    }
                    at = &mut at[name];
                }
                *at = value;
            }
            file
        })
        .boxed()
}

/// Loads a file. Panics if a complaint or a remark is not one line.
fn load(text: &[u8]) -> Option<Loaded> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.conf");
    fs::write(&path, text).unwrap();
    let given = [("hostname-override", vec!["node-1".to_owned()])].into();
    match config::load(&Flags { config: Some(path), given }) {
        Ok(loaded) => {
            for remark in &loaded.remarks {
                assert!(
                    is_one_line(&format!("{}: {}", remark.origin, remark.message)),
                    "{remark:?}"
                );
            }
            Some(loaded)
        }
        Err(error) => {
            assert!(is_one_line(&error.to_string()), "{:?}", error.to_string());
            None
        }
    }
}

/// What `nftproxy config` and `/configz` make of it: as many lines as there are settings, and JSON.
fn is_shown(loaded: &Loaded) {
    let shown = config::show(loaded, Format::Text);
    let strange = shown.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(strange, None, "{shown}");
    for text in [config::show(loaded, Format::Json), config::configz(loaded)] {
        serde_json::from_str::<Value>(&text).unwrap();
    }
}

proptest! {
    #![proptest_config(cases(400, SEEDS))]

    #[test]
    fn a_configuration_loads_or_is_refused_in_one_line(
        file in any_file(),
        noise in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..2),
    ) {
        let mut text = serde_saphyr::to_string(&file).unwrap().into_bytes();
        if let Some(loaded) = load(&text) {
            is_shown(&loaded);
            let mut proxy = Proxy::new(State::new(loaded.config.live.settings, node()), FakeKernel::default());
            for event in example().into_iter().chain(all_listed()) {
                proxy.observe(event);
            }
            let rules = nft_text::ruleset(&proxy.wanted());
            prop_assert_eq!(is_contained(&rules), Ok(()), "{}", file);
        }
        for (at, byte) in noise {
            let at = at.index(text.len());
            text[at] = byte;
        }
        load(&text).iter().for_each(is_shown);
    }

    #[test]
    fn any_bytes_are_a_configuration_or_refused_in_one_line(
        bytes in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..300),
            "[\\[\\]{}&*!|>'\"%@:,#\\-? \na-c0-9]{0,200}".prop_map(String::into_bytes),
        ],
        headed in any::<bool>(),
    ) {
        const HEAD: &[u8] = b"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let text = if headed { [HEAD, &bytes].concat() } else { bytes };
        load(&text).iter().for_each(is_shown);
    }
}

proptest! {
    #![proptest_config(cases(40, SEEDS))]

    /// An interface's name is the one thing of a configuration that the rules repeat.
    #[test]
    fn rules_for_any_interface_of_a_configuration_load(
        name in text("[ -~]{0,16}"),
        prefix in any::<bool>(),
    ) {
        let (mode, field) = if prefix {
            ("InterfaceNamePrefix", "interfaceNamePrefix")
        } else {
            ("BridgeInterface", "bridgeInterface")
        };
        let file = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "detectLocalMode": mode, "detectLocal": { field: name },
        });
        if let Some(loaded) = load(file.to_string().as_bytes()) {
            let mut proxy = Proxy::new(State::new(loaded.config.live.settings, node()), FakeKernel::default());
            all_listed().for_each(|event| proxy.observe(event));
            let rules = nft_text::ruleset(&proxy.wanted());
            prop_assert_eq!(is_contained(&rules), Ok(()));
            in_namespace(|| drop(nft(&["-c", "-f", "-"], &rules)));
        }
    }
}
