//! The structure that readers share with writers, under a model checker: its sources are compiled once more with
//! atomics and locks whose every operation is a point of scheduling, and random programs run under random
//! schedules. What a match may answer is known exactly: a block that was there during all of the call is
//! seen, one that was absent during all of it is not.
//!
//! Operations are taken to be sequentially consistent; what weaker ones allow is argued in `run.rs` and `cover.rs`.
//! A failing schedule is printed and can be replayed (`shuttle::replay`).

#![allow(dead_code, clippy::unwrap_used)]

#[path = "../src/blocks.rs"]
mod blocks;
#[path = "../src/cap.rs"]
mod cap;
#[path = "../src/cover.rs"]
mod cover;
#[path = "../src/holders.rs"]
mod holders;
#[path = "../src/line.rs"]
mod line;
#[path = "../src/lock.rs"]
mod lock;
#[path = "../src/matches.rs"]
mod matches;
#[path = "../src/piece.rs"]
mod piece;
#[path = "../src/pool.rs"]
mod pool;
#[path = "../src/run.rs"]
mod run;
#[path = "model/sync.rs"]
mod sync;
#[path = "../src/table.rs"]
mod table;
#[path = "../src/walk.rs"]
mod walk;
#[path = "../src/write.rs"]
mod write;

use std::sync::{Arc, Mutex};

use blocks::Blocks;
use holders::{Holders, Kind, Slot};
use kvmesh_core::{BlockHash, SetDigest, Tier};
use matches::Matches;
use run::Place;
use shuttle::{
    rand::{Rng, thread_rng},
    scheduler::RandomScheduler,
    thread,
};
use table::Table;

/// Two prompts that part after some blocks.
const PROMPTS: usize = 2;
const LENGTH: usize = 14;
const SHARED: usize = 6;
/// Blocks in all.
const BLOCKS: usize = SHARED + PROMPTS * (LENGTH - SHARED);

fn number(prompt: usize, at: usize) -> usize {
    if at < SHARED {
        at
    } else {
        SHARED + prompt * (LENGTH - SHARED) + at - SHARED
    }
}

fn hash(number: usize) -> u64 {
    (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What is known of one block of one engine.
#[derive(Clone, Copy, Default)]
struct State {
    held: bool,
    /// A change is under way.
    busy: bool,
    /// Stores and removals begun.
    stores: u32,
    removals: u32,
}

type Truth = Vec<[State; BLOCKS]>;

struct Mesh {
    blocks: Blocks,
    holders: Arc<Holders>,
    slots: Vec<Slot>,
    truth: Mutex<Truth>,
}

impl Mesh {
    fn new(engines: usize, max_bytes: usize) -> Self {
        let mut holders = Holders::default();
        let slots: Vec<_> = (0..engines)
            .map(|n| {
                let id = holders.add(n.to_string().into(), None, Kind::Engine);
                Slot::new(id.unwrap().index() as u16, Tier::Device)
            })
            .collect();
        Self {
            // A cap keeps the pools' first chunks small.
            blocks: Blocks::new(Some(max_bytes), engines),
            holders: Arc::new(holders),
            truth: Mutex::new(vec![[State::default(); BLOCKS]; engines]),
            slots,
        }
    }

    /// A random change of one engine's blocks.
    fn change(&self, engine: usize) {
        let mut random = thread_rng();
        let prompt = random.gen_range(0..PROMPTS);
        let store = random.gen_bool(0.6);
        // Mostly from the start, as engines store, or to the end, as they evict.
        let edges = [
            0,
            LENGTH,
            random.gen_range(0..LENGTH),
            random.gen_range(0..=LENGTH),
        ];
        let (from, to) = match (store, random.gen_range(0..4)) {
            (true, 0..3) => (edges[0], edges[3]),
            (false, 0..3) => (edges[2], edges[1]),
            _ => (edges[2].min(edges[3]), edges[2].max(edges[3])),
        };
        let mut numbers: Vec<usize> = (from..to).map(|at| number(prompt, at)).collect();
        if !store && random.gen_bool(0.5) {
            numbers.reverse();
        }
        let parent = from.checked_sub(1).map(|at| number(prompt, at));
        self.make(engine, store, &numbers, parent);
    }

    /// Stores or removes these blocks of an engine.
    fn make(&self, engine: usize, store: bool, numbers: &[usize], parent: Option<usize>) {
        let hashes: Vec<u64> = numbers.iter().copied().map(hash).collect();
        self.note(engine, numbers, |state| {
            state.busy = true;
            *(if store {
                &mut state.stores
            } else {
                &mut state.removals
            }) += 1;
        });
        if store {
            let slot = self.slots[engine];
            self.blocks.store(slot, &hashes, parent.map(hash));
        } else {
            self.blocks.remove(self.slots[engine], &hashes);
        }
        self.note(engine, numbers, |state| {
            state.busy = false;
            state.held = store;
        });
    }

    fn note(&self, engine: usize, numbers: &[usize], change: impl Fn(&mut State)) {
        let mut truth = self.truth.lock().unwrap();
        numbers
            .iter()
            .for_each(|&number| change(&mut truth[engine][number]));
    }

    /// A match whose answer has to fit what is known of the time it took. `misses`: blocks may be missed.
    fn look(&self, matches: &mut Matches, misses: bool) {
        let prompt = thread_rng().gen_range(0..PROMPTS);
        let hashes: Vec<u64> = (0..LENGTH).map(|at| hash(number(prompt, at))).collect();
        let before = self.truth.lock().unwrap().clone();
        let holders = || Arc::clone(&self.holders);
        matches.walk(&hashes, self.holders.version(), holders, &self.blocks);
        let after = self.truth.lock().unwrap().clone();
        for (engine, slot) in self.slots.iter().enumerate() {
            let found = matches
                .iter()
                .find(|found| found.engine.index() as u16 == slot.holder());
            let depths = found.map_or([0; 4], |found| found.depths);
            assert_eq!(depths, [depths[0]; 4]);
            let known = |at: usize| {
                let number = number(prompt, at);
                (before[engine][number], after[engine][number])
            };
            for at in 0..depths[0] as usize {
                let (old, new) = known(at);
                let absent = !old.held && !old.busy && new.stores == old.stores;
                assert!(!absent, "engine {engine} was seen to hold block {at}");
            }
            if (depths[0] as usize) < LENGTH && !misses {
                let (old, new) = known(depths[0] as usize);
                let there = old.held && !old.busy && new.removals == old.removals;
                assert!(!there, "engine {engine}'s block {} was not seen", depths[0]);
            }
        }
    }

    /// Everything as it is when all is quiet.
    fn check(&self) {
        let truth = self.truth.lock().unwrap();
        let mut distinct = [false; BLOCKS];
        for (states, &slot) in truth.iter().zip(&self.slots) {
            let held = (0..BLOCKS).filter(|&number| states[number].held);
            held.clone().for_each(|number| distinct[number] = true);
            let mut wanted: Vec<u64> = held.map(hash).collect();
            let mut digest = SetDigest::default();
            digest.extend(wanted.iter().copied().map(BlockHash));
            assert_eq!(self.blocks.held(slot), digest);
            let mut blocks = self.blocks.of(slot);
            blocks.sort_unstable();
            wanted.sort_unstable();
            assert_eq!(blocks, wanted);
        }
        let distinct = distinct.iter().filter(|&&held| held).count();
        assert_eq!(self.blocks.len(), distinct);
    }
}

/// Runs `program` under so many random schedules, always the same ones.
fn explore(schedules: usize, program: impl Fn() + Send + Sync + 'static) {
    let mut config = shuttle::Config::new();
    config.silence_warnings = true;
    config.stack_size = 1 << 18;
    let scheduler = RandomScheduler::new_from_seed(0x6b76_6d65_7368, schedules);
    shuttle::Runner::new(scheduler, config).run(program);
}

/// Engines side by side in the same runs, each writing and one thread matching.
fn writers_and_a_reader(engines: usize, writers: usize, changes: usize) {
    let mesh = Arc::new(Mesh::new(engines, 1 << 20));
    for engine in 0..engines {
        mesh.change(engine);
    }
    let threads: Vec<_> = (0..writers)
        .map(|writer| {
            let mesh = Arc::clone(&mesh);
            thread::spawn(move || {
                for at in 0..changes {
                    mesh.change((writer + at * writers) % engines);
                }
            })
        })
        .collect();
    let mut matches = Matches::new();
    for _ in 0..4 {
        mesh.look(&mut matches, false);
    }
    for thread in threads {
        thread.join().unwrap();
    }
    mesh.look(&mut matches, false);
    mesh.check();
}

#[test]
fn one_writer_beside_a_reader() {
    explore(600, || writers_and_a_reader(3, 1, 6));
}

#[test]
fn two_writers_beside_a_reader() {
    explore(400, || writers_and_a_reader(4, 2, 4));
}

/// A run's end goes while two engines that share its start store the same blocks behind it: one of them may find no room
/// there and take another run, the other find room and then the blocks in that run.
#[test]
fn an_end_goes_while_two_go_on() {
    explore(2_000, || {
        let mesh = Arc::new(Mesh::new(3, 1 << 20));
        let whole = |prompt| (0..LENGTH).map(move |at| number(prompt, at));
        (0..3).for_each(|engine| {
            mesh.make(engine, true, &(0..SHARED).collect::<Vec<_>>(), None);
        });
        mesh.make(2, true, &whole(0).collect::<Vec<_>>(), None);
        let threads: Vec<_> = (0..3)
            .map(|engine| {
                let mesh = Arc::clone(&mesh);
                let numbers: Vec<_> = match engine {
                    2 => whole(0).skip(SHARED).collect(),
                    _ => whole(1).collect(),
                };
                thread::spawn(move || mesh.make(engine, engine != 2, &numbers, None))
            })
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        mesh.check();
    });
}

/// More entries in a run than lie beside it.
#[test]
fn many_engines_in_one_run() {
    explore(200, || writers_and_a_reader(12, 2, 12));
}

/// Blocks of one home, many of them behind it: those that stay are found whatever others do, and those that go are not.
#[test]
fn one_home_for_all() {
    const RUNS: usize = 3;
    fn blocks(run: usize) -> Vec<u64> {
        (run * SHARED..(run + 1) * SHARED).map(hash).collect()
    }
    fn place(run: usize) -> Place {
        Place::new(run as u32 + 1, 0)
    }
    fn add(table: &Table, run: usize) {
        let (count, _) = table.insert(&blocks(run), &[], place(run), false, |_, _| false);
        assert_eq!(count, SHARED);
    }
    fn has(table: &Table, run: usize) -> bool {
        let found = |(at, &hash): (usize, &u64)| {
            let here = |other| (other == place(run).behind(at)).then_some(());
            table.find(hash, here).is_some()
        };
        blocks(run).iter().enumerate().all(found)
    }
    explore(400, || {
        let table = Arc::new(Table::new(1));
        (0..RUNS).for_each(|run| add(&table, run));
        let threads: Vec<_> = (0..RUNS - 1)
            .map(|run| {
                let table = Arc::clone(&table);
                thread::spawn(move || {
                    table.remove(&blocks(run), &[], place(run), false);
                    add(&table, run);
                    assert!(has(&table, run));
                    table.remove(&blocks(run), &[], place(run), false);
                    assert!(!has(&table, run));
                })
            })
            .collect();
        (0..4).for_each(|_| assert!(has(&table, RUNS - 1)));
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        assert!(has(&table, RUNS - 1));
    });
}
