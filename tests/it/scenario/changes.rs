//! The rows of the scenario table that are about changes: connections and flows that are there while
//! objects change, clients that are held to an endpoint, and what the next connection meets.
//!
//! All of them change at once, so that there is little to wait for. What must change is waited for;
//! what must stay is looked at after the changes beside it have come about.
//!
//! At every step `explain` is asked what the next connection meets. Of established ones it says nothing:
//! they do not come to the rules.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::Finding;
use super::asking::words;
use super::explaining::{self, Explained};
use super::proxies::Proxy;
use super::services::UDP_NUMBER;
use super::table::{Protocol, Target};
use super::world::{BEHIND_ONE, HOST_BEYOND, Objects, SOURCES, Setting, source};
use crate::namespace::nft;
use crate::net::{CLIENT, NODE, Net, in_netns, ip, patient, sysctl};
use crate::serve::{Outcome, patience, tcp_from, tcp_here, udp_on, udp_socket};

/// The proxy has had its time to do what it should not.
const AFTERWARDS: Duration = Duration::from_secs(1);

pub(crate) struct Changes<'a> {
    pub(crate) net: &'a Net,
    pub(crate) proxy: &'a mut dyn Proxy,
    pub(crate) objects: Objects,
    pub(crate) findings: Vec<(u8, Finding)>,
    pub(crate) explanations: Explanations,
}

/// What came of asking `explain`.
#[derive(Debug, Default)]
pub(crate) struct Explanations {
    /// The rows it was asked of.
    pub(crate) rows: BTreeSet<u8>,
    /// What was not explained as it is, a line each.
    pub(crate) wrong: Vec<String>,
}

/// A connection, and who is at its other end.
struct Lasting {
    stream: TcpStream,
    lines: std::io::Lines<BufReader<TcpStream>>,
}

impl Lasting {
    fn open(net: &Net, to: SocketAddr) -> Self {
        let stream = in_netns(&net.name("client"), || TcpStream::connect(to).unwrap());
        stream.set_read_timeout(Some(patience() * 5)).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        lines.next().unwrap().unwrap();
        Self { stream, lines }
    }

    /// Who answers now.
    fn ask(&mut self) -> String {
        let sent = (&self.stream).write_all(b"?\n");
        match sent.and_then(|()| self.lines.next().expect("the connection is open")) {
            Ok(line) => line.split(' ').next().unwrap().to_owned(),
            Err(error) => format!("cut: {error}"),
        }
    }
}

fn by(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Answered { by, .. } => by.clone(),
        Outcome::Refused => "refused".into(),
        Outcome::TimedOut => "lost".into(),
    }
}

const FAMILIES: [usize; 2] = [0, 1];

/// A flow of UDP datagrams of pod `b`, what happens to its Service, and who answers.
struct Flow {
    row: u8,
    service: &'static str,
    to: Target,
    before: &'static str,
    /// What endpoints the Service has then.
    endpoints: &'static [&'static str],
    /// Who answers another flow then.
    new: &'static str,
    /// Who answers this one then.
    after: &'static str,
}

const fn flow(
    row: u8,
    service: &'static str,
    before: &'static str,
    endpoints: &'static [&'static str],
    [new, after]: [&'static str; 2],
) -> Flow {
    Flow { row, service, to: Target::Vip(service), before, endpoints, new, after }
}

impl Flow {
    const fn to(self, to: Target) -> Self {
        Self { to, ..self }
    }

    fn address(&self, family: usize) -> SocketAddr {
        self.to.address(family)
    }

    fn case(&self, when: &str) -> String {
        match self.to {
            Target::NodePort(..) => format!("NP, {when}"),
            _ => when.to_owned(),
        }
    }

    /// What is explained where this is met.
    fn explained(met: &str) -> &str {
        if met == "beyond" { "left alone" } else { met }
    }
}

const FLOWS: [Flow; 7] = [
    flow(111, "udp-leaves", "a", &["remote"], ["remote", "remote"]),
    flow(111, "udp-leaves", "a", &["remote"], ["remote", "remote"])
        .to(Target::NodePort("udp-leaves", NODE)),
    flow(112, "udp-ends", "a", &["a serving terminating", "remote"], ["remote", "a"]),
    flow(113, "udp-none", "a", &[], ["refused", "refused"]),
    flow(113, "udp-none", "a", &[], ["refused", "refused"]).to(Target::NodePort("udp-none", NODE)),
    flow(114, "udp-late", "refused", &["a"], ["a", "a"]),
    flow(115, "udp-number", "beyond", &["remote"], ["beyond", "beyond"])
        .to(Target::Address(HOST_BEYOND, UDP_NUMBER)),
];
/// That all of them make the same choices twice has a likelihood of 3^-24.
const SOME: Range<u8> = 0..SOURCES / 2;
/// How many of them are explained.
const SOME_EXPLAINED: usize = 3;
const ENDPOINTS: [&str; 3] = ["a", "b", "remote"];

fn vip(name: &'static str, family: usize) -> SocketAddr {
    Target::Vip(name).address(family)
}

impl Changes<'_> {
    pub(crate) fn run(mut self) -> (Vec<(u8, Finding)>, Explanations) {
        self.flows();
        let kept = self.affinity();
        self.unready(&kept);
        self.timeout();
        (self.findings, self.explanations)
    }

    fn explain(
        &self,
        client: (&str, Option<&str>),
        to: SocketAddr,
        protocol: Protocol,
    ) -> Option<Explained> {
        self.proxy.explains().then(|| explaining::of_kernel(self.net, client, to, protocol))
    }

    fn explained(&mut self, number: u8, asked: &str, expected: &str, said: &str) {
        self.explanations.rows.insert(number);
        if said != expected {
            let line = format!("{number}: {asked}: explained {said:?}, expected {expected:?}");
            self.explanations.wrong.push(line);
        }
    }

    /// The next packet from here is explained as going there: words of what is met, or names alone.
    fn explains(
        &mut self,
        number: u8,
        from: &str,
        (to, protocol): (SocketAddr, Protocol),
        expected: &str,
    ) {
        if let Some(said) = self.explain((from, None), to, protocol) {
            let said = if expected.contains(' ') { said.words } else { said.by };
            self.explained(number, &format!("{from} to {to}"), expected, &said);
        }
    }

    /// The client is explained as being remembered at this endpoint.
    fn explains_kept(&mut self, number: u8, client: Option<&str>, to: SocketAddr, by: &str) {
        if let Some(said) = self.explain(("client", client), to, Protocol::Tcp) {
            let words = if said.remembered { said.by } else { format!("new, {}", said.by) };
            self.explained(number, &format!("client {client:?} to {to}"), by, &words);
        }
    }

    /// The client is explained as one that may meet any of these; waits until it is.
    fn explains_new(&mut self, number: u8, client: Option<&str>, to: SocketAddr, all: &[&str]) {
        if !self.proxy.explains() {
            return;
        }
        let said = self.eventually(&all.join(", "), || {
            let said = self.explain(("client", client), to, Protocol::Tcp).expect("it explains");
            if said.remembered { format!("kept, {}", said.by) } else { said.by }
        });
        self.explained(number, &format!("client {client:?} to {to}"), &all.join(", "), &said);
    }

    fn found(&mut self, number: u8, family: usize, case: &str, expected: &str, seen: &str) {
        self.found_if(number, family, case, expected, seen, expected == seen);
    }

    fn found_if(
        &mut self,
        number: u8,
        family: usize,
        case: &str,
        expected: &str,
        seen: &str,
        right: bool,
    ) {
        let (case, expected, seen) = (case.to_owned(), expected.to_owned(), seen.to_owned());
        let (setting, family) = (Setting::Base, Some(family));
        self.findings.push((number, Finding { case, setting, family, expected, seen, right }));
    }

    /// Asks until the answer is the expected one or time is up; the last answer.
    fn eventually(&self, expected: &str, mut ask: impl FnMut() -> String) -> String {
        let until = Instant::now() + self.proxy.patience();
        loop {
            let seen = ask();
            if seen == expected || Instant::now() > until {
                return seen;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What one connection from a namespace meets.
    fn meets(&self, from: &str, to: SocketAddr) -> String {
        let met = in_netns(&self.net.name(from), || tcp_here(to));
        words(&BTreeSet::from([met]), from, to)
    }

    /// 17, 96, 110 to 115.
    fn flows(&mut self) {
        self.count_new_flows(UDP_NUMBER);
        // The kernel forgets a flow after 30 s, which a slow machine takes until it is asked about.
        in_netns(&self.net.name("node"), || sysctl("netfilter/nf_conntrack_udp_timeout", "600"));
        let mut established = BTreeMap::new();
        let mut sockets = Vec::new();
        for family in FAMILIES {
            let deleted = vip("deleted", family);
            let met = self.meets("b", deleted);
            self.found(17, family, "before", "a own", &met);
            self.explains(17, "b", (deleted, Protocol::Tcp), "a own");
            let ranged = Target::Balancer("ranges-change").address(family);
            let leaving = vip("tcp-leaves", family);
            for (row, to) in [(96, ranged), (110, leaving)] {
                self.explains(row, "client", (to, Protocol::Tcp), "a:8081 masq");
            }
            established.insert((96, family), Lasting::open(self.net, ranged));
            established.insert((110, family), Lasting::open(self.net, leaving));
            for flow in &FLOWS {
                let socket = in_netns(&self.net.name("b"), || udp_socket(flow.address(family)));
                let met = by(&udp_on(&socket));
                self.found(flow.row, family, &flow.case("before"), flow.before, &met);
                let (to, explained) = (flow.address(family), Flow::explained(flow.before));
                self.explains(flow.row, "b", (to, Protocol::Udp), explained);
                sockets.push((flow, family, socket));
            }
        }

        self.objects.remove("deleted");
        self.objects.restrict("ranges-change", &["198.18.99.0/24", "fd00:198:99::/64"]);
        for family in FAMILIES {
            self.objects.set("tcp-leaves", family, &["remote"]);
            for flow in &FLOWS {
                self.objects.set(flow.service, family, flow.endpoints);
            }
        }
        self.proxy.update(&self.objects);

        for family in FAMILIES {
            // What new connections meet.
            let gone = vip("deleted", family);
            let met = self.eventually("lost", || self.meets("b", gone));
            self.found(17, family, "after", "lost", &met);
            self.explains(17, "b", (gone, Protocol::Tcp), "lost");
            let ranged = Target::Balancer("ranges-change").address(family);
            let met = self.eventually("lost", || self.meets("client", ranged));
            self.found(96, family, "new connection", "lost", &met);
            self.explains(96, "client", (ranged, Protocol::Tcp), "lost");
            let leaving = vip("tcp-leaves", family);
            let elsewhere = "remote:8081 masq";
            let met = self.eventually(elsewhere, || self.meets("client", leaving));
            self.found(110, family, "new connection", elsewhere, &met);
            self.explains(110, "client", (leaving, Protocol::Tcp), elsewhere);
            for flow in &FLOWS {
                let to = flow.address(family);
                if flow.row == 115 {
                    // Another flow would be counted.
                    self.explains(115, "b", (to, Protocol::Udp), Flow::explained(flow.new));
                    continue;
                }
                let new = || by(&in_netns(&self.net.name("b"), || udp_on(&udp_socket(to))));
                let met = self.eventually(flow.new, new);
                self.found(flow.row, family, &flow.case("another flow"), flow.new, &met);
                self.explains(flow.row, "b", (to, Protocol::Udp), flow.new);
            }
        }
        std::thread::sleep(patient(AFTERWARDS));
        for ((row, family), connection) in &mut established {
            let answer = connection.ask();
            self.found(*row, *family, "established", "a", &answer);
        }
        for (flow, family, socket) in sockets {
            let met = self.eventually(flow.after, || by(&udp_on(&socket)));
            self.found(flow.row, family, &flow.case("the flow"), flow.after, &met);
        }
        // Its entry may be deleted: another is made in its place.
        for family in FAMILIES {
            let new = self.new_flows(family);
            let seen = if new > 1 { "deleted" } else { "kept" };
            self.found_if(115, family, "entry", "deleted or kept", seen, new > 0);
        }
    }

    /// Lets the node count flows to a UDP port before anybody translates them.
    fn count_new_flows(&self, port: u16) {
        let rules = ["ip", "ip6"].map(|table| {
            format!(
                "table {table} watch {{\nchain flows {{\n\
                 type filter hook prerouting priority -150\n\
                 iifname \"pod-b\" udp dport {port} ct state new counter\n}}\n}}\n"
            )
        });
        in_netns(&self.net.name("node"), || nft(&["-f", "-"], &rules.concat()));
    }

    fn new_flows(&self, family: usize) -> u64 {
        let list = ["list", "table", ["ip", "ip6"][family], "watch"];
        let text = in_netns(&self.net.name("node"), || nft(&list, ""));
        let count = text.split("packets ").nth(1).and_then(|rest| rest.split(' ').next());
        count.unwrap().parse().unwrap()
    }

    /// Who answers connections from the client, from an address or from its own.
    fn who(&self, from: Option<&str>, to: SocketAddr, times: usize) -> BTreeSet<String> {
        in_netns(&self.net.name("client"), || {
            (0..times).map(|_| by(&tcp_from(from.map(ip), to))).collect()
        })
    }

    /// Who answers each of some of the client's further addresses.
    fn choices(&self, to: SocketAddr, family: usize, sources: Range<u8>) -> Vec<String> {
        let sources = sources.map(|number| source(number, family));
        sources.map(|source| list(&self.who(Some(&source), to, 1))).collect()
    }

    /// 103 to 106, and 108; where the client is held, in each family.
    fn affinity(&mut self) -> Vec<String> {
        let mut kept = Vec::new();
        for family in FAMILIES {
            let web = vip("sticky", family);
            self.explains_new(103, None, web, &ENDPOINTS);
            let again = self.who(None, web, 12);
            self.one(103, family, "VIP", &again);
            self.explains_kept(103, None, web, &list(&again));
            let all = [
                web,
                Target::NodePort("sticky", NODE).address(family),
                Target::Balancer("sticky").address(family),
                Target::External("sticky").address(family),
            ];
            let everywhere: BTreeSet<_> =
                all.iter().flat_map(|to| self.who(None, *to, 6)).collect();
            self.one(104, family, "all frontends", &everywhere);
            for to in all {
                self.explains_kept(104, None, to, &list(&everywhere));
            }
            let second = Target::VipAt("sticky", 443).address(family);
            let choices = [web, second].map(|to| (to, self.choices(to, family, SOME)));
            let differ = choices[0].1 != choices[1].1;
            for (to, by) in &choices {
                for number in SOME.take(SOME_EXPLAINED) {
                    let client = source(number, family);
                    self.explains_kept(105, Some(&client), *to, &by[usize::from(number)]);
                }
            }
            let seen = if differ { "independent" } else { "the same" };
            self.found(105, family, "24 clients", "independent", seen);
            let pair = BEHIND_ONE[family].map(|source| self.who(Some(source), web, 6));
            let pair = pair.into_iter().flatten().collect();
            self.one(106, family, "both", &pair);
            // Who is behind that address is not to be seen here.
            self.explains_kept(106, None, web, &list(&pair));
            kept.push(list(&again));
        }

        // 108
        self.proxy.restart();
        for family in FAMILIES {
            self.explains_kept(108, None, vip("sticky", family), &kept[family]);
            let seen = list(&self.who(None, vip("sticky", family), 12));
            let right = seen == kept[family];
            let seen = if right { "kept".to_owned() } else { seen };
            self.found_if(108, family, "client", "kept", &seen, right);
        }
        kept
    }

    /// 107: the endpoint is not ready, and then it is again.
    fn unready(&mut self, kept: &[String]) {
        for family in FAMILIES {
            let endpoints = ENDPOINTS.map(|name| match name {
                name if name != kept[family] => name,
                "a" => "a serving",
                "b" => "b serving",
                _ => "remote serving",
            });
            self.objects.set("sticky", family, &endpoints);
        }
        self.proxy.update(&self.objects);
        let mut moved = Vec::new();
        for family in FAMILIES {
            let web = vip("sticky", family);
            let others = ENDPOINTS.into_iter().filter(|name| *name != kept[family]);
            self.explains_new(107, None, web, &others.collect::<Vec<_>>());
            let other = self.eventually("another", || {
                let all = self.who(None, web, 1);
                if all.contains(&kept[family]) { list(&all) } else { "another".into() }
            });
            self.found(107, family, "unready", "another", &other);
            let again = self.who(None, web, 12);
            self.one(107, family, "then", &again);
            self.explains_kept(107, None, web, &list(&again));
            moved.push(list(&again));
            self.objects.set("sticky", family, &ENDPOINTS);
            self.objects.set("tcp-leaves", family, &["a"]);
        }
        self.proxy.update(&self.objects);
        for family in FAMILIES {
            let web = vip("sticky", family);
            // Asking would pin. Changes are told in the order of names: when this one has come, that
            // one has.
            let marker = vip("tcp-leaves", family);
            let there = "a:8081 masq";
            let met = self.eventually(there, || self.meets("client", marker));
            self.found(107, family, "ready again, marker", there, &met);
            self.explains_kept(107, None, web, &moved[family]);
            // Clients that have not been here before.
            self.explains_new(107, Some(&source(SOURCES / 2, family)), web, &ENDPOINTS);
            let all = self.choices(web, family, SOURCES / 2..SOURCES);
            let seen = if all.contains(&kept[family]) { "there" } else { "not there" };
            self.found(107, family, "ready again, others", "there", seen);
            let seen = list(&self.who(None, web, 12));
            let right = seen == moved[family];
            let seen = if right { "kept".to_owned() } else { seen };
            self.found_if(107, family, "ready again", "kept", &seen, right);
        }
    }

    /// 109, and that use renews it (103).
    fn timeout(&mut self) {
        let mut before = Vec::new();
        let mut used = [BTreeSet::new(), BTreeSet::new()];
        let last = |family| source(SOME.end - 1, family);
        for family in FAMILIES {
            let short = vip("sticky-short", family);
            self.explains_new(109, Some(&last(family)), short, &ENDPOINTS);
            let choices = self.choices(short, family, SOME);
            self.explains_kept(109, Some(&last(family)), short, choices.last().unwrap());
            before.push(choices);
        }
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(6) {
            for family in FAMILIES {
                used[family].extend(self.who(Some(CLIENT[family]), vip("sticky-short", family), 1));
            }
            std::thread::sleep(Duration::from_millis(400));
        }
        for (family, used) in used.iter().enumerate() {
            self.one(103, family, "used for longer than the timeout", used);
            let short = vip("sticky-short", family);
            let again = list(&self.who(Some(CLIENT[family]), short, 1));
            self.explains_kept(103, None, short, &again);
            self.explains_new(109, Some(&last(family)), short, &ENDPOINTS);
            let changed = self.choices(short, family, SOME) != before[family];
            let seen = if changed { "chosen anew" } else { "kept" };
            self.found(109, family, "24 clients", "chosen anew", seen);
        }
    }

    fn one(&mut self, number: u8, family: usize, case: &str, seen: &BTreeSet<String>) {
        let one = seen.len() == 1 && ENDPOINTS.contains(&list(seen).as_str());
        let seen = if one { "one endpoint".to_owned() } else { list(seen) };
        self.found(number, family, case, "one endpoint", &seen);
    }
}

pub(super) fn list(set: &BTreeSet<String>) -> String {
    set.iter().cloned().collect::<Vec<_>>().join(", ")
}
