//! Blocks that a placement will have cached, before the worker's events say so.
//!
//! They let requests that come at the same time share one prefill: whoever is placed behind the first finds its blocks
//! cached there, at the price of waiting for it. An entry ends when an event confirms it or takes the block away, when its
//! request is given up, or [`GRACE_MS`] after its prompt was computed: by then the index knows better.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use crate::types::WorkerId;

/// Milliseconds that events may lag behind the report of a computed prompt.
pub const GRACE_MS: f64 = 2_000.0;

/// All of a selector's speculative entries.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Speculation {
    /// By block: who will have it, for how many leases.
    blocks: FxHashMap<u64, SmallVec<[(WorkerId, u32); 2]>>,
    leases: FxHashMap<u64, (WorkerId, Box<[u64]>)>,
    /// By last block and worker: the lease that its event confirms.
    lasts: FxHashMap<(u64, WorkerId), u64>,
    computed: VecDeque<(f64, u64)>,
}

impl Speculation {
    /// Leases with entries.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Blocks with entries, and the sum of their hashes modulo 2^64: equal where the same blocks are speculated on, whatever
    /// the workers are called.
    pub fn digest(&self) -> (usize, u64) {
        let sum = self
            .blocks
            .keys()
            .fold(0, |sum: u64, &hash| sum.wrapping_add(hash));
        (self.blocks.len(), sum)
    }

    /// A lease's prompt is going to be cached on a worker.
    pub fn add(&mut self, lease: u64, worker: WorkerId, chain: Box<[u64]>) {
        let Some(&last) = chain.last() else {
            return;
        };
        for &hash in &chain {
            let holders = self.blocks.entry(hash).or_default();
            match holders.iter_mut().find(|(holder, _)| *holder == worker) {
                Some((_, count)) => *count += 1,
                None => holders.push((worker, 1)),
            }
        }
        self.lasts.insert((last, worker), lease);
        self.leases.insert(lease, (worker, chain));
    }

    /// Calls `found(worker, depth)` for every worker that will have the first block of `chain`; depth is its leading
    /// blocks.
    pub fn matches(&self, chain: &[u64], mut found: impl FnMut(WorkerId, u32)) {
        let Some(first) = chain.first().and_then(|hash| self.blocks.get(hash)) else {
            return;
        };
        let mut live: SmallVec<[WorkerId; 8]> = first.iter().map(|&(worker, _)| worker).collect();
        let mut depth = 1;
        while !live.is_empty() {
            let holders = chain.get(depth as usize).and_then(|h| self.blocks.get(h));
            live.retain(|worker| {
                let goes_on = holders
                    .is_some_and(|holders| holders.iter().any(|(holder, _)| holder == worker));
                if !goes_on {
                    found(*worker, depth);
                }
                goes_on
            });
            depth += 1;
        }
    }

    /// A worker says that it has these blocks.
    pub fn stored(&mut self, worker: WorkerId, hashes: &[u64]) {
        if self.leases.is_empty() {
            return;
        }
        for &hash in hashes {
            if let Some(lease) = self.lasts.get(&(hash, worker)).copied() {
                self.withdraw(lease);
            }
        }
    }

    /// A worker says that it no longer has these blocks.
    pub fn removed(&mut self, worker: WorkerId, hashes: &[u64]) {
        if self.leases.is_empty() {
            return;
        }
        for hash in hashes {
            if let Some(holders) = self.blocks.get_mut(hash) {
                holders.retain(|(holder, _)| *holder != worker);
                if holders.is_empty() {
                    self.blocks.remove(hash);
                }
            }
        }
    }

    /// The prompt of a lease is computed: its events are on their way.
    pub fn computed(&mut self, now: f64, lease: u64) {
        if self.leases.contains_key(&lease) {
            self.computed.push_back((now + GRACE_MS, lease));
        }
    }

    /// Ends the entries whose events should have come.
    pub fn expire(&mut self, now: f64) {
        while let Some(&(at, lease)) = self.computed.front() {
            if at > now {
                break;
            }
            self.computed.pop_front();
            self.withdraw(lease);
        }
    }

    /// Ends a lease's entries, if it has any.
    pub fn withdraw(&mut self, lease: u64) {
        let Some((worker, chain)) = self.leases.remove(&lease) else {
            return;
        };
        if let Some(&last) = chain.last() {
            if self.lasts.get(&(last, worker)) == Some(&lease) {
                self.lasts.remove(&(last, worker));
            }
        }
        for hash in &chain {
            let Some(holders) = self.blocks.get_mut(hash) else {
                continue;
            };
            if let Some(at) = holders.iter().position(|(holder, _)| *holder == worker) {
                holders[at].1 -= 1;
                if holders[at].1 == 0 {
                    holders.swap_remove(at);
                }
            }
            if holders.is_empty() {
                self.blocks.remove(hash);
            }
        }
    }

    /// Ends all entries of a worker.
    pub fn forget(&mut self, worker: WorkerId) {
        let gone: Vec<u64> = self
            .leases
            .iter()
            .filter(|(_, (holder, _))| *holder == worker)
            .map(|(&lease, _)| lease)
            .collect();
        gone.into_iter().for_each(|lease| self.withdraw(lease));
    }
}
