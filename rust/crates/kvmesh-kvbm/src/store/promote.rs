//! Blocks on the disk come back to the host tier: chosen where they are asked for, read on a thread of its own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use kvmesh_core::{Digest, Tier as Kind};
use parking_lot::{Condvar, Mutex};
use rustc_hash::FxHashSet;

use super::{Flow, Shared};
use crate::error::{Error, Result};
use crate::image::Layout;
use crate::tiers::{Direction, NamespaceId, NvmeTier, Room, Slot, Tier, Transfer};

/// Blocks reserved and read together: the first of them can be used before the last have room.
const BATCH: usize = 32;
/// What is on its way up takes at most this part of the host tier.
const PART: u64 = 2;

/// The reader.
pub(super) struct Promoter {
    work: Arc<Work>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Work {
    shared: Arc<Shared>,
    nvme: Arc<NvmeTier>,
    /// Blocks that may be on their way at a time, by bytes.
    most_bytes: u64,
    queue: Mutex<Queue>,
    filled: Condvar,
    promoted: AtomicU64,
    failed: AtomicU64,
    late: AtomicU64,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// What is wished before anybody asks: by when, and in which order of those. After all of `tasks`.
    prefetches: BTreeMap<(Instant, u64), Task>,
    next: u64,
    /// Of wishes and arrivals that are not read yet.
    bytes: u64,
    blocks: u64,
    /// The last blocks of the chains wished for: a scheduler asks again and again.
    wished: FxHashSet<(NamespaceId, Digest)>,
    stop: bool,
}

enum Task {
    /// Blocks to reserve room for, and read.
    Wish {
        namespace: NamespaceId,
        chain: Vec<Digest>,
        /// As it was counted.
        bytes: u64,
        blocks: u64,
    },
    /// Blocks to read.
    Read(Vec<Arrival>),
}

/// A block with a slot in the host tier, leased below.
struct Arrival {
    digest: Digest,
    layout: Arc<Layout>,
    slot: Slot,
    below: Slot,
}

impl Promoter {
    pub(super) fn start(
        shared: &Arc<Shared>,
        nvme: &Arc<NvmeTier>,
        host_bytes: u64,
    ) -> Result<Self> {
        let work = Arc::new(Work {
            shared: shared.clone(),
            nvme: nvme.clone(),
            most_bytes: host_bytes / PART,
            queue: Mutex::default(),
            filled: Condvar::new(),
            promoted: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            late: AtomicU64::new(0),
        });
        let of_thread = work.clone();
        let thread = thread::Builder::new()
            .name("kvbm-promote".into())
            .spawn(move || of_thread.run())
            .map_err(Error::io("cannot start", "the disk tier's threads"))?;
        Ok(Self {
            work,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// How many leading blocks there are in both tiers, `here` of them in the host tier. The others are wished for, at
    /// once, or until some time if there is nothing else to do.
    pub(super) fn wish(
        &self,
        shared: &Shared,
        namespace: NamespaceId,
        chain: &[Digest],
        here: usize,
        until: Option<Instant>,
    ) -> usize {
        let open = shared.open(namespace);
        let Some(below) = open.below else {
            return here;
        };
        let found = self.leading(shared, namespace, below, chain, here);
        let bytes = ((found - here) * open.layout.slot_bytes()) as u64;
        let Some(&last) = chain[..found].last().filter(|_| found > here) else {
            return here;
        };
        let mut queue = self.work.queue.lock();
        if queue.wished.contains(&(namespace, last)) {
            return found;
        }
        if queue.stop || queue.bytes + bytes > self.work.most_bytes {
            // More would only push each other out.
            return here;
        }
        let blocks = (found - here) as u64;
        queue.bytes += bytes;
        queue.blocks += blocks;
        queue.wished.insert((namespace, last));
        let wish = Task::Wish {
            namespace,
            chain: chain[..found].to_vec(),
            bytes,
            blocks,
        };
        queue.next += 1;
        let number = queue.next;
        match until {
            None => queue.tasks.push_back(wish),
            Some(until) => drop(queue.prefetches.insert((until, number), wish)),
        }
        drop(queue);
        self.work.filled.notify_one();
        found
    }

    /// Reserves room for the leading blocks of the chain that are on the disk, and begins to read them.
    pub(super) fn fetch(&self, shared: &Shared, namespace: NamespaceId, chain: &[Digest]) {
        if shared.host.leading(namespace, chain) == chain.len() {
            return;
        }
        let arrivals = self.work.expect(namespace, None, chain);
        if arrivals.is_empty() {
            return;
        }
        let mut queue = self.work.queue.lock();
        if queue.stop {
            drop(queue);
            return self.work.give_up(&arrivals);
        }
        queue.bytes += bytes_of(&arrivals);
        queue.blocks += arrivals.len() as u64;
        queue.tasks.push_back(Task::Read(arrivals));
        drop(queue);
        self.work.filled.notify_one();
    }

    /// Reads the leading blocks of the chain that are on the disk, on this thread; `parent` is the block before them.
    pub(super) fn bring(&self, namespace: NamespaceId, parent: Option<&Digest>, chain: &[Digest]) {
        let arrivals = self.work.expect(namespace, parent, chain);
        arrivals
            .chunks(BATCH)
            .for_each(|batch| self.work.read(batch));
    }

    /// Reads a block that is only on the disk, on this thread, to the host tier and from there to `out`; false: there is
    /// no room for it, or it is not to be had, or somebody else is reading it.
    pub(super) fn bring_to(
        &self,
        namespace: NamespaceId,
        chain: &[Digest; 1],
        out: &mut [u8],
    ) -> bool {
        let arrivals = self.work.expect(namespace, None, chain);
        let host = &self.work.shared.host;
        let mut came = false;
        self.work.read_as(&arrivals, |arrival, failed| {
            let Arrival {
                digest,
                layout,
                slot,
                ..
            } = arrival;
            came = match failed {
                true => host.arrived(*slot, digest, layout, true),
                false => host.arrived_to(*slot, digest, layout, out),
            };
            came
        });
        came
    }

    pub(super) fn flow(&self) -> Flow {
        Flow {
            promoted: self.work.promoted.load(Ordering::Relaxed),
            failed: self.work.failed.load(Ordering::Relaxed),
            late: self.work.late.load(Ordering::Relaxed),
            coming: self.work.queue.lock().blocks,
            ..Flow::default()
        }
    }

    pub(super) fn stop(&self) {
        self.work.queue.lock().stop = true;
        self.work.filled.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
        let tasks = std::mem::take(&mut self.work.queue.lock().tasks);
        for task in tasks {
            if let Task::Read(arrivals) = task {
                self.work.give_up(&arrivals);
            }
        }
    }

    fn leading(
        &self,
        shared: &Shared,
        namespace: NamespaceId,
        below: NamespaceId,
        chain: &[Digest],
        here: usize,
    ) -> usize {
        let mut found = here;
        while found < chain.len() {
            let before = found;
            found += self.work.nvme.leading(below, &chain[found..]);
            if found < chain.len() {
                found += shared.host.leading(namespace, &chain[found..]);
            }
            if found == before {
                break;
            }
        }
        found
    }
}

impl Queue {
    /// Takes a wish back; how many blocks it was of.
    fn give_up(&mut self, task: Task) -> u64 {
        let Task::Wish {
            namespace,
            chain,
            bytes,
            blocks,
        } = task
        else {
            return 0;
        };
        if let Some(&last) = chain.last() {
            self.wished.remove(&(namespace, last));
        }
        self.bytes -= bytes;
        self.blocks -= blocks;
        blocks
    }
}

impl Work {
    fn run(&self) {
        loop {
            let task = {
                let mut queue = self.queue.lock();
                loop {
                    if queue.stop {
                        return;
                    }
                    if let Some(task) = queue.tasks.pop_front() {
                        break task;
                    }
                    match queue.prefetches.pop_first() {
                        Some(((until, _), task)) if Instant::now() < until => break task,
                        Some((_, task)) => {
                            self.late.fetch_add(queue.give_up(task), Ordering::Relaxed)
                        }
                        None => {
                            self.filled.wait(&mut queue);
                            0
                        }
                    };
                }
            };
            let (bytes, blocks) = match task {
                Task::Wish {
                    namespace,
                    chain,
                    bytes,
                    blocks,
                } => {
                    if let Some(&last) = chain.last() {
                        self.queue.lock().wished.remove(&(namespace, last));
                    }
                    let here = self.shared.host.leading(namespace, &chain);
                    for end in (here + BATCH..chain.len() + BATCH).step_by(BATCH) {
                        let arrivals = self.expect(namespace, None, &chain[..end.min(chain.len())]);
                        self.read(&arrivals);
                    }
                    (bytes, blocks)
                }
                Task::Read(arrivals) => {
                    arrivals.chunks(BATCH).for_each(|batch| self.read(batch));
                    (bytes_of(&arrivals), arrivals.len() as u64)
                }
            };
            let mut queue = self.queue.lock();
            queue.bytes -= bytes;
            queue.blocks -= blocks;
        }
    }

    /// Reserves room for those leading blocks that are below only; `parent` is the block before the first.
    fn expect(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Arrival> {
        let (host, open) = (&self.shared.host, self.shared.open(namespace));
        let mut arrivals = Vec::new();
        let Some(below) = open.below else {
            return arrivals;
        };
        let mut at = host.leading(namespace, chain);
        while at < chain.len() {
            let slots = self.nvme.lease(below, &chain[at..], usize::MAX);
            if slots.is_empty() {
                break;
            }
            let parent = at
                .checked_sub(1)
                .map_or(parent, |before| Some(&chain[before]));
            let these = &chain[at..at + slots.len()];
            let rooms = host.expect(namespace, parent, these, Kind::Nvme);
            let full = rooms.last() == Some(&Room::Full);
            for ((room, below), &digest) in rooms.into_iter().zip(slots).zip(&chain[at..]) {
                match room {
                    Room::Reserved(slot) => arrivals.push(Arrival {
                        digest,
                        layout: open.layout.clone(),
                        slot,
                        below,
                    }),
                    Room::Present | Room::Full => self.nvme.release(&[below]),
                }
            }
            if full {
                break;
            }
            at += host.leading(namespace, &chain[at..]);
        }
        arrivals
    }

    fn read(&self, arrivals: &[Arrival]) {
        let host = &self.shared.host;
        self.read_as(arrivals, |arrival, failed| {
            host.arrived(arrival.slot, &arrival.digest, &arrival.layout, failed)
        });
    }

    /// Reads blocks; `arrived` settles each, unless it has `failed`, and says whether it is whole.
    fn read_as(&self, arrivals: &[Arrival], mut arrived: impl FnMut(&Arrival, bool) -> bool) {
        let host = &self.shared.host;
        let slots: Vec<Slot> = arrivals.iter().map(|arrival| arrival.below).collect();
        let mut transfer = |place, number: usize| {
            let arrival = &arrivals[number];
            let bytes = arrival.layout.slot_bytes();
            let slot = host.arena().at(arrival.slot.0, bytes);
            // SAFETY: the arena outlives the transfers. The slot is reserved for this block: nobody else writes it, and
            // who looks at it waits for its first word.
            unsafe { Transfer::new(Direction::Read, place, &[(slot, bytes)]) }
        };
        self.nvme.fetch(&slots, &mut transfer, |number, result| {
            let below = arrivals[number].below;
            if arrived(&arrivals[number], result.is_err()) {
                self.promoted.fetch_add(1, Ordering::Relaxed);
            } else {
                self.failed.fetch_add(1, Ordering::Relaxed);
                if result.is_ok() {
                    self.nvme.discard(below);
                }
            }
            self.nvme.release(&[below]);
        });
    }

    fn give_up(&self, arrivals: &[Arrival]) {
        for arrival in arrivals {
            let Arrival {
                digest,
                layout,
                slot,
                below,
            } = arrival;
            self.shared.host.arrived(*slot, digest, layout, true);
            self.nvme.release(&[*below]);
        }
    }
}

fn bytes_of(arrivals: &[Arrival]) -> u64 {
    let bytes = arrivals.iter().map(|arrival| arrival.layout.slot_bytes());
    bytes.sum::<usize>() as u64
}
