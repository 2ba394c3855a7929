//! Which blocks a tier holds, in what state, and which of them leave: everything about a tier but the bytes.

mod chaining;
mod hinting;
mod leaving;
mod parking;
mod promoting;
mod restoring;
mod shares;
mod walking;

use std::sync::Arc;
use std::time::Instant;

use kvmesh_core::Digest;
use rustc_hash::FxHashMap;

use super::by_name::ByName;
use super::chains::chains_of;
use super::entry::{Block, Key, State};
use super::slabs::{SlabId, Slabs};
use super::{NamespaceId, Room, Slot, Stats};
use crate::error::Result;
use crate::eviction::Ghosts;
use crate::eviction::{self, BlockId, Hints, Policy, Tick, Use};
use crate::image::Layout;
use crate::journal::{Change, Journal};
use crate::namespace::Namespace;

pub(crate) use parking::Leaving;
pub(super) use restoring::Event;
pub(super) use shares::PartId;
use shares::{Part, PartsOfSlab, Shares};

struct Open {
    namespace: Namespace,
    layout: Arc<Layout>,
    slab: SlabId,
}

/// The blocks of one tier. Not thread-safe: the tier holds it under its lock.
pub(super) struct Catalog {
    namespaces: Vec<Open>,
    index: ByName,
    /// How many blocks, reserved ones included, name the key as their parent.
    followers: FxHashMap<Key, u32>,
    slabs: Slabs<Block>,
    parts: Vec<Part>,
    by_slab: Vec<PartsOfSlab>,
    /// None: tenants have none.
    shares: Option<Shares>,
    policy: Policy,
    clock: Tick,
    begun: Instant,
    stats: Stats,
    hinted: Ghosts<Hints>,
    /// Blocks are written to a tier below before they leave.
    parks: bool,
    /// What happened to slots, where somebody keeps a record.
    events: Option<Vec<Event>>,
}

impl Catalog {
    pub(super) fn new(capacity: u64, policy: Policy) -> Self {
        Self {
            namespaces: Vec::new(),
            index: ByName::default(),
            followers: FxHashMap::default(),
            slabs: Slabs::new(capacity),
            parts: Vec::new(),
            by_slab: Vec::new(),
            shares: None,
            policy,
            clock: 0,
            begun: Instant::now(),
            stats: Stats {
                capacity_bytes: capacity,
                ..Stats::default()
            },
            hinted: Ghosts::default(),
            parks: false,
            events: None,
        }
    }

    pub(super) fn open(&mut self, namespace: &Namespace) -> Result<NamespaceId> {
        if let Some(known) = self
            .namespaces
            .iter()
            .position(|open| open.namespace == *namespace)
        {
            return Ok(NamespaceId(known as u32));
        }
        let layout = Arc::new(Layout::new(namespace));
        let slab = self.slabs.open(layout.slot_bytes() as u64)?;
        self.add_parts();
        self.namespaces.push(Open {
            namespace: namespace.clone(),
            layout,
            slab,
        });
        Ok(NamespaceId((self.namespaces.len() - 1) as u32))
    }

    pub(super) fn layout(&self, namespace: NamespaceId) -> &Arc<Layout> {
        &self.namespaces[namespace.0 as usize].layout
    }

    /// The block a slot is for.
    pub(super) fn block(&self, slot: Slot) -> Option<(NamespaceId, Digest)> {
        self.slabs.get(slot).map(|block| (block.key.0, block.key.1))
    }

    pub(super) fn lookup(&mut self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        let found = chain
            .iter()
            .take_while(|digest| self.readable(&Key(namespace, **digest)).is_some())
            .count();
        self.stats.lookups += chain.len() as u64;
        self.stats.hits += found as u64;
        found
    }

    pub(super) fn reserve(
        &mut self,
        journal: &Journal,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        self.reserve_as(State::Reserved, journal, namespace, parent, chain)
    }

    fn reserve_as(
        &mut self,
        state: State,
        journal: &Journal,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        let operation = self.begin(namespace, parent, chain);
        let part = self.part_for(namespace, parent, chain);
        let mut rooms = Vec::with_capacity(chain.len());
        let mut parent = parent.copied();
        for (place, &digest) in chain.iter().enumerate() {
            let key = Key(namespace, digest);
            let at = Use {
                key: key.name(),
                parent: parent.map(|parent| Key(namespace, parent).name()),
                tail: place + 1 == chain.len(),
                ..operation
            };
            rooms.push(if rooms.last() == Some(&Room::Full) {
                self.parts[part.0].ranking.admits(&at);
                Room::Full
            } else if let Some(slot) = self.index.get(&key) {
                self.use_now(slot, &at);
                self.offer(slot);
                Room::Present
            } else if let Some(slot) = self.place(journal, part, key, parent, state, &at) {
                self.stats.blocks_in_use += 1;
                Room::Reserved(slot)
            } else {
                Room::Full
            });
            parent = Some(digest);
        }
        rooms
    }

    /// Whether the slot is reserved, so that its owner may write it.
    pub(super) fn is_reserved(&self, slot: Slot) -> bool {
        self.slabs
            .get(slot)
            .is_some_and(|block| block.state == State::Reserved)
    }

    /// Reserved becomes sealed; says whether it was reserved.
    pub(super) fn seal(&mut self, slot: Slot) -> bool {
        match self.slabs.get_mut(slot) {
            Some(block) if block.state == State::Reserved => {
                block.state = State::Sealed;
                true
            }
            _ => false,
        }
    }

    pub(super) fn abandon(&mut self, slot: Slot) {
        let Some(block) = self.slabs.get(slot) else {
            return;
        };
        if matches!(block.state, State::Reserved | State::Sealed) {
            self.stats.blocks_in_use -= 1;
            self.unlist(slot, false);
            self.vacate(slot);
        }
    }

    pub(super) fn register(&mut self, journal: &Journal, slots: &[Slot]) {
        for &slot in slots {
            let Some(block) = self.slabs.get_mut(slot) else {
                continue;
            };
            if block.state != State::Sealed {
                continue;
            }
            block.state = State::Registered { readers: 0 };
            let namespace = block.key.0;
            self.stats.blocks_in_use -= 1;
            self.stats.stored += 1;
            self.stats.stored_bytes += self.layout(namespace).slot_bytes() as u64;
            self.offer(slot);
            self.announce(journal, slot);
        }
    }

    /// A block is registered now.
    fn announce(&mut self, journal: &Journal, slot: Slot) {
        let Some(block) = self.slabs.get(slot) else {
            return;
        };
        let (key, parent) = (block.key, block.parent);
        self.stats.blocks += 1;
        if let Some(events) = &mut self.events {
            events.push(Event::stored(slot, &key, parent));
        }
        if self.is_announced(key.0) {
            journal.stored(parent.as_ref().map(Digest::block_hash), key.1.block_hash());
        }
    }

    pub(super) fn lease(
        &mut self,
        namespace: NamespaceId,
        chain: &[Digest],
        limit: usize,
    ) -> Vec<Slot> {
        let operation = self.begin(namespace, None, chain);
        let mut slots = Vec::new();
        for digest in chain.iter().take(limit) {
            let key = Key(namespace, *digest);
            let Some(slot) = self.readable(&key) else {
                break;
            };
            let Some(block) = self.slabs.get_mut(slot) else {
                break;
            };
            match &mut block.state {
                State::Registered { readers } => {
                    self.stats.blocks_in_use += u64::from(*readers == 0);
                    *readers += 1;
                }
                State::Promoting { readers } => *readers += 1,
                _ => {}
            }
            let at = Use {
                key: key.name(),
                parent: block.parent.map(|parent| Key(namespace, parent).name()),
                ..operation
            };
            self.use_now(slot, &at);
            slots.push(slot);
        }
        self.stats.loaded += slots.len() as u64;
        self.stats.loaded_bytes += (slots.len() * self.layout(namespace).slot_bytes()) as u64;
        slots
    }

    pub(super) fn release(&mut self, slot: Slot) {
        let Some(block) = self.slabs.get_mut(slot) else {
            return;
        };
        match &mut block.state {
            State::Registered { readers } if *readers > 0 => {
                *readers -= 1;
                if *readers == 0 {
                    self.stats.blocks_in_use -= 1;
                    self.offer(slot);
                }
            }
            State::Promoting { readers } if *readers > 0 => *readers -= 1,
            State::Doomed { readers } => {
                *readers -= 1;
                if *readers == 0 {
                    self.stats.blocks_in_use -= 1;
                    self.free(slot);
                }
            }
            _ => {}
        }
    }

    pub(super) fn stats(&self) -> Stats {
        Stats {
            used_bytes: self.slabs.used_bytes(),
            ..self.stats
        }
    }

    /// All announced blocks as chains.
    pub(super) fn chains(&self) -> Vec<Change> {
        let announced = self.index.iter().filter_map(|(key, slot)| {
            let block = self.slabs.get(slot)?;
            let registered = matches!(block.state, State::Registered { .. });
            let shown = self.is_announced(key.0) && registered;
            let parent = block.parent.map(|parent| Key(key.0, parent));
            shown.then_some((*key, parent))
        });
        chains_of(announced.collect(), |key| key.1.block_hash())
    }

    /// A new operation, as the use of no block.
    fn begin(&mut self, namespace: NamespaceId, parent: Option<&Digest>, chain: &[Digest]) -> Use {
        self.clock += 1;
        let hints = self.hints_of(namespace, parent, chain);
        self.stats.hinted += u64::from(hints != Hints::default());
        Use {
            key: eviction::Key(0),
            parent: None,
            tail: false,
            tick: self.clock,
            seconds: self.begun.elapsed().as_secs_f64(),
            hints,
        }
    }

    fn slab_of(&self, namespace: NamespaceId) -> SlabId {
        self.namespaces[namespace.0 as usize].slab
    }

    fn is_announced(&self, namespace: NamespaceId) -> bool {
        self.namespaces[namespace.0 as usize].namespace.rank == 0
    }

    /// The slot of a block that is registered, or will be without anybody's doing.
    fn readable(&self, key: &Key) -> Option<Slot> {
        let slot = self.index.get(key)?;
        let state = self.slabs.get(slot)?.state;
        matches!(state, State::Registered { .. } | State::Promoting { .. }).then_some(slot)
    }

    /// Reserves a slot for a block, evicting if need be and if it is worth it.
    fn place(
        &mut self,
        journal: &Journal,
        part: PartId,
        key: Key,
        parent: Option<Digest>,
        state: State,
        at: &Use,
    ) -> Option<Slot> {
        let slab = self.parts[part.0].slab;
        let block = Block {
            key,
            parent,
            state,
            used: at.tick,
            part,
            id: BlockId(0),
            parked: None,
            came_from: None,
        };
        // First, so that room is not made by evicting the very block this one follows.
        self.follow(&block);
        let placed = match self.slabs.insert(slab, block) {
            Ok(slot) => Ok(slot),
            Err(block) => {
                self.make_room(journal, part, at);
                self.slabs.insert(slab, block)
            }
        };
        match placed {
            Ok(slot) => {
                let id = self.parts[part.0].ranking.add(slot, at);
                self.count(part, true);
                self.slabs.used(slot, at.tick);
                if let Some(block) = self.slabs.get_mut(slot) {
                    block.id = id;
                }
                self.index.insert(key, slot);
                Some(slot)
            }
            Err(block) => {
                self.unfollow(&block);
                None
            }
        }
    }
}
