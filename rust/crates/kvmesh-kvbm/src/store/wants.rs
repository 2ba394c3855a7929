//! What engines ask for and this node lacks: whoever can bring it is told, and engines are told whether to wait.
//!
//! A want is the leading blocks that others have of a chain, behind those that are here. It is open until it is settled,
//! or its time is over: then the engine computes what has not come. It is told once; what came of it is remembered for a
//! while, since a scheduler asks again and again.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvmesh_core::{BlockHash, Digest};
use parking_lot::{Condvar, Mutex};
use rustc_hash::FxHashMap;

use super::Store;
use crate::tiers::NamespaceId;

/// Open wants; more would only wait for the link.
const MOST: usize = 16;
/// The longest time an engine waits, however long computing would take.
const LONGEST: Duration = Duration::from_secs(5);
/// What is late is given up by whoever brings it; so much later engines stop waiting for that.
const GRACE: Duration = Duration::from_millis(100);
/// What did not come is not wanted again for so long.
const REST: Duration = Duration::from_secs(10);

/// Knows what other nodes' stores have. May be out of date.
pub trait Elsewhere: Send + Sync {
    /// How many leading blocks of a chain one of them has. Engines' look-ups wait for the answer.
    fn leading(&self, chain: &[BlockHash]) -> usize;
}

/// Blocks to bring.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// By which it is settled.
    pub number: u64,
    /// Of these blocks.
    pub namespace: NamespaceId,
    /// The block before the first, if it is known.
    pub parent: Option<Digest>,
    /// The blocks.
    pub chain: Vec<Digest>,
    /// Later, computing them is faster.
    pub until: Instant,
}

/// What a look-up found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Leading blocks that a lease would get.
    pub blocks: usize,
    /// More are being brought: to ask again is worth more than to begin computing.
    pub coming: bool,
}

#[derive(Default)]
pub(super) struct Wants {
    elsewhere: OnceLock<Arc<dyn Elsewhere>>,
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Wanted>,
    /// By the last block.
    known: FxHashMap<(NamespaceId, Digest), Want>,
    next: u64,
    wanted: u64,
    shed: u64,
    stop: bool,
}

struct Want {
    number: u64,
    until: Instant,
    open: bool,
}

impl Want {
    fn is_open(&self, now: Instant) -> bool {
        self.open && now < self.until + GRACE
    }
}

impl State {
    fn waits(&self, namespace: NamespaceId, chain: &[Digest], now: Instant) -> bool {
        !self.known.is_empty()
            && (chain.iter())
                .filter_map(|&digest| self.known.get(&(namespace, digest)))
                .any(|want| want.is_open(now))
    }
}

impl Wants {
    pub(super) fn stop(&self) {
        self.state.lock().stop = true;
        self.filled.notify_all();
    }
}

impl Store {
    /// From now on somebody brings what engines ask for and other nodes have: see `wanted`. Once.
    pub fn look_elsewhere(&self, elsewhere: Arc<dyn Elsewhere>) {
        let _ = self.wants.elsewhere.set(elsewhere);
    }

    /// As `lookup`, for an engine that computes a block in so much time: what it would get sooner from other nodes or
    /// from object storage is wanted from there.
    pub fn lookup_for(
        &self,
        namespace: NamespaceId,
        chain: &[Digest],
        per_block: Duration,
    ) -> Found {
        let blocks = self.lookup(namespace, chain);
        let coming = match self.wants.elsewhere.get() {
            Some(elsewhere) if !per_block.is_zero() => {
                self.want(&**elsewhere, namespace, chain, blocks, per_block)
            }
            _ => false,
        };
        Found { blocks, coming }
    }

    /// Waits for blocks to bring; none when the time is over, or the store stops. `settle` each.
    pub fn wanted(&self, timeout: Duration) -> Vec<Wanted> {
        let until = Instant::now() + timeout;
        let mut state = self.wants.state.lock();
        while state.queue.is_empty() && !state.stop {
            if self.wants.filled.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        state.queue.drain(..).collect()
    }

    /// No more blocks of this want will come.
    pub fn settle(&self, number: u64) {
        let mut state = self.wants.state.lock();
        if let Some(want) = state.known.values_mut().find(|want| want.number == number) {
            want.open = false;
        }
    }

    /// Blocks that were wanted, and that would have been if not so many were.
    pub fn wanted_total(&self) -> (u64, u64) {
        let state = self.wants.state.lock();
        (state.wanted, state.shed)
    }

    /// Reads what memory and disk lack of a chain out of object storage; `parent` is the block before the first. Blocks.
    pub fn bring_remote(
        &self,
        namespace: NamespaceId,
        parent: Option<Digest>,
        chain: &[Digest],
        within: Duration,
    ) {
        if let Some(objects) = &self.objects {
            self.expire_pins();
            objects.recaller.bring(namespace, parent, chain, within);
        }
    }

    fn want(
        &self,
        elsewhere: &dyn Elsewhere,
        namespace: NamespaceId,
        chain: &[Digest],
        here: usize,
        per_block: Duration,
    ) -> bool {
        let now = Instant::now();
        if self.wants.state.lock().waits(namespace, chain, now) {
            return true;
        }
        let missing = &chain[here..];
        let there = self.leading_elsewhere(elsewhere, namespace, missing);
        let Some(&last) = missing[..there].last() else {
            return false;
        };
        let mut state = self.wants.state.lock();
        if let Some(want) = state.known.get(&(namespace, last))
            && now < want.until + REST
        {
            return want.is_open(now);
        }
        state.known.retain(|_, want| now < want.until + REST);
        if state
            .known
            .values()
            .filter(|want| want.is_open(now))
            .count()
            >= MOST
        {
            state.shed += there as u64;
            return false;
        }
        state.next += 1;
        state.wanted += there as u64;
        let (number, until) = (state.next, now + LONGEST.min(per_block * there as u32));
        let open = true;
        (state.known).insert(
            (namespace, last),
            Want {
                number,
                until,
                open,
            },
        );
        state.queue.push_back(Wanted {
            number,
            namespace,
            parent: here.checked_sub(1).map(|before| chain[before]),
            chain: missing[..there].to_vec(),
            until,
        });
        drop(state);
        self.wants.filled.notify_one();
        true
    }

    fn leading_elsewhere(
        &self,
        elsewhere: &dyn Elsewhere,
        namespace: NamespaceId,
        chain: &[Digest],
    ) -> usize {
        if chain.is_empty() {
            return 0;
        }
        let hashes: Vec<BlockHash> = chain.iter().map(Digest::block_hash).collect();
        let with_nodes = elsewhere.leading(&hashes).min(chain.len());
        let stored =
            (self.objects.as_ref()).map_or(0, |objects| objects.recaller.leading(namespace, chain));
        with_nodes.max(stored)
    }
}
