//! What the kernel holds under our name, read back into our own types.
//!
//! Read once at start-up and when a commit failed. The parts come from several dumps, so the ruleset
//! generation is compared before and after, and everything is read again if it moved. What that does not
//! tell is up to [`elements`].

mod elements;

use std::collections::BTreeMap;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use self::elements::whole;
use super::affinity;
use super::batch::Batch;
use super::encode::{hook, nfproto, set_flags};
use super::ffi::{Chain, Generation, Header, Rule, Set, Table};
use super::lower::lower;
use super::socket::NetlinkSocket;
use super::{OWNED, PERSIST, connections};
use crate::model::Family;
use crate::nft::dataplane::{self, Options};
use crate::nft::element::{ElementId, Value, data_len, key_len};
use crate::nft::kernel::{ChainState, LoadError, Loaded, LoadedTable, Ownership, SetState};
use crate::nft::names::{AffinityName, CONNECTIONS, ChainName, DataType, STAND_IN, SetName, TABLE};
use crate::nft::rule::{BaseKind, Chain as WantedChain};
use nftnl::nftnl_sys as sys;

/// How often a dump is repeated when the ruleset changes under it, or the elements of a map move.
const ATTEMPTS: u32 = 20;

/// A map whose elements move is left alone for this long, then twice as long, and so on. Moving takes
/// the kernel about a millisecond for thousands of elements.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Reads both tables.
pub(super) fn load(
    socket: &mut NetlinkSocket,
    options: &Options,
    owning: bool,
) -> Result<Loaded, LoadError> {
    for _ in 0..ATTEMPTS {
        let before = generation(socket)?;
        let mut dump = Dump { socket, options, owning, consistent: true };
        let loaded = dump.tables()?;
        if dump.consistent && generation(socket)? == before {
            return Ok(loaded);
        }
    }
    Err(LoadError::Unstable { attempts: ATTEMPTS })
}

/// The number that every commit of anyone increments.
pub(super) fn generation(socket: &mut NetlinkSocket) -> Result<u32, LoadError> {
    let fail = |source| LoadError::Socket { step: "read the ruleset generation", source };
    let request = request(libc::NFT_MSG_GETGEN, 0, libc::NLM_F_ACK, |_| ());
    let mut generation = None;
    socket
        .dump(&request, |message| {
            generation = Generation::parse(message).map(|g| g.get_u32(sys::NFTNL_GEN_ID));
        })
        .map_err(fail)?;
    generation.ok_or_else(|| fail(io::ErrorKind::UnexpectedEof.into()))
}

/// One request message.
fn request(
    kind: libc::c_int,
    family: u16,
    flags: libc::c_int,
    payload: impl FnOnce(Header<'_>),
) -> Vec<u8> {
    Batch::single(|room, sequence| payload(room.header(kind, family, flags, sequence)))
}

struct Dump<'a> {
    socket: &'a mut NetlinkSocket,
    options: &'a Options,
    /// Whether the tables are to be owned.
    owning: bool,
    consistent: bool,
}

impl Dump<'_> {
    fn run(
        &mut self,
        step: &'static str,
        request: &[u8],
        each: impl FnMut(&[u8]),
    ) -> Result<(), LoadError> {
        let consistent =
            self.socket.dump(request, each).map_err(|source| LoadError::Socket { step, source })?;
        self.consistent &= consistent;
        Ok(())
    }

    fn tables(&mut self) -> Result<Loaded, LoadError> {
        let mut loaded = Loaded::default();
        for family in Family::BOTH {
            let mut found = None;
            let all = request(libc::NFT_MSG_GETTABLE, nfproto(family), libc::NLM_F_DUMP, |_| ());
            self.run("list tables", &all, |message| {
                let Some(table) = Table::parse(message) else { return };
                match table.get_str(sys::NFTNL_TABLE_NAME).as_deref() {
                    Some(TABLE) => found = Some(table),
                    Some(STAND_IN) => drop(loaded.stand_ins.insert(family)),
                    _ => {}
                }
            })?;
            let Some(table) = found else { continue };
            let mut content = LoadedTable {
                comment: table.get_data(sys::NFTNL_TABLE_USERDATA).and_then(|d| comment(&d)),
                ownership: self.ownership(&table),
                ..LoadedTable::default()
            };
            self.chains(family, &mut content)?;
            self.sets(family, &mut content)?;
            loaded.tables.insert(family, content);
        }
        Ok(loaded)
    }

    fn ownership(&self, table: &Table) -> Ownership {
        match table.get_u32(sys::NFTNL_TABLE_FLAGS) & OWNED {
            OWNED => Ownership::Right,
            PERSIST if self.owning => Ownership::Claimable,
            _ if self.owning => Ownership::Never,
            _ => Ownership::Right,
        }
    }

    fn chains(&mut self, family: Family, table: &mut LoadedTable) -> Result<(), LoadError> {
        let mut rules: BTreeMap<String, Vec<RuleText>> = BTreeMap::new();
        let mut filter = Rule::new();
        filter.set_str(sys::NFTNL_RULE_TABLE, TABLE);
        let all = request(libc::NFT_MSG_GETRULE, nfproto(family), libc::NLM_F_DUMP, |header| {
            filter.build(header);
        });
        self.run("list rules", &all, |message| {
            let Some(rule) = Rule::parse(message) else { return };
            if rule.get_str(sys::NFTNL_RULE_TABLE).as_deref() == Some(TABLE)
                && let Some(chain) = rule.get_str(sys::NFTNL_RULE_CHAIN)
            {
                rules.entry(chain).or_default().push(RuleText::of(&rule));
            }
        })?;
        let options = self.options;
        let all = request(libc::NFT_MSG_GETCHAIN, nfproto(family), libc::NLM_F_DUMP, |_| ());
        self.run("list chains", &all, |message| {
            let Some(chain) = Chain::parse(message) else { return };
            if chain.get_str(sys::NFTNL_CHAIN_TABLE).as_deref() == Some(TABLE)
                && let Some(name) = chain.get_str(sys::NFTNL_CHAIN_NAME)
            {
                let found = rules.get(&name).map_or(&[][..], Vec::as_slice);
                let state = match name.parse::<ChainName>() {
                    Err(_) => ChainState::Unknown,
                    Ok(known) => {
                        compare(&chain, found, &dataplane::chain(known, family, options), family)
                    }
                };
                table.chains.insert(name, state);
            }
        })
    }

    fn sets(&mut self, family: Family, table: &mut LoadedTable) -> Result<(), LoadError> {
        let all = sets_request(family);
        let mut ours = Vec::new();
        let mut affinities = Vec::new();
        self.run("list sets", &all, |message| {
            let Some(set) = Set::parse(message) else { return };
            if set.get_str(sys::NFTNL_SET_TABLE).as_deref() == Some(TABLE)
                && let Some(name) = set.get_str(sys::NFTNL_SET_NAME)
            {
                let state = match name.parse::<SetName>() {
                    Err(_) if name == CONNECTIONS => connections::state(&set, family),
                    Err(_) => match name.parse::<AffinityName>() {
                        Err(_) => SetState::Unknown,
                        Ok(known) if affinity::is_defined(&set, family) => {
                            affinities.push(known);
                            SetState::Same
                        }
                        Ok(_) => SetState::Differs,
                    },
                    Ok(known) if is_defined_as(&set, known, family) => {
                        ours.push(known);
                        SetState::Same
                    }
                    Ok(_) => SetState::Differs,
                };
                table.sets.insert(name, state);
            }
        })?;
        for set in ours {
            if !self.elements(family, set, &mut table.elements)? {
                table.sets.insert(set.to_string(), SetState::Differs);
            }
        }
        for name in affinities {
            let held = affinity::backends(self.socket, family, &name)?;
            table.affinities.insert(name, held);
        }
        Ok(())
    }

    /// Reads the elements of a set. False if one of them was not understood.
    fn elements(
        &mut self,
        family: Family,
        set: SetName,
        elements: &mut BTreeMap<ElementId, Value>,
    ) -> Result<bool, LoadError> {
        let mut pause = Duration::ZERO;
        whole(family, set, elements, |reading| {
            sleep(pause);
            pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            let mut filter = Set::new();
            filter.set_str(sys::NFTNL_SET_TABLE, TABLE);
            filter.set_str(sys::NFTNL_SET_NAME, set.as_str());
            let all = elements_request(family, filter);
            self.run("list elements", &all, |message| {
                reading.understood &= Set::parse_elements(message, |element| reading.add(&element));
            })
        })
    }
}

/// Asks for the sets of our table.
pub(super) fn sets_request(family: Family) -> Vec<u8> {
    let mut filter = Set::new();
    filter.set_str(sys::NFTNL_SET_TABLE, TABLE);
    request(libc::NFT_MSG_GETSET, nfproto(family), libc::NLM_F_DUMP, |header| filter.build(header))
}

/// Asks for our table alone.
pub(super) fn table_request(family: Family) -> Vec<u8> {
    let mut table = Table::new();
    table.set_str(sys::NFTNL_TABLE_NAME, TABLE);
    request(libc::NFT_MSG_GETTABLE, nfproto(family), libc::NLM_F_ACK, |header| table.build(header))
}

/// Asks for a set alone.
pub(super) fn set_request(family: Family, mut set: Set) -> Vec<u8> {
    request(libc::NFT_MSG_GETSET, nfproto(family), libc::NLM_F_ACK, |header| set.build(header))
}

/// Asks for the elements of a set.
pub(super) fn elements_request(family: Family, mut filter: Set) -> Vec<u8> {
    request(libc::NFT_MSG_GETSETELEM, nfproto(family), libc::NLM_F_DUMP, |header| {
        filter.build_elements(header);
    })
}

/// The comment in a table's userdata: TLVs of one byte type and one byte length.
fn comment(userdata: &[u8]) -> Option<String> {
    let [kind, len, text @ ..] = userdata else { return None };
    let text = text.get(..usize::from(*len))?;
    (u32::from(*kind) == sys::NFTNL_UDATA_TABLE_COMMENT)
        .then(|| String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned())
}

/// What of a rule can be compared: its instructions and comment.
#[derive(Debug, PartialEq, Eq)]
struct RuleText {
    instructions: Vec<String>,
    comment: Option<String>,
}

impl RuleText {
    fn of(rule: &Rule) -> Self {
        let comment = rule.get_data(sys::NFTNL_RULE_USERDATA).and_then(|data| comment(&data));
        Self { instructions: rule.instructions(), comment }
    }
}

fn compare(chain: &Chain, found: &[RuleText], wanted: &WantedChain, family: Family) -> ChainState {
    let kind = chain.get_str(sys::NFTNL_CHAIN_TYPE);
    let same_base = match wanted.base {
        None => kind.is_none(),
        Some(base) => {
            let wanted_kind = match base.kind {
                BaseKind::Filter => "filter",
                BaseKind::Nat => "nat",
            };
            kind.as_deref() == Some(wanted_kind)
                && chain.get_u32(sys::NFTNL_CHAIN_HOOKNUM) == hook(base.hook) as u32
                && chain.priority() == base.priority
                && chain.get_u32(sys::NFTNL_CHAIN_POLICY) == nftnl::Policy::Accept as u32
        }
    };
    if !same_base {
        return ChainState::BaseDiffers;
    }
    let same_rules = found.len() == wanted.rules.len()
        && wanted.rules.iter().zip(found).all(|(wanted, found)| {
            let instructions = lower(wanted, family);
            found.comment.as_deref() == wanted.comment
                && instructions.len() == found.instructions.len()
                && instructions.iter().zip(&found.instructions).all(|(a, b)| a.text_form() == *b)
        });
    if same_rules { ChainState::Same } else { ChainState::RulesDiffer }
}

fn is_defined_as(set: &Set, name: SetName, family: Family) -> bool {
    // A map of verdicts has the length of a verdict, which is the kernel's business.
    let same_data = match name.data() {
        DataType::Backend => set.get_u32(sys::NFTNL_SET_DATA_LEN) == data_len(family, name),
        DataType::Verdict => set.get_u32(sys::NFTNL_SET_DATA_TYPE) == 0xffff_ff00,
        DataType::None => true,
    };
    same_data
        && set.get_u32(sys::NFTNL_SET_KEY_LEN) == key_len(family, name)
        && set.get_u32(sys::NFTNL_SET_FLAGS) == set_flags(name)
}

#[cfg(test)]
mod hostile;
