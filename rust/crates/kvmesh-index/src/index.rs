//! The index as its callers see it.

use std::{
    collections::HashMap,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

use crossbeam_utils::CachePadded;
use kvmesh_core::{Error, ErrorKind, Result, SetDigest, Tier};

use crate::{
    batch::{Batch, Change},
    blocks::Blocks,
    holders::{Holder, HolderId, Holders, Kind, MAX_HOLDERS, MAX_SLOTS, Slot},
    matches::Matches,
    snapshot,
    sync::{Arc, ArcSwap, AtomicU64, Mutex, MutexGuard, fence},
};

/// Which holder has which block in which tier; see the crate's documentation for what it guarantees.
///
/// A holder is an engine, with a device tier, or a store. A store with a node has that node's host and
/// nvme tiers and a network tier; one without has a network tier. An engine sees its own
/// device tier, the host and nvme tiers of all stores on its node, and every network tier.
///
/// Methods that take a [`HolderId`] fail with `NotFound` once it was dropped.
pub struct PrefixIndex {
    /// What readers see; replaced under `names`, and its version then.
    holders: ArcSwap<Holders>,
    version: AtomicU64,
    names: CachePadded<Mutex<HashMap<Arc<str>, HolderId>>>,
    /// One writer at a time for a holder, by its number: who it is.
    seats: Box<[Mutex<Seat>]>,
    blocks: Blocks,
}

/// Who has a number.
type Seat = Option<(HolderId, Holder)>;

/// Sizes at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// Engines and stores.
    pub holders: usize,
    /// Of these, engines.
    pub engines: usize,
    /// Distinct blocks.
    pub blocks: usize,
    /// (holder, tier, block) triples.
    pub held: u64,
    /// Runs the blocks lie in.
    pub runs: usize,
    /// Bytes asked of the allocator for blocks, runs and the table, in use or kept for use.
    pub bytes: usize,
    /// The cap on `bytes`.
    pub max_bytes: Option<usize>,
    /// Blocks forgotten at the cap since the start, each counted once, whoever held it.
    pub forgotten: u64,
}

impl PrefixIndex {
    /// An empty index that uses at most `max_bytes` bytes; `None` for no cap.
    pub fn new(max_bytes: Option<usize>) -> Self {
        Self {
            holders: ArcSwap::default(),
            version: AtomicU64::new(0),
            names: CachePadded::default(),
            seats: (0..MAX_HOLDERS).map(|_| Mutex::default()).collect(),
            blocks: Blocks::new(max_bytes, MAX_SLOTS),
        }
    }

    /// An index with what [`Self::snapshot`] wrote, every holder under its id; what does not fit
    /// under `max_bytes` is forgotten. Fails with `InvalidArgument` for damaged bytes.
    pub fn restore(bytes: &[u8], max_bytes: Option<usize>) -> Result<Self> {
        let index = Self::new(max_bytes);
        let mut runs = snapshot::read(bytes)?;
        for (id, holder) in runs.holders.iter() {
            *index.seats[id.index()].lock() = Some((id, holder.clone()));
            index.names.lock().insert(Arc::clone(&holder.name), id);
        }
        while let Some((slot, hashes, parent)) = runs.next()? {
            index.blocks.store(slot, hashes, parent);
        }
        index.publish(runs.holders);
        Ok(index)
    }

    /// The whole state as bytes, at one moment: writers wait meanwhile, matches do not.
    pub fn snapshot(&self) -> Vec<u8> {
        let _names = self.names.lock();
        let _seats: Vec<_> = self.seats.iter().map(Mutex::lock).collect();
        snapshot::write(&self.holders.load(), &self.blocks)
    }

    /// Adds an engine, on a node whose stores it sees. Fails with `InvalidArgument` when the name is
    /// in use and `LimitExceeded` beyond [`crate::MAX_HOLDERS`].
    pub fn add_engine(&self, name: &str, node: Option<&str>) -> Result<HolderId> {
        self.add(name, node, Kind::Engine)
    }

    /// Adds a store, on a node or for the whole cluster. Fails as [`Self::add_engine`] does.
    pub fn add_store(&self, name: &str, node: Option<&str>) -> Result<HolderId> {
        self.add(name, node, Kind::Store)
    }

    fn add(&self, name: &str, node: Option<&str>, kind: Kind) -> Result<HolderId> {
        let mut names = self.names.lock();
        if names.contains_key(name) {
            return Err(
                Error::invalid("this holder exists; drop it before adding it again")
                    .with_context("name", name),
            );
        }
        let name: Arc<str> = name.into();
        let mut holders = Holders::clone(&self.holders.load());
        let id = holders.add(Arc::clone(&name), node, kind)?;
        *self.seats[id.index()].lock() = Some((id, holders.get(id)?.clone()));
        names.insert(name, id);
        self.publish(holders);
        Ok(id)
    }

    /// Forgets a holder, its blocks and its id.
    pub fn drop_holder(&self, id: HolderId) -> Result<()> {
        // Nobody writes for it any more, and its number is not free yet.
        let mut seat = self.seat(id)?;
        self.clear_tiers(id, None);
        let owner = seat.take();
        drop(seat);
        let mut names = self.names.lock();
        if let Some((_, holder)) = owner {
            names.remove(&holder.name);
        }
        let mut holders = Holders::clone(&self.holders.load());
        holders.drop(id);
        self.publish(holders);
        Ok(())
    }

    /// Records that the holder has these blocks. Known ones are ignored.
    ///
    /// `parent` is the block before the first, where known: a hint for compression that never changes an
    /// answer. Fails with `InvalidArgument` for a tier that such a holder does not have.
    pub fn store(
        &self,
        id: HolderId,
        hashes: &[u64],
        parent: Option<u64>,
        tier: Tier,
    ) -> Result<()> {
        let seat = self.seat(id)?;
        if let Some((_, holder)) = &*seat {
            if let Some(advice) = holder.lacks(tier) {
                return Err(Error::invalid(advice)
                    .with_context("name", &holder.name)
                    .with_context("tier", tier));
            }
        }
        self.blocks.store(slot(id, tier), hashes, parent);
        Ok(())
    }

    /// Records that the holder no longer has these blocks in this tier. Unknown ones are ignored.
    pub fn remove(&self, id: HolderId, hashes: &[u64], tier: Tier) -> Result<()> {
        let _seat = self.seat(id)?;
        self.blocks.remove(slot(id, tier), hashes);
        Ok(())
    }

    /// Records that the holder has nothing in one tier, or in any (`None`).
    pub fn clear(&self, id: HolderId, tier: Option<Tier>) -> Result<()> {
        let _seat = self.seat(id)?;
        self.clear_tiers(id, tier);
        Ok(())
    }

    /// Applies one serialized `kvmesh.v1.KvEventBatch` to the holder it names, wholly or not at all.
    ///
    /// Its sequence number is the caller's business; changes in tiers that the holder cannot have are
    /// skipped. Fails with `InvalidArgument` for bytes that are no batch or whose columns do not add up,
    /// `NotFound` for a name that is not in use.
    pub fn apply(&self, batch: &[u8]) -> Result<()> {
        self.apply_noting(batch, |_, _| {})
    }

    /// As [`PrefixIndex::apply`], and tells `note` of every change of the holder: one reading of a batch for all who
    /// care.
    pub fn apply_noting(
        &self,
        batch: &[u8],
        mut note: impl FnMut(HolderId, &Change<'_>),
    ) -> Result<()> {
        let batch = Batch::parse(batch)?;
        let id = self.names.lock().get(batch.holder).copied();
        let id = id.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "no holder of this name; add it first")
                .with_context("name", batch.holder)
        })?;
        let seat = self.seat(id)?;
        let lacks = |tier| matches!(&*seat, Some((_, holder)) if holder.lacks(tier).is_some());
        for change in batch.changes() {
            note(id, &change);
            match change {
                Change::Cleared(tier) => self.clear_tiers(id, tier),
                Change::Stored(tier, ..) | Change::Removed(tier, _) if lacks(tier) => {}
                Change::Stored(tier, parent, hashes) => {
                    self.blocks.store(slot(id, tier), hashes, parent);
                }
                Change::Removed(tier, hashes) => self.blocks.remove(slot(id, tier), hashes),
            }
        }
        Ok(())
    }

    /// For every engine that sees the first block of `hashes`: how many leading blocks it sees,
    /// by tier. `hashes` are a prompt's blocks from its start. Waits for nobody.
    pub fn matches(&self, hashes: &[u64], into: &mut Matches) {
        loop {
            let version = self.version.load(Acquire);
            into.walk(hashes, version, || self.holders.load_full(), &self.blocks);
            fence(Acquire);
            // Otherwise it may have taken a number's next owner for the last.
            if self.version.load(Relaxed) == version {
                return;
            }
        }
    }

    /// Shows readers other holders. The caller has the names.
    fn publish(&self, holders: Holders) {
        let version = holders.version();
        self.holders.store(Arc::new(holders));
        self.version.store(version, Release);
    }

    /// The digest of what the index knows a holder to have in a tier, which is less than it has
    /// once blocks were forgotten at the cap.
    pub fn digest(&self, id: HolderId, tier: Tier) -> Result<SetDigest> {
        let _seat = self.seat(id)?;
        Ok(self.blocks.held(slot(id, tier)))
    }

    /// Blocks of a holder in a tier that were forgotten at the cap since it was last cleared: at most so many that it
    /// has are not in the index. One that was forgotten, stored again and forgotten again counts twice.
    pub fn forgotten(&self, id: HolderId, tier: Tier) -> Result<u64> {
        let _seat = self.seat(id)?;
        Ok(self.blocks.forgotten_of(slot(id, tier)))
    }

    /// The blocks the index knows a holder to have in a tier, in no order to rely on; blocks stored as
    /// one chain mostly lie together. Reads the whole index.
    pub fn blocks(&self, id: HolderId, tier: Tier) -> Result<Vec<u64>> {
        let _seat = self.seat(id)?;
        Ok(self.blocks.of(slot(id, tier)))
    }

    /// Sizes now.
    pub fn stats(&self) -> Stats {
        let holders = self.holders.load();
        let held = holders
            .iter()
            .flat_map(|(id, _)| Tier::ALL.map(|tier| self.blocks.held(slot(id, tier)).count))
            .sum();
        Stats {
            holders: holders.len(),
            engines: holders.engines(),
            blocks: self.blocks.len(),
            held,
            runs: self.blocks.runs(),
            bytes: self.blocks.bytes(),
            max_bytes: self.blocks.max_bytes(),
            forgotten: self.blocks.forgotten(),
        }
    }

    /// The holder's turn to write. Fails when it was dropped.
    fn seat(&self, id: HolderId) -> Result<MutexGuard<'_, Seat>> {
        let seat = self.seats[id.index()].lock();
        match &*seat {
            Some((owner, _)) if *owner == id => Ok(seat),
            _ => Err(Holders::unknown(id)),
        }
    }

    fn clear_tiers(&self, id: HolderId, tier: Option<Tier>) {
        for each in Tier::ALL {
            if tier.is_none_or(|tier| tier == each) {
                self.blocks.clear(slot(id, each));
            }
        }
    }
}

fn slot(id: HolderId, tier: Tier) -> Slot {
    Slot::new(id.index() as u16, tier)
}
