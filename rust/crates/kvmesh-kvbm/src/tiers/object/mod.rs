//! The object tier: blocks in object storage, which all stores of a cluster share and which outlives them.
//!
//! * [`bucket`] is the service, every call with a deadline; [`names`] is what objects are called and hold;
//!   [`keeper`] takes the tier out and brings it back; [`tier`] makes it one.
//! * What is there is known by listing: at the start, now and then, and where somebody asks for a block. A block that
//!   another store deleted meanwhile is absent when it is read, and forgotten.
//! * A service that is down, slow, full or refuses takes the tier out: it is empty and full at once, and says why. Then
//!   it is tried again and again, and comes back with what it has.

mod bucket;
mod keeper;
mod names;
mod tier;

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use kvmesh_core::{BlockHash, Digest};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashSet;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{Notify, watch};

use self::bucket::{Bucket, Failure};
use self::names::{Named, NamespaceName, read_name};
pub(crate) use self::names::{pack, parts};
use super::catalog::Event;
use super::contents::Contents;
use super::{Health, NamespaceId, Slot};
use crate::copy::checksum;
use crate::error::{Error, Result};
use crate::eviction::Policy;
use crate::image::Layout;
use crate::journal::Journal;
use crate::latency::{Latency, Observed};
use crate::namespace::Namespace;

/// Threads that talk to the service.
const THREADS: usize = 2;
/// Blocks of a chain that are asked for at once.
const ASKED_AT_ONCE: usize = 32;

/// Object storage, and this store's share in it.
#[derive(Debug, Clone)]
pub struct ObjectSettings {
    /// `s3://bucket/prefix` or `fs:///path`: what is below it is kvmesh's alone.
    pub url: String,
    /// Of S3, where it is not Amazon's.
    pub endpoint: Option<String>,
    /// Of S3; None: `AWS_REGION`, or us-east-1.
    pub region: Option<String>,
    /// None: what the environment, files or the machine's role give.
    pub credentials: Option<Credentials>,
    /// Bytes that may be there, of all stores together.
    pub bytes: u64,
    /// For one call, what it is tried again included.
    pub timeout: Duration,
    /// From one listing to the next.
    pub refresh: Duration,
    /// Whether anything is written or deleted there.
    pub writable: bool,
}

/// Of S3. Never shown.
#[derive(Clone)]
pub struct Credentials {
    /// Names the key.
    pub access_key_id: String,
    /// The key.
    pub secret_access_key: String,
    /// Of keys that are lent for a time.
    pub session_token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// Blocks in object storage.
pub struct ObjectTier {
    settings: ObjectSettings,
    policy: Policy,
    contents: Mutex<Contents>,
    journal: Journal,
    /// None: the tier is out. Before `contents`, where both are locked.
    online: RwLock<Option<Arc<Online>>>,
    health: Mutex<Health>,
    reads: Latency,
    writes: Latency,
    /// Objects that are being deleted: they are not written meanwhile.
    deleting: Mutex<FxHashSet<String>>,
    deleted: Notify,
    stop: watch::Sender<bool>,
    runtime: Mutex<Option<Runtime>>,
    handle: Handle,
    own: Weak<ObjectTier>,
}

/// One time online.
struct Online {
    bucket: Bucket,
    /// Namespaces whose fields are there.
    described: Mutex<FxHashSet<NamespaceName>>,
}

impl ObjectTier {
    /// A tier over `settings.url`, with what is there. Where the service is not to be had, the tier is out until it is.
    /// Waits for the first listing as long as for one call. Fails for a URL that is none.
    pub fn new(settings: &ObjectSettings, policy: Policy) -> Result<Arc<Self>> {
        bucket::check_url(&settings.url)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("kvbm-object")
            .enable_all()
            .build()
            .map_err(Error::io("cannot start", "the object tier's threads"))?;
        let handle = runtime.handle().clone();
        let tier = Arc::new_cyclic(|own| Self {
            contents: Mutex::new(Contents::nothing(settings.bytes, policy)),
            settings: settings.clone(),
            policy,
            journal: Journal::default(),
            online: RwLock::new(None),
            health: Mutex::new(Health {
                problem: Some("not listed yet".into()),
                io: settings.url.clone(),
                ..Health::default()
            }),
            reads: Latency::default(),
            writes: Latency::default(),
            deleting: Mutex::default(),
            deleted: Notify::new(),
            stop: watch::Sender::new(false),
            runtime: Mutex::new(Some(runtime)),
            handle,
            own: own.clone(),
        });
        let (told, first) = mpsc::sync_channel(1);
        let keep = keeper::keep(tier.own.clone(), tier.stop.subscribe(), told);
        tier.handle.spawn(keep);
        // Later it comes by itself.
        let _ = first.recv_timeout(settings.timeout);
        Ok(tier)
    }

    /// What it was made of.
    pub(crate) fn settings(&self) -> &ObjectSettings {
        &self.settings
    }

    /// Whether it works, and what it has done.
    pub fn health(&self) -> Health {
        self.health.lock().clone()
    }

    /// How long reads and writes of blocks took.
    pub(crate) fn latencies(&self) -> (Observed, Observed) {
        (self.reads.observed(), self.writes.observed())
    }

    /// The object of a leased or reserved slot.
    pub fn object_of(&self, slot: Slot) -> Option<String> {
        let contents = self.contents.lock();
        let (namespace, digest, parent) = contents.catalog.link(contents.inside(slot)?)?;
        let name = NamespaceName::of(contents.catalog.namespace(namespace));
        Some(name.block(&digest, parent.as_ref()))
    }

    /// The namespaces it knows, by their numbers.
    pub(crate) fn namespaces(&self) -> Vec<Namespace> {
        self.contents.lock().namespaces()
    }

    /// What is there, each with its parent, the longest unused first.
    pub(crate) fn by_use(&self) -> Vec<(NamespaceId, Digest, Option<Digest>)> {
        self.contents.lock().catalog.by_use()
    }

    /// Whether the block is known to be there. Counts as no look-up.
    pub(crate) fn holds(&self, namespace: NamespaceId, digest: &Digest) -> bool {
        self.contents.lock().catalog.holds(namespace, digest)
    }

    /// Fails when the tier is out.
    pub(crate) fn working(&self) -> Result<()> {
        self.service().map(drop)
    }

    /// Where its tasks run.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Runs a task to its end; None if the tier is stopped meanwhile. Blocks; not for the tier's own threads.
    pub(crate) fn wait<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        let (told, done) = mpsc::sync_channel(1);
        self.handle.spawn(async move {
            let _ = told.send(task.await);
        });
        done.recv().ok()
    }

    /// Writes a reserved slot's object; it may be sealed then.
    pub(crate) async fn put(&self, slot: Slot, body: Vec<u8>) -> Result<()> {
        let online = self.service()?;
        let (namespace, inside) = {
            let contents = self.contents.lock();
            let inside = contents.inside(slot).ok_or(Error::NotFilled)?;
            let (id, ..) = contents.catalog.link(inside).ok_or(Error::NotFilled)?;
            (contents.catalog.namespace(id).clone(), inside)
        };
        let path = self.object_of(slot).ok_or(Error::NotFilled)?;
        self.until_deleted(Some(&path)).await;
        let (bytes, begun) = (body.len() as u64, Instant::now());
        let written = match self.describe(&online, &namespace).await {
            Ok(()) => online.bucket.put(&path, body).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = written {
            return Err(self.take_out(&online, &failure));
        }
        self.writes.record(begun.elapsed());
        self.health.lock().written_bytes += bytes;
        let mut contents = self.contents.lock();
        // Unless the tier went away meanwhile.
        if contents.inside(slot) == Some(inside) && contents.catalog.is_reserved(inside) {
            contents.filled.insert(inside);
        }
        Ok(())
    }

    /// Reads a leased slot's object, whose bytes prove nothing yet. A block that is gone is forgotten, and `Lost`.
    pub(crate) async fn get(&self, slot: Slot) -> Result<Vec<u8>> {
        let online = self.service()?;
        let (digest, _) = self.contents.lock().block(slot)?;
        let path = self.object_of(slot).ok_or(Error::NotFilled)?;
        let begun = Instant::now();
        match online.bucket.get(&path).await {
            Ok(body) => {
                self.reads.record(begun.elapsed());
                self.health.lock().read_bytes += body.len() as u64;
                Ok(body.to_vec())
            }
            Err(Failure::Absent) => {
                let mut contents = self.contents.lock();
                if let Some(slot) = contents.inside(slot) {
                    contents.catalog.disown(&self.journal, slot);
                }
                Err(Error::Lost(digest))
            }
            Err(failure) => Err(self.take_out(&online, &failure)),
        }
    }

    /// Looks in the service for the leading blocks of a chain that are not known here. Fails when the tier is out.
    pub(crate) async fn ask(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Result<()> {
        let online = self.service()?;
        let name = NamespaceName::of(self.contents.lock().catalog.namespace(namespace));
        for batch in chain.chunks(ASKED_AT_ONCE) {
            let asked = (batch.iter()).map(|&hash| online.bucket.first(name.beginning(hash)));
            let answers = futures::future::join_all(asked).await;
            for (&hash, found) in batch.iter().zip(answers) {
                let found = found.map_err(|failure| self.take_out(&online, &failure))?;
                let named = found.and_then(|path| read_name(&path));
                let Some(Named::Block { digest, parent, .. }) = named else {
                    return Ok(());
                };
                if digest.block_hash() != hash {
                    return Ok(());
                }
                let mut contents = self.contents.lock();
                contents
                    .catalog
                    .adopt(&self.journal, namespace, digest, parent);
            }
        }
        Ok(())
    }

    /// The segments of a block's object, if all its bytes are right.
    pub(crate) fn proven<'a>(
        body: &'a [u8],
        digest: &Digest,
        layout: &Layout,
    ) -> std::result::Result<Vec<&'a [u8]>, &'static str> {
        let (header, segments) = parts(body, layout).ok_or("object")?;
        let checksums = layout
            .decode_as(crate::image::AT_REST, header, digest)
            .ok_or("header")?;
        let right = |(bytes, expected): (&&[u8], &u64)| checksum(bytes) == *expected;
        match segments.iter().zip(&checksums).all(right) {
            true => Ok(segments),
            false => Err("segment"),
        }
    }

    async fn describe(
        &self,
        online: &Online,
        namespace: &Namespace,
    ) -> std::result::Result<(), Failure> {
        let name = NamespaceName::of(namespace);
        if !online.described.lock().contains(&name) {
            (online.bucket.put(&name.fields(), namespace.to_bytes())).await?;
            online.described.lock().insert(name);
        }
        Ok(())
    }

    fn service(&self) -> Result<Arc<Online>> {
        let online = self.online.read().clone();
        online.ok_or_else(|| self.broken("it is out"))
    }

    fn broken(&self, why: impl Into<String>) -> Error {
        Error::Storage {
            at: self.settings.url.clone(),
            why: why.into(),
        }
    }

    /// Deletes the objects of blocks that have left the catalog.
    fn delete_removed(&self) {
        let paths: Vec<String> = {
            let mut contents = self.contents.lock();
            let events = contents.catalog.take_events().into_iter();
            let removed = events.filter_map(|event| match event {
                Event::Removed {
                    namespace,
                    digest,
                    parent,
                    ..
                } => Some((namespace, digest, parent)),
                Event::Stored { .. } => None,
            });
            let name = |id| NamespaceName::of(contents.catalog.namespace(id));
            removed
                .map(|(id, digest, parent)| name(id).block(&digest, parent.as_ref()))
                .collect()
        };
        self.delete(paths);
    }

    /// Deletes objects, by and by.
    fn delete(&self, paths: Vec<String>) {
        let nothing = paths.is_empty() || !self.settings.writable;
        let (Some(own), false) = (self.own.upgrade(), nothing) else {
            return;
        };
        let Ok(online) = self.service() else {
            return;
        };
        self.deleting.lock().extend(paths.iter().cloned());
        self.handle.spawn(async move {
            let deleted = online.bucket.delete(paths.clone()).await;
            {
                let mut deleting = own.deleting.lock();
                deleting.retain(|path| !paths.contains(path));
            }
            own.deleted.notify_waiters();
            if let Err(failure) = deleted {
                own.take_out(&online, &failure);
            }
        });
    }

    /// Waits until this object, or none, is being deleted.
    async fn until_deleted(&self, path: Option<&str>) {
        loop {
            let deleted = self.deleted.notified();
            tokio::pin!(deleted);
            deleted.as_mut().enable();
            let waits = {
                let deleting = self.deleting.lock();
                path.map_or(!deleting.is_empty(), |path| deleting.contains(path))
            };
            if !waits {
                return;
            }
            deleted.await;
        }
    }
}

impl Drop for ObjectTier {
    fn drop(&mut self) {
        self.stop();
    }
}
