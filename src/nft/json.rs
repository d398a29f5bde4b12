//! The typed values as JSON in nft's own schema (libnftables-json(5)): what `nft -j list table` prints
//! of the same table, without handles.
//!
//! For programs that read tables. It is not for loading: nft 1.0.6 does not take back what it prints
//! of maps whose values are concatenations, nor of keys that have no type of their own, such as the
//! slot of an endpoint; the text ([`super::text`]) is what loads.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value as Json, json};

use super::connection::CONNECTION;
use super::element::{Key, Value};
use super::names::{AffinityName, CONNECTIONS, DataType, KeyField, SetName, TABLE};
use super::rule::{
    AFFINITY_SIZE, BaseKind, CONNECTIONS_SIZE, COUNTED_BY, COUNTED_FOR, Chain, HASH_SEED, Hook,
    Rule, Selector, SlotSource, Statement, masks,
};
use super::ruleset::Ruleset;
use super::text::type_name;
use crate::model::Family;

/// The tables of these families: one object, as `nft -j list` prints it.
#[must_use]
pub fn ruleset(ruleset: &Ruleset, families: &[Family]) -> Json {
    let mut all = vec![json!({"metainfo": {"json_schema_version": 1}})];
    for &family in families {
        table(ruleset, family, &mut all);
    }
    json!({ "nftables": all })
}

fn table(ruleset: &Ruleset, family: Family, all: &mut Vec<Json>) {
    let family_name = family.to_string();
    all.push(json!({"table": {"family": family_name, "name": TABLE}}));
    let placed = |kind: &str, name: &str, mut more: Json| {
        let object = more.as_object_mut().expect("objects are made here");
        object.insert("family".into(), family_name.as_str().into());
        object.insert("table".into(), TABLE.into());
        object.insert("name".into(), name.into());
        json!({ kind: more })
    };
    for set in SetName::ALL {
        let mut object = json!({ "type": types(set.key(), family) });
        let kind = match set.data() {
            DataType::None => "set",
            DataType::Verdict => {
                object["map"] = "verdict".into();
                "map"
            }
            DataType::Backend => {
                object["map"] = backend_type(family).into();
                "map"
            }
        };
        if set.is_interval() {
            object["flags"] = json!(["interval"]);
        }
        let elements: Vec<_> =
            ruleset.elements_of(family, set).map(|(id, value)| element(&id.key, value)).collect();
        if !elements.is_empty() {
            object["elem"] = elements.into();
        }
        all.push(placed(kind, set.as_str(), object));
    }
    for name in ruleset.affinities_of(family) {
        let object = json!({
            "type": type_name(KeyField::Address, family),
            "map": backend_type(family),
            "size": AFFINITY_SIZE,
            "flags": ["timeout", "dynamic"],
        });
        all.push(placed("map", &name.to_string(), object));
    }
    if ruleset.counts() {
        let object = json!({
            "type": types(&CONNECTION, family),
            "size": CONNECTIONS_SIZE,
            "flags": ["timeout", "dynamic"],
        });
        all.push(placed("set", CONNECTIONS, object));
    }
    let chains: Vec<Chain> = ruleset.chains(family).collect();
    for chain in &chains {
        let object = chain.base.map_or(json!({}), |base| {
            json!({
                "type": match base.kind {
                    BaseKind::Filter => "filter",
                    BaseKind::Nat => "nat",
                },
                "hook": match base.hook {
                    Hook::Prerouting => "prerouting",
                    Hook::Input => "input",
                    Hook::Forward => "forward",
                    Hook::Output => "output",
                    Hook::Postrouting => "postrouting",
                },
                "prio": base.priority,
                "policy": "accept",
            })
        });
        all.push(placed("chain", &chain.name.to_string(), object));
    }
    for chain in &chains {
        let name = chain.name.to_string();
        all.extend(chain.rules.iter().map(|rule| self::rule(rule, &name, family)));
    }
}

fn types(key: &[KeyField], family: Family) -> Json {
    let names: Vec<_> = key.iter().map(|&field| type_name(field, family)).collect();
    if let [name] = names[..] { name.into() } else { names.into() }
}

fn backend_type(family: Family) -> String {
    let [address, port] = [KeyField::Address, KeyField::Port].map(|f| type_name(f, family));
    format!("{address} . {port}")
}

fn concat(parts: impl IntoIterator<Item = Json>) -> Json {
    json!({ "concat": parts.into_iter().collect::<Vec<_>>() })
}

fn prefix(net: IpNet) -> Json {
    if net.prefix_len() == net.max_prefix_len() {
        return net.addr().to_string().into();
    }
    json!({"prefix": {"addr": net.addr().to_string(), "len": net.prefix_len()}})
}

fn key(key: &Key) -> Json {
    let address = |address: &IpAddr| Json::from(address.to_string());
    match key {
        Key::Frontend(a, protocol, port) => {
            concat([address(a), protocol.to_string().into(), (*port).into()])
        }
        Key::Sources(a, protocol, port, net) => {
            let range = [net.network(), net.broadcast()].map(|end| address(&end));
            let frontend = [address(a), protocol.to_string().into(), (*port).into()];
            concat(frontend.into_iter().chain(range))
        }
        Key::Slot(a, protocol, port, slot) => {
            concat([address(a), protocol.to_string().into(), (*port).into(), (*slot).into()])
        }
        Key::NodePort(protocol, port) => concat([protocol.to_string().into(), (*port).into()]),
        Key::NodePortSlot(protocol, port, slot) => {
            concat([protocol.to_string().into(), (*port).into(), (*slot).into()])
        }
        Key::NodePortBackend(protocol, port, backend) => concat([
            protocol.to_string().into(),
            (*port).into(),
            address(&backend.address),
            backend.port.into(),
        ]),
        Key::Address(a) => address(a),
        Key::Pair(a, b) => concat([address(a), address(b)]),
        Key::AddressPort(a, port) => concat([address(a), (*port).into()]),
        Key::Port(port) => (*port).into(),
        Key::Range(first, last) => match super::element::prefix(*first, *last) {
            Some(net) => prefix(net),
            None => json!({"range": [address(first), address(last)]}),
        },
    }
}

fn element(id: &Key, value: &Value) -> Json {
    let value = match value {
        Value::None => return key(id),
        Value::Goto(chain) => json!({"goto": {"target": chain.to_string()}}),
        Value::Jump(chain) => json!({"jump": {"target": chain.to_string()}}),
        Value::Drop => json!({"drop": null}),
        Value::Backend(backend) => {
            concat([backend.address.to_string().into(), backend.port.into()])
        }
    };
    json!([key(id), value])
}

fn rule(rule: &Rule, chain: &str, family: Family) -> Json {
    let statements: Vec<_> = rule.statements.iter().map(|s| statement(s, family)).collect();
    let mut object = json!({
        "family": family.to_string(), "table": TABLE, "chain": chain, "expr": statements,
    });
    if let Some(comment) = rule.comment {
        object["comment"] = comment.into();
    }
    json!({ "rule": object })
}

fn compare(op: &str, left: Json, right: impl Into<Json>) -> Json {
    let parts = [("op", op.into()), ("left", left), ("right", right.into())];
    let parts: serde_json::Map<_, _> =
        parts.into_iter().map(|(key, part)| (key.to_owned(), part)).collect();
    json!({ "match": parts })
}

fn payload(protocol: &str, field: &str) -> Json {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn meta(key: &str) -> Json {
    json!({"meta": {"key": key}})
}

fn statement(statement: &Statement, family: Family) -> Json {
    let key = |selectors: &[Selector]| match selectors {
        [one] => selector(*one, family),
        several => concat(several.iter().map(|&one| selector(one, family))),
    };
    let address = |field| payload(&family.to_string(), field);
    let is_local =
        |field: &str| compare("==", json!({"fib": {"result": "type", "flags": [field]}}), "local");
    let set = |set: &SetName| format!("@{set}");
    let affinity = |name: &AffinityName| format!("@{name}");
    let mark = |sign: &str, bits: &u32| {
        let value = json!({ sign: [meta("mark"), bits] });
        json!({"mangle": {"key": meta("mark"), "value": value}})
    };
    let dnat = |address: Json, map: String| {
        let addr = json!({"map": {"key": address, "data": map}});
        json!({"dnat": {"family": family.to_string(), "addr": addr}})
    };
    match statement {
        Statement::CtStateNew => compare("in", json!({"ct": {"key": "state"}}), "new"),
        Statement::CtStatusDnat => compare("in", json!({"ct": {"key": "status"}}), "dnat"),
        Statement::FromThisHost => is_local("saddr"),
        Statement::ToThisHost => is_local("daddr"),
        Statement::NotToLoopback => compare("!=", address("daddr"), loopback(family)),
        Statement::ToLoopback => compare("==", address("daddr"), loopback(family)),
        Statement::FromLoopback => compare("==", address("saddr"), loopback(family)),
        Statement::NotToInterface(name) => compare("!=", meta("oifname"), name.to_string()),
        Statement::FromInterface(name) => compare("==", meta("iifname"), name.to_string()),
        Statement::NotFromInterface(name) => compare("!=", meta("iifname"), name.to_string()),
        Statement::L4Proto(protocol) => compare("==", meta("l4proto"), protocol.to_string()),
        Statement::In(selectors, name) => compare("==", key(selectors), set(name)),
        Statement::NotIn(selectors, name) => compare("!=", key(selectors), set(name)),
        Statement::MarkClear(bits) => compare("==", json!({"&": [meta("mark"), bits]}), 0),
        Statement::MarkOr(bits) => mark("|", bits),
        Statement::MarkXor(bits) => mark("^", bits),
        Statement::Vmap(selectors, map) => {
            json!({"vmap": {"key": key(selectors), "data": set(map)}})
        }
        Statement::Dnat(selectors, map) => dnat(key(selectors), set(map)),
        Statement::DnatSticky(name) => dnat(address("saddr"), affinity(name)),
        Statement::Remember(name, seconds) => json!({"map": {
            "op": "update",
            "elem": {"elem": {"val": address("saddr"), "timeout": seconds}},
            "data": concat([address("daddr"), payload("th", "dport")]),
            "map": affinity(name),
        }}),
        Statement::Count => json!({"set": {
            "op": "update",
            "elem": {"elem": {"val": key(&COUNTED_BY), "timeout": COUNTED_FOR}},
            "set": format!("@{CONNECTIONS}"),
            "stmt": [{"counter": null}],
        }}),
        Statement::Masquerade => json!({"masquerade": {"flags": "fully-random"}}),
        Statement::Jump(chain) => json!({"jump": {"target": chain.to_string()}}),
        Statement::Goto(chain) => json!({"goto": {"target": chain.to_string()}}),
        Statement::Return => json!({"return": null}),
        Statement::Accept => json!({"accept": null}),
        Statement::Reject => {
            let kind = match family {
                Family::V4 => "icmp",
                Family::V6 => "icmpv6",
            };
            json!({"reject": {"type": kind, "expr": "port-unreachable"}})
        }
        Statement::Drop => json!({"drop": null}),
    }
}

fn loopback(family: Family) -> Json {
    match family {
        Family::V4 => json!({"prefix": {"addr": "127.0.0.0", "len": 8}}),
        Family::V6 => "::1".into(),
    }
}

fn selector(selector: Selector, family: Family) -> Json {
    let of_connection = |key: &str, direction: &str| json!({"ct": {"key": key, "dir": direction}});
    let address = |field: &str| format!("{family} {field}");
    let masked = |sign: &str, mask: Option<IpAddr>| {
        let source = payload(&family.to_string(), "saddr");
        match mask {
            Some(mask) => json!({ sign: [source, mask.to_string()] }),
            None => source,
        }
    };
    match selector {
        Selector::Saddr => payload(&family.to_string(), "saddr"),
        Selector::SaddrFirst(length) => masked("&", masks(family, length).map(|masks| masks.0)),
        Selector::SaddrLast(length) => masked("|", masks(family, length).map(|masks| masks.1)),
        Selector::Daddr => payload(&family.to_string(), "daddr"),
        Selector::L4Proto => meta("l4proto"),
        Selector::Dport => payload("th", "dport"),
        Selector::OriginalDaddr => of_connection(&address("daddr"), "original"),
        Selector::OriginalDport => of_connection("proto-dst", "original"),
        Selector::ReplySaddr => of_connection(&address("saddr"), "reply"),
        Selector::ReplySport => of_connection("proto-src", "reply"),
        Selector::Slot { source, modulus, offset } => {
            let number =
                |mode: &str| json!({"numgen": {"mode": mode, "mod": modulus, "offset": offset}});
            match source {
                SlotSource::Random => number("random"),
                SlotSource::Increment => number("inc"),
                SlotSource::SourceHash => {
                    let expr = payload(&family.to_string(), "saddr");
                    let mut hash = json!({"mod": modulus, "seed": HASH_SEED, "expr": expr});
                    if offset > 0 {
                        hash["offset"] = offset.into();
                    }
                    json!({ "jhash": hash })
                }
            }
        }
    }
}
