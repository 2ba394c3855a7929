//! A flush of memory to the disk: what it waits for, and what became of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmesh_core::Digest;
use parking_lot::{Condvar, Mutex};

use super::Shared;
use crate::error::{Error, Result};
use crate::tiers::{Leaving, NamespaceId, NvmeTier, Slot, Tier};

/// How often a caller looks whether the disk is still there. It waits a little longer than its flush, which says what
/// was not written.
const LOOK: Duration = Duration::from_millis(200);

/// What the caller of a flush waits for.
#[derive(Default)]
pub(super) struct Answer {
    result: Mutex<Option<Result<()>>>,
    told: Condvar,
}

/// A flush in the writer's hands.
pub(super) struct Flush {
    answer: Arc<Answer>,
    until: Option<Instant>,
    of: usize,
    /// To be written, or looked at again, leased in memory.
    to_do: VecDeque<Leaving>,
    under_way: usize,
    /// Leased below, so that no other block pushes them out while the flush goes on.
    kept: Vec<(NamespaceId, Digest, Slot)>,
    missing: usize,
    /// The first of them, and why.
    first: Option<(Digest, String)>,
}

impl Answer {
    /// Waits until the flush has ended, its time is over, or the disk is out: then the writer may be stuck in it.
    pub(super) fn wait(&self, nvme: &NvmeTier, until: Option<Instant>) -> Result<()> {
        let mut result = self.result.lock();
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            nvme.working()?;
            if until.is_some_and(|until| Instant::now() >= until + LOOK) {
                return Err(Error::Invalid("the disk has not answered in time".into()));
            }
            self.told.wait_for(&mut result, LOOK);
        }
    }
}

impl Flush {
    /// Of these, leased in memory, in this order.
    pub(super) fn new(blocks: VecDeque<Leaving>, until: Option<Instant>) -> (Self, Arc<Answer>) {
        let answer = Arc::<Answer>::default();
        let flush = Self {
            answer: answer.clone(),
            until,
            of: blocks.len(),
            to_do: blocks,
            under_way: 0,
            kept: Vec::new(),
            missing: 0,
            first: None,
        };
        (flush, answer)
    }

    /// The next block; `kept`, `again` or `lost` it.
    pub(super) fn next(&mut self, shared: &Shared) -> Option<Leaving> {
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.lose_all(shared, "the time was over");
        }
        let block = self.to_do.pop_front()?;
        self.under_way += 1;
        Some(block)
    }

    /// The block is on the disk, if it still is: else it is looked at again.
    pub(super) fn kept(
        &mut self,
        shared: &Shared,
        nvme: &NvmeTier,
        below: NamespaceId,
        block: Leaving,
    ) {
        match nvme.hold(below, &block.digest) {
            Some(slot) => {
                self.under_way -= 1;
                self.kept.push((below, block.digest, slot));
                shared.host.spilled(&block);
            }
            None => self.again(block),
        }
    }

    /// Somebody else is writing the block.
    pub(super) fn again(&mut self, block: Leaving) {
        self.under_way -= 1;
        self.to_do.push_back(block);
    }

    /// The block is not on the disk.
    pub(super) fn lost(&mut self, shared: &Shared, block: &Leaving, why: impl ToString) {
        self.under_way -= 1;
        self.miss(block.digest, why);
        shared.host.spilled(block);
    }

    /// Whether nothing is left to be done but to `end` it.
    pub(super) fn is_over(&self) -> bool {
        self.to_do.is_empty() && self.under_way == 0
    }

    /// Blocks that have not been begun.
    pub(super) fn to_do(&self) -> usize {
        self.to_do.len()
    }

    /// Gives up what has not been begun.
    pub(super) fn lose_all(&mut self, shared: &Shared, why: &str) {
        for block in std::mem::take(&mut self.to_do) {
            self.under_way += 1;
            self.lost(shared, &block, why);
        }
    }

    /// Makes what was written outlive the machine, and says what was not.
    pub(super) fn end(mut self, nvme: &NvmeTier) {
        let synced = nvme.sync();
        // The disk may have been out meanwhile, and have come back with what its record says.
        let kept = std::mem::take(&mut self.kept);
        for (below, digest, _) in &kept {
            if !nvme.holds(*below, digest) {
                self.miss(*digest, "it went from the disk again");
            }
        }
        let slots: Vec<Slot> = kept.into_iter().map(|(.., slot)| slot).collect();
        nvme.release(&slots);
        let missing = match self.first {
            None => Ok(()),
            Some((first, why)) => Err(Error::NotKept {
                missing: self.missing,
                of: self.of,
                first,
                why,
            }),
        };
        *self.answer.result.lock() = Some(synced.and(missing));
        self.answer.told.notify_all();
    }

    fn miss(&mut self, digest: Digest, why: impl ToString) {
        self.missing += 1;
        self.first.get_or_insert_with(|| (digest, why.to_string()));
    }
}
