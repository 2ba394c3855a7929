//! Blocks in object storage come to the host tier: read many at a time, and let go of when they are late.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use kvmesh_core::{BlockHash, Digest};
use parking_lot::Mutex;
use rustc_hash::FxHashSet;

use super::network::Incoming;
use super::{Recalled, Shared};
use crate::error::{Error, Result};
use crate::tiers::{NamespaceId, NvmeTier, ObjectTier, Slot, Tier};

/// Blocks and bytes read at a time: the first of them can be used before the last are asked for.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 64 << 20;
/// A batch takes at most this part of the host tier.
const PART: u64 = 8;
/// How long one batch may take, however much time there is: engines wait for what has begun.
const BATCH_TIME: Duration = Duration::from_secs(5);
/// Recalls under way; more would only wait for the link.
const MOST: usize = 16;
/// Weight of the last batch in the measured speed.
const WEIGHT: f64 = 0.3;

/// The reader.
pub(super) struct Recaller {
    shared: Arc<Shared>,
    nvme: Option<Arc<NvmeTier>>,
    tier: Arc<ObjectTier>,
    host_bytes: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    recalled: Recalled,
    /// The last blocks of the chains that are being recalled.
    under_way: FxHashSet<BlockHash>,
    bytes_per_s: Option<f64>,
}

/// Why blocks do not come.
#[derive(Clone, Copy)]
enum Reason {
    Absent,
    Late,
    Slow,
    Full,
    Corrupt,
    Failed,
    Shed,
}

impl Recaller {
    pub(super) fn new(
        shared: &Arc<Shared>,
        nvme: Option<&Arc<NvmeTier>>,
        tier: &Arc<ObjectTier>,
        host_bytes: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            shared: shared.clone(),
            nvme: nvme.cloned(),
            tier: tier.clone(),
            host_bytes,
            state: Mutex::default(),
        })
    }

    pub(super) fn recalled(&self) -> Recalled {
        let state = self.state.lock();
        Recalled {
            bytes_per_s: state.bytes_per_s.unwrap_or(0.0) as u64,
            ..state.recalled
        }
    }

    /// How many leading blocks of a chain are here, on the disk, or known to be in the storage.
    pub(super) fn leading(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        let remote = self.remote_of(namespace);
        let stored = |digest: &Digest| {
            remote.is_some_and(|remote| self.tier.holds(remote, digest))
                || self.shared.host.leading(namespace, &[*digest]) == 1
                || self.is_below(namespace, digest)
        };
        chain.iter().take_while(|digest| stored(digest)).count()
    }

    /// Begins to read what memory and disk lack of a chain. Never blocks; what does not come until then is counted.
    pub(super) fn want(
        self: &Arc<Self>,
        namespace: NamespaceId,
        chain: Vec<Digest>,
        until: Instant,
    ) {
        let Some(last) = chain.last().map(Digest::block_hash) else {
            return;
        };
        if self.begins(last, chain.len()) {
            let own = self.clone();
            self.tier.handle().spawn(async move {
                own.recall(namespace, None, &chain, until).await;
                own.state.lock().under_way.remove(&last);
            });
        }
    }

    /// The same of a chain whose blocks may not be known yet: the storage is asked for them.
    pub(super) fn want_named(
        self: &Arc<Self>,
        namespace: NamespaceId,
        known: Vec<Digest>,
        chain: Vec<BlockHash>,
        until: Instant,
    ) {
        let Some(&last) = chain.last() else {
            return;
        };
        if !self.begins(last, chain.len()) {
            return;
        }
        let own = self.clone();
        self.tier.handle().spawn(async move {
            let (found, asked) = own.ask(namespace, known, &chain, until).await;
            own.miss(asked, (chain.len() - found.len()) as u64);
            own.recall(namespace, None, &found, until).await;
            own.state.lock().under_way.remove(&last);
        });
    }

    /// Reads what memory and disk lack of a chain, whose first block follows `parent`. Blocks.
    pub(super) fn bring(
        self: &Arc<Self>,
        namespace: NamespaceId,
        parent: Option<Digest>,
        chain: &[Digest],
        within: Duration,
    ) {
        let (own, chain) = (self.clone(), chain.to_vec());
        let until = Instant::now() + within;
        self.tier.wait(async move {
            own.recall(namespace, parent, &chain, until).await;
        });
    }

    fn begins(&self, last: BlockHash, blocks: usize) -> bool {
        let mut state = self.state.lock();
        if state.under_way.contains(&last) {
            return false;
        }
        if state.under_way.len() >= MOST {
            state.recalled.add(Reason::Shed, blocks as u64);
            return false;
        }
        state.under_way.insert(last)
    }

    /// The digests of leading blocks, of which `known` are known; and why there are no more.
    async fn ask(
        &self,
        namespace: NamespaceId,
        mut known: Vec<Digest>,
        chain: &[BlockHash],
        until: Instant,
    ) -> (Vec<Digest>, Reason) {
        let Some(remote) = self.remote_of(namespace) else {
            return (known, Reason::Absent);
        };
        let asked = self.tier.ask(remote, &chain[known.len()..]);
        let reason = match tokio::time::timeout_at(until.into(), asked).await {
            Ok(Ok(())) => Reason::Absent,
            Ok(Err(_)) => Reason::Failed,
            Err(_) => Reason::Late,
        };
        let found = self.tier.digests(remote, &chain[known.len()..]);
        known.extend(found);
        (known, reason)
    }

    async fn recall(
        &self,
        namespace: NamespaceId,
        parent: Option<Digest>,
        chain: &[Digest],
        until: Instant,
    ) {
        let Some(remote) = self.remote_of(namespace) else {
            return self.miss(Reason::Absent, chain.len() as u64);
        };
        let host = &self.shared.host;
        let slot_bytes = host.layout(namespace).slot_bytes();
        let batch_bytes = BATCH_BYTES.min((self.host_bytes / PART) as usize);
        let batch = (batch_bytes / slot_bytes).clamp(1, BATCH);
        let mut at = 0;
        loop {
            at += host.leading(namespace, &chain[at..]);
            at += (chain[at..].iter())
                .take_while(|digest| self.is_below(namespace, digest))
                .count();
            if at == chain.len() {
                return;
            }
            if host.leading(namespace, &chain[at..at + 1]) == 1 {
                continue;
            }
            let before = at
                .checked_sub(1)
                .map_or(parent, |before| Some(chain[before]));
            let rest = &chain[at..chain.len().min(at + batch)];
            match self
                .recall_batch(namespace, remote, before.as_ref(), rest, until)
                .await
            {
                Ok(taken) => at += taken,
                Err(reason) => return self.miss(reason, (chain.len() - at) as u64),
            }
        }
    }

    /// Reads leading blocks of a part of a chain; how many were there to be read.
    async fn recall_batch(
        &self,
        namespace: NamespaceId,
        remote: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
        until: Instant,
    ) -> std::result::Result<usize, Reason> {
        let host = &self.shared.host;
        let layout = host.layout(namespace);
        let left = until
            .saturating_duration_since(Instant::now())
            .min(BATCH_TIME);
        if left.is_zero() {
            return Err(Reason::Late);
        }
        let leased = Leased::new(&self.tier, remote, chain);
        if leased.slots.is_empty() {
            return Err(Reason::Absent);
        }
        let chain = &chain[..leased.slots.len()];
        self.worth(chain.len() * layout.slot_bytes(), left)?;
        let mut incoming = Incoming::expect(host, namespace, parent, chain);
        let places: Vec<usize> = incoming.blocks().iter().map(|block| block.place).collect();
        if places.is_empty() {
            // They are here by now, or on their way, or there is no room.
            return match host.leading(namespace, &chain[..1]) {
                1 => Ok(1),
                _ => Err(Reason::Full),
            };
        }
        let began = Instant::now();
        let reads = places.iter().map(|&place| {
            let slot = leased.slots[place];
            async move { (place, self.tier.get(slot).await) }
        });
        let mut reads: FuturesUnordered<_> = reads.collect();
        let (mut brought, mut worst) = (0, None);
        let read = async {
            while let Some((place, object)) = reads.next().await {
                match self.take(&mut incoming, place, &object, &leased) {
                    None => brought += 1,
                    reason => worst = reason,
                }
            }
        };
        let late = tokio::time::timeout(left, read).await.is_err();
        let bytes = (brought * layout.slot_bytes()) as u64;
        if brought > 0 || late {
            let moved = bytes.max(layout.slot_bytes() as u64) as f64;
            let speed = moved / began.elapsed().as_secs_f64().max(1e-6);
            let mut state = self.state.lock();
            state.recalled.blocks += brought as u64;
            state.recalled.bytes += bytes;
            let last = state.bytes_per_s.unwrap_or(speed);
            state.bytes_per_s = Some(last + WEIGHT * (speed - last));
        }
        match worst {
            _ if late => Err(Reason::Late),
            Some(reason) => Err(reason),
            None if places.len() < chain.len() => Ok(places.last().map_or(0, |last| last + 1)),
            None => Ok(chain.len()),
        }
    }

    /// A block's object has been read, or not; why it cannot be used.
    fn take(
        &self,
        incoming: &mut Incoming,
        place: usize,
        object: &Result<Vec<u8>>,
        leased: &Leased,
    ) -> Option<Reason> {
        let whole = incoming.arrived_as(place, object.as_deref().ok());
        match object {
            Ok(_) if whole => None,
            Ok(_) => {
                self.tier.discard(leased.slots[place]);
                Some(Reason::Corrupt)
            }
            Err(Error::Lost(_)) => Some(Reason::Absent),
            Err(_) => Some(Reason::Failed),
        }
    }

    /// Fails where computing is faster. A link may get better, so the next is told of less than this one was.
    fn worth(&self, bytes: usize, left: Duration) -> std::result::Result<(), Reason> {
        let mut state = self.state.lock();
        match state.bytes_per_s {
            Some(speed) if bytes as f64 / speed > left.as_secs_f64() => {
                state.bytes_per_s = Some(speed * (1.0 + WEIGHT));
                Err(Reason::Slow)
            }
            _ => Ok(()),
        }
    }

    /// The tier's number of the namespace.
    fn remote_of(&self, namespace: NamespaceId) -> Option<NamespaceId> {
        let open = self.shared.try_open(namespace)?;
        self.tier.open(&open.name).ok()
    }

    fn is_below(&self, namespace: NamespaceId, digest: &Digest) -> bool {
        let below = self.shared.try_open(namespace).and_then(|open| open.below);
        match (&self.nvme, below) {
            (Some(nvme), Some(below)) => nvme.holds(below, digest),
            _ => false,
        }
    }

    fn miss(&self, reason: Reason, blocks: u64) {
        self.state.lock().recalled.add(reason, blocks);
    }
}

impl Recalled {
    fn add(&mut self, reason: Reason, blocks: u64) {
        let missed = match reason {
            Reason::Absent => &mut self.absent,
            Reason::Late => &mut self.late,
            Reason::Slow => &mut self.slow,
            Reason::Full => &mut self.full,
            Reason::Corrupt => &mut self.corrupt,
            Reason::Failed => &mut self.failed,
            Reason::Shed => &mut self.shed,
        };
        *missed += blocks;
    }
}

/// Blocks that stay known while they are read.
struct Leased<'a> {
    tier: &'a ObjectTier,
    slots: Vec<Slot>,
}

impl<'a> Leased<'a> {
    fn new(tier: &'a ObjectTier, namespace: NamespaceId, chain: &[Digest]) -> Self {
        let slots = tier.lease(namespace, chain, usize::MAX);
        Self { tier, slots }
    }
}

impl Drop for Leased<'_> {
    fn drop(&mut self) {
        self.tier.release(&self.slots);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Settings, Store};
    use crate::tiers::ObjectSettings;

    #[test]
    fn a_link_that_does_not_beat_computing_is_refused_and_tried_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let objects = ObjectSettings {
            url: format!("fs://{}", dir.path().display()),
            endpoint: None,
            region: None,
            credentials: None,
            bytes: 1 << 30,
            timeout: Duration::from_secs(20),
            refresh: Duration::from_secs(3600),
            writable: true,
        };
        let settings = Settings {
            objects: Some(objects),
            ..Settings::host(dir.path(), 1 << 20)
        };
        let store = Store::new(&settings).expect("a store");
        let recaller = &store.objects.as_ref().expect("object storage").recaller;
        let second = Duration::from_secs(1);
        assert!(
            recaller.worth(1 << 30, second).is_ok(),
            "nothing is known yet"
        );
        recaller.state.lock().bytes_per_s = Some(1000.0);
        assert!(recaller.worth(900, second).is_ok());
        let refused = (0..).take_while(|_| recaller.worth(10_000, second).is_err());
        assert_eq!(refused.count(), 9, "1.3 to the ninth is more than ten");
        assert!(recaller.worth(10_000, second / 2).is_err());
    }
}
