//! The selector's look-ups in the prefix index, and the index's events for the selector.

use std::sync::Arc;

use kvmesh_core::{Result, Tier};
use kvmesh_index::{Change, HolderId, Matches, PrefixIndex};
use kvmesh_replay::{Driver, Input};
use kvmesh_select::{Found, Lookup, WorkerId};
use rustc_hash::FxHashMap;

/// The prefix index with the selector's names for its engines.
pub struct Linked {
    index: Arc<PrefixIndex>,
    workers: FxHashMap<HolderId, WorkerId>,
    matches: Matches,
}

impl Lookup for Linked {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        self.index.matches(blocks, &mut self.matches);
        let named = |hit: kvmesh_index::Match| {
            Some(Found {
                worker: *self.workers.get(&hit.engine)?,
                depths: hit.depths,
            })
        };
        found.extend(self.matches.iter().filter_map(named));
    }
}

impl Linked {
    /// Without names yet.
    pub fn new(index: Arc<PrefixIndex>) -> Self {
        Self {
            index,
            workers: FxHashMap::default(),
            matches: Matches::new(),
        }
    }

    /// Says which engine a worker is; an earlier link ends.
    pub fn link(&mut self, holder: HolderId, worker: WorkerId) {
        self.unlink(worker);
        self.workers.insert(holder, worker);
    }

    /// Forgets which engine a worker is.
    pub fn unlink(&mut self, worker: WorkerId) {
        self.workers.retain(|_, linked| *linked != worker);
    }
}

/// Applies a batch to the index, and tells the selector what linked workers have on their devices.
pub fn apply(driver: &mut Driver<Linked>, now: f64, batch: &[u8]) -> Result<()> {
    let index = Arc::clone(&driver.lookup.index);
    // Out of the way, so that the selector can be told while the index reads.
    let workers = std::mem::take(&mut driver.lookup.workers);
    let note = |holder: HolderId, change: &Change<'_>| {
        let Some(&worker) = workers.get(&holder) else {
            return;
        };
        match *change {
            Change::Stored(Tier::Device, _, hashes) => driver.stored(now, worker, hashes),
            Change::Removed(Tier::Device, hashes) => driver.removed(now, worker, hashes),
            Change::Cleared(None | Some(Tier::Device)) => {
                driver.call(now, Input::Cleared { worker });
            }
            _ => {}
        }
    };
    let applied = index.apply_noting(batch, note);
    driver.lookup.workers = workers;
    applied
}
