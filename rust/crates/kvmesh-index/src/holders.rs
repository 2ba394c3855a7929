//! Who can hold blocks, and what each engine sees.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use kvmesh_core::{Error, ErrorKind, Result, Tier};

/// Holders an index can have at once.
pub const MAX_HOLDERS: usize = 4096;

const INDEX_BITS: u32 = MAX_HOLDERS.trailing_zeros();
const TIERS: usize = Tier::ALL.len();

/// Slots there can be.
pub const MAX_SLOTS: usize = MAX_HOLDERS * TIERS;

/// The node of a holder without one.
pub const NO_NODE: u16 = u16::MAX;

/// Names a holder until it is dropped. Never names another one: a number in use again comes with
/// another generation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HolderId(u32);

impl HolderId {
    fn new(index: usize, generation: u32) -> Self {
        Self(generation << INDEX_BITS | index as u32)
    }

    /// The id a caller got from [`HolderId::get`].
    pub fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    /// The id as a number.
    pub fn get(self) -> u32 {
        self.0
    }

    fn generation(self) -> u32 {
        self.0 >> INDEX_BITS
    }

    /// The holder's number.
    pub(crate) fn index(self) -> usize {
        self.0 as usize % MAX_HOLDERS
    }
}

/// One tier of one holder. Those of a tier lie side by side, by the holders' numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Slot(u16);

/// Slots in a group: one bit of a word each.
pub const GROUP: usize = u64::BITS as usize;
/// Groups of a tier.
const TIER_GROUPS: usize = MAX_HOLDERS / GROUP;

impl Slot {
    pub fn new(holder: u16, tier: Tier) -> Self {
        Self((tier as u16) << INDEX_BITS | holder)
    }

    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    pub fn bits(self) -> u16 {
        self.0
    }

    /// The slot of this number in a group.
    #[inline]
    pub fn of_group(group: u8, number: u32) -> Self {
        Self(u16::from(group) * GROUP as u16 + number as u16)
    }

    /// The slot's group.
    #[inline]
    pub fn group(self) -> u8 {
        (self.0 / GROUP as u16) as u8
    }

    /// Its bit in words of the group.
    #[inline]
    pub fn member(self) -> u64 {
        1 << (self.0 % GROUP as u16)
    }

    #[inline]
    pub fn index(self) -> usize {
        self.0 as usize
    }

    #[inline]
    pub fn holder(self) -> u16 {
        self.0 % MAX_HOLDERS as u16
    }

    #[inline]
    pub fn tier(self) -> Tier {
        Tier::ALL[self.0 as usize / MAX_HOLDERS % TIERS]
    }
}

/// The tier of a group, and where its holders are in words by holder number.
#[inline]
pub fn tier_of_group(group: u8) -> (Tier, usize) {
    let group = usize::from(group);
    (Tier::ALL[group / TIER_GROUPS], group % TIER_GROUPS)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Engine,
    Store,
}

/// A holder as it was added.
#[derive(Clone)]
pub struct Holder {
    pub name: Arc<str>,
    pub kind: Kind,
    node: u16,
}

/// A holder's number, and its generation, kept while the number is free.
#[derive(Clone, Default)]
struct Seat {
    generation: u32,
    holder: Option<Holder>,
}

/// A machine, as long as a holder is on it.
#[derive(Clone)]
struct Node {
    name: Arc<str>,
    engines: Vec<u16>,
    holders: usize,
}

/// Versions of holders so far, in all indexes.
static VERSIONS: AtomicU64 = AtomicU64::new(0);

/// All holders by number, and the nodes they are on. Readers have one that never changes; whoever adds or drops a
/// holder puts another in its place.
#[derive(Clone, Default)]
pub struct Holders {
    /// Tells these holders from any others; 0 for none.
    version: u64,
    seats: Vec<Seat>,
    free: Vec<u16>,
    nodes: Vec<Option<Node>>,
    /// Bits by number: who is an engine.
    engines: Vec<u64>,
    /// By number what a match asks of its engines, in columns: the id and the node, or [`NO_NODE`].
    ids: Vec<HolderId>,
    node_of: Vec<u16>,
}

impl Holders {
    /// Adds a holder, whose name nobody has. Fails when [`MAX_HOLDERS`] are there.
    pub fn add(&mut self, name: Arc<str>, node: Option<&str>, kind: Kind) -> Result<HolderId> {
        if self.free.is_empty() && self.seats.len() == MAX_HOLDERS {
            return Err(
                Error::new(ErrorKind::LimitExceeded, "too many holders; drop one first")
                    .with_context("limit", MAX_HOLDERS),
            );
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.seats.push(Seat::default());
            (self.seats.len() - 1) as u16
        });
        self.sit(index, name, node, kind);
        Ok(HolderId::new(
            index.into(),
            self.seats[usize::from(index)].generation,
        ))
    }

    fn sit(&mut self, index: u16, name: Arc<str>, node: Option<&str>, kind: Kind) {
        self.renew();
        let node = node.map_or(NO_NODE, |node| self.join_node(node));
        let word = usize::from(index) / GROUP;
        self.engines.resize(self.engines.len().max(word + 1), 0);
        if kind == Kind::Engine {
            self.engines[word] |= 1 << (usize::from(index) % GROUP);
            if let Some(Some(node)) = self.nodes.get_mut(usize::from(node)) {
                node.engines.push(index);
            }
        }
        let seat = &mut self.seats[usize::from(index)];
        seat.holder = Some(Holder { name, kind, node });
        let id = HolderId::new(index.into(), seat.generation);
        let numbers = self.ids.len().max(usize::from(index) + 1);
        self.ids.resize(numbers, id);
        self.ids[usize::from(index)] = id;
        self.node_of.resize(numbers, NO_NODE);
        self.node_of[usize::from(index)] = node;
    }

    fn renew(&mut self) {
        self.version = VERSIONS.fetch_add(1, Relaxed) + 1;
    }

    /// Differs between any two sets of holders, whichever index they are of.
    #[inline]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Puts a holder back under the id it had, when nobody has its number.
    pub fn restore(
        &mut self,
        id: HolderId,
        name: Arc<str>,
        node: Option<&str>,
        kind: Kind,
    ) -> bool {
        let Some(seat) = self
            .seats
            .get_mut(id.index())
            .filter(|seat| seat.holder.is_none())
        else {
            return false;
        };
        seat.generation = id.generation();
        self.free.retain(|&free| usize::from(free) != id.index());
        self.sit(id.index() as u16, name, node, kind);
        true
    }

    /// Every number's generation, free ones included: ids are not to come twice.
    pub fn generations(&self) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.seats.iter().map(|seat| seat.generation)
    }

    /// As many free numbers with these generations.
    pub fn with_generations(generations: Vec<u32>) -> Self {
        let free = (0..generations.len() as u16).rev().collect();
        let seat = |generation| Seat {
            generation,
            holder: None,
        };
        Self {
            seats: generations.into_iter().map(seat).collect(),
            free,
            ..Self::default()
        }
    }

    fn join_node(&mut self, name: &str) -> u16 {
        let known = self
            .nodes
            .iter()
            .position(|node| matches!(node, Some(n) if &*n.name == name));
        let index = known
            .or_else(|| self.nodes.iter().position(Option::is_none))
            .unwrap_or(self.nodes.len());
        if index == self.nodes.len() {
            self.nodes.push(None);
        }
        let fresh = || Node {
            name: name.into(),
            engines: Vec::new(),
            holders: 0,
        };
        self.nodes[index].get_or_insert_with(fresh).holders += 1;
        index as u16
    }

    /// Forgets a holder and frees its number.
    pub fn drop(&mut self, id: HolderId) {
        self.renew();
        let index = id.index();
        let seat = &mut self.seats[index];
        // The id's remaining bits; a number would have to be used a million times to repeat an id.
        seat.generation = (seat.generation + 1) & (u32::MAX >> INDEX_BITS);
        let holder = seat.holder.take();
        self.free.push(index as u16);
        self.node_of[index] = NO_NODE;
        self.engines[index / GROUP] &= !(1 << (index % GROUP));
        let Some(at) = holder.map(|holder| usize::from(holder.node)) else {
            return;
        };
        if let Some(Some(node)) = self.nodes.get_mut(at) {
            node.engines.retain(|&engine| usize::from(engine) != index);
            node.holders -= 1;
            if node.holders == 0 {
                self.nodes[at] = None;
            }
        }
    }

    /// A live holder. Fails with `NotFound`.
    pub fn get(&self, id: HolderId) -> Result<&Holder> {
        self.seats
            .get(id.index())
            .filter(|seat| HolderId::new(id.index(), seat.generation) == id)
            .and_then(|seat| seat.holder.as_ref())
            .ok_or_else(|| Self::unknown(id))
    }

    /// The error for an id that names nobody.
    pub fn unknown(id: HolderId) -> Error {
        Error::new(
            ErrorKind::NotFound,
            "no such holder; it was dropped or never added",
        )
        .with_context("id", id.get())
    }

    /// The live holder that a slot belongs to.
    pub fn holder(&self, slot: Slot) -> Option<&Holder> {
        self.seats.get(usize::from(slot.holder()))?.holder.as_ref()
    }

    /// All live holders by id.
    pub fn iter(&self) -> impl Iterator<Item = (HolderId, &Holder)> {
        let id = |(index, seat): (usize, &Seat)| HolderId::new(index, seat.generation);
        self.seats.iter().enumerate().filter_map(move |entry| {
            let holder = entry.1.holder.as_ref()?;
            Some((id(entry), holder))
        })
    }

    /// The name of a holder's node.
    pub fn node_name(&self, holder: &Holder) -> Option<&str> {
        let node = self.nodes.get(usize::from(holder.node))?.as_ref()?;
        Some(&node.name)
    }

    /// One more than the highest number in use.
    pub fn numbers(&self) -> usize {
        self.seats.len()
    }

    /// One more than the highest node number in use.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// The node a holder is on.
    #[inline]
    pub fn node_of(&self, holder: u16) -> Option<u16> {
        let node = *self.node_of.get(usize::from(holder))?;
        (node != NO_NODE).then_some(node)
    }

    /// The ids of live holders, by number; what other numbers have is no one's.
    pub fn ids(&self) -> &[HolderId] {
        &self.ids
    }

    /// Bits by number: who is an engine. As many words as the numbers in use need.
    pub fn engine_words(&self) -> &[u64] {
        &self.engines
    }

    /// Live engines.
    pub fn engines(&self) -> usize {
        let count = |word: &u64| word.count_ones() as usize;
        self.engines.iter().map(count).sum()
    }

    /// The engines of a node.
    pub fn engines_of(&self, node: u16) -> &[u16] {
        self.nodes[usize::from(node)]
            .as_ref()
            .map_or(&[], |node| &node.engines)
    }

    /// Live holders.
    pub fn len(&self) -> usize {
        self.seats.len() - self.free.len()
    }
}

impl Holder {
    /// Why such a holder cannot have blocks in a tier.
    pub fn lacks(&self, tier: Tier) -> Option<&'static str> {
        let (fits, advice) = match (self.kind, self.node) {
            (Kind::Engine, _) => (
                tier == Tier::Device,
                "an engine holds blocks on its device only; add a store",
            ),
            (Kind::Store, NO_NODE) => (
                tier == Tier::Network,
                "a store without a node has the network tier only",
            ),
            (Kind::Store, _) => (
                tier != Tier::Device,
                "a store has no device tier; use host, nvme or network",
            ),
        };
        (!fits).then_some(advice)
    }
}
