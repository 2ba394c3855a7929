//! What the host tier does with a tier below it: blocks are written down before they leave, and come back up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmesh_core::Digest;

use super::catalog::Leaving;
use super::host::HostTier;
use super::{NamespaceId, Origins, Room, Slot};
use crate::image::Layout;
use crate::slot;

impl HostTier {
    /// From now on, blocks wait to be written below before they leave.
    pub(crate) fn spill(&self) {
        self.catalog.lock().enable_parking();
    }

    /// Whether blocks should be written below.
    pub(crate) fn wants_spilling(&self) -> bool {
        self.catalog.lock().wants_any_parked()
    }

    /// Blocks that should be below and are not yet.
    pub(crate) fn unspilled(&self) -> u64 {
        self.catalog.lock().unspilled()
    }

    /// Blocks that leave next, leased; `spilled` each. All others may still be used.
    pub(crate) fn leaving(&self, limit: usize) -> Vec<Leaving> {
        self.catalog.lock().park(limit)
    }

    /// The block is below, or is not to be.
    pub(crate) fn spilled(&self, leaving: &Leaving) {
        self.all_spilled(std::slice::from_ref(leaving));
    }

    /// The same of several: who waits for room wakes once.
    pub(crate) fn all_spilled(&self, leaving: &[Leaving]) {
        let mut catalog = self.catalog.lock();
        leaving.iter().for_each(|block| catalog.done(block));
        drop(catalog);
        self.moved.notify_all();
    }

    /// Waits until a block of this namespace can be stored without another's leaving unwritten; false: not in time.
    pub(crate) fn wait_spilled(&self, namespace: NamespaceId, timeout: Duration) -> bool {
        let mut catalog = self.catalog.lock();
        let until = Instant::now() + timeout;
        while catalog.is_behind(namespace) {
            if self.moved.wait_until(&mut catalog, until).timed_out() {
                return false;
            }
        }
        true
    }

    /// The block in a slot, if its bytes are right: the checksums in its header.
    pub(crate) fn proven(&self, slot: Slot, digest: &Digest, layout: &Layout) -> Option<Vec<u64>> {
        slot::proven(&self.arena, slot.0, layout, digest, false)
    }

    /// Reserves room for blocks that come from a tier below; `arrived` each that is `Reserved`.
    pub(crate) fn expect(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
        from: kvmesh_core::Tier,
    ) -> Vec<Room> {
        let mut catalog = self.catalog.lock();
        let rooms = catalog.promote(&self.journal, namespace, parent, chain, from);
        // Before anybody can lease them: readers wait for what the first word says.
        self.disprove(&rooms);
        rooms
    }

    /// An expected block's image at rest has been read into its slot, unless it `failed`. It can be read if it is
    /// whole, which is returned; it is gone if not.
    pub(crate) fn arrived(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Arc<Layout>,
        failed: bool,
    ) -> bool {
        let whole = !failed && slot::proven(&self.arena, slot.0, layout, digest, true).is_some();
        self.settle(slot, whole);
        whole
    }

    /// The same of one that was read and that somebody waits for: its bytes are proven as they are copied to `out`, which
    /// has the segments' size.
    pub(crate) fn arrived_to(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Layout,
        out: &mut [u8],
    ) -> bool {
        let mut rest = out;
        let copied = |at, bytes| {
            let (this, next) = std::mem::take(&mut rest).split_at_mut(bytes);
            rest = next;
            self.arena.get(at, this)
        };
        let proven = slot::proven_by(&self.arena, slot.0, layout, digest, true, copied);
        self.settle(slot, proven.is_some());
        proven.is_some()
    }

    /// An expected block is in its slot, or will not come.
    fn settle(&self, slot: Slot, whole: bool) {
        {
            let mut catalog = self.catalog.lock();
            // Before the slot can be anybody else's. Who was let go stays so, though its word has been written over.
            let here = whole && catalog.is_promoting(slot);
            slot::settle(&self.arena, slot.0, here);
            catalog.promoted(&self.journal, slot, whole);
        }
        self.moved.notify_all();
    }

    /// An expected block will not come, though its slot may still be written, until `arrived`: readers that wait for it
    /// are let go, and nobody finds it any more.
    pub(crate) fn forsake(&self, slot: Slot) {
        {
            let mut catalog = self.catalog.lock();
            if catalog.is_promoting(slot) {
                slot::settle(&self.arena, slot.0, false);
                catalog.forsake(slot);
            }
        }
        self.moved.notify_all();
    }

    /// Where leased blocks came from that are read for the first time since.
    pub fn take_origins(&self, slots: &[Slot]) -> Origins {
        self.catalog.lock().take_origins(slots)
    }

    /// Whether the slot's block has not arrived yet.
    pub(crate) fn is_coming(&self, slot: Slot) -> bool {
        self.catalog.lock().is_promoting(slot)
    }

    /// Waits until the slot's block has arrived or failed.
    pub(crate) fn wait_arrival(&self, slot: Slot) {
        let mut catalog = self.catalog.lock();
        while catalog.is_promoting(slot) {
            self.moved.wait(&mut catalog);
        }
    }

    /// Whether the block can be read now. Counts as no look-up.
    pub(crate) fn holds(&self, namespace: NamespaceId, digest: &Digest) -> bool {
        self.catalog.lock().holds(namespace, digest)
    }

    /// Leading blocks that are here or coming. Counts as no look-up.
    pub(crate) fn leading(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        self.catalog.lock().leading(namespace, chain)
    }

    /// All blocks that can be read now, each with its parent, the longest unused first.
    pub(crate) fn by_use(&self) -> Vec<(NamespaceId, Digest, Option<Digest>)> {
        self.catalog.lock().by_use()
    }

    /// All blocks that can be read now, leased as those that leave are: parents before what follows them.
    pub(crate) fn everything(&self) -> Vec<Leaving> {
        self.catalog.lock().everything()
    }

    /// Erases what would prove a slot's last block.
    pub(super) fn disprove(&self, rooms: &[Room]) {
        for room in rooms {
            if let Room::Reserved(slot) = room {
                slot::erase(&self.arena, slot.0);
            }
        }
    }
}
