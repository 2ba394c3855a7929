//! What a tier's contents went through, for whoever publishes it.

use std::time::Duration;

use kvmesh_core::BlockHash;
use parking_lot::{Condvar, Mutex};

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Blocks now held, each the parent of the next.
    Stored {
        /// The block before the first, unless the first begins a prompt.
        parent: Option<BlockHash>,
        /// The blocks.
        hashes: Vec<BlockHash>,
    },
    /// Blocks no longer held.
    Removed {
        /// The blocks.
        hashes: Vec<BlockHash>,
    },
    /// More changed than was kept. Only the tier's whole state says what it holds now.
    Lost,
}

/// Hashes kept for a reader; one that is further behind starts over from the whole state.
const MAX_HASHES: usize = 1 << 20;

/// Changes in order, until drained.
#[derive(Debug, Default)]
pub struct Journal {
    pending: Mutex<Pending>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    changes: Vec<Change>,
    hashes: usize,
    woken: bool,
}

impl Journal {
    /// Notes that blocks are held now.
    pub fn stored(&self, parent: Option<BlockHash>, hash: BlockHash) {
        self.add(1, |changes| match changes.last_mut() {
            Some(Change::Stored { hashes, .. })
                if parent.is_some() && hashes.last().copied() == parent =>
            {
                hashes.push(hash);
            }
            _ => changes.push(Change::Stored {
                parent,
                hashes: vec![hash],
            }),
        });
    }

    /// Notes that a block is not held any more.
    pub fn removed(&self, hash: BlockHash) {
        self.add(1, |changes| match changes.last_mut() {
            Some(Change::Removed { hashes }) => hashes.push(hash),
            _ => changes.push(Change::Removed { hashes: vec![hash] }),
        });
    }

    fn add(&self, hashes: usize, apply: impl FnOnce(&mut Vec<Change>)) {
        let mut pending = self.pending.lock();
        let was_empty = pending.changes.is_empty();
        if matches!(pending.changes.first(), Some(Change::Lost)) {
            return;
        }
        pending.hashes += hashes;
        if pending.hashes > MAX_HASHES {
            (pending.changes, pending.hashes) = (vec![Change::Lost], 0);
        } else {
            apply(&mut pending.changes);
        }
        drop(pending);
        if was_empty {
            self.arrived.notify_all();
        }
    }

    /// Takes all changes so far.
    pub fn drain(&self) -> Vec<Change> {
        let mut pending = self.pending.lock();
        pending.hashes = 0;
        std::mem::take(&mut pending.changes)
    }

    /// Blocks until there are changes, `wake` was called or `timeout` is over; says whether there are changes.
    pub fn wait(&self, timeout: Duration) -> bool {
        let mut pending = self.pending.lock();
        if pending.changes.is_empty() && !pending.woken {
            self.arrived.wait_for(&mut pending, timeout);
        }
        pending.woken = false;
        !pending.changes.is_empty()
    }

    /// Makes the present `wait` return, or the next one.
    pub fn wake(&self) {
        self.pending.lock().woken = true;
        self.arrived.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_and_removals_are_grouped() {
        let journal = Journal::default();
        journal.stored(None, BlockHash(1));
        journal.stored(Some(BlockHash(1)), BlockHash(2));
        journal.stored(Some(BlockHash(7)), BlockHash(8));
        journal.removed(BlockHash(2));
        journal.removed(BlockHash(1));
        journal.stored(None, BlockHash(1));
        assert_eq!(
            journal.drain(),
            [
                Change::Stored {
                    parent: None,
                    hashes: vec![BlockHash(1), BlockHash(2)]
                },
                Change::Stored {
                    parent: Some(BlockHash(7)),
                    hashes: vec![BlockHash(8)]
                },
                Change::Removed {
                    hashes: vec![BlockHash(2), BlockHash(1)]
                },
                Change::Stored {
                    parent: None,
                    hashes: vec![BlockHash(1)]
                },
            ]
        );
        assert!(!journal.wait(Duration::ZERO));
        journal.wake();
        assert!(
            !journal.wait(Duration::from_secs(60)),
            "returns at once, without changes"
        );
    }

    #[test]
    fn a_reader_too_far_behind_is_told_so() {
        let journal = Journal::default();
        for hash in 0..=MAX_HASHES as u64 {
            journal.removed(BlockHash(hash));
        }
        journal.stored(None, BlockHash(1));
        assert_eq!(journal.drain(), [Change::Lost]);
        journal.stored(None, BlockHash(2));
        assert_eq!(journal.drain().len(), 1);
    }
}
