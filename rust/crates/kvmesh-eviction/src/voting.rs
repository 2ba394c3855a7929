//! The default: the class index, LRU and GDSF by vote.
//!
//! Each of the three manages a cache without bytes of the same capacity, from the same uses, and its word counts the
//! more, the more that cache has hit of late ([`Votes`]). What they hold by the least weight leaves the real cache
//! first. So it holds what the one holds that is clearly ahead; and while none is, what most of them hold, which is
//! about as good as each, where following whoever was ahead last would be worse than all.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use crate::commitment::Round;
use crate::votes::{EXPERTS, Holders, Votes};
use crate::{
    BlockId, ClassIndex, EvictionPolicy, Gdsf, Key, Link, Lru, PrefixCache, Tick, Use, entry,
};

/// What was hit counts half after so many uses for each block in the cache, and at least.
const HALF_LIFE: f64 = 32.0;
const LEAST_HALF_LIFE: f64 = 16_384.0;

/// The expert that has an opinion on when a block returns.
const CLASS_INDEX: usize = 0;

struct Expert {
    cache: PrefixCache,
    /// Hits in the current operation.
    hits: f64,
}

/// A block that some expert or the real cache holds.
#[derive(Debug, Clone)]
struct Node {
    key: Key,
    parent: Link,
    /// Nodes that name it as their parent, and caches that hold it.
    references: u32,
    used: Tick,
    /// In the real cache.
    real: Link,
    holders: Holders,
}

/// A block of the real cache.
#[derive(Debug, Default, Clone)]
struct Real {
    /// None: nobody else holds it, or another real block has the same name.
    node: Link,
    present: bool,
    offered: bool,
    /// Who holds it, while it is offered.
    holders: Holders,
    used: Tick,
}

/// The policy. Memory: what its three policies take, and one entry for each block that one of their caches holds.
pub struct Voting {
    experts: [Expert; EXPERTS],
    votes: Votes,
    ids: FxHashMap<Key, BlockId>,
    nodes: Vec<Node>,
    vacant: Vec<BlockId>,
    real: Vec<Real>,
    len: usize,
    capacity: usize,
    /// The offered blocks of the real cache, by who holds them.
    offered: [BTreeSet<(Tick, BlockId)>; 1 << EXPERTS],
    /// Of each expert's blocks, those that the real cache does not hold.
    missing: [usize; EXPERTS],
    /// Hits of the real cache in the current operation.
    hits: f64,
    tick: Tick,
    /// Uses in the current operation.
    uses: u64,
    evicted: Vec<BlockId>,
}

impl Default for Voting {
    fn default() -> Self {
        let policies: [Box<dyn EvictionPolicy>; EXPERTS] = [
            Box::new(ClassIndex::default()),
            Box::new(Lru::default()),
            Box::new(Gdsf::default()),
        ];
        Self {
            experts: policies.map(|policy| Expert {
                cache: PrefixCache::new(policy, usize::MAX),
                hits: 0.0,
            }),
            votes: Votes::default(),
            ids: FxHashMap::default(),
            nodes: Vec::new(),
            vacant: Vec::new(),
            real: Vec::new(),
            len: 0,
            capacity: usize::MAX,
            offered: Default::default(),
            missing: [0; EXPERTS],
            hits: 0.0,
            tick: 0,
            uses: 0,
            evicted: Vec::new(),
        }
    }
}

impl Voting {
    /// Lets the experts see a use, once an operation; returns the block's node if anybody holds it.
    fn observe(&mut self, at: &Use) -> Option<BlockId> {
        let node = self.resolve(at);
        let known = &mut self.nodes[node.at()];
        if known.used == at.tick {
            return Some(node);
        }
        known.used = at.tick;
        let parent = known.parent.get();
        if self.tick != at.tick {
            self.tick = at.tick;
            self.compare();
        }
        for expert in 0..self.experts.len() {
            let mut evicted = std::mem::take(&mut self.evicted);
            let Expert { cache, hits, .. } = &mut self.experts[expert];
            let found = cache.touch(node, parent, at, &mut evicted);
            *hits += f64::from(u8::from(found));
            if !found && cache.holds(node) {
                let known = &mut self.nodes[node.at()];
                known.references += 1;
                known.holders |= 1 << expert;
                self.missing[expert] += usize::from(known.real == Link::NONE);
                self.sort(node);
            }
            self.evicted = evicted;
            self.settle(expert);
        }
        self.uses += 1;
        if self.nodes[node.at()].references == 0 {
            // Nobody took it.
            self.nodes[node.at()].references = 1;
            self.release(node);
            return None;
        }
        Some(node)
    }

    /// The node of a block, new if nobody holds it.
    fn resolve(&mut self, at: &Use) -> BlockId {
        if let Some(&node) = self.ids.get(&at.key) {
            return node;
        }
        let parent = at.parent.and_then(|parent| self.ids.get(&parent).copied());
        if let Some(parent) = parent {
            self.nodes[parent.at()].references += 1;
        }
        let new = Node {
            key: at.key,
            parent: parent.into(),
            references: 0,
            used: 0,
            real: Link::NONE,
            holders: 0,
        };
        let node = match self.vacant.pop() {
            Some(node) => {
                self.nodes[node.at()] = new;
                node
            }
            None => {
                self.nodes.push(new);
                BlockId(self.nodes.len() as u32 - 1)
            }
        };
        self.ids.insert(at.key, node);
        node
    }

    /// Ends one reference to a node; forgets it with the last.
    fn release(&mut self, node: BlockId) {
        let known = &mut self.nodes[node.at()];
        known.references -= 1;
        if known.references == 0 {
            self.ids.remove(&known.key);
            self.vacant.push(node);
            if let Some(parent) = known.parent.get() {
                self.release(parent);
            }
        }
    }

    /// What an expert has evicted is not its any more.
    fn settle(&mut self, expert: usize) {
        while let Some(node) = self.evicted.pop() {
            self.unhold(expert, node);
            self.sort(node);
            self.release(node);
        }
    }

    /// An expert does not hold the node any more.
    fn unhold(&mut self, expert: usize, node: BlockId) {
        let known = &mut self.nodes[node.at()];
        known.holders &= !(1 << expert);
        self.missing[expert] -= usize::from(known.real == Link::NONE);
    }

    /// The experts that hold a node.
    fn holding(&self, node: BlockId) -> impl Iterator<Item = usize> + use<> {
        let holders = self.nodes[node.at()].holders;
        (0..EXPERTS).filter(move |expert| holders >> expert & 1 == 1)
    }

    /// Sorts a real block anew, after a change of who holds it.
    fn sort(&mut self, node: BlockId) {
        if let Some(block) = self.nodes[node.at()].real.get()
            && self.real[block.at()].offered
        {
            self.withdraw(block);
            self.offer(block);
        }
    }

    /// Ends an operation: counts what each expert and the real cache hit.
    fn compare(&mut self) {
        let half_life = LEAST_HALF_LIFE.max(HALF_LIFE * self.len as f64);
        let round = Round {
            uses: std::mem::take(&mut self.uses) as f64,
            hits: std::array::from_fn(|expert| std::mem::take(&mut self.experts[expert].hits)),
            real: std::mem::take(&mut self.hits),
            missing: self.missing,
        };
        self.votes.count(&round, f64::exp2(-round.uses / half_life));
    }

    /// The offered block that is held by the least weight, and who holds it.
    fn least(&self) -> Option<(Holders, BlockId)> {
        self.votes.order().iter().find_map(|&holders| {
            let &(_, block) = self.offered[usize::from(holders)].first()?;
            Some((holders, block))
        })
    }

    /// The real cache has room for so many blocks.
    fn limit(&mut self, capacity: usize) {
        self.capacity = capacity;
        for expert in 0..self.experts.len() {
            let mut evicted = std::mem::take(&mut self.evicted);
            self.experts[expert].cache.resize(capacity, &mut evicted);
            self.evicted = evicted;
            self.settle(expert);
        }
    }
}

impl EvictionPolicy for Voting {
    fn used(&mut self, block: BlockId, at: &Use) {
        let node = self.observe(at);
        let real = entry(&mut self.real, block);
        let again = std::mem::replace(&mut real.used, at.tick) == at.tick;
        if real.present {
            self.hits += f64::from(u8::from(!again));
            return;
        }
        real.present = true;
        self.len += 1;
        if let Some(node) = node.filter(|node| self.nodes[node.at()].real == Link::NONE) {
            let known = &mut self.nodes[node.at()];
            known.real = Some(block).into();
            known.references += 1;
            real.node = Some(node).into();
            for expert in self.holding(node) {
                self.missing[expert] -= 1;
            }
        }
        if self.len > self.capacity {
            self.limit(self.len);
        }
    }

    fn admits(&mut self, at: &Use) -> bool {
        if self.len != self.capacity {
            self.limit(self.len);
        }
        let Some(node) = self.observe(at) else {
            return false;
        };
        let weight = self.votes.weight(self.nodes[node.at()].holders);
        weight > 0.0
            && (self.least()).is_none_or(|(holders, _)| weight >= self.votes.weight(holders))
    }

    fn offer(&mut self, block: BlockId) {
        let real = &mut self.real[block.at()];
        let node = real.node.get();
        real.offered = true;
        real.holders = node.map_or(0, |node| self.nodes[node.at()].holders);
        self.offered[usize::from(real.holders)].insert((real.used, block));
    }

    fn withdraw(&mut self, block: BlockId) {
        if let Some(real) = self.real.get_mut(block.at())
            && real.offered
        {
            real.offered = false;
            self.offered[usize::from(real.holders)].remove(&(real.used, block));
        }
    }

    fn removed(&mut self, block: BlockId, for_room: bool) {
        let real = std::mem::take(&mut self.real[block.at()]);
        self.len -= 1;
        let Some(node) = real.node.get() else {
            return;
        };
        self.nodes[node.at()].real = Link::NONE;
        for expert in self.holding(node) {
            self.missing[expert] += 1;
        }
        if !for_room {
            // Dropped for another reason than room: the experts would have lost it, too.
            for expert in 0..self.experts.len() {
                if self.experts[expert].cache.holds(node) {
                    self.experts[expert].cache.remove(node);
                    self.unhold(expert, node);
                    self.release(node);
                }
            }
        }
        self.release(node);
    }

    fn victim(&mut self) -> Option<BlockId> {
        self.least().map(|(_, block)| block)
    }

    fn chance(&self, block: BlockId, key: Key) -> Option<f64> {
        let node = self.real.get(block.at())?.node.get();
        let of_index = node.unwrap_or(BlockId(u32::MAX));
        self.experts[CLASS_INDEX].cache.chance(of_index, key)
    }
}
