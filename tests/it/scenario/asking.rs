//! Asking what the cases of the table ask: connections from a namespace, until what they meet is what
//! is expected or time is up; and saying what was met.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Finding;
use super::services::{balancer_ip, cluster_ip, external_ip, node_port, port};
use super::table::{Case, Met, Protocol, Target};
use crate::net::{CLIENT, GATEWAY, NODE, Net, POD_A, POD_B, REMOTE, REMOTE_GATEWAY, in_netns, ip};
use crate::serve::{Outcome, echo_here, sctp, tcp_here, udp_on, udp_socket};

/// Most of the time is spent waiting for packets that do not come.
const THREADS: usize = 8;

impl Target {
    pub(crate) fn address(self, family: usize) -> SocketAddr {
        let (addresses, port) = match self {
            Self::Vip(name) => (cluster_ip(name), port(name)),
            Self::VipAt(name, port) => (cluster_ip(name), port),
            Self::Balancer(name) => (balancer_ip(name), port(name)),
            Self::BalancerAt(name, port) => (balancer_ip(name), port),
            Self::External(name) => (external_ip(name), port(name)),
            Self::NodePort(name, addresses) => (addresses.map(str::to_owned), node_port(name)),
            Self::Address(addresses, port) => (addresses.map(str::to_owned), port),
        };
        SocketAddr::new(ip(&addresses[family]), port)
    }

    fn words(self) -> String {
        match self {
            Self::Vip(name) => format!("VIP of {name}"),
            Self::VipAt(name, port) => format!("VIP:{port} of {name}"),
            Self::Balancer(name) => format!("LB of {name}"),
            Self::BalancerAt(name, port) => format!("LB:{port} of {name}"),
            Self::External(name) => format!("X of {name}"),
            Self::NodePort(name, addresses) if addresses == NODE => format!("NP of {name}"),
            Self::NodePort(name, addresses) => format!("NP of {name} at {}", addresses[0]),
            Self::Address(addresses, _) => addresses[0].to_owned(),
        }
    }
}

/// The address that a namespace has by itself when it dials this.
pub(super) fn own(from: &str, to: SocketAddr) -> IpAddr {
    let family = usize::from(to.is_ipv6());
    ip(match from {
        "a" => POD_A,
        "b" => POD_B,
        "remote" => REMOTE,
        "client" => CLIENT,
        "node" if to.ip().is_loopback() => return to.ip(),
        "node" => NODE,
        other => panic!("nobody dials from {other}"),
    }[family])
}

/// The node's address towards an endpoint.
fn masquerade(by: &str, family: usize) -> IpAddr {
    ip(if by == "remote" { REMOTE_GATEWAY } else { GATEWAY }[family])
}

fn outcome(met: Met, case: &Case, to: SocketAddr) -> Outcome {
    let family = usize::from(to.is_ipv6());
    let answered = |by: &str, port, seen| Outcome::Answered { by: by.to_owned(), port, seen };
    let own = own(case.from, to);
    match met {
        // The sender of an INIT is not told whom the server saw.
        Met::Own(by) if case.protocol == Protocol::Sctp => answered(by, 8080, UNSEEN),
        Met::Own(by) => answered(by, 8080, own),
        Met::Masq(by) => answered(by, 8080, masquerade(by, family)),
        Met::Masq8081(by) => answered(by, 8081, masquerade(by, family)),
        Met::Own8081(by) => answered(by, 8081, own),
        Met::Untouched(by) => answered(by, to.port(), own),
        Met::Refused => Outcome::Refused,
        Met::Lost => Outcome::TimedOut,
    }
}

const UNSEEN: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// In words that are the same for both families.
pub(crate) fn words(set: &BTreeSet<Outcome>, from: &str, to: SocketAddr) -> String {
    let family = usize::from(to.is_ipv6());
    let all = set.iter().map(|outcome| match outcome {
        Outcome::Refused => "refused".to_owned(),
        Outcome::TimedOut => "lost".to_owned(),
        Outcome::Answered { by, port, seen } => {
            let port = if *port == 8080 { String::new() } else { format!(":{port}") };
            let seen = match *seen {
                seen if seen == UNSEEN => String::new(),
                seen if seen == own(from, to) => " own".to_owned(),
                seen if seen == masquerade(by, family) => " masq".to_owned(),
                seen => format!(" from {seen}"),
            };
            format!("{by}{port}{seen}")
        }
    });
    all.collect::<Vec<_>>().join(", ")
}

/// How many connections show what there is to be seen: of two that are equally likely, one is missed
/// by 24 with a likelihood of 2^-23.
fn tries(expected: &BTreeSet<Outcome>) -> usize {
    if expected.iter().all(|outcome| *outcome == Outcome::TimedOut) {
        2
    } else if expected.iter().all(|outcome| *outcome == Outcome::Refused) {
        4
    } else {
        24
    }
}

/// What a number of connections meet.
fn meet(net: &Net, case: &Case, to: SocketAddr, expected: &BTreeSet<Outcome>) -> BTreeSet<Outcome> {
    let netns = net.name(case.from);
    in_netns(&netns, || {
        let (mut met, mut lost) = (BTreeSet::new(), 0);
        for _ in 0..tries(expected) {
            let outcome = match case.protocol {
                Protocol::Tcp => tcp_here(to),
                Protocol::Udp => udp_on(&udp_socket(to)),
                Protocol::Echo => echo_here(to),
                Protocol::Sctp => match sctp(&netns, to, &["a", "b", "remote", "host"]) {
                    Some(by) => Outcome::Answered { by, port: 8080, seen: UNSEEN },
                    None => Outcome::TimedOut,
                },
            };
            lost += usize::from(outcome == Outcome::TimedOut);
            met.insert(outcome);
            // Time is not to be spent on more of the same.
            let mixed = expected.contains(&Outcome::TimedOut) && expected.len() > 1;
            if if mixed { lost > 3 && met == *expected } else { lost > 3 } {
                break;
            }
        }
        met
    })
}

fn ask(net: &Net, case: &Case, family: usize, patience: Duration) -> Finding {
    let until = Instant::now() + patience;
    let to = case.to.address(family);
    let expected: BTreeSet<_> = case.expected.iter().map(|met| outcome(*met, case, to)).collect();
    let is_right = |met: &BTreeSet<Outcome>| {
        if case.one_of { met.len() == 1 && met.is_subset(&expected) } else { *met == expected }
    };
    let met = loop {
        let met = meet(net, case, to, &expected);
        if is_right(&met) || Instant::now() > until {
            break met;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let one_of = if case.one_of { "one of " } else { "" };
    Finding {
        case: format!("{} → {}", case.from, case.to.words()),
        setting: case.setting,
        family: Some(family),
        expected: format!("{one_of}{}", words(&expected, case.from, to)),
        right: is_right(&met),
        seen: words(&met, case.from, to),
    }
}

/// Asks cases in both families, several at a time; in the order they were given.
pub(crate) fn ask_all(net: &Net, cases: &[(u8, Case)], patience: Duration) -> Vec<(u8, Finding)> {
    let each = |(number, case): &(u8, Case)| -> Vec<_> {
        case.families.iter().map(|family| (*number, *case, *family)).collect()
    };
    let open: Vec<_> = cases.iter().flat_map(each).collect();
    let (taken, findings) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let place = taken.fetch_add(1, Ordering::Relaxed);
                    let Some((number, case, family)) = open.get(place) else { break };
                    let finding = ask(net, case, *family, patience);
                    findings.lock().unwrap().push((place, (*number, finding)));
                }
            });
        }
    });
    let mut findings = findings.into_inner().unwrap();
    findings.sort_by_key(|(place, _)| *place);
    findings.into_iter().map(|(_, finding)| finding).collect()
}
