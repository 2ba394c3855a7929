//! What happens to slots, as a record that outlives the process, and a catalog made from it.

use kvmesh_core::Digest;

use super::super::entry::{Block, Key, State};
use super::super::{NamespaceId, Slot, Stats};
use super::Catalog;
use crate::eviction::{BlockId, Policy, Tick, Use};
use crate::journal::{Change, Journal};
use crate::namespace::Namespace;

/// A slot's new content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Holds this block now.
    Stored {
        slot: Slot,
        namespace: NamespaceId,
        digest: Digest,
        parent: Option<Digest>,
    },
    /// Does not hold this block any more.
    Removed {
        slot: Slot,
        namespace: NamespaceId,
        digest: Digest,
        parent: Option<Digest>,
    },
}

impl Event {
    pub(super) fn removed(slot: Slot, key: &Key, parent: Option<Digest>) -> Self {
        Self::Removed {
            slot,
            namespace: key.0,
            digest: key.1,
            parent,
        }
    }

    pub(super) fn stored(slot: Slot, key: &Key, parent: Option<Digest>) -> Self {
        Self::Stored {
            slot,
            namespace: key.0,
            digest: key.1,
            parent,
        }
    }
}

impl Catalog {
    /// A catalog whose slots' contents are recorded.
    pub(crate) fn recorded(capacity: u64, policy: Policy) -> Self {
        let mut catalog = Self::new(capacity, policy);
        catalog.events = Some(Vec::new());
        catalog
    }

    /// From now on slots' contents are recorded.
    pub(crate) fn record(&mut self) {
        self.events.get_or_insert_default();
    }

    /// Bytes of a region: slots keep their places as long as it stays the same.
    pub(crate) fn region_bytes(&self) -> u64 {
        self.slabs.region_bytes()
    }

    /// The events since the last call, oldest first.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        self.events.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The open namespaces, by their numbers.
    pub(crate) fn known_namespaces(&self) -> impl Iterator<Item = &Namespace> {
        self.namespaces.iter().map(|open| &open.namespace)
    }

    /// An open namespace.
    pub(crate) fn namespace(&self, namespace: NamespaceId) -> &Namespace {
        &self.namespaces[namespace.0 as usize].namespace
    }

    /// What is there, in the order of its last use.
    pub(crate) fn recorded_blocks(&self) -> Vec<Event> {
        let mut blocks: Vec<(Tick, BlockId, Event)> = (self.index.iter())
            .filter_map(|(key, slot)| {
                let block = self.slabs.get(slot)?;
                let there = matches!(block.state, State::Registered { .. });
                let event = Event::stored(slot, key, block.parent);
                there.then_some((block.used, block.id, event))
            })
            .collect();
        blocks.sort_unstable_by_key(|&(used, id, _)| (used, id));
        blocks.into_iter().map(|(.., event)| event).collect()
    }

    /// What is there, each with its parent, the longest unused first.
    pub(crate) fn by_use(&self) -> Vec<(NamespaceId, Digest, Option<Digest>)> {
        let block = |event| match event {
            Event::Stored {
                namespace,
                digest,
                parent,
                ..
            } => Some((namespace, digest, parent)),
            Event::Removed { .. } => None,
        };
        let blocks = self.recorded_blocks().into_iter();
        blocks.filter_map(block).collect()
    }

    /// Totals go on from those of another catalog.
    pub(crate) fn count_on_from(&mut self, other: &Stats) {
        let own = self.stats;
        self.stats = Stats {
            capacity_bytes: own.capacity_bytes,
            used_bytes: own.used_bytes,
            blocks: own.blocks,
            blocks_in_use: own.blocks_in_use,
            ..*other
        };
    }

    /// Notes all that is there as stored.
    pub(crate) fn announce_all(&self, journal: &Journal) {
        for change in self.chains() {
            if let Change::Stored { mut parent, hashes } = change {
                for hash in hashes {
                    journal.stored(parent.replace(hash), hash);
                }
            }
        }
    }

    /// Notes all that is there as removed.
    pub(crate) fn renounce_all(&self, journal: &Journal) {
        for change in self.chains() {
            if let Change::Stored { hashes, .. } = change {
                hashes.into_iter().for_each(|hash| journal.removed(hash));
            }
        }
    }

    /// Puts blocks where they were, in the order they were stored; those that do not fit are left out. Of a catalog that
    /// holds nothing yet. Nothing is announced.
    pub(crate) fn restore(&mut self, stored: &[Event]) -> usize {
        let mut restored = Vec::with_capacity(stored.len());
        for event in stored {
            let &Event::Stored {
                slot,
                namespace,
                digest,
                parent,
            } = event
            else {
                continue;
            };
            let key = Key(namespace, digest);
            let operation = self.begin(namespace, None, &[]);
            let at = Use {
                key: key.name(),
                parent: parent.map(|parent| Key(namespace, parent).name()),
                ..operation
            };
            let part = self.part_for(namespace, None, &[]);
            let block = Block {
                key,
                parent,
                state: State::Registered { readers: 0 },
                used: at.tick,
                part,
                id: BlockId(0),
                parked: None,
                came_from: None,
            };
            let slab = self.slab_of(namespace);
            if self.index.get(&key).is_some() || !self.slabs.insert_at(slab, slot, block) {
                continue;
            }
            let id = self.parts[part.0].ranking.add(slot, &at);
            self.count(part, true);
            self.slabs.used(slot, at.tick);
            if let Some(block) = self.slabs.get_mut(slot) {
                block.id = id;
            }
            self.index.insert(key, slot);
            self.follow_parent(key, parent);
            restored.push(slot);
        }
        self.slabs.settle();
        for &slot in &restored {
            self.offer(slot);
        }
        self.stats.blocks += restored.len() as u64;
        restored.len()
    }

    /// Takes in a block that is there already, if there is room without another's leaving; whether it is new.
    pub(crate) fn adopt(
        &mut self,
        journal: &Journal,
        namespace: NamespaceId,
        digest: Digest,
        parent: Option<Digest>,
    ) -> bool {
        let key = Key(namespace, digest);
        let slab = self.slab_of(namespace);
        if self.index.get(&key).is_some() || self.slabs.room(slab).0 == 0 {
            return false;
        }
        let operation = self.begin(namespace, None, &[]);
        let at = Use {
            key: key.name(),
            parent: parent.map(|parent| Key(namespace, parent).name()),
            ..operation
        };
        let state = State::Registered { readers: 0 };
        let part = self.part_for(namespace, None, &[]);
        let Some(slot) = self.place(journal, part, key, parent, state, &at) else {
            return false;
        };
        self.offer(slot);
        self.announce(journal, slot);
        true
    }

    /// The block turned out to be gone: it is forgotten, which is not recorded.
    pub(crate) fn disown(&mut self, journal: &Journal, slot: Slot) {
        let before = self.events.as_ref().map_or(0, Vec::len);
        self.forget(journal, slot, false);
        if let Some(events) = &mut self.events {
            events.truncate(before);
        }
    }

    /// A slot's block, and the one it follows.
    pub(crate) fn link(&self, slot: Slot) -> Option<(NamespaceId, Digest, Option<Digest>)> {
        let block = self.slabs.get(slot)?;
        Some((block.key.0, block.key.1, block.parent))
    }
}
