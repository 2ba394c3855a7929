//! Leases and slots: what placed requests take of each worker, until they end.
//!
//! A lease is taken with a placement, renewed by progress, and ends exactly once: by completion or cancellation
//! (the caller says so), or by expiry when nothing was heard of it for its time to live.

use std::{cmp::Reverse, collections::BinaryHeap};

use rustc_hash::FxHashMap;

use crate::{active::Active, types::WorkerId};

/// What live leases take of one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Slots {
    /// Requests that still need the worker.
    pub requests: u32,
    /// Of these, generating.
    pub streams: u32,
    /// Prompt tokens placed and not yet computed.
    pub queued_tokens: u64,
    /// Blocks that these requests hold or will have filled.
    pub blocks: u64,
    /// Of these, blocks of generating requests, now or later, that were not cached there when they were placed: no
    /// two requests share them, so that a pool that they fill is full.
    pub own_blocks: u64,
    /// Of `blocks`, those counted before, with another request that shares them.
    pub shared_blocks: u64,
}

impl Slots {
    /// Blocks in use, shared ones counted once.
    pub fn distinct_blocks(&self) -> u64 {
        self.blocks.saturating_sub(self.shared_blocks)
    }
}

/// What a lease stands for.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Lease {
    /// The request's id.
    pub request: u64,
    /// Computes the prompt.
    pub prefill: WorkerId,
    /// Generates.
    pub decode: WorkerId,
    /// Prompt tokens in all.
    pub prompt_tokens: u32,
    /// Of them, to be computed.
    pub uncached_tokens: u32,
    /// Whether the prompt is computed.
    pub prefilled: bool,
    /// Tokens generated, as far as reported.
    pub output_tokens: u32,
    blocks: u32,
    /// Blocks that were cached where it generates.
    cached_blocks: u32,
    deadline: f64,
}

/// How a request fares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Progress {
    /// The prompt is computed.
    pub prefilled: bool,
    /// Tokens generated so far; any means that the prompt is computed.
    pub output_tokens: u32,
}

/// What a report changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The prompt was not known to be computed before.
    pub prefilled: bool,
    /// No token was known before.
    pub first_token: bool,
}

/// All leases, and the slots of the workers they name.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Leases {
    ttl_ms: f64,
    block_tokens: u32,
    live: FxHashMap<u64, Lease>,
    /// At least one entry a lease, none later than its deadline; the bits of a time from 0 on order as it does.
    deadlines: BinaryHeap<Reverse<(u64, u64)>>,
    /// By the worker's place; of the worker that has it now.
    slots: Vec<(u32, Slots)>,
    active: Active,
    expired: u64,
}

impl Leases {
    /// None yet. A lease lives `ttl_ms` beyond its last report.
    pub fn new(ttl_ms: f64, block_tokens: u32) -> Self {
        Self {
            ttl_ms,
            block_tokens: block_tokens.max(1),
            live: FxHashMap::default(),
            deadlines: BinaryHeap::new(),
            slots: Vec::new(),
            active: Active::default(),
            expired: 0,
        }
    }

    /// Live leases.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether there is no live lease.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Leases that ended by expiry.
    pub fn expired(&self) -> u64 {
        self.expired
    }

    /// A live lease.
    pub fn get(&self, id: u64) -> Option<&Lease> {
        self.live.get(&id)
    }

    /// What is taken of a worker.
    pub fn slots(&self, worker: WorkerId) -> Slots {
        match self.slots.get(worker.index as usize) {
            Some((life, slots)) if *life == worker.life => Slots {
                shared_blocks: self.active.shared(worker),
                ..*slots
            },
            _ => Slots::default(),
        }
    }

    /// Leading blocks of a chain that live requests hold on a worker.
    pub fn held(&self, worker: WorkerId, chain: &[u64]) -> u32 {
        self.active.depth(worker, chain)
    }

    /// A worker joined; leases of another that had its place before weigh no more.
    pub fn admit(&mut self, worker: WorkerId) {
        let at = worker.index as usize;
        if self.slots.len() <= at {
            self.slots.resize(at + 1, (u32::MAX, Slots::default()));
        }
        self.slots[at] = (worker.life, Slots::default());
        self.active.clear(worker);
    }

    /// A worker left; its leases live on, without weight.
    pub fn forget(&mut self, worker: WorkerId) {
        if let Some(entry) = self.slots.get_mut(worker.index as usize) {
            *entry = (u32::MAX, Slots::default());
            self.active.clear(worker);
        }
    }

    fn slots_mut(&mut self, worker: WorkerId) -> Option<&mut Slots> {
        let entry = self.slots.get_mut(worker.index as usize)?;
        (entry.0 == worker.life).then_some(&mut entry.1)
    }

    /// Takes a lease out under `id`, which must be new and not 0: (prefill, decode) workers, (all, uncached) prompt
    /// tokens.
    pub fn take(
        &mut self,
        now: f64,
        id: u64,
        request: u64,
        workers: (WorkerId, WorkerId),
        (prompt_tokens, uncached_tokens): (u32, u32),
        chain: &[u64],
    ) {
        let (prefill, decode) = workers;
        let lease = Lease {
            request,
            prefill,
            decode,
            prompt_tokens,
            uncached_tokens,
            prefilled: false,
            output_tokens: 0,
            blocks: prompt_tokens.div_ceil(self.block_tokens),
            cached_blocks: if prefill == decode {
                (prompt_tokens.max(1) - uncached_tokens) / self.block_tokens
            } else {
                0
            },
            deadline: now + self.ttl_ms,
        };
        let previous = self.live.insert(id, lease);
        debug_assert!(previous.is_none() && id != 0);
        self.deadlines.push(Reverse((lease.deadline.to_bits(), id)));
        if prefill == decode && self.slots_mut(decode).is_some() {
            self.active.take(id, decode, chain);
        }
        if let Some(slots) = self.slots_mut(decode) {
            slots.requests += 1;
            slots.blocks += u64::from(lease.blocks);
            slots.own_blocks += u64::from(lease.blocks - lease.cached_blocks);
        }
        if let Some(slots) = self.slots_mut(prefill) {
            slots.queued_tokens += u64::from(uncached_tokens);
            if prefill != decode {
                slots.requests += 1;
                slots.blocks += u64::from(lease.blocks);
            }
        }
    }

    /// Renews a lease and accounts for what was reached; None for a lease that is not held. Reports may come late
    /// or twice: what was reached stays reached.
    pub fn progress(&mut self, now: f64, id: u64, progress: Progress) -> Option<Changed> {
        let lease = self.live.get_mut(&id)?;
        lease.deadline = now + self.ttl_ms;
        let changed = Changed {
            prefilled: !lease.prefilled && (progress.prefilled || progress.output_tokens > 0),
            first_token: lease.output_tokens == 0 && progress.output_tokens > 0,
        };
        let output = lease.output_tokens.max(progress.output_tokens);
        let blocks = (lease.prompt_tokens + output).div_ceil(self.block_tokens);
        let grown = u64::from(blocks - lease.blocks);
        (lease.output_tokens, lease.blocks) = (output, blocks);
        lease.prefilled |= changed.prefilled;
        let lease = *lease;
        if changed.prefilled {
            self.leave_prefill(&lease);
        }
        if let Some(slots) = self.slots_mut(lease.decode) {
            slots.streams += u32::from(changed.prefilled);
            slots.blocks += grown;
            slots.own_blocks += grown;
        }
        Some(changed)
    }

    /// Ends a lease and frees what it took; None for one that is not held.
    pub fn end(&mut self, id: u64) -> Option<Lease> {
        let lease = self.live.remove(&id)?;
        self.active.end(id);
        self.free(&lease);
        Some(lease)
    }

    /// Ends every lease past its deadline, and hands it out.
    pub fn expire(&mut self, now: f64) -> Vec<(u64, Lease)> {
        let mut gone = Vec::new();
        while let Some(&Reverse((noted, id))) = self.deadlines.peek() {
            if f64::from_bits(noted) > now {
                break;
            }
            self.deadlines.pop();
            match self.live.get(&id).map(|lease| lease.deadline) {
                Some(deadline) if deadline > now => {
                    self.deadlines.push(Reverse((deadline.to_bits(), id)));
                }
                Some(_) => gone.extend(self.end(id).map(|lease| (id, lease))),
                None => {}
            }
        }
        self.expired += gone.len() as u64;
        gone
    }

    /// Requests that workers' slots count and no live lease stands for, or the other way round; 0 as long as every lease
    /// frees what it took. Looks at all leases.
    pub fn leaked(&self) -> u64 {
        let mut left: Vec<i64> = self
            .slots
            .iter()
            .map(|(_, one)| one.requests.into())
            .collect();
        let mut account = |worker: WorkerId| {
            let at = worker.index as usize;
            if self
                .slots
                .get(at)
                .is_some_and(|(life, _)| *life == worker.life)
            {
                left[at] -= 1;
            }
        };
        for lease in self.live.values() {
            account(lease.decode);
            if lease.prefill != lease.decode && !lease.prefilled {
                account(lease.prefill);
            }
        }
        left.into_iter().map(i64::unsigned_abs).sum()
    }

    fn leave_prefill(&mut self, lease: &Lease) {
        let prompt_blocks = lease.prompt_tokens.div_ceil(self.block_tokens);
        if let Some(slots) = self.slots_mut(lease.prefill) {
            slots.queued_tokens -= u64::from(lease.uncached_tokens);
            if lease.prefill != lease.decode {
                slots.requests -= 1;
                slots.blocks -= u64::from(prompt_blocks);
            }
        }
    }

    fn free(&mut self, lease: &Lease) {
        if !lease.prefilled {
            self.leave_prefill(lease);
        }
        if let Some(slots) = self.slots_mut(lease.decode) {
            slots.requests -= 1;
            slots.blocks -= u64::from(lease.blocks);
            slots.own_blocks -= u64::from(lease.blocks - lease.cached_blocks);
            slots.streams -= u32::from(lease.prefilled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_freed_is_counted() {
        let worker = |index| WorkerId { index, life: index };
        let mut leases = Leases::new(1_000.0, 64);
        (0..2).for_each(|index| leases.admit(worker(index)));
        leases.take(0.0, 1, 1, (worker(0), worker(1)), (100, 100), &[]);
        leases.take(0.0, 2, 2, (worker(1), worker(1)), (100, 100), &[]);
        assert_eq!(leases.leaked(), 0);
        // The second worker leaves; another comes in its place.
        leases.forget(worker(1));
        assert_eq!(leases.leaked(), 0);
        // As if a lease that is gone had freed nothing.
        leases.slots[0].1.requests += 1;
        assert_eq!(leases.leaked(), 1);
        leases.end(1);
        assert_eq!(leases.leaked(), 1);
    }
}
