//! Slots that processes share, under a model checker: the sources of the host tier and of what engines do with its
//! slots are compiled once more, with locks whose every operation is a point of scheduling and with an arena whose words
//! have all the values that the C++ memory model allows (`slots/arena.rs`). Each program runs under random
//! schedules; where the order of `src/slot.rs` is broken on purpose, it has to fail.
//!
//! A failing schedule is printed and can be replayed (`shuttle::replay`).

#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::duplicate_mod)]

#[path = "slots/arena.rs"]
mod arena;
#[path = "../src/block.rs"]
mod block;
#[path = "../src/error.rs"]
mod error;
#[path = "../src/image.rs"]
mod image;
#[path = "../src/journal.rs"]
mod journal;
#[path = "../src/namespace.rs"]
mod namespace;
#[path = "../src/slot.rs"]
mod slot;
#[path = "slots/sync.rs"]
mod sync;
#[path = "slots/tiers.rs"]
mod tiers;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use arena::{Arena, Fault, View, adopt, dies_after, is_dead, seen, set_fault};
use block::{Reservation, Reserved, lease, register, reserve};
use error::Error;
use image::{Layout, Segment};
use kvmesh_core::Digest;
use kvmesh_eviction as eviction;
use kvmesh_eviction::Policy;
use namespace::Namespace;
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread;
use slot::Arrival;
use tiers::{HostTier, NamespaceId, Room, Slot, Tier};

const SEGMENT: usize = 16;
const SEGMENTS: usize = 2;
/// Accesses of words that write a block: the segments, the header behind the first word, the first word.
const WRITES: usize = (SEGMENTS * SEGMENT + 64 + 8 * SEGMENTS) / 8;
const SCHEDULES: usize = 3_000;

fn digest(name: u8) -> Digest {
    Digest::new([name; 32])
}

/// A block's bytes as one of those wrote them who computed it: equal blocks need not have equal bits.
fn content(name: u8, writer: u8) -> [[u8; SEGMENT]; SEGMENTS] {
    [0, 1].map(|segment| std::array::from_fn(|at| [name, writer, segment, at as u8][at % 4]))
}

/// A store of so many slots.
#[derive(Clone)]
struct Node {
    host: Arc<HostTier>,
    tier: Arc<dyn Tier>,
    namespace: NamespaceId,
    layout: Arc<Layout>,
}

impl Node {
    fn new(slots: u64) -> Self {
        let bytes = slots * image::ALIGNMENT as u64;
        let host = Arc::new(HostTier::with_policy(Path::new(""), bytes, Policy::Lru).unwrap());
        let name = Namespace {
            model: "m".into(),
            revision: String::new(),
            dtype: String::new(),
            layout: String::new(),
            rank: 0,
            ranks: 1,
            segments: vec![SEGMENT as u32; SEGMENTS],
        };
        let namespace = host.open(&name).unwrap();
        Self {
            tier: host.clone(),
            layout: host.layout(namespace),
            namespace,
            host,
        }
    }

    fn arena(&self) -> &Arena {
        self.host.arena()
    }

    fn reserve(&self, name: u8) -> Option<Reserved> {
        let chain = [digest(name)];
        match reserve(&self.tier, self.namespace, None, &chain).pop() {
            Some(Reservation::Room(reserved)) => Some(reserved),
            _ => None,
        }
    }

    /// What an engine's process does with a slot it was given.
    fn fill(&self, slot: Slot, name: u8, writer: u8) {
        let content = content(name, writer);
        let put = |number: usize, at| self.arena().put(at, &content[number]);
        slot::fill(self.arena(), slot.0, &self.layout, &digest(name), put);
    }

    /// Stores a block, if there is room; an engine that dies leaves its connection to end.
    fn store(&self, name: u8, writer: u8) {
        let Some(reserved) = self.reserve(name) else {
            return;
        };
        self.fill(reserved.slot(), name, writer);
        if !is_dead() {
            register(vec![reserved.seal().unwrap()]);
        }
    }

    /// Copies a leased block as an engine does. None: it is not what its header says.
    fn load(&self, slot: Slot, name: u8) -> Option<[[u8; SEGMENT]; SEGMENTS]> {
        let sums = slot::checksums(self.arena(), slot.0, &self.layout, &digest(name))?;
        self.copy(slot, &sums)
    }

    fn copy(&self, slot: Slot, sums: &[u64]) -> Option<[[u8; SEGMENT]; SEGMENTS]> {
        let mut out = [[0; SEGMENT]; SEGMENTS];
        for ((segment, out), &sum) in self.layout.segments().iter().zip(&mut out).zip(sums) {
            if self.arena().get(slot.0 + segment.offset as u64, out) != sum {
                return None;
            }
        }
        Some(out)
    }

    /// Reads a block, if it is there, as an engine and as the store itself; it has to be whole while it is leased.
    fn read(&self, name: u8) {
        let lease = lease(&self.tier, self.namespace, &[digest(name)], 1);
        if let Some(&slot) = lease.slots().first() {
            if self.host.is_coming(slot) {
                return;
            }
            let loaded = self.load(slot, name).expect("a leased block is whole");
            assert_written(name, loaded);
            let mut out = [0; SEGMENT * SEGMENTS];
            lease.read(0, 0..SEGMENTS, &mut out).unwrap();
            assert_eq!(out[..], loaded.concat());
        }
    }

    /// All is quiet: nothing is in use, and all room can be had again.
    fn check(&self) {
        self.host.flush();
        let stats = self.host.stats();
        assert_eq!((stats.used_bytes, stats.blocks_in_use), (0, 0));
    }
}

fn assert_written(name: u8, loaded: [[u8; SEGMENT]; SEGMENTS]) {
    assert!(
        (0..4).any(|writer| content(name, writer) == loaded),
        "nobody wrote {loaded:?}"
    );
}

/// A thread that sees what its parent saw; joined, the other way round.
struct Joined(thread::JoinHandle<View>);

fn spawn(node: &Node, body: impl FnOnce(&Node) + Send + 'static) -> Joined {
    let (node, view) = (node.clone(), seen());
    Joined(thread::spawn(move || {
        adopt(&view);
        body(&node);
        seen()
    }))
}

fn join(threads: Vec<Joined>) {
    for Joined(thread) in threads {
        adopt(&thread.join().unwrap());
    }
}

/// Runs `program` under random schedules, always the same ones: half of them change threads at any access, half at a few,
/// so that one thread also gets far while another stands still.
fn explore(fault: Fault, program: impl Fn() + Send + Sync + 'static) {
    const SEED: u64 = 0x6b76_6d65_7368;
    const CHANGES: usize = 4;
    set_fault(fault);
    let program = Arc::new(program);
    let again = Arc::clone(&program);
    let mut config = shuttle::Config::new();
    config.silence_warnings = true;
    config.stack_size = 1 << 18;
    let scheduler = RandomScheduler::new_from_seed(SEED, SCHEDULES / 2);
    shuttle::Runner::new(scheduler, config.clone()).run(move || program());
    let scheduler = PctScheduler::new_from_seed(SEED, CHANGES, SCHEDULES / 2);
    shuttle::Runner::new(scheduler, config).run(move || again());
}

/// The same of a program that is broken, or runs under broken rules: some schedule shows it.
fn breaks(fault: Fault, program: impl Fn() + Send + Sync + 'static) {
    let shown = catch_unwind(AssertUnwindSafe(|| explore(fault, program)));
    assert!(shown.is_err(), "no schedule shows {fault:?}");
}

/// Two engines store blocks, into one slot or into two; others read them.
fn stores_beside_readers() {
    let node = Node::new(thread_rng().gen_range(1..=2));
    let threads = (0..4)
        .map(|number| {
            spawn(&node, move |node| {
                for name in [1, 2, 1] {
                    if number < 2 {
                        node.store(name, number);
                    } else {
                        node.read(name);
                    }
                }
            })
        })
        .collect();
    join(threads);
    node.check();
}

#[test]
fn a_block_is_whole_for_all_who_lease_it() {
    explore(Fault::None, stores_beside_readers);
}

/// A block leaves, because it is doubted or for another, while a reader has it; `held`: under its lease.
fn a_reader_beside_reuse(held: bool) {
    let node = Node::new(1);
    node.store(1, 0);
    let reader = spawn(&node, move |node| {
        let lease = lease(&node.tier, node.namespace, &[digest(1)], 1);
        let Some(&slot) = lease.slots().first() else {
            return;
        };
        let kept = held.then_some(lease);
        let loaded = node.load(slot, 1).expect("a leased block is whole");
        assert_written(1, loaded);
        drop(kept);
    });
    let writer = spawn(&node, |node| {
        let doubted = lease(&node.tier, node.namespace, &[digest(1)], 1);
        if !doubted.slots().is_empty() && thread_rng().gen_bool(0.5) {
            doubted.discard(0);
        }
        drop(doubted);
        for name in [2, 1, 3] {
            node.store(name, 1);
        }
    });
    join(vec![reader, writer]);
    node.check();
}

#[test]
fn a_leased_slot_is_nobody_elses() {
    explore(Fault::None, || a_reader_beside_reuse(true));
    breaks(Fault::None, || a_reader_beside_reuse(false));
}

/// What engines register that have not written all of it yet, into a slot that had the same block before.
fn registered_too_early() {
    let node = Node::new(1);
    node.store(1, 0);
    node.host.flush();
    let reserved = node.reserve(1).unwrap();
    let slot = reserved.slot();
    let writer = spawn(&node, move |node| node.fill(slot, 1, 1));
    let store = spawn(&node, move |node| {
        // Not for ever, and not always.
        for _ in 0..thread_rng().gen_range(0..40) {
            if slot::look(node.arena(), slot.0) == Arrival::Here {
                break;
            }
            thread::yield_now();
        }
        if let Ok(filled) = reserved.seal() {
            register(vec![filled]);
            node.read(1);
        }
    });
    join(vec![writer, store]);
    node.check();
}

#[test]
fn a_block_that_is_not_whole_is_not_registered() {
    explore(Fault::None, registered_too_early);
    for fault in [Fault::Release, Fault::Acquire, Fault::Erase] {
        breaks(fault, registered_too_early);
    }
}

/// An engine dies while it stores a block; another stores, and others read.
fn an_engine_dies() {
    let node = Node::new(1);
    node.store(1, 0);
    let dying = spawn(&node, |node| {
        dies_after(thread_rng().gen_range(0..=WRITES));
        node.store(thread_rng().gen_range(1..=2), 1);
    });
    let other = spawn(&node, |node| {
        node.store(1, 2);
        node.store(2, 2);
    });
    let reader = spawn(&node, |node| {
        [1, 2, 1].into_iter().for_each(|name| node.read(name))
    });
    join(vec![dying, other, reader]);
    node.check();
}

#[test]
fn an_engine_that_dies_leaves_nothing_half_written_and_no_slot_taken() {
    explore(Fault::None, an_engine_dies);
}

/// Waits for a block on its way as an engine does; what it got.
fn wait_and_load(node: &Node, name: u8) -> Option<[[u8; SEGMENT]; SEGMENTS]> {
    let lease = lease(&node.tier, node.namespace, &[digest(name)], 1);
    let &slot = lease.slots().first()?;
    // Not for ever: the store may be dead.
    for _ in 0..40 {
        match slot::look(node.arena(), slot.0) {
            Arrival::Here => {
                let loaded = node.load(slot, name).expect("a block that came is whole");
                assert_written(name, loaded);
                return Some(loaded);
            }
            Arrival::Failed => return None,
            Arrival::Coming => thread::yield_now(),
        }
    }
    None
}

/// What a disk, or another node, writes into a slot: the header at rest and the segments, in any order.
fn arrive(node: &Node, slot: Slot, name: u8, writer: u8) {
    let content = content(name, writer);
    let sums: Vec<u64> = content
        .iter()
        .map(|bytes| twox_hash::XxHash3_64::oneshot_with_seed(0, bytes))
        .collect();
    let mut header = node.layout.encode_header(&digest(name), &sums);
    header[..8].copy_from_slice(&image::AT_REST.to_le_bytes());
    let header_first = thread_rng().gen_bool(0.5);
    if header_first {
        node.arena().write(slot.0, &header);
    }
    for (bytes, segment) in content.iter().zip(node.layout.segments()) {
        node.arena().write(slot.0 + segment.offset as u64, bytes);
    }
    if !header_first {
        node.arena().write(slot.0, &header);
    }
}

/// A block comes up from a lower tier, into a slot that had the same block before; engines wait for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Coming {
    Whole,
    /// It is given up while its bytes are on their way, and another block wants the slot.
    Forsaken,
    /// The store dies at some moment.
    StoreDies,
}

fn comes_up(how: Coming) {
    let node = Node::new(1);
    node.store(1, 0);
    node.host.flush();
    let store = spawn(&node, move |node| {
        let from = kvmesh_core::Tier::Nvme;
        let rooms = node.host.expect(node.namespace, None, &[digest(1)], from);
        let [Room::Reserved(slot)] = rooms[..] else {
            return;
        };
        if how == Coming::StoreDies {
            dies_after(thread_rng().gen_range(0..=WRITES));
        }
        let forsake = (how == Coming::Forsaken).then(|| {
            spawn(node, move |node| {
                node.host.forsake(slot);
                node.store(2, 1);
            })
        });
        arrive(node, slot, 1, 1);
        let here = (node.host).arrived(slot, &digest(1), &node.layout, false);
        assert!(here || how != Coming::Whole, "it came whole");
        join(forsake.into_iter().collect());
    });
    let readers = (0..2).map(|_| {
        spawn(&node, move |node| {
            wait_and_load(node, 1);
            if how != Coming::StoreDies {
                node.read(2);
            }
        })
    });
    let readers = readers.collect();
    join(vec![store]);
    join(readers);
    if how != Coming::StoreDies {
        node.check();
    }
}

#[test]
fn a_block_that_comes_up_is_whole_for_all_who_wait_for_it() {
    explore(Fault::None, || comes_up(Coming::Whole));
    for fault in [Fault::Release, Fault::Acquire, Fault::Erase] {
        breaks(fault, || comes_up(Coming::Whole));
    }
}

#[test]
fn a_slot_whose_block_is_given_up_is_nobody_elses_until_its_bytes_have_come() {
    explore(Fault::None, || comes_up(Coming::Forsaken));
}

#[test]
fn a_store_that_dies_shows_nothing_that_is_not_whole() {
    explore(Fault::None, || comes_up(Coming::StoreDies));
}

/// How a reader without a lease compares what it copies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compares {
    /// What has arrived.
    Copied,
    /// What was in the slot before it was copied.
    InPlace,
}

/// A reader whose connection was lost goes on reading while its slot is filled again, with another block and with the
/// same one from another engine.
fn a_checksum_beside_a_refill(compares: Compares) {
    let node = Node::new(1);
    node.store(1, 0);
    let reader = spawn(&node, move |node| {
        let lost = lease(&node.tier, node.namespace, &[digest(1)], 1);
        let Some(&slot) = lost.slots().first() else {
            return;
        };
        drop(lost);
        let sums = slot::checksums(node.arena(), slot.0, &node.layout, &digest(1));
        let Some(sums) = sums else {
            return;
        };
        let loaded = match compares {
            Compares::Copied => node.copy(slot, &sums),
            Compares::InPlace => copy_after_comparing(node, slot, &sums),
        };
        if let Some(loaded) = loaded {
            assert_written(1, loaded);
        }
    });
    let writer = spawn(&node, |node| {
        for (name, writer) in [(2, 0), (1, 1), (2, 2)] {
            node.store(name, writer);
        }
    });
    join(vec![reader, writer]);
    node.check();
}

fn copy_after_comparing(
    node: &Node,
    slot: Slot,
    sums: &[u64],
) -> Option<[[u8; SEGMENT]; SEGMENTS]> {
    let mut out = [[0; SEGMENT]; SEGMENTS];
    for ((segment, out), &sum) in node.layout.segments().iter().zip(&mut out).zip(sums) {
        let at = slot.0 + segment.offset as u64;
        if node.arena().checksum(at, SEGMENT) != sum {
            return None;
        }
        node.arena().get(at, out);
    }
    Some(out)
}

#[test]
fn a_reader_beside_a_refill_takes_no_other_bytes_for_its_blocks() {
    explore(Fault::None, || a_checksum_beside_a_refill(Compares::Copied));
    breaks(Fault::None, || {
        a_checksum_beside_a_refill(Compares::InPlace)
    });
}
