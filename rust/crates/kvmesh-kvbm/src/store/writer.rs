//! The one thread that writes memory's blocks to the disk: those that leave next, and those that a flush waits for.
//!
//! It proves blocks while others are under way, and puts those that have arrived together on record by one addition. As
//! nobody else writes them, a flush knows of every block whether it is there, on its way or not to be had.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use memmap2::MmapMut;

use super::Open;
use super::flush::Flush;
use super::spill::{Place, Work};
use crate::block::{self, Reserved};
use crate::error::{Error, Result};
use crate::image::AT_REST;
use crate::tiers::{Direction, Leaving, Slot, Transfer, Writes};

/// Blocks chosen to leave at a time.
const CHOSEN: usize = 8;
/// The most blocks under way, and bytes, unless one block has more.
const MOST: usize = 64;
const MOST_BYTES: usize = 32 << 20;
/// The first page of an image is written from a copy, because its first word differs.
const PAGE: usize = crate::image::ALIGNMENT;
/// How long to wait for a block that somebody else is writing.
const BUSY: Duration = Duration::from_millis(1);

pub(super) struct Writer {
    work: Arc<Work>,
    heads: MmapMut,
    /// Of `heads`, by page.
    vacant: Vec<usize>,
    under_way: Vec<Placed>,
    bytes: usize,
    /// Chosen, and not looked at yet.
    leaving: VecDeque<Leaving>,
    flush: Option<Flush>,
    /// Blocks that leave and blocks of a flush go by turns.
    for_flush: bool,
}

/// A block with a place on the disk.
struct Placed {
    leaving: Leaving,
    reserved: Reserved,
    open: Arc<Open>,
    head: usize,
    for_flush: bool,
}

impl Writer {
    pub(super) fn new(work: Arc<Work>) -> Result<Self> {
        let heads = MmapMut::map_anon(PAGE * MOST);
        Ok(Self {
            work,
            heads: heads.map_err(Error::io("cannot get memory for", "the disk tier"))?,
            vacant: (0..MOST).collect(),
            under_way: Vec::new(),
            bytes: 0,
            leaving: VecDeque::new(),
            flush: None,
            for_flush: false,
        })
    }

    /// Until the store is stopped.
    pub(super) fn run(&mut self) {
        let work = self.work.clone();
        while work.wait() {
            loop {
                work.nvme.write_all(self);
                if self.flush.is_none() || work.is_stopped() {
                    break;
                }
                // All that is left of it others are writing.
                thread::sleep(BUSY);
            }
            work.nvme.sync_if_due();
        }
        for mut flush in self.flush.take().into_iter().chain(work.all_flushes()) {
            flush.lose_all(&work.shared, "the store was stopped");
            flush.end(&work.nvme);
        }
    }

    /// Ends the flush that is over, and begins the next one.
    fn attend(&mut self) {
        while self.flush.as_ref().is_none_or(Flush::is_over) {
            let over = std::mem::replace(&mut self.flush, self.work.next_flush());
            match over {
                Some(flush) => flush.end(&self.work.nvme),
                None if self.flush.is_none() => return,
                None => {}
            }
        }
    }

    fn choose(&mut self) -> Option<(Leaving, bool)> {
        let shared = &self.work.shared;
        self.for_flush = !self.for_flush;
        let mut of_flush = || {
            let block = self.flush.as_mut()?.next(shared)?;
            Some((block, true))
        };
        if self.for_flush
            && let Some(chosen) = of_flush()
        {
            return Some(chosen);
        }
        if self.leaving.is_empty() {
            self.leaving = shared.host.leaving(CHOSEN).into();
        }
        let leaves = self.leaving.pop_front().map(|block| (block, false));
        leaves.or_else(of_flush)
    }

    /// The block's place on the disk, if it is to be written.
    fn place(&mut self, leaving: Leaving, for_flush: bool) -> Option<Slot> {
        let (shared, nvme) = (&self.work.shared, &self.work.nvme);
        let place = self.work.place(&leaving, for_flush);
        if let Place::Room(reserved, open) = place {
            let (slot, head) = (reserved.slot(), self.vacant.pop()?);
            self.bytes += open.layout.slot_bytes();
            self.under_way.push(Placed {
                leaving,
                reserved,
                open,
                head,
                for_flush,
            });
            return Some(slot);
        }
        match (place, self.flush.as_mut().filter(|_| for_flush)) {
            (Place::There(below), Some(flush)) => flush.kept(shared, nvme, below, leaving),
            (Place::Busy, Some(flush)) => flush.again(leaving),
            (Place::Nowhere(why), Some(flush)) => flush.lost(shared, &leaving, why),
            _ => shared.host.spilled(&leaving),
        }
        None
    }
}

impl Writes for Writer {
    fn next(&mut self, most: usize) -> Vec<Slot> {
        self.work.nvme.sync_if_due();
        self.attend();
        let mut slots = Vec::new();
        if self.work.is_stopped() {
            for block in std::mem::take(&mut self.leaving) {
                self.work.shared.host.spilled(&block);
            }
            return slots;
        }
        let mut waits = 0;
        while slots.len() < most && !self.vacant.is_empty() && self.bytes < MOST_BYTES {
            let to_do = self.flush.as_ref().map_or(0, Flush::to_do);
            let Some((block, for_flush)) = self.choose() else {
                break;
            };
            slots.extend(self.place(block, for_flush));
            // Those that others are writing are looked at once.
            waits += usize::from(for_flush && self.flush.as_ref().map_or(0, Flush::to_do) == to_do);
            if waits > to_do {
                break;
            }
        }
        self.attend();
        slots
    }

    fn transfer(&mut self, slot: Slot, place: u64) -> Transfer {
        let arena = self.work.shared.host.arena();
        let mut blocks = self.under_way.iter();
        let block = blocks.find(|block| block.reserved.slot() == slot);
        let block = block.expect("it was given a place");
        let (from, rest) = (block.leaving.slot.0, block.open.layout.slot_bytes() - PAGE);
        let head = &mut self.heads[block.head * PAGE..][..PAGE];
        head.copy_from_slice(&arena.read(from, PAGE));
        head[..8].copy_from_slice(&AT_REST.to_le_bytes());
        let head = (head.as_mut_ptr(), PAGE);
        let pieces = match rest {
            0 => vec![head],
            _ => vec![head, (arena.at(from + PAGE as u64, rest), rest)],
        };
        // SAFETY: `heads` and the arena outlive the transfers. The head is this block's until it has been written, and
        // the slot is leased: nobody writes it but a faulty process, whose bytes do not have the checksums of the head
        // any more.
        unsafe { Transfer::new(Direction::Write, place, &pieces) }
    }

    fn written(&mut self, results: Vec<(Slot, Result<()>)>) {
        let (mut filled, mut ended) = (Vec::new(), Vec::new());
        for (slot, result) in results {
            let mut blocks = self.under_way.iter();
            let Some(place) = blocks.position(|block| block.reserved.slot() == slot) else {
                continue;
            };
            let block = self.under_way.swap_remove(place);
            self.bytes -= block.open.layout.slot_bytes();
            self.vacant.push(block.head);
            let sealed = result.and_then(|()| block.reserved.seal());
            let sealed = sealed.map(|block| filled.push(block));
            ended.push((block.leaving, block.open.below, block.for_flush, sealed));
        }
        self.work.count(filled.len(), ended.len() - filled.len());
        // Together, which is one addition to the record; before any of them may leave memory.
        block::register(filled);
        let (shared, nvme) = (&self.work.shared, &self.work.nvme);
        let mut left = Vec::new();
        for (leaving, below, for_flush, sealed) in ended {
            match (self.flush.as_mut().filter(|_| for_flush), below, sealed) {
                (None, ..) => left.push(leaving),
                (Some(flush), Some(below), Ok(())) => flush.kept(shared, nvme, below, leaving),
                (Some(flush), _, Err(why)) => flush.lost(shared, &leaving, why),
                (Some(flush), None, _) => flush.lost(shared, &leaving, Error::NotFilled),
            }
        }
        if !left.is_empty() {
            shared.host.all_spilled(&left);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use kvmesh_core::Digest;

    use crate::embedded::BlockStore;
    use crate::eviction::Policy;
    use crate::store::{NvmeSettings, Settings};
    use crate::tiers::NamespaceId;

    #[test]
    fn a_flush_waits_for_a_disk_that_is_slow_with_what_was_chosen_before() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            policy: Policy::Lru,
            nvme: Some(NvmeSettings {
                dir: dir.path().join("nvme"),
                bytes: 512 * 4096,
                bytes_per_day: None,
            }),
            ..Settings::host(dir.path(), 64 * 4096)
        };
        let store = BlockStore::new(&settings, 4000).unwrap();
        let nvme = store.store().nvme().unwrap();
        let (held, is_holding) = nvme.hold_next_write().unwrap();
        let mut names = Vec::new();
        while !store.store().host().wants_spilling() {
            names.push(Digest::new([names.len() as u8; 32]));
            assert!(store.put(names[names.len() - 1], &[1; 4000]).unwrap());
        }
        while !is_holding() {
            thread::yield_now();
        }
        let within = Some(Duration::from_millis(20));
        assert!(store.store().persist(within).is_err(), "it does not wait");
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(300));
                drop(held);
            });
            store.flush().unwrap();
            let on_disk = |name: &&Digest| nvme.holds(NamespaceId(0), name);
            assert_eq!(names.iter().filter(on_disk).count(), names.len());
        });
        store.close();
    }
}
