//! The rows of the scenario table of the compatibility reference, as data.
//!
//! A row is a number, what it says, and either cases (who dials what, under which setting, and what
//! must come of it), or the remark that it is about changes over time (see `changes.rs`), or why it is
//! not here. Cases are of both families unless they say otherwise. The names are those of
//! `services.rs`: P1 is pod `b`, or `a` where it is an endpoint itself; P2 is `remote`.

use super::world::{HOST_NETWORK_ELSEWHERE, Setting};
use crate::net::{GATEWAY, NODE, NODE_SECOND};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) number: u8,
    pub(crate) what: &'static str,
    pub(crate) how: How,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum How {
    Cases(&'static [Case]),
    /// The changes of `changes.rs` fill it.
    OverTime,
    /// Why it is not here.
    Absent(&'static str),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) setting: Setting,
    pub(crate) from: &'static str,
    pub(crate) to: Target,
    pub(crate) protocol: Protocol,
    pub(crate) families: &'static [usize],
    pub(crate) expected: &'static [Met],
    /// Only one of the expected, always the same.
    pub(crate) one_of: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    Sctp,
    Echo,
}

/// What is dialled.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    Vip(&'static str),
    /// A ClusterIP at a port that the Service does not have.
    VipAt(&'static str, u16),
    Balancer(&'static str),
    BalancerAt(&'static str, u16),
    External(&'static str),
    /// The node port of a Service at an address.
    NodePort(&'static str, [&'static str; 2]),
    Address([&'static str; 2], u16),
}

/// What a client meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Met {
    /// This one answers, and sees the client's own address.
    Own(&'static str),
    /// This one answers, and sees an address of the node.
    Masq(&'static str),
    /// The same, at the endpoint's port 8081.
    Own8081(&'static str),
    Masq8081(&'static str),
    /// Not the proxy's: this one answers at the port that was dialled, and sees the own address.
    Untouched(&'static str),
    Refused,
    Lost,
}

use Met::{Lost, Masq, Masq8081, Own, Own8081, Refused, Untouched};

const fn case(from: &'static str, to: Target, expected: &'static [Met]) -> Case {
    let (setting, protocol, families) = (Setting::Base, Protocol::Tcp, BOTH);
    Case { setting, from, to, protocol, families, expected, one_of: false }
}

const BOTH: &[usize] = &[0, 1];

impl Case {
    const fn under(self, setting: Setting) -> Self {
        Self { setting, ..self }
    }

    const fn by(self, protocol: Protocol) -> Self {
        Self { protocol, ..self }
    }

    const fn of(self, families: &'static [usize]) -> Self {
        Self { families, ..self }
    }

    /// Whether a proxy has nothing to do with it.
    pub(crate) fn is_left_alone(&self) -> bool {
        let loopback = matches!(self.to, Target::NodePort(_, LOOPBACK));
        loopback || self.expected.iter().all(|met| matches!(met, Untouched(_)))
    }

    const fn one_of(self) -> Self {
        Self { one_of: true, ..self }
    }
}

const fn vip(name: &'static str) -> Target {
    Target::Vip(name)
}

const fn np(name: &'static str) -> Target {
    Target::NodePort(name, NODE)
}

const fn lb(name: &'static str) -> Target {
    Target::Balancer(name)
}

const fn ext(name: &'static str) -> Target {
    Target::External(name)
}

const SECOND: [&str; 2] = [NODE_SECOND, GATEWAY[1]];
const LOOPBACK: [&str; 2] = ["127.0.0.1", "::1"];
const UNUSED: Target = Target::Address(["10.96.7.7", "fd00:10:96::7:7"], 80);

const ANY: &[Met] = &[Own("a"), Own("remote")];
const ANY_MASQ: &[Met] = &[Masq("a"), Masq("remote")];
/// As `a` itself sees it: given itself, it is masqueraded.
const ANY_OF_A: &[Met] = &[Masq("a"), Own("remote")];
const HERE_MASQ: &[Met] = &[Masq("a"), Masq("b")];
const A: &[Met] = &[Own("a")];
const A_MASQ: &[Met] = &[Masq("a")];
const E2: &[Met] = &[Own("remote")];
const E2_MASQ: &[Met] = &[Masq("remote")];
const REFUSED: &[Met] = &[Refused];
const LOST: &[Met] = &[Lost];
const BEYOND: &[Met] = &[Untouched("beyond")];
const DAEMON: &[Met] = &[Untouched("daemon")];

const fn row(number: u8, what: &'static str, cases: &'static [Case]) -> Row {
    Row { number, what, how: How::Cases(cases) }
}

const fn over_time(number: u8, what: &'static str) -> Row {
    Row { number, what, how: How::OverTime }
}

const fn absent(number: u8, what: &'static str, why: &'static str) -> Row {
    Row { number, what, how: How::Absent(why) }
}

const GATE: &str = "the gate KubeProxyNFTablesLocalhostNodePorts is alpha and off in 1.37; \
                    `--localhost-node-ports` of nftproxy is tested in `tests/it/features.rs`";
const HEALTH: &str = "of the health servers: tests/it/health.rs";

use Protocol::{Echo, Sctp, Udp};
use Setting::{
    AllAddresses, BareNode, BridgeInterface, InterfacePrefix, LoopbackRange, MasqueradeAll,
    NoDetector, NoServiceCidr, NodeCidr, OtherRange,
};

#[rustfmt::skip]
pub(crate) const ROWS: &[Row] = &[
    row(1, "P1 → VIP", &[case("b", vip("any"), ANY)]),
    row(2, "P1 = E1 → VIP, picks E1", &[case("a", vip("only-a"), A_MASQ)]),
    row(3, "P1 = E1 → VIP, picks E2", &[case("a", vip("any"), ANY_OF_A)]),
    row(4, "N1 → VIP", &[case("node", vip("any"), ANY_MASQ)]),
    row(5, "C → VIP", &[case("client", vip("any"), ANY_MASQ)]),
    row(6, "P2 via N1 → VIP, ClusterCIDR", &[case("remote", vip("here"), &[Own("a"), Own("b")])]),
    row(7, "P2 via N1 → VIP, NodeCIDR, Bridge or Prefix", &[
        case("remote", vip("here"), HERE_MASQ).under(NodeCidr),
        case("remote", vip("here"), HERE_MASQ).under(BridgeInterface),
        case("remote", vip("here"), HERE_MASQ).under(InterfacePrefix),
        case("client", vip("any"), ANY_MASQ).under(BridgeInterface),
        case("client", vip("any"), ANY_MASQ).under(InterfacePrefix),
        case("node", vip("any"), ANY_MASQ).under(BridgeInterface),
        case("node", vip("any"), ANY_MASQ).under(InterfacePrefix),
        case("b", vip("any"), ANY).under(NodeCidr),
        case("b", vip("any"), ANY).under(BridgeInterface),
        case("b", vip("any"), ANY).under(InterfacePrefix),
    ]),
    row(8, "P1 → VIP, masqueradeAll", &[case("b", vip("any"), ANY_MASQ).under(MasqueradeAll)]),
    row(9, "N1 or C → VIP, no cluster CIDR", &[
        case("node", vip("any"), ANY).under(NoDetector),
        case("client", vip("any"), ANY).under(NoDetector),
    ]),
    row(10, "P1 = E1 → VIP, no cluster CIDR", &[case("a", vip("any"), ANY_OF_A).under(NoDetector)]),
    row(11, "P1 → VIP, port not in S", &[case("b", Target::VipAt("any", 81), REFUSED)]),
    row(12, "N1 → VIP, port not in S", &[case("node", Target::VipAt("any", 81), REFUSED)]),
    row(13, "P1 → VIP by UDP, S has TCP only", &[case("b", vip("any"), REFUSED).by(Udp)]),
    row(14, "P1 → VIP, ICMP echo", &[case("b", vip("any"), REFUSED).by(Echo)]),
    row(15, "P1 or N1 → unused address in ServiceCIDR", &[
        case("b", UNUSED, LOST),
        case("node", UNUSED, LOST),
    ]),
    row(16, "P1 → unused address, no ServiceCIDR", &[case("b", UNUSED, BEYOND).under(NoServiceCidr)]),
    over_time(17, "P1 → VIP, Service deleted"),
    row(18, "P1 → VIP, no endpoints", &[case("b", vip("none"), REFUSED)]),
    row(19, "N1 → VIP, no endpoints", &[case("node", vip("none"), REFUSED)]),
    row(20, "P1 → VIP, none ready, none terminating", &[case("b", vip("unready"), REFUSED)]),
    row(21, "P1 → VIP, serving and terminating only", &[case("b", vip("ending"), A)]),
    row(22, "P1 → VIP, E1 terminating, E2 ready", &[case("b", vip("ending-a"), E2)]),
    row(23, "P1 → VIP, E1 terminating, not serving", &[case("b", vip("ended"), REFUSED)]),
    row(24, "P1 → VIP, all conditions nil", &[case("b", vip("unset"), ANY)]),
    row(25, "P1 → VIP, E1 ready and terminating", &[case("b", vip("published"), A)]),
    row(26, "P1 → VIP, iTP Local", &[case("b", vip("internal"), A)]),
    row(27, "N1 → VIP, iTP Local", &[case("node", vip("internal"), A_MASQ)]),
    row(28, "C → VIP, iTP Local", &[case("client", vip("internal"), A_MASQ)]),
    row(29, "P1 → VIP, iTP Local, E2 only", &[case("b", vip("internal-away"), LOST)]),
    row(30, "N1 → VIP, iTP Local, E2 only", &[case("node", vip("internal-away"), LOST)]),
    row(31, "P1 → VIP, iTP Local, no endpoint", &[case("b", vip("internal-none"), REFUSED)]),
    row(32, "P1 → VIP, iTP Local, E1 terminating, E2 ready", &[case("b", vip("internal-ending"), A)]),
    row(33, "P1 → VIP, iTP Local, E1 not ready, E2 ready", &[case("b", vip("internal-unready"), LOST)]),
    row(34, "C → N1:NP, iTP Local, eTP Cluster, E2 only", &[case("client", np("internal-away"), E2_MASQ)]),
    row(35, "P1 → VIP, zone hints, one for our zone", &[case("b", vip("zone"), A)]),
    row(36, "P1 → VIP, one ready endpoint without hint", &[case("b", vip("zone-partly"), ANY)]),
    row(37, "P1 → VIP, zone hints, none for our zone", &[case("b", vip("zone-elsewhere"), ANY)]),
    row(38, "P1 → VIP, zone hints, node has no zone", &[case("b", vip("zone"), ANY).under(BareNode)]),
    row(39, "P1 → VIP, node hints, E1 hinted for N1", &[case("b", vip("node-hint"), A)]),
    row(40, "P1 → VIP, node hints elsewhere, zone hint on E2", &[case("b", vip("node-elsewhere"), E2)]),
    row(41, "P1 → VIP, endpoint hinted for our zone not ready", &[case("b", vip("zone-unready"), E2)]),
    row(42, "P1 → VIP, hints, all terminating and serving", &[case("b", vip("zone-ending"), ANY)]),
    row(43, "C → N1:NP, zone hints, eTP Cluster", &[case("client", np("zone"), A_MASQ)]),
    row(44, "C → N1:NP, E1 hinted elsewhere, eTP Local", &[case("client", np("zone-local"), A)]),
    row(45, "C → N1:NP", &[
        case("client", np("any"), ANY_MASQ),
        case("client", np("any"), ANY_MASQ).under(NoDetector),
    ]),
    row(46, "C → N1:NP, host-network endpoint on N1", &[
        case("client", np("host"), &[Own("host")]),
        case("b", np("host"), &[Own("host")]),
    ]),
    row(47, "C → N1:NP, host-network endpoint on N2", &[case("client", np("host-elsewhere"), E2_MASQ)]),
    row(48, "P1 → N1:NP", &[case("b", np("any"), ANY_MASQ)]),
    row(49, "N1 → N1:NP", &[case("node", np("any"), ANY_MASQ)]),
    row(50, "P1 → N2:NP", &[
        case("b", Target::NodePort("any", HOST_NETWORK_ELSEWHERE), &[Untouched("remote")]),
    ]),
    row(51, "C → other address of N1, NP, default", &[
        case("client", Target::NodePort("daemon", SECOND), DAEMON),
    ]),
    row(52, "C → other address of N1, NP, all addresses", &[
        case("client", Target::NodePort("daemon", SECOND), ANY_MASQ).under(AllAddresses),
    ]),
    row(53, "C → N1:NP, nodePortAddresses has another subnet", &[
        case("client", np("daemon"), DAEMON).under(OtherRange),
        case("client", Target::NodePort("daemon", GATEWAY), ANY_MASQ).under(OtherRange),
    ]),
    row(54, "N1 → loopback, NP", &[
        case("node", Target::NodePort("any", LOOPBACK), REFUSED),
        case("node", Target::NodePort("daemon", LOOPBACK), DAEMON),
        case("node", Target::NodePort("any", LOOPBACK), REFUSED).under(AllAddresses),
        case("node", Target::NodePort("daemon", LOOPBACK), DAEMON).under(AllAddresses),
        case("node", Target::NodePort("any", LOOPBACK), REFUSED).under(LoopbackRange),
        case("node", Target::NodePort("daemon", LOOPBACK), DAEMON).under(LoopbackRange),
    ]),
    absent(55, "N1 → loopback, NP, TCP, gate on", GATE),
    absent(56, "N1 → loopback, NP, UDP, gate on", GATE),
    row(57, "C → N1:NP, eTP Local", &[case("client", np("external"), A)]),
    row(58, "C → N1:NP, eTP Local, E2 only", &[case("client", np("external-away"), LOST)]),
    row(59, "P1 → N1:NP, eTP Local, E2 only", &[case("b", np("external-away"), E2)]),
    row(60, "N1 → N1:NP, eTP Local, E2 only", &[case("node", np("external-away"), E2_MASQ)]),
    row(61, "P1 → N1:NP, eTP Local", &[case("b", np("external"), ANY)]),
    row(62, "P1 → N1:NP, eTP Local, no detector", &[case("b", np("external"), A).under(NoDetector)]),
    row(63, "P1 → N1:NP, eTP Local, no detector, E2 only", &[
        case("b", np("external-away"), LOST).under(NoDetector),
    ]),
    // Of E2 it is itself; no reply that it takes can come through N1.
    row(64, "P2 → N1:NP, eTP Local, ClusterCIDR", &[case("remote", np("external"), &[Own("a"), Lost])]),
    row(65, "P2 → N1:NP, eTP Local, NodeCIDR", &[
        case("remote", np("external"), A).under(NodeCidr),
        case("remote", np("external-away"), LOST).under(NodeCidr),
    ]),
    row(66, "C → N1:NP, eTP Local, E1 terminating, E2 ready", &[case("client", np("external-ending"), A)]),
    row(67, "P1 → N1:NP, the same", &[case("b", np("external-ending"), E2)]),
    row(68, "C → N1:NP, no endpoints", &[
        case("client", np("none"), REFUSED),
        case("client", np("external-none"), REFUSED),
        case("client", lb("none"), REFUSED),
        case("client", lb("external-none"), REFUSED),
        case("client", ext("none"), REFUSED),
        case("b", lb("external-none"), REFUSED),
    ]),
    row(69, "N1 → N1:NP, no endpoints", &[case("node", np("none"), REFUSED)]),
    row(70, "C → other address of N1, NP, no endpoints", &[
        case("client", Target::NodePort("none", SECOND), DAEMON),
    ]),
    row(71, "C → N1:NP, a daemon listens there", &[case("client", np("daemon"), ANY_MASQ)]),
    row(72, "C → N1:NP by TCP and UDP, one number", &[
        case("client", np("number"), A_MASQ),
        case("client", np("number"), &[Masq8081("a")]).by(Udp),
    ]),
    row(73, "C → N1, external IP and port also a NP", &[case("client", np("node-port"), A_MASQ)]),
    row(74, "C → LB", &[case("client", lb("any"), ANY_MASQ)]),
    row(75, "P1 → LB", &[case("b", lb("any"), ANY_MASQ)]),
    row(76, "N1 → LB", &[case("node", lb("any"), ANY_MASQ)]),
    row(77, "C → LB, eTP Local", &[case("client", lb("external"), A)]),
    row(78, "C → LB, eTP Local, E2 only", &[case("client", lb("external-away"), LOST)]),
    row(79, "P1 → LB, eTP Local, E2 only", &[
        case("b", lb("external-away"), E2),
        case("b", lb("external"), ANY),
    ]),
    row(80, "P1 = E1 → LB, eTP Local", &[case("a", lb("external"), ANY_OF_A)]),
    row(81, "N1 → LB, eTP Local, E2 only", &[
        case("node", lb("external-away"), E2_MASQ),
        case("node", lb("external"), ANY_MASQ),
    ]),
    row(82, "N1 → LB, a local address and the source, eTP Local", &[
        case("node", lb("balancer-here"), ANY_MASQ),
    ]),
    row(83, "any → LB, port not in S", &[
        case("client", Target::BalancerAt("any", 81), BEYOND),
        case("b", Target::BalancerAt("any", 81), BEYOND),
        case("node", Target::BalancerAt("any", 81), BEYOND),
    ]),
    row(84, "P1 → LB, ipMode Proxy", &[case("b", lb("mode-proxy"), BEYOND)]),
    row(85, "C → LB, ipMode Proxy, source ranges", &[case("client", lb("mode-proxy-ranges"), BEYOND)]),
    row(86, "ingress has a hostname only", &[
        case("client", lb("hostname"), BEYOND),
        case("b", vip("hostname"), ANY),
    ]),
    row(87, "C in range → LB", &[
        case("client", lb("ranges"), ANY_MASQ),
        case("client", lb("ranges-local"), A),
    ]),
    row(88, "C outside → LB", &[
        case("client", lb("ranges-others"), LOST),
        case("node", lb("ranges"), LOST),
    ]),
    row(89, "C outside → N1:NP, X or VIP", &[
        case("client", np("ranges-others"), ANY_MASQ),
        case("client", ext("ranges-others"), ANY_MASQ),
        case("client", vip("ranges-others"), ANY_MASQ),
    ]),
    row(90, "P1 outside → LB", &[
        case("b", lb("ranges"), LOST),
        case("b", lb("ranges-local"), LOST),
        case("remote", lb("ranges"), LOST),
    ]),
    row(91, "N1 → LB, ranges contain the node", &[case("node", lb("ranges-node"), ANY_MASQ)]),
    row(92, "N1 → LB, a local address and the source, ranges contain the node", &[
        case("node", lb("ranges-node-here"), ANY_MASQ),
    ]),
    row(93, "the same, ranges do not contain the node", &[case("node", lb("ranges-others-here"), LOST)]),
    row(94, "C outside → LB, no endpoints", &[case("client", lb("ranges-others-none"), LOST)]),
    row(95, "C in range → LB, no endpoints", &[case("client", lb("ranges-none"), REFUSED)]),
    over_time(96, "established C → LB, range removed"),
    row(97, "C6 → LB, IPv4 ranges only", &[
        case("client", lb("ranges-ipv4"), ANY_MASQ).of(&[1]),
        case("client", lb("ranges-ipv4"), LOST).of(&[0]),
    ]),
    row(98, "C → LB, ranges overlap or repeat", &[case("client", lb("ranges-overlap"), ANY_MASQ)]),
    row(99, "C → X", &[
        case("client", ext("any"), ANY_MASQ),
        case("b", ext("any"), ANY_MASQ),
        case("node", ext("any"), ANY_MASQ),
        case("client", ext("external"), A),
        case("b", ext("external"), ANY),
        case("a", ext("external"), ANY_OF_A),
        case("node", ext("external"), ANY_MASQ),
        case("client", ext("external-away"), LOST),
        case("b", ext("external-away"), E2),
        case("node", ext("external-away"), E2_MASQ),
    ]),
    absent(100, "C → X, AllowServiceExternalIPs=false", "a gate of the API server's admission"),
    row(101, "C → X, claimed by S and S2", &[
        case("client", ext("claim-1"), &[Masq("a"), Masq("remote")]).one_of(),
    ]),
    row(102, "C → X, S has endpoints, S2 has none", &[
        case("client", ext("full-1"), A_MASQ),
        case("client", ext("none-1"), A_MASQ),
    ]),
    over_time(103, "same client → VIP again, affinity"),
    over_time(104, "same client → VIP, NP, LB and X, affinity"),
    over_time(105, "same client → VIP:80 and VIP:443, affinity"),
    over_time(106, "two clients behind one address, affinity"),
    over_time(107, "pinned client, its endpoint becomes unready"),
    over_time(108, "pinned client, proxy restarts"),
    over_time(109, "pinned client, idle for longer than the timeout"),
    over_time(110, "established TCP, endpoint removed"),
    over_time(111, "UDP flow, its endpoint gone, others serve"),
    over_time(112, "UDP flow, its endpoint serving and terminating"),
    over_time(113, "UDP flow, all endpoints gone"),
    over_time(114, "UDP datagrams before the first endpoint"),
    over_time(115, "UDP flow P1 → outside host, port number is a NP"),
    row(116, "SCTP → VIP", &[
        case("client", vip("sctp"), A).by(Sctp),
        case("remote", vip("sctp"), A).by(Sctp),
        case("node", vip("sctp"), A).by(Sctp),
    ]),
    row(117, "P1 → VIP6, ipFamilies [IPv4]", &[
        case("b", vip("only-ipv4"), ANY).of(&[0]),
        case("b", vip("only-ipv4"), LOST).of(&[1]),
        case("client", np("only-ipv4"), DAEMON).of(&[1]),
        case("client", lb("only-ipv4"), BEYOND).of(&[1]),
        case("client", ext("only-ipv4"), BEYOND).of(&[1]),
    ]),
    row(118, "C6 → N1:NP, Node has no IPv6 address", &[
        case("client", np("any"), ANY_MASQ).under(BareNode).of(&[1]),
        case("client", Target::NodePort("any", SECOND), ANY_MASQ).under(BareNode).of(&[1]),
    ]),
    row(119, "P1 → VIP, slice labelled headless", &[case("b", vip("headless-slice"), E2)]),
    row(120, "P1 → VIP, Service labelled service-proxy-name", &[
        case("b", vip("other-proxy"), LOST),
        case("client", np("other-proxy"), DAEMON),
        case("client", lb("other-proxy"), BEYOND),
    ]),
    row(121, "P1 → VIP, endpoint in two slices, once terminating", &[case("b", vip("twice"), A)]),
    row(122, "P1 → VIP, two slices, two port numbers", &[
        case("b", vip("two-numbers"), &[Own("a"), Own8081("a")]),
    ]),
    row(123, "P1 → VIP, endpoint without nodeName, iTP Local", &[case("b", vip("internal-nowhere"), LOST)]),
    absent(124, "GET N1:healthCheckNodePort, one local ready pod", HEALTH),
    absent(125, "the same, terminating local pods only", HEALTH),
    absent(126, "the same, proxy stale", HEALTH),
    absent(127, "GET N1:10256/healthz and /livez, node tainted", HEALTH),
];
