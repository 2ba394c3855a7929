//! Takes the tier out when its service does not do, brings it back, and finds out what other stores have done.

use std::cmp::Reverse;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use kvmesh_core::Digest;
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::bucket::{Bucket, Failure};
use super::names::{Named, NamespaceName, ROOT, read_name};
use super::{ObjectTier, Online};
use crate::error::{Error, Result};
use crate::image::Layout;
use crate::journal::Journal;
use crate::namespace::Namespace;
use crate::tiers::NamespaceId;
use crate::tiers::catalog::Catalog;

/// How often the tier is looked after, and the longest time between two tries to come back.
const EVERY: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(10);
/// A tier that went out sooner is tried again later than the last time.
const STEADY: Duration = Duration::from_secs(60);

/// What a listing came to.
#[derive(Default)]
struct Listing {
    namespaces: Vec<Namespace>,
    /// Each by the place of its namespace in `namespaces`, the longest unwritten first.
    blocks: Vec<(usize, Digest, Option<Digest>)>,
    /// Still older ones, for which there is no room.
    excess: Vec<(usize, Digest, Option<Digest>)>,
}

/// When to do what.
struct Times {
    /// Until the next try to come back.
    wait: Duration,
    came: Option<Instant>,
    listed: Instant,
}

/// Looks after the tier until it is stopped or dropped; `told` hears when the first try is over.
pub(super) async fn keep(
    weak: Weak<ObjectTier>,
    mut stop: watch::Receiver<bool>,
    told: SyncSender<()>,
) {
    let mut times = Times {
        wait: EVERY,
        came: None,
        listed: Instant::now(),
    };
    loop {
        let pause = match weak.upgrade() {
            Some(tier) => tier.look_after(&mut times).await,
            None => return,
        };
        let _ = told.try_send(());
        let stopped = stop.wait_for(|stopped| *stopped);
        if tokio::time::timeout(pause, stopped).await.is_ok() {
            return;
        }
    }
}

impl ObjectTier {
    /// Ends its threads, after what is being deleted. Idempotent; there is no way back.
    pub fn stop(&self) {
        if self.stop.send_replace(true) {
            return;
        }
        // The last to drop the tier may be one of its own threads.
        if let (Some(own), true) = (self.own.upgrade(), Handle::try_current().is_err()) {
            let time = self.settings.timeout;
            self.wait(async move {
                let _ = tokio::time::timeout(time, own.until_deleted(None)).await;
            });
        }
        *self.online.write() = None;
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }

    /// What to do now; how long to pause then.
    async fn look_after(&self, times: &mut Times) -> Duration {
        if let Ok(online) = self.service() {
            if times.listed.elapsed() >= self.settings.refresh {
                if let Err(failure) = self.refresh(&online).await {
                    self.take_out(&online, &failure);
                }
                times.listed = Instant::now();
            }
            return EVERY.min(self.settings.refresh);
        }
        if let Some(came) = times.came.take() {
            // It has just gone out.
            if came.elapsed() > STEADY {
                times.wait = EVERY;
            }
            return times.wait;
        }
        let come = self.come_back().await;
        let pause = times.wait;
        times.wait = (pause * 2).min(PATIENCE);
        match come {
            Ok(()) => {
                (times.came, times.listed) = (Some(Instant::now()), Instant::now());
                EVERY
            }
            Err(error) => {
                let why = match error {
                    Error::Storage { why, .. } => why,
                    error => error.to_string(),
                };
                self.health.lock().problem = Some(why);
                pause
            }
        }
    }

    /// Takes the tier out: it holds nothing and has no room until it comes back. What callers are told.
    pub(super) fn take_out(&self, online: &Arc<Online>, failure: &Failure) -> Error {
        let mut current = self.online.write();
        if current.as_ref().is_some_and(|now| Arc::ptr_eq(now, online)) {
            *current = None;
            let mut contents = self.contents.lock();
            // Namespaces that fitted once fit again.
            if let Ok(catalog) = contents.emptied(self.settings.bytes, self.policy) {
                contents.replace(catalog, &self.journal, false);
            }
            let mut health = self.health.lock();
            health.problem = Some(failure.to_string());
            health.outages += 1;
        }
        self.broken(failure.to_string())
    }

    async fn come_back(&self) -> Result<()> {
        let bucket = Bucket::open(&self.settings)?;
        let failed = |failure: Failure| self.broken(failure.to_string());
        let listing = self.list(&bucket).await.map_err(failed)?;
        if self.settings.writable {
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            let probe = format!("probe/{}-{}", std::process::id(), now.as_nanos());
            bucket.probe(&probe).await.map_err(failed)?;
        }
        self.take_in(bucket, &listing)
    }

    /// Goes online with what is there.
    fn take_in(&self, bucket: Bucket, listing: &Listing) -> Result<()> {
        loop {
            let (known, emptied) = {
                let contents = self.contents.lock();
                let emptied = contents.emptied(self.settings.bytes, self.policy);
                (contents.namespaces(), emptied)
            };
            let mut catalog = emptied?;
            // All of it is announced below.
            let recovered = adopt(&mut catalog, &Journal::default(), listing).len();
            catalog.take_events();
            let mut current = self.online.write();
            let mut contents = self.contents.lock();
            if contents.namespaces() != known {
                // Another one was opened meanwhile, and has a number.
                continue;
            }
            if *self.stop.borrow() {
                return Ok(());
            }
            contents.replace(catalog, &self.journal, true);
            drop(contents);
            let mut health = self.health.lock();
            (health.problem, health.recovered) = (None, recovered as u64);
            drop(health);
            let described = listing.namespaces.iter().map(NamespaceName::of).collect();
            *current = Some(Arc::new(Online {
                bucket,
                described: Mutex::new(described),
            }));
            drop(current);
            self.delete(listing.excess_paths());
            return Ok(());
        }
    }

    /// Finds out what other stores have written and deleted.
    async fn refresh(&self, online: &Online) -> std::result::Result<(), Failure> {
        let before = self.by_use();
        let listing = self.list(&online.bucket).await?;
        {
            let mut contents = self.contents.lock();
            if !contents.online {
                return Ok(());
            }
            let there = adopt(&mut contents.catalog, &self.journal, &listing);
            for (namespace, digest, _) in before {
                if there.contains(&(namespace, digest)) {
                    continue;
                }
                if let Some(slot) = contents.catalog.hold_block(namespace, &digest) {
                    contents.catalog.disown(&self.journal, slot);
                    contents.catalog.release(slot);
                }
            }
        }
        self.delete(listing.excess_paths());
        // A namespace that was deleted with its blocks is described anew.
        let described = listing.namespaces.iter().map(NamespaceName::of).collect();
        *online.described.lock() = described;
        Ok(())
    }

    async fn list(&self, bucket: &Bucket) -> std::result::Result<Listing, Failure> {
        let mut blocks = Vec::new();
        let mut listing = Listing::default();
        let mut known: FxHashMap<NamespaceName, (usize, u64)> = FxHashMap::default();
        for object in bucket.list(ROOT).await? {
            match read_name(&object.path) {
                Some(Named::Fields(name)) => {
                    let fields = match bucket.get(&object.path).await {
                        Ok(fields) => fields.to_vec(),
                        Err(Failure::Absent) => continue,
                        Err(failure) => return Err(failure),
                    };
                    if let Some(namespace) = name.decode(&fields) {
                        let bytes = Layout::new(&namespace).slot_bytes() as u64;
                        known.insert(name, (listing.namespaces.len(), bytes));
                        listing.namespaces.push(namespace);
                    }
                }
                Some(Named::Block {
                    namespace,
                    digest,
                    parent,
                }) => blocks.push((object.modified, namespace, digest, parent)),
                None => {}
            }
        }
        blocks.sort_by_key(|&(modified, ..)| Reverse(modified));
        let mut bytes = 0;
        for (_, name, digest, parent) in blocks {
            // Of others it is not known what they are.
            let Some(&(namespace, of_block)) = known.get(&name) else {
                continue;
            };
            bytes += of_block;
            let fits = bytes <= self.settings.bytes;
            let part = if fits {
                &mut listing.blocks
            } else {
                &mut listing.excess
            };
            part.push((namespace, digest, parent));
        }
        listing.blocks.reverse();
        Ok(listing)
    }
}

impl Listing {
    fn excess_paths(&self) -> Vec<String> {
        (self.excess.iter())
            .map(|(namespace, digest, parent)| {
                NamespaceName::of(&self.namespaces[*namespace]).block(digest, parent.as_ref())
            })
            .collect()
    }
}

/// Takes in what is listed and not there yet; all that is listed.
fn adopt(
    catalog: &mut Catalog,
    journal: &Journal,
    listing: &Listing,
) -> FxHashSet<(NamespaceId, Digest)> {
    let numbers: Vec<Option<NamespaceId>> = (listing.namespaces.iter())
        .map(|namespace| catalog.open(namespace).ok())
        .collect();
    let mut there = FxHashSet::default();
    for &(namespace, digest, parent) in &listing.blocks {
        if let Some(id) = numbers[namespace] {
            catalog.adopt(journal, id, digest, parent);
            there.insert((id, digest));
        }
    }
    there
}
