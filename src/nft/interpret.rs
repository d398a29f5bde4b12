//! What the rules do with a packet: an interpreter of the typed ruleset.
//!
//! Pure: a packet that opens a connection in, everything that can become of it out, each with its share
//! of such connections and the rules it met. Where the kernel draws a number, all of them are followed.
//! What the rules ask the host (is this address one of yours?) is asked of the caller. `explain` shows
//! the result, and tests hold it against real packets.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::dataplane;
use super::element::{Backend, ElementId, Key, Value, prefix};
use super::jhash;
use super::names::{AffinityName, ChainName, SetName};
use super::rule::{HASH_SEED, InterfaceName, Rule, Selector, SlotSource, Statement};
use super::ruleset::Ruleset;
use crate::model::{Family, Protocol};

/// A packet that opens a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who sent it.
    pub source: IpAddr,
    /// The address that was dialled.
    pub destination: IpAddr,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// The port that was dialled.
    pub port: u16,
    /// How it came here.
    pub origin: Origin,
}

/// How a packet came to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A program of this host sent it.
    Host,
    /// By this interface; None stands for one of which nothing is known.
    Interface(Option<Box<str>>),
}

/// What the rules are applied to and in.
pub struct World<'a> {
    /// The tables.
    pub ruleset: &'a Ruleset,
    /// Whether an address is one of this host (`fib … type local`).
    pub is_local: &'a dyn Fn(IpAddr) -> bool,
    /// The backends that affinity maps hold the packet's source to.
    pub remembered: &'a BTreeMap<AffinityName, Backend>,
}

/// One thing that can become of a packet.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The share of such packets that it becomes of; all shares add up to 1.
    pub share: f64,
    /// The backend it was translated to, and how that was found.
    pub pick: Option<Pick>,
    /// The rules that applied, in their order.
    pub steps: Vec<Step>,
    /// The end of it.
    pub fate: Fate,
}

/// How a backend was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pick {
    /// The backend.
    pub backend: Backend,
    /// The elements that lead to it, any of which could have been drawn; none if it was remembered.
    pub elements: Vec<ElementId>,
    /// The affinity map that remembered it.
    pub remembered: Option<AffinityName>,
}

/// A rule that applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The base chain that was under way.
    pub base: ChainName,
    /// The chain.
    pub chain: ChainName,
    /// The number of the rule in it.
    pub rule: usize,
    /// The elements that its look-ups met, but for those of a pick.
    pub elements: Vec<ElementId>,
}

/// Where a packet ends, as far as these rules decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fate {
    /// Dropped silently.
    Dropped,
    /// Refused: port unreachable.
    Rejected,
    /// Goes on.
    Passes {
        /// Where to.
        to: Backend,
        /// Whether that is this host.
        here: bool,
        /// Whether its source is replaced by an address of this host.
        masqueraded: bool,
    },
}

/// Everything that can become of a packet.
#[must_use]
pub fn interpret(packet: &Packet, world: &World<'_>) -> Vec<Outcome> {
    let family = Family::of(packet.destination);
    let interpreter = Interpreter { world, packet, family };
    let to = Backend { address: packet.destination, port: packet.port };
    let start = State {
        to,
        mark: 0,
        translated: false,
        masqueraded: false,
        refused: None,
        outcome: Outcome {
            share: 1.0,
            pick: None,
            steps: Vec::new(),
            fate: Fate::Passes { to, here: false, masqueraded: false },
        },
    };
    let from_host = packet.origin == Origin::Host;
    let first = if from_host { ChainName::NatOutput } else { ChainName::NatPrerouting };
    let mut outcomes = Vec::new();
    for state in interpreter.base(&first, start) {
        let here = (world.is_local)(state.to.address);
        let way: &[ChainName] = match (from_host, here) {
            (false, true) => &[ChainName::FilterInput, ChainName::NatInput],
            (false, false) => &[ChainName::FilterForward, ChainName::NatPostrouting],
            // What the host sends to itself leaves by its loopback, and comes in again.
            (true, true) => {
                &[ChainName::FilterOutput, ChainName::NatPostrouting, ChainName::FilterInput]
            }
            (true, false) => &[ChainName::FilterOutput, ChainName::NatPostrouting],
        };
        let mut states = vec![state];
        for base in way {
            let runs = |state: State| match state.refused {
                None => interpreter.base(base, state),
                Some(_) => vec![state],
            };
            states = states.into_iter().flat_map(runs).collect();
        }
        outcomes.extend(states.into_iter().map(|state| state.end(here)));
    }
    outcomes
}

/// A packet under way.
#[derive(Clone)]
struct State {
    to: Backend,
    mark: u32,
    translated: bool,
    masqueraded: bool,
    refused: Option<Fate>,
    outcome: Outcome,
}

impl State {
    fn end(self, here: bool) -> Outcome {
        let passes = Fate::Passes { to: self.to, here, masqueraded: self.masqueraded };
        Outcome { fate: self.refused.unwrap_or(passes), ..self.outcome }
    }
}

/// Where a packet goes on behind a rule.
enum Flow {
    /// With the next rule.
    Next(State),
    /// Behind the rule that jumped to this chain.
    Back(State),
    /// Nowhere in this base chain: it was accepted or refused.
    Done(State),
}

struct Interpreter<'a> {
    world: &'a World<'a>,
    packet: &'a Packet,
    family: Family,
}

/// A value of the packet.
#[derive(Clone, Copy)]
enum Field {
    Address(IpAddr),
    Protocol(Protocol),
    Port(u16),
    Slot(u16),
}

impl Interpreter<'_> {
    fn base(&self, base: &ChainName, state: State) -> Vec<State> {
        let flows = self.chain(base, base, state);
        let state = |flow| match flow {
            Flow::Next(state) | Flow::Back(state) | Flow::Done(state) => state,
        };
        flows.into_iter().map(state).collect()
    }

    /// Runs a chain. What falls off its end goes [`Flow::Back`].
    fn chain(&self, base: &ChainName, name: &ChainName, state: State) -> Vec<Flow> {
        let chain = dataplane::chain(name.clone(), self.family, &self.world.ruleset.options);
        let mut under_way = vec![state];
        let mut out = Vec::new();
        for (number, rule) in chain.rules.iter().enumerate() {
            let step = Step {
                base: base.clone(),
                chain: name.clone(),
                rule: number,
                elements: Vec::new(),
            };
            let flows: Vec<Flow> = under_way
                .drain(..)
                .flat_map(|state| self.rule(rule, step.clone(), state))
                .collect();
            for flow in flows {
                match flow {
                    Flow::Next(state) => under_way.push(state),
                    done_or_back => out.push(done_or_back),
                }
            }
        }
        out.extend(under_way.into_iter().map(Flow::Back));
        out
    }

    /// Applies a rule: its statements in their order, until one does not match.
    fn rule(&self, rule: &Rule, mut step: Step, mut state: State) -> Vec<Flow> {
        let base = step.base.clone();
        for statement in &rule.statements {
            let matches = match statement {
                // All that is followed is first packets, and what they leave behind in affinity maps is
                // not asked for again by them. Counting changes nothing.
                Statement::CtStateNew | Statement::Remember(..) | Statement::Count => true,
                Statement::CtStatusDnat => state.translated,
                Statement::FromThisHost => (self.world.is_local)(self.packet.source),
                Statement::ToThisHost => (self.world.is_local)(state.to.address),
                Statement::NotToLoopback => !state.to.address.is_loopback(),
                Statement::ToLoopback => state.to.address.is_loopback(),
                Statement::FromLoopback => self.packet.source.is_loopback(),
                Statement::FromInterface(name) => self.came_by(&base, name),
                Statement::NotFromInterface(name) => !self.came_by(&base, name),
                // Which one that is, is known of what the host sends to itself alone.
                Statement::NotToInterface(name) => {
                    !((self.world.is_local)(state.to.address) && names(name, LOOPBACK))
                }
                Statement::L4Proto(protocol) => self.packet.protocol == *protocol,
                Statement::In(selectors, set) => self.find(&state, selectors, *set, &mut step),
                Statement::NotIn(selectors, set) => !self.find(&state, selectors, *set, &mut step),
                Statement::MarkClear(bits) => state.mark & bits == 0,
                Statement::MarkOr(bits) => {
                    state.mark |= bits;
                    true
                }
                Statement::MarkXor(bits) => {
                    state.mark ^= bits;
                    true
                }
                Statement::Vmap(selectors, map) => {
                    let fields = self.fields(&state, selectors);
                    match self.look_up(*map, &fields) {
                        None => false,
                        Some((id, value)) => {
                            step.elements.push(id);
                            state.outcome.steps.push(step);
                            return match value {
                                Value::Goto(chain) => self.chain(&base, chain, state),
                                Value::Jump(chain) => self.jump(&base, chain, state, None),
                                Value::Drop => refuse(state, Fate::Dropped),
                                Value::None | Value::Backend(_) => vec![Flow::Next(state)],
                            };
                        }
                    }
                }
                Statement::Dnat(selectors, map) => {
                    return self.draw(&state, &step, selectors, *map);
                }
                Statement::DnatSticky(affinity) => match self.world.remembered.get(affinity) {
                    None => false,
                    Some(&backend) => {
                        let remembered = Some(affinity.clone());
                        state.outcome.steps.push(step);
                        let pick = Pick { backend, elements: Vec::new(), remembered };
                        return vec![Flow::Done(translated(state, pick))];
                    }
                },
                Statement::Masquerade => {
                    state.masqueraded = true;
                    state.outcome.steps.push(step);
                    return vec![Flow::Done(state)];
                }
                // Nothing stands behind a jump in our rules.
                Statement::Jump(chain) => {
                    // Where nothing was found, as by most first and all second tries, there is nothing
                    // to tell.
                    let untold = (step.chain != base).then_some(state.outcome.steps.len() + 1);
                    state.outcome.steps.push(step);
                    return self.jump(&base, chain, state, untold);
                }
                Statement::Goto(chain) => {
                    state.outcome.steps.push(step);
                    return self.chain(&base, chain, state);
                }
                Statement::Return => {
                    state.outcome.steps.push(step);
                    return vec![Flow::Back(state)];
                }
                Statement::Accept => {
                    state.outcome.steps.push(step);
                    return vec![Flow::Done(state)];
                }
                Statement::Reject | Statement::Drop => {
                    state.outcome.steps.push(step);
                    let reject = *statement == Statement::Reject;
                    return refuse(state, if reject { Fate::Rejected } else { Fate::Dropped });
                }
            };
            if !matches {
                return vec![Flow::Next(state)];
            }
        }
        state.outcome.steps.push(step);
        vec![Flow::Next(state)]
    }

    /// Runs a chain, and comes back. The step that led there goes untold if there are just so many by then.
    fn jump(
        &self,
        base: &ChainName,
        chain: &ChainName,
        state: State,
        untold: Option<usize>,
    ) -> Vec<Flow> {
        let came_back = |flow| match flow {
            Flow::Back(mut state) => {
                if untold == Some(state.outcome.steps.len()) {
                    state.outcome.steps.pop();
                }
                Flow::Next(state)
            }
            flow => flow,
        };
        self.chain(base, chain, state).into_iter().map(came_back).collect()
    }

    /// Follows every number that could be drawn; those that meet no element go on with the next rule.
    fn draw(&self, state: &State, step: &Step, selectors: &[Selector], map: SetName) -> Vec<Flow> {
        let mut drawn: BTreeMap<Option<Backend>, (u32, Vec<ElementId>)> = BTreeMap::new();
        let numbers = self.numbers(selectors);
        for &number in &numbers {
            let mut fields = self.fields(state, selectors);
            fields.push(Field::Slot(number));
            match self.look_up(map, &fields) {
                Some((id, Value::Backend(backend))) => {
                    let (count, ids) = drawn.entry(Some(*backend)).or_default();
                    *count += 1;
                    ids.push(id);
                }
                _ => drawn.entry(None).or_default().0 += 1,
            }
        }
        let all = f64::from(u32::try_from(numbers.len()).unwrap_or(u32::MAX));
        let flow = |(backend, (count, elements)): (_, (u32, _))| {
            let mut state = state.clone();
            state.outcome.share *= f64::from(count) / all;
            let Some(backend) = backend else { return Flow::Next(state) };
            state.outcome.steps.push(step.clone());
            Flow::Done(translated(state, Pick { backend, elements, remembered: None }))
        };
        drawn.into_iter().map(flow).collect()
    }

    /// The slots that a selection can come to, all equally likely.
    fn numbers(&self, selectors: &[Selector]) -> Vec<u16> {
        let slot = selectors.iter().find_map(|selector| match selector {
            Selector::Slot { source, modulus, offset } => Some((*source, *modulus, *offset)),
            _ => None,
        });
        match slot {
            Some((SlotSource::SourceHash, modulus, offset)) => {
                vec![offset + jhash::slot(self.packet.source, modulus, HASH_SEED)]
            }
            Some((SlotSource::Random | SlotSource::Increment, modulus, offset)) => {
                (offset..=offset.saturating_add(modulus - 1)).collect()
            }
            None => Vec::new(),
        }
    }

    /// The values of selectors, but for a slot.
    fn fields(&self, state: &State, selectors: &[Selector]) -> Vec<Field> {
        let field = |selector: &Selector| match selector {
            Selector::Saddr => Some(Field::Address(self.packet.source)),
            Selector::SaddrFirst(length) => Some(Field::Address(self.range(*length)?.network())),
            Selector::SaddrLast(length) => Some(Field::Address(self.range(*length)?.broadcast())),
            Selector::Daddr | Selector::ReplySaddr => Some(Field::Address(state.to.address)),
            Selector::L4Proto => Some(Field::Protocol(self.packet.protocol)),
            Selector::Dport | Selector::ReplySport => Some(Field::Port(state.to.port)),
            Selector::OriginalDaddr => Some(Field::Address(self.packet.destination)),
            Selector::OriginalDport => Some(Field::Port(self.packet.port)),
            Selector::Slot { .. } => None,
        };
        selectors.iter().filter_map(field).collect()
    }

    /// The prefix of this length that the source is in.
    fn range(&self, length: u8) -> Option<IpNet> {
        IpNet::new(self.packet.source, length).ok()
    }

    fn find(&self, state: &State, selectors: &[Selector], set: SetName, step: &mut Step) -> bool {
        let found = self.look_up(set, &self.fields(state, selectors));
        step.elements.extend(found.map(|(id, _)| id));
        found.is_some()
    }

    /// The element that a look-up meets.
    fn look_up(&self, set: SetName, fields: &[Field]) -> Option<(ElementId, &Value)> {
        use Field::{Address, Port, Protocol as Proto, Slot};
        let ruleset = self.world.ruleset;
        let key = match *fields {
            [Address(a)] if set.is_interval() => {
                let within = |id: &ElementId| matches!(id.key, Key::Range(first, last) if first <= a && a <= last);
                let mut elements = ruleset.elements_of(self.family, set);
                return elements.find(|(id, _)| within(id)).map(|(id, value)| (*id, value));
            }
            [Address(a), Proto(protocol), Port(port), Address(first), Address(last)] => {
                Key::Sources(a, protocol, port, prefix(first, last)?)
            }
            [Address(a), Proto(protocol), Port(port)] => Key::Frontend(a, protocol, port),
            [Address(a), Proto(protocol), Port(port), Slot(slot)] => {
                Key::Slot(a, protocol, port, slot)
            }
            [Proto(protocol), Port(port)] => Key::NodePort(protocol, port),
            [Proto(protocol), Port(port), Slot(slot)] => Key::NodePortSlot(protocol, port, slot),
            [Address(a)] => Key::Address(a),
            [Address(a), Address(b)] => Key::Pair(a, b),
            [Address(a), Port(port)] => Key::AddressPort(a, port),
            [Proto(protocol), Port(port), Address(address), Port(number)] => {
                Key::NodePortBackend(protocol, port, Backend { address, port: number })
            }
            [Port(port)] => Key::Port(port),
            _ => return None,
        };
        let id = ElementId { family: self.family, set, key };
        ruleset.elements.get(&id).map(|value| (id, value))
    }

    fn came_by(&self, base: &ChainName, name: &InterfaceName) -> bool {
        match &self.packet.origin {
            Origin::Interface(Some(interface)) => names(name, interface),
            Origin::Interface(None) => false,
            // What the host sends to itself comes in again.
            Origin::Host => *base == ChainName::FilterInput && names(name, LOOPBACK),
        }
    }
}

/// The interface by which the host reaches itself.
const LOOPBACK: &str = "lo";

fn names(name: &InterfaceName, interface: &str) -> bool {
    match name {
        InterfaceName::Whole(whole) => **whole == *interface,
        InterfaceName::Prefix(prefix) => interface.starts_with(&**prefix),
    }
}

fn refuse(state: State, fate: Fate) -> Vec<Flow> {
    vec![Flow::Done(State { refused: Some(fate), ..state })]
}

fn translated(mut state: State, pick: Pick) -> State {
    state.to = pick.backend;
    state.translated = true;
    state.outcome.pick = Some(pick);
    state
}
