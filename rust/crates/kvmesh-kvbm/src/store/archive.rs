//! What was stored goes to the object storage, behind everything else: nobody waits for it but who asks to.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvmesh_core::Digest;
use parking_lot::{Condvar, Mutex};

use super::{Archived, Shared};
use crate::block::{self, Reservation, Reserved};
use crate::error::{Error, Result};
use crate::tiers::{Leaving, NamespaceId, ObjectTier, Slot, Tier};

/// What waits takes at most this part of the host tier's bytes: it stays there until it is written.
const PART: u64 = 4;
/// Blocks being written at a time.
const UNDER_WAY: usize = 8;
/// What has no deadline.
const FOREVER: Duration = Duration::from_secs(1 << 32);
/// How often it looks for work without being woken.
const IDLE: Duration = Duration::from_millis(200);

/// The writer.
pub(super) struct Archivist {
    work: Arc<Work>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Work {
    shared: Arc<Shared>,
    tier: Arc<ObjectTier>,
    most_bytes: u64,
    queue: Mutex<Queue>,
    changed: Condvar,
    written: AtomicU64,
    shed: AtomicU64,
    left: AtomicU64,
    unplaced: AtomicU64,
    failed: AtomicU64,
}

#[derive(Default)]
struct Queue {
    blocks: VecDeque<Fresh>,
    bytes: u64,
    under_way: usize,
    wake: bool,
    stop: bool,
}

/// A block that waits, leased.
#[derive(Clone)]
struct Fresh {
    slot: Slot,
    namespace: NamespaceId,
    digest: Digest,
    parent: Option<Digest>,
    bytes: u64,
    /// Of a flush that waits for it: it has to be kept.
    flush: Option<Flush>,
}

/// A flush has ended when nobody else has it any more.
type Flush = Arc<()>;

/// What is to be done with a block.
enum Place {
    /// Write this there.
    Room(Reserved, Vec<u8>),
    /// Nothing: it is there, or not to be had, or there is no room.
    None,
    /// Somebody is writing it.
    Busy,
}

impl Archivist {
    pub(super) fn start(
        shared: &Arc<Shared>,
        tier: &Arc<ObjectTier>,
        host_bytes: u64,
    ) -> Result<Self> {
        shared.host.note_stored();
        let work = Arc::new(Work {
            shared: shared.clone(),
            tier: tier.clone(),
            most_bytes: host_bytes / PART,
            queue: Mutex::default(),
            changed: Condvar::new(),
            written: AtomicU64::new(0),
            shed: AtomicU64::new(0),
            left: AtomicU64::new(0),
            unplaced: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let of_thread = work.clone();
        let thread = thread::Builder::new()
            .name("kvbm-archive".into())
            .spawn(move || of_thread.run())
            .map_err(Error::io("cannot start", "the object tier's threads"))?;
        Ok(Self {
            work,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// There may be work.
    pub(super) fn wake(&self) {
        self.work.queue.lock().wake = true;
        self.work.changed.notify_all();
    }

    /// Waits until a block can be stored without being shed; false: not in time.
    pub(super) fn wait_room(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        self.work.take_news();
        self.work.wait(until, |work, queue| {
            queue.bytes < work.most_bytes / 2 || work.tier.working().is_err()
        })
    }

    /// Writes all of the host tier that is not there. Fails when the tier is out, or goes out, or with what is not there
    /// in the end.
    pub(super) fn write_everything(&self, within: Option<Duration>) -> Result<()> {
        let work = &self.work;
        work.tier.working()?;
        work.take_news();
        let (flush, host) = (Flush::default(), &work.shared.host);
        let all = host.everything();
        for block in &all {
            work.push(Fresh {
                slot: block.slot,
                namespace: block.namespace,
                digest: block.digest,
                parent: block.parent,
                bytes: host.layout(block.namespace).slot_bytes() as u64,
                flush: Some(flush.clone()),
            });
        }
        self.wake();
        let until = Instant::now() + within.unwrap_or(FOREVER);
        let done = work.wait(until, |work, _| {
            Arc::strong_count(&flush) == 1 || work.tier.working().is_err()
        });
        work.tier.working()?;
        let is_there = |block: &Leaving| {
            let open = work.shared.try_open(block.namespace);
            let remote = open.and_then(|open| open.remote);
            remote.is_some_and(|remote| work.tier.holds(remote, &block.digest))
        };
        let missing: Vec<Digest> = (all.iter().filter(|block| !is_there(block)))
            .map(|block| block.digest)
            .collect();
        let Some(&first) = missing.first() else {
            return Ok(());
        };
        let why = match done {
            true => "object storage has no room for it, or it went from there again",
            false => "the time was over",
        };
        Err(Error::NotKept {
            missing: missing.len(),
            of: all.len(),
            first,
            why: why.into(),
        })
    }

    pub(super) fn archived(&self) -> Archived {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let queue = self.work.queue.lock();
        Archived {
            written: of(&self.work.written),
            shed: of(&self.work.shed),
            left: of(&self.work.left),
            unplaced: of(&self.work.unplaced),
            failed: of(&self.work.failed),
            waiting: (queue.blocks.len() + queue.under_way) as u64,
        }
    }

    pub(super) fn stop(&self) {
        self.work.queue.lock().stop = true;
        self.work.changed.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
        for fresh in std::mem::take(&mut self.work.queue.lock().blocks) {
            self.work.shared.host.release(&[fresh.slot]);
        }
    }
}

impl Work {
    fn run(self: Arc<Self>) {
        loop {
            self.take_news();
            let next = {
                let mut queue = self.queue.lock();
                if queue.stop {
                    return;
                }
                let next = match queue.under_way < UNDER_WAY {
                    true => queue.blocks.pop_front(),
                    false => None,
                };
                if let Some(fresh) = &next {
                    queue.bytes -= fresh.bytes;
                    queue.under_way += 1;
                } else if !std::mem::take(&mut queue.wake) {
                    self.changed.wait_for(&mut queue, IDLE);
                }
                next
            };
            if let Some(fresh) = next {
                match self.place(&fresh) {
                    Place::Room(reserved, body) => self.write(reserved, body, fresh.flush),
                    Place::Busy if fresh.flush.is_some() => self.look_again(fresh),
                    Place::None | Place::Busy => {
                        drop(fresh);
                        self.ended();
                    }
                }
            }
        }
    }

    /// What was stored waits to be written; what is too much is shed, the newest.
    fn take_news(&self) {
        let host = &self.shared.host;
        for (namespace, digest, parent) in host.news() {
            // Most of what comes up from there is known to be there.
            let remote = self.shared.try_open(namespace).and_then(|open| open.remote);
            if remote.is_some_and(|remote| self.tier.holds(remote, &digest)) {
                continue;
            }
            let bytes = host.layout(namespace).slot_bytes() as u64;
            let full = self.queue.lock().bytes + bytes > self.most_bytes;
            if full || self.tier.working().is_err() {
                self.shed.fetch_add(1, Ordering::Relaxed);
            } else if let Some(slot) = host.hold(namespace, &digest) {
                self.push(Fresh {
                    slot,
                    namespace,
                    digest,
                    parent,
                    bytes,
                    flush: None,
                });
            } else {
                self.left.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn push(&self, fresh: Fresh) {
        let mut queue = self.queue.lock();
        queue.bytes += fresh.bytes;
        queue.blocks.push_back(fresh);
    }

    /// The block's place there and its bytes, if it is not there yet. It is leased no more, unless a flush waits for it
    /// and somebody is writing it.
    fn place(&self, fresh: &Fresh) -> Place {
        let place = self.try_place(fresh);
        if !(matches!(place, Place::Busy) && fresh.flush.is_some()) {
            self.shared.host.release(&[fresh.slot]);
        }
        place
    }

    fn try_place(&self, fresh: &Fresh) -> Place {
        let Some((remote, body)) = self.body(fresh) else {
            return Place::None;
        };
        let tier: Arc<dyn Tier> = self.tier.clone();
        let chain = [fresh.digest];
        let reserve = match fresh.flush {
            Some(_) => block::reserve_anyway,
            None => block::reserve,
        };
        match reserve(&tier, remote, fresh.parent.as_ref(), &chain).pop() {
            Some(Reservation::Room(reserved)) => Place::Room(reserved, body),
            Some(Reservation::Present) => Place::Busy,
            Some(Reservation::Full) | None => {
                self.unplaced.fetch_add(1, Ordering::Relaxed);
                Place::None
            }
        }
    }

    /// Somebody else is writing it: once it has ended, this one is there or can be written.
    fn look_again(&self, fresh: Fresh) {
        self.push(fresh);
        let mut queue = self.queue.lock();
        queue.under_way -= 1;
        if queue.under_way > 0 || queue.blocks.len() == 1 {
            self.changed.wait_for(&mut queue, IDLE);
        }
    }

    fn body(&self, fresh: &Fresh) -> Option<(NamespaceId, Vec<u8>)> {
        let open = self.shared.try_open(fresh.namespace)?;
        let remote = open.remote?;
        if self.tier.holds(remote, &fresh.digest) {
            return None;
        }
        let body = (self.shared.host).pack(fresh.slot, &fresh.digest, &open.layout);
        if body.is_none() {
            self.shared.host.discard(fresh.slot);
        }
        Some((remote, body?))
    }

    fn write(self: &Arc<Self>, reserved: Reserved, body: Vec<u8>, flush: Option<Flush>) {
        // Ended however the task ends, with its runtime too.
        let turn = Turn {
            work: self.clone(),
            flush,
        };
        self.tier.handle().spawn(async move {
            let work = &turn.work;
            let put = work.tier.put(reserved.slot(), body).await;
            match put.and_then(|()| reserved.seal()) {
                Ok(filled) => {
                    block::register(vec![filled]);
                    work.written.fetch_add(1, Ordering::Relaxed);
                }
                // A tier that fails goes out, and says why.
                Err(_) => {
                    work.failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }

    fn ended(&self) {
        self.queue.lock().under_way -= 1;
        self.changed.notify_all();
    }

    fn wait(&self, until: Instant, done: impl Fn(&Self, &Queue) -> bool) -> bool {
        let mut queue = self.queue.lock();
        while !queue.stop && !done(self, &queue) {
            if Instant::now() >= until {
                return false;
            }
            // The tier's going out wakes nobody.
            self.changed.wait_for(&mut queue, IDLE);
        }
        true
    }
}

struct Turn {
    work: Arc<Work>,
    flush: Option<Flush>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.flush = None;
        self.work.ended();
    }
}
