//! Blocks that live requests hold on each worker, each counted once however many share it.
//!
//! Engines keep a shared prefix once, and what a step takes grows with the blocks in use. A request's blocks are a chain, so
//! what of it is held already is a prefix: found by bisection, without walking the chain.

use rustc_hash::FxHashMap;

use crate::types::WorkerId;

/// One worker's blocks.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Held {
    /// By block: requests that hold it.
    holders: FxHashMap<u64, u32>,
    /// Holders beyond the first, of all blocks.
    shared: u64,
}

/// The blocks of live requests that generate where they were computed.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Active {
    /// By the worker's place.
    workers: Vec<Held>,
    /// By lease; only those whose worker has not changed since.
    chains: FxHashMap<u64, (WorkerId, Box<[u64]>)>,
}

impl Active {
    /// A worker came to this place, or left it: nothing is held there.
    pub fn clear(&mut self, worker: WorkerId) {
        let at = worker.index as usize;
        if self.workers.len() <= at {
            self.workers.resize_with(at + 1, Held::default);
        }
        self.workers[at] = Held::default();
        self.chains
            .retain(|_, (holder, _)| holder.index != worker.index);
    }

    /// A request holds these blocks from now on.
    pub fn take(&mut self, lease: u64, worker: WorkerId, chain: &[u64]) {
        let Some(held) = self.workers.get_mut(worker.index as usize) else {
            return;
        };
        for &hash in chain {
            let count = held.holders.entry(hash).or_default();
            held.shared += u64::from(*count > 0);
            *count += 1;
        }
        self.chains.insert(lease, (worker, chain.into()));
    }

    /// It does no more.
    pub fn end(&mut self, lease: u64) {
        let Some((worker, chain)) = self.chains.remove(&lease) else {
            return;
        };
        let held = &mut self.workers[worker.index as usize];
        for hash in &chain {
            let Some(count) = held.holders.get_mut(hash) else {
                continue;
            };
            *count -= 1;
            held.shared -= u64::from(*count > 0);
            if *count == 0 {
                held.holders.remove(hash);
            }
        }
    }

    /// Of a worker's blocks counted by request, those that were counted before.
    pub fn shared(&self, worker: WorkerId) -> u64 {
        let held = self.workers.get(worker.index as usize);
        held.map_or(0, |held| held.shared)
    }

    /// Leading blocks of a chain that are held on a worker.
    pub fn depth(&self, worker: WorkerId, chain: &[u64]) -> u32 {
        let Some(held) = self.workers.get(worker.index as usize) else {
            return 0;
        };
        chain.partition_point(|hash| held.holders.contains_key(hash)) as u32
    }
}
