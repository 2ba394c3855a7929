//! The default: the class index, guarded by LRU and GDSF.
//!
//! Each of the three manages a cache without bytes of the same capacity, from the same uses. Whose cache has hit more
//! lately leads, and the real cache follows it: what the leader's cache does not hold leaves first, and what that
//! refuses is refused. So the real cache is never far from the best of the three, whatever the traffic.

use std::collections::BTreeSet;

use rustc_hash::FxHashMap;

use crate::{
    BlockId, ClassIndex, EvictionPolicy, Gdsf, Key, Link, Lru, PrefixCache, Tick, Use, entry,
};

/// Scores are halved after so many uses for each block in the cache, and at least.
const HALF_LIFE: f64 = 4.0;
const LEAST_HALF_LIFE: f64 = 4096.0;
/// Hits beyond the leader's that change the leader, for each use of a half-life.
const MARGIN: f64 = 0.001;
/// A leader stays for as many uses as there are blocks, divided by this: a change sorts all that may leave anew.
const TERM: u64 = 8;

/// The expert that has an opinion on when a block returns.
const CLASS_INDEX: usize = 0;

struct Expert {
    cache: PrefixCache,
    /// Hits in the current operation.
    hits: f64,
    /// Hits beyond the leader's since it leads; the past is discounted.
    lead: f64,
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
}

/// A block of the real cache.
#[derive(Debug, Default, Clone)]
struct Real {
    /// None: nobody else holds it, or another real block has the same name.
    node: Link,
    present: bool,
    offered: bool,
    used: Tick,
}

/// The policy. Memory: what its three policies take, and one entry for each block that one of their caches holds.
pub struct Guarded {
    experts: [Expert; 3],
    leader: usize,
    ids: FxHashMap<Key, BlockId>,
    nodes: Vec<Node>,
    vacant: Vec<BlockId>,
    real: Vec<Real>,
    len: usize,
    capacity: usize,
    /// The offered blocks of the real cache that the leader's cache holds, and those it does not.
    kept: BTreeSet<(Tick, BlockId)>,
    spare: BTreeSet<(Tick, BlockId)>,
    tick: Tick,
    /// Uses in the current operation, and since the leader leads.
    uses: u64,
    led: u64,
    evicted: Vec<BlockId>,
}

impl Default for Guarded {
    fn default() -> Self {
        let policies: [Box<dyn EvictionPolicy>; 3] = [
            Box::new(ClassIndex::default()),
            Box::new(Lru::default()),
            Box::new(Gdsf::default()),
        ];
        Self {
            experts: policies.map(|policy| Expert {
                cache: PrefixCache::new(policy, usize::MAX),
                hits: 0.0,
                lead: 0.0,
            }),
            leader: 0,
            ids: FxHashMap::default(),
            nodes: Vec::new(),
            vacant: Vec::new(),
            real: Vec::new(),
            len: 0,
            capacity: usize::MAX,
            kept: BTreeSet::new(),
            spare: BTreeSet::new(),
            tick: 0,
            uses: 0,
            led: 0,
            evicted: Vec::new(),
        }
    }
}

impl Guarded {
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
                self.nodes[node.at()].references += 1;
                self.sort(expert, node);
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
            self.sort(expert, node);
            self.release(node);
        }
    }

    /// Puts a real block to those kept or spared, after a change of an expert's cache.
    fn sort(&mut self, expert: usize, node: BlockId) {
        if expert == self.leader
            && let Some(block) = self.nodes[node.at()].real.get()
            && self.real[block.at()].offered
        {
            self.withdraw(block);
            self.offer(block);
        }
    }

    fn keeps(&self, node: Option<BlockId>) -> bool {
        node.is_some_and(|node| self.experts[self.leader].cache.holds(node))
    }

    /// Ends an operation: notes what each expert has hit more than the leader. Who leads by enough becomes the leader.
    fn compare(&mut self) {
        let half_life = LEAST_HALF_LIFE.max(HALF_LIFE * self.len as f64);
        let uses = std::mem::take(&mut self.uses);
        self.led += uses;
        let fade = f64::exp2(-(uses as f64) / half_life);
        let of_leader = self.experts[self.leader].hits;
        let mut best = (MARGIN * half_life, self.leader);
        for (number, expert) in self.experts.iter_mut().enumerate() {
            expert.lead = expert.lead * fade + std::mem::take(&mut expert.hits) - of_leader;
            if expert.lead > best.0 {
                best = (expert.lead, number);
            }
        }
        if best.1 != self.leader && self.led * TERM >= self.len as u64 {
            self.follow(best.1);
        }
    }

    fn follow(&mut self, leader: usize) {
        self.leader = leader;
        self.led = 0;
        for expert in &mut self.experts {
            expert.lead = 0.0;
        }
        let offered: Vec<BlockId> = (self.kept.iter().chain(&self.spare))
            .map(|&(_, block)| block)
            .collect();
        self.kept.clear();
        self.spare.clear();
        for block in offered {
            self.offer(block);
        }
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

impl EvictionPolicy for Guarded {
    fn used(&mut self, block: BlockId, at: &Use) {
        let node = self.observe(at);
        let real = entry(&mut self.real, block);
        real.used = at.tick;
        if real.present {
            return;
        }
        real.present = true;
        self.len += 1;
        let known = node.map(|node| &mut self.nodes[node.at()]);
        if let Some(known) = known.filter(|known| known.real == Link::NONE) {
            known.real = Some(block).into();
            known.references += 1;
            real.node = node.into();
        }
        if self.len > self.capacity {
            self.limit(self.len);
        }
    }

    fn admits(&mut self, at: &Use) -> bool {
        if self.len != self.capacity {
            self.limit(self.len);
        }
        let node = self.observe(at);
        self.keeps(node)
    }

    fn offer(&mut self, block: BlockId) {
        let real = &mut self.real[block.at()];
        real.offered = true;
        let place = (real.used, block);
        let node = real.node.get();
        if self.keeps(node) {
            self.kept.insert(place);
        } else {
            self.spare.insert(place);
        }
    }

    fn withdraw(&mut self, block: BlockId) {
        if let Some(real) = self.real.get_mut(block.at())
            && real.offered
        {
            real.offered = false;
            let place = (real.used, block);
            let _ = self.kept.remove(&place) || self.spare.remove(&place);
        }
    }

    fn removed(&mut self, block: BlockId, for_room: bool) {
        let real = std::mem::take(&mut self.real[block.at()]);
        self.len -= 1;
        let Some(node) = real.node.get() else {
            return;
        };
        self.nodes[node.at()].real = Link::NONE;
        if !for_room {
            // Dropped for another reason than room: the experts would have lost it, too.
            for expert in 0..self.experts.len() {
                if self.experts[expert].cache.holds(node) {
                    self.experts[expert].cache.remove(node);
                    self.release(node);
                }
            }
        }
        self.release(node);
    }

    fn victim(&mut self) -> Option<BlockId> {
        let &(_, block) = self.spare.first().or_else(|| self.kept.first())?;
        Some(block)
    }

    fn chance(&self, block: BlockId, key: Key) -> Option<f64> {
        let node = self.real.get(block.at())?.node.get();
        let of_index = node.unwrap_or(BlockId(u32::MAX));
        self.experts[CLASS_INDEX].cache.chance(of_index, key)
    }
}
