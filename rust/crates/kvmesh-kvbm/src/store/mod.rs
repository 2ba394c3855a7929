//! A node's tiers as one: blocks go down before they leave the host tier, and come up when they are asked for.
//!
//! * [`spill`] writes blocks that leave next to the disk, those that [`admission`] lets through, and what a [`flush`]
//!   waits for, all on one [`writer`].
//! * [`promote`] reads blocks back into the host tier, which is where all readers read.
//! * [`archive`] writes what was stored to object storage, [`recall`] reads it back; [`objects`] is both for callers.
//! * [`pins`] keeps blocks for tenants; [`residency`] tells where blocks are and takes wishes of where they should be.
//! * [`network`] lends blocks to other nodes' stores and expects theirs; it moves no bytes. [`wants`] tells of what
//!   engines ask for and others have.
//! * [`single`] moves blocks one by one, for callers that wait.
//! * [`warm`] fills vacant memory ahead of traffic.
//! * [`scrub`] checks what nobody has asked for yet, [`suspects`] the copies of what an engine has found to be wrong.
//!
//! Nothing a scheduler waits for (`lookup`, `lease`) waits for the disk: both only start reads.

mod admission;
mod archive;
mod flow;
mod flush;
mod network;
mod objects;
mod pins;
mod promote;
mod recall;
mod residency;
mod scrub;
mod settings;
mod single;
mod spill;
mod suspects;
mod wants;
mod warm;
mod writer;

use std::sync::Arc;
use std::time::Duration;

use kvmesh_core::{BlockHash, Digest};
use parking_lot::Mutex;

pub use self::flow::{Archived, Flow, Recalled};
pub use self::network::{Expected, Incoming, Lent, WORD};
use self::objects::Objects;
use self::pins::Pins;
pub use self::pins::{PinError, Pinned};
use self::promote::Promoter;
pub use self::residency::Prefetched;
pub use self::scrub::{Checked, ScrubSettings, Scrubbed};
use self::scrub::{Checker, Scrubber};
pub use self::settings::{NvmeSettings, Settings};
use self::spill::Spiller;
use self::suspects::Suspects;
use self::wants::Wants;
pub use self::wants::{Elsewhere, Found, Wanted};
pub use self::warm::{Run, Warmed, Warming};
use crate::block::{self, Lease};
use crate::error::{Error, Result};
use crate::eviction::Hints;
use crate::image::Layout;
use crate::latency::{Latency, Observed};
use crate::namespace::Namespace;
use crate::tiers::{Health, HostTier, NamespaceId, NvmeTier, Slot, Stats, Tier};

/// A block's namespace in all tiers.
pub(crate) struct Open {
    pub(crate) name: Namespace,
    pub(crate) layout: Arc<Layout>,
    /// On the disk; None: that tier cannot have such blocks.
    pub(crate) below: Option<NamespaceId>,
    /// The same in object storage.
    pub(crate) remote: Option<NamespaceId>,
}

/// The tiers of a node. Thread-safe.
pub struct Store {
    host: Arc<HostTier>,
    shared: Arc<Shared>,
    /// Tenants do, of the host tier.
    has_shares: bool,
    lower: Option<Lower>,
    objects: Option<Objects>,
    scrubber: Option<Scrubber>,
    /// None: there are no other tiers.
    suspects: Option<Suspects>,
    /// From an engine's lease to its release: how long loads took.
    loads: Latency,
    pins: Pins,
    wants: Wants,
    /// Held by who opens a namespace, which may wait for the disk.
    opening: Mutex<()>,
}

/// What the threads know, too.
pub(crate) struct Shared {
    pub(crate) host: Arc<HostTier>,
    /// By the host tier's numbers.
    opened: Mutex<Vec<Arc<Open>>>,
}

struct Lower {
    nvme: Arc<NvmeTier>,
    spiller: Spiller,
    promoter: Promoter,
}

impl Shared {
    pub(crate) fn open(&self, namespace: NamespaceId) -> Arc<Open> {
        self.opened.lock()[namespace.0 as usize].clone()
    }

    /// The same; None where it is open in the host tier alone.
    fn try_open(&self, namespace: NamespaceId) -> Option<Arc<Open>> {
        self.opened.lock().get(namespace.0 as usize).cloned()
    }

    /// All, by the host tier's numbers.
    fn all(&self) -> Vec<Arc<Open>> {
        self.opened.lock().clone()
    }

    /// A tier's number of a namespace, as another tier's number of it; None where that has not opened it.
    fn translate(
        &self,
        from: kvmesh_core::Tier,
        namespace: NamespaceId,
        to: kvmesh_core::Tier,
    ) -> Option<NamespaceId> {
        let opened = self.opened.lock();
        let number = |open: &Open, host: usize, tier| match tier {
            kvmesh_core::Tier::Host => Some(NamespaceId(host as u32)),
            kvmesh_core::Tier::Nvme => open.below,
            kvmesh_core::Tier::Network => open.remote,
            kvmesh_core::Tier::Device => None,
        };
        let found = (opened.iter().enumerate())
            .find(|(host, open)| number(open, *host, from) == Some(namespace))?;
        number(found.1, found.0, to)
    }
}

impl Store {
    /// Makes the tiers. Takes the time the host tier's memory takes to allocate, and the disk tier's record to read.
    pub fn new(settings: &Settings) -> Result<Self> {
        let (dir, bytes) = (&settings.shm_dir, settings.host_bytes);
        let host = Arc::new(HostTier::with_policy(dir, bytes, settings.policy)?);
        if let Some(weights) = &settings.tenant_weights {
            host.share(weights.clone());
        }
        let shared = Arc::new(Shared {
            host: host.clone(),
            opened: Mutex::default(),
        });
        let lower = match &settings.nvme {
            None => None,
            Some(nvme) => {
                host.spill();
                let tier = NvmeTier::new(&nvme.dir, nvme.bytes, settings.policy);
                Some(Lower {
                    spiller: Spiller::start(&shared, &tier, nvme.bytes_per_day)?,
                    promoter: Promoter::start(&shared, &tier, settings.host_bytes)?,
                    nvme: tier,
                })
            }
        };
        let objects = match &settings.objects {
            None => None,
            Some(objects) => {
                let nvme = lower.as_ref().map(|lower| &lower.nvme);
                Some(Objects::start(&shared, nvme, objects, settings)?)
            }
        };
        let mut store = Self {
            host,
            shared,
            has_shares: settings.tenant_weights.is_some(),
            lower,
            objects,
            scrubber: None,
            suspects: None,
            loads: Latency::default(),
            pins: Pins::new(settings.pin_bytes),
            wants: Wants::default(),
            opening: Mutex::new(()),
        };
        if store.tiers().len() > 1 {
            store.suspects = Some(Suspects::start(store.checker())?);
        }
        if let Some(scrub) = settings.scrub {
            store.scrubber = Some(Scrubber::start(store.local_checker(), scrub)?);
        }
        Ok(store)
    }

    /// The host tier.
    pub fn host(&self) -> &Arc<HostTier> {
        &self.host
    }

    /// The disk tier.
    pub fn nvme(&self) -> Option<&Arc<NvmeTier>> {
        self.lower.as_ref().map(|lower| &lower.nvme)
    }

    /// The tiers, from the top.
    pub fn tiers(&self) -> Vec<Arc<dyn Tier>> {
        let mut tiers: Vec<Arc<dyn Tier>> = vec![self.host.clone()];
        if let Some(lower) = &self.lower {
            tiers.push(lower.nvme.clone());
        }
        if let Some(objects) = &self.objects {
            tiers.push(objects.tier.clone());
        }
        tiers
    }

    /// Opens a namespace in all tiers. Fails where the host tier cannot have such blocks.
    pub fn open(&self, namespace: &Namespace) -> Result<NamespaceId> {
        let _opening = self.opening.lock();
        let id = self.host.open(namespace)?;
        if self.shared.opened.lock().len() <= id.0 as usize {
            let open = Arc::new(Open {
                name: namespace.clone(),
                layout: self.host.layout(id),
                below: (self.nvme()).and_then(|nvme| nvme.open(namespace).ok()),
                remote: (self.objects()).and_then(|tier| tier.open(namespace).ok()),
            });
            self.shared.opened.lock().push(open);
        }
        Ok(id)
    }

    /// How many leading blocks of the chain a `lease` would get. Those on the disk begin to come up.
    pub fn lookup(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        let here = self.host.lookup(namespace, chain);
        match &self.lower {
            Some(lower) if here < chain.len() => {
                (lower.promoter).wish(&self.shared, namespace, chain, here, None)
            }
            _ => here,
        }
    }

    /// Leases the leading blocks of the chain, those included that are on their way up; which of them are not here yet.
    pub fn lease(&self, namespace: NamespaceId, chain: &[Digest]) -> (Lease, Vec<u32>) {
        if let Some(lower) = &self.lower {
            lower.promoter.fetch(&self.shared, namespace, chain);
        }
        let host: Arc<dyn Tier> = self.host.clone();
        let lease = block::lease(&host, namespace, chain, usize::MAX);
        let coming = |&(_, &slot): &(usize, &_)| self.host.is_coming(slot);
        let coming = (lease.slots().iter().enumerate())
            .filter(coming)
            .map(|(place, _)| place as u32)
            .collect();
        (lease, coming)
    }

    /// Somebody is about to need room in the host tier: pins whose time is over keep nothing any more.
    pub fn expire_pins(&self) {
        self.pins.expire();
    }

    /// These blocks of a chain are about to be stored for a tenant; empty: for nobody.
    pub fn claim(&self, namespace: NamespaceId, chain: &[Digest], tenant: &str) {
        if let (true, Some(last)) = (self.has_shares, chain.last()) {
            (self.host).claim(namespace, std::slice::from_ref(last), tenant);
        }
    }

    /// Something was stored in the host tier: others may have to go down.
    pub fn stored(&self) {
        self.make_way();
        if let Some(objects) = &self.objects {
            objects.archivist.wake();
        }
    }

    /// Something has come to the host tier: others may have to go down before the next comes.
    fn make_way(&self) {
        if let Some(lower) = &self.lower
            && self.host.wants_spilling()
        {
            lower.spiller.wake();
        }
    }

    /// Waits until a block can be stored without another's leaving unwritten. For callers that would rather wait than
    /// lose blocks; true at once where there is no tier below, or it is out.
    pub fn wait_spilled(&self, namespace: NamespaceId, timeout: Duration) -> bool {
        if let Some(objects) = &self.objects
            && !objects.archivist.wait_room(timeout)
        {
            return false;
        }
        let Some(lower) = &self.lower else {
            return true;
        };
        if self.host.wait_spilled(namespace, Duration::ZERO) || lower.nvme.working().is_err() {
            return true;
        }
        lower.spiller.wake();
        self.host.wait_spilled(namespace, timeout)
    }

    /// What requests that use these blocks from now on say of their return, in all tiers.
    pub fn hint(&self, namespace: NamespaceId, blocks: &[BlockHash], hints: Hints) {
        self.host.hint(namespace, blocks, hints);
        if let (Some(nvme), Some(below)) = (self.nvme(), self.shared.open(namespace).below) {
            nvme.hint(below, blocks, hints);
        }
        if let (Some(tier), Some(remote)) = (self.objects(), self.shared.open(namespace).remote) {
            tier.hint(remote, blocks, hints);
        }
    }

    /// Keeps the leading blocks of a chain in the host tier for a tenant, under all namespaces of a model (all where it
    /// is empty), until it is released or the time is over. Fails where the tenant has no bytes left for them.
    pub fn pin(
        &self,
        tenant: &str,
        model: &str,
        chain: &[Digest],
        time: Duration,
    ) -> std::result::Result<Pinned, PinError> {
        let mut leases = Vec::new();
        for namespace in self.namespaces_of(model) {
            let bytes = self.shared.open(namespace).layout.slot_bytes() as u64;
            let (lease, _) = self.lease(namespace, chain);
            if !lease.slots().is_empty() {
                leases.push((bytes * lease.slots().len() as u64, lease));
            }
        }
        self.pins.pin(tenant, leases, time)
    }

    /// Ends a pin; false if there is none of that receipt.
    pub fn unpin(&self, receipt: u64) -> bool {
        self.pins.release(receipt)
    }

    /// Pins, and their bytes.
    pub fn pinned(&self) -> (usize, u64) {
        self.pins.held()
    }

    /// Writes everything in the host tier to the tiers that outlive the machine, whatever its chances; with a time, as
    /// much as is written by then. All that was stored before is there when it returns, or it fails and says what is not:
    /// with `NotKept`, or because one of those tiers is out. Blocks.
    pub fn persist(&self, within: Option<Duration>) -> Result<()> {
        let kept = match &self.lower {
            Some(lower) => lower.spiller.write_everything(within),
            None => Ok(()),
        };
        kept.and(match &self.objects {
            Some(objects) => objects.archivist.write_everything(within),
            None => Ok(()),
        })
    }

    /// Each tier's numbers, from the top.
    pub fn stats(&self) -> Vec<(kvmesh_core::Tier, Stats)> {
        let of = |tier: Arc<dyn Tier>| Some((tier.kind()?, tier.stats()));
        self.tiers().into_iter().filter_map(of).collect()
    }

    /// What went between the tiers.
    pub fn flow(&self) -> Flow {
        match &self.lower {
            Some(lower) => Flow {
                shed: self.host.stats().shed,
                waiting: self.host.unspilled(),
                ..lower.spiller.flow().and(lower.promoter.flow())
            },
            None => Flow::default(),
        }
    }

    /// Whether the disk tier works.
    pub fn health(&self) -> Option<Health> {
        self.nvme().map(|nvme| nvme.health())
    }

    /// Checks blocks of a tier from the one behind `after` on, at most `limit`, and drops those that are bad. Fails when
    /// the tier does, or there is none of this kind. Blocks.
    pub fn check(
        &self,
        kind: kvmesh_core::Tier,
        after: Option<Slot>,
        limit: usize,
    ) -> Result<Checked> {
        let checker = self.checker();
        let tier = (checker.tiers.iter()).find(|tier| tier.kind() == Some(kind));
        let missing = || Error::Invalid(format!("this store has no {kind:?} tier"));
        checker.check(tier.ok_or_else(missing)?, after, limit)
    }

    /// An engine has found this block to be wrong in memory, from where it is gone: its copies are checked, by and by.
    pub(crate) fn suspect(&self, namespace: NamespaceId, digest: Digest) {
        if let Some(suspects) = &self.suspects {
            suspects.add(namespace, digest);
        }
    }

    /// An engine has held blocks for so long, to load them.
    pub(crate) fn loaded_in(&self, time: Duration) {
        self.loads.record(time);
    }

    /// How long operations on the tiers took: of memory, engines' loads, from lease to release; of the others, single
    /// blocks, from when their batch was begun.
    pub fn latencies(&self) -> Vec<(kvmesh_core::Tier, &'static str, Observed)> {
        use kvmesh_core::Tier::{Host, Network, Nvme};
        let mut latencies = vec![(Host, "load", self.loads.observed())];
        if let Some(nvme) = self.nvme() {
            let (read, written) = nvme.latencies();
            latencies.extend([(Nvme, "read", read), (Nvme, "write", written)]);
        }
        if let Some(tier) = self.objects() {
            let (read, written) = tier.latencies();
            latencies.extend([(Network, "read", read), (Network, "write", written)]);
        }
        latencies
    }

    /// What was checked at rest, tier by tier; empty where nothing is.
    pub fn scrubbed(&self) -> Vec<(kvmesh_core::Tier, Scrubbed)> {
        self.scrubber.as_ref().map_or(Vec::new(), Scrubber::totals)
    }

    /// Of tiers whose reading costs nothing.
    fn local_checker(&self) -> Checker {
        let mut checker = self.checker();
        (checker.tiers).retain(|tier| tier.kind() != Some(kvmesh_core::Tier::Network));
        checker
    }

    fn checker(&self) -> Checker {
        Checker {
            shared: self.shared.clone(),
            tiers: self.tiers(),
        }
    }

    /// Ends the threads and lets go of the disk; what is in memory stays readable. Idempotent.
    pub fn stop(&self) {
        self.pins.clear();
        self.wants.stop();
        if let Some(scrubber) = &self.scrubber {
            scrubber.stop();
        }
        if let Some(suspects) = &self.suspects {
            suspects.stop();
        }
        if let Some(lower) = &self.lower {
            lower.spiller.stop();
            lower.promoter.stop();
            lower.nvme.stop();
        }
        if let Some(objects) = &self.objects {
            objects.stop();
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.stop();
    }
}
