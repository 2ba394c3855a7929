//! The offline optimum on prefix chains: what returns last leaves first (L. Belady, IBM Systems Journal, 1966).
//!
//! A block is used whenever one that follows it is, so what returns last of all is always the tail of a chain, and
//! keeping chains whole costs the optimum nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kvmesh_eviction::simulate::Request;
use kvmesh_eviction::{BlockId, EvictionPolicy, Key, Tick, Use};

/// The policy for one trace, which it has seen.
pub struct Optimum {
    /// Per block the operations that use it.
    uses: HashMap<Key, Vec<Tick>>,
    next: BTreeMap<BlockId, Tick>,
    offered: BTreeSet<(Tick, BlockId)>,
}

impl Optimum {
    pub fn new(trace: &[Request]) -> Self {
        let mut uses: HashMap<Key, Vec<Tick>> = HashMap::new();
        for (number, request) in trace.iter().enumerate() {
            for &key in &request.chain {
                uses.entry(key).or_default().push(number as Tick + 1);
            }
        }
        Self {
            uses,
            next: BTreeMap::new(),
            offered: BTreeSet::new(),
        }
    }

    fn next_use(&self, at: &Use) -> Tick {
        let uses = &self.uses[&at.key];
        let next = uses.partition_point(|&tick| tick <= at.tick);
        uses.get(next).copied().unwrap_or(Tick::MAX)
    }
}

impl EvictionPolicy for Optimum {
    fn used(&mut self, block: BlockId, at: &Use) {
        self.next.insert(block, self.next_use(at));
    }

    fn admits(&mut self, at: &Use) -> bool {
        let next = self.next_use(at);
        self.offered.last().is_none_or(|&(last, _)| next < last)
    }

    fn offer(&mut self, block: BlockId) {
        self.offered.insert((self.next[&block], block));
    }

    fn withdraw(&mut self, block: BlockId) {
        if let Some(&next) = self.next.get(&block) {
            self.offered.remove(&(next, block));
        }
    }

    fn removed(&mut self, block: BlockId, _: bool) {
        self.next.remove(&block);
    }

    fn victim(&mut self) -> Option<BlockId> {
        self.offered.last().map(|&(_, block)| block)
    }
}
