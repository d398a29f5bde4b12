//! Damaged answers: whatever a message holds, reading it comes to an end. The messages that are damaged are
//! those of a real batch, which have the form of those that the kernel lists.
//!
//! Their form stays: types and lengths of attributes, and the ends of texts. libnftnl takes those on trust
//! from the kernel, and ends the process where an attribute is not of the type that it knows.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::model::{
    Endpoint, EndpointSlice, Event, Kind, NamespacedName, NodeFacts, Protocol, Scheduler, Service,
    ServicePort, SessionAffinity, SlicePort, TrafficPolicy,
};
use crate::nft::fake::FakeKernel;
use crate::nft::netlink::NetlinkKernel;
use crate::nlmsg::{GENMSG, HEADER, messages};
use crate::reconcile::Proxy;
use crate::settings::Settings;
use crate::state::State;

/// The messages of a batch that makes everything there is.
static MESSAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let addresses = ["10.96.0.1", "fd00:10:96::1"].map(|address| address.parse().unwrap());
    let name = NamespacedName::new("default", "web");
    let mut events = vec![Event::Service(Service {
        name: name.clone(),
        created: 0,
        cluster_ips: addresses.into(),
        external_ips: Vec::new(),
        load_balancer_ips: vec!["203.0.113.1".parse().unwrap()],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: 30080.try_into().ok(),
        }],
        internal_traffic_policy: TrafficPolicy::Cluster,
        external_traffic_policy: TrafficPolicy::Local,
        session_affinity: SessionAffinity::ClientIp { timeout: 10 },
        source_ranges: vec!["10.0.0.0/8".parse().unwrap()],
        scheduler: Scheduler::RoundRobin,
        health_check_node_port: None,
    })];
    for (family, address) in Family::BOTH.into_iter().zip(["10.244.0.1", "fd00:10:244::1"]) {
        events.push(Event::EndpointSlice(EndpointSlice {
            name: NamespacedName::new("default", address),
            service: name.clone(),
            family,
            ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints: vec![Endpoint { local: true, ..Endpoint::new(address.parse().unwrap()) }],
            last_change_trigger: None,
        }));
    }
    events.extend(Kind::ALL.map(Event::Listed));
    let state = State::new(Settings::default(), NodeFacts::default());
    let mut proxy = Proxy::new(state, FakeKernel::default());
    for event in events {
        proxy.observe(event);
    }
    proxy.commit().unwrap();
    let batches = proxy.kernel_mut().applied.iter().map(NetlinkKernel::encode);
    let batches: Vec<_> = batches.collect();
    let all = batches.iter().flat_map(|batch| messages(batch));
    all.map(<[u8]>::to_vec).collect()
});

/// Reads a message as that of its kind is read.
fn read(message: &[u8], family: Family) {
    match i32::from(crate::nlmsg::kind(message) & 0xff) {
        libc::NFT_MSG_NEWTABLE => {
            let Some(table) = Table::parse(message) else { return };
            let _ = table.get_str(sys::NFTNL_TABLE_NAME);
            let _ = table.get_data(sys::NFTNL_TABLE_USERDATA).and_then(|data| comment(&data));
        }
        libc::NFT_MSG_NEWRULE => {
            let Some(rule) = Rule::parse(message) else { return };
            let _ = rule.get_str(sys::NFTNL_RULE_CHAIN);
            let _ = RuleText::of(&rule);
        }
        libc::NFT_MSG_NEWCHAIN => {
            let Some(chain) = Chain::parse(message) else { return };
            let _ = chain.get_str(sys::NFTNL_CHAIN_NAME);
            for name in ChainName::FIXED {
                let wanted = dataplane::chain(name, family, &Options::default());
                let _ = compare(&chain, &[], &wanted, family);
            }
        }
        libc::NFT_MSG_NEWSET => {
            let Some(set) = Set::parse(message) else { return };
            let _ = set.get_str(sys::NFTNL_SET_NAME);
            let _ = affinity::is_defined(&set, family);
            for name in SetName::ALL {
                let _ = is_defined_as(&set, name, family);
            }
        }
        libc::NFT_MSG_NEWSETELEM => {
            for name in SetName::ALL {
                let mut elements = BTreeMap::new();
                let outcome = whole(family, name, &mut elements, |reading| {
                    reading.understood &=
                        Set::parse_elements(message, |element| reading.add(&element));
                    // One answer is all there is.
                    reading.repeated = 0;
                    Ok(())
                });
                // What comes twice in it is asked for again, in vain.
                assert!(!matches!(outcome, Err(LoadError::Socket { .. })));
            }
        }
        _ => {}
    }
}

/// Where the values are that stand in an attribute without being made of others, without their last bytes.
fn values(message: &[u8], from: usize, to: usize, found: &mut Vec<usize>) {
    let mut at = from;
    while at + 4 <= to {
        let number = |at: usize| u16::from_ne_bytes([message[at], message[at + 1]]);
        let (len, kind) = (usize::from(number(at)), number(at + 2));
        assert!(len >= 4 && at + len <= to, "a message of ours");
        if kind & 0x8000 != 0 {
            values(message, at + 4, at + len, found);
        } else {
            found.extend(at + 4..(at + len).saturating_sub(1));
        }
        at += len.next_multiple_of(4);
    }
}

proptest! {
    #[test]
    fn damaged_messages_are_read_to_an_end(
        which in any::<Index>(),
        noise in proptest::collection::vec((any::<Index>(), prop_oneof![any::<u8>(), 0..8_u8]), 0..12),
        six in any::<bool>(),
    ) {
        let mut message = MESSAGES[which.index(MESSAGES.len())].clone();
        let mut found = Vec::new();
        values(&message, HEADER + GENMSG, message.len(), &mut found);
        for (at, byte) in noise.into_iter().filter(|_| !found.is_empty()) {
            message[found[at.index(found.len())]] = byte;
        }
        read(&message, if six { Family::V6 } else { Family::V4 });
    }
}

#[test]
fn what_is_damaged_is_all_there_is() {
    let kinds = [libc::NFT_MSG_NEWTABLE, libc::NFT_MSG_NEWCHAIN, libc::NFT_MSG_NEWRULE]
        .into_iter()
        .chain([libc::NFT_MSG_NEWSET, libc::NFT_MSG_NEWSETELEM]);
    for kind in kinds {
        let is = |message: &&Vec<u8>| libc::c_int::from(crate::nlmsg::kind(message) & 0xff) == kind;
        assert!(MESSAGES.iter().any(|message| is(&message)), "{kind}");
    }
}
