//! Real threads: a match never reports a block that was absent during the whole call, and never
//! misses one that was present during the whole call.

#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod prompts;

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
};

use kvmesh_core::Tier;
use kvmesh_index::{HolderId, Matches, PrefixIndex};
use prompts::block;

const PROMPT: usize = 300;
/// The blocks every engine always holds; the rest comes and goes.
const STABLE: usize = 60;
const ENGINES: usize = 3;
const ROUNDS: usize = 3_000;

/// What is known of one block in one tier of one holder, which one writer changes: 0 absent, 1 being stored,
/// 2 held, 3 being removed, 4 absent again, and so on.
type Life = AtomicU64;

/// One holder's blocks of the prompt in one tier.
struct Part {
    holder: HolderId,
    tier: Tier,
    lives: Vec<Life>,
}

impl Part {
    fn new(holder: HolderId, tier: Tier) -> Self {
        let lives = (0..PROMPT).map(|_| Life::new(0)).collect();
        Self {
            holder,
            tier,
            lives,
        }
    }

    fn look(&self) -> Vec<u64> {
        self.lives.iter().map(|life| life.load(SeqCst)).collect()
    }

    /// Has the index store or remove a stretch of the prompt, and says so before and after.
    fn change(&self, index: &PrefixIndex, hashes: &[u64], stretch: Range<usize>, store: bool) {
        let settled = if store { 0 } else { 2 };
        let changing: Vec<&Life> = self.lives[stretch.clone()]
            .iter()
            .filter(|life| life.load(SeqCst) % 4 == settled)
            .collect();
        let step = || {
            for life in &changing {
                life.fetch_add(1, SeqCst);
            }
        };
        step();
        if store {
            let parent = stretch.start.checked_sub(1).map(|at| hashes[at]);
            index.store(self.holder, &hashes[stretch], parent, self.tier)
        } else {
            index.remove(self.holder, &hashes[stretch], self.tier)
        }
        .unwrap();
        step();
    }
}

/// How deep an engine may see the prompt, of parts that it sees and two looks at each, one before the call
/// and one after it: at least, and at most.
fn bounds(looks: &[(&[u64], &[u64])]) -> (usize, usize) {
    let all_along = |at: usize, state: u64| {
        move |(before, after): &(&[u64], &[u64])| before[at] == after[at] && before[at] % 4 == state
    };
    let least = (0..PROMPT).take_while(|&at| looks.iter().any(all_along(at, 2)));
    let most = (0..PROMPT).take_while(|&at| !looks.iter().all(all_along(at, 0)));
    (least.count(), most.count())
}

/// Numbers that look random; the same in every run.
fn dice(seed: usize) -> impl FnMut(usize) -> usize {
    let mut state = seed as u64;
    move |below| {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) as usize % below
    }
}

#[test]
fn matches_under_writers_are_bounded_by_the_truth() {
    let index = PrefixIndex::new(None);
    let hashes: Vec<u64> = (0..PROMPT as u64).map(|at| block(1, at)).collect();
    let engines: Vec<HolderId> = (0..ENGINES)
        .map(|n| {
            index
                .add_engine(&format!("engine-{n}"), Some("node"))
                .unwrap()
        })
        .collect();
    let store = index.add_store("store", Some("node")).unwrap();
    let devices = engines
        .iter()
        .map(|&engine| Part::new(engine, Tier::Device));
    let below = Tier::ALL[1..].iter().map(|&tier| Part::new(store, tier));
    let parts: Vec<Part> = devices.chain(below).collect();
    for device in &parts[..ENGINES] {
        device.change(&index, &hashes, 0..STABLE, true);
    }
    // Matches of which the truth left no choice, and that ended at a block that was absent.
    let exact = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let write = |parts: &[Part], seed: usize| {
        let mut dice = dice(seed);
        for _ in 0..ROUNDS {
            let part = &parts[dice(parts.len())];
            let start = STABLE + dice(PROMPT - STABLE);
            let end = PROMPT.min(start + 1 + dice(80));
            part.change(&index, &hashes, start..end, dice(5) < 3);
        }
    };
    let read = || {
        let mut matches = Matches::new();
        while !stop.load(SeqCst) {
            let before: Vec<_> = parts.iter().map(Part::look).collect();
            index.matches(&hashes, &mut matches);
            let after: Vec<_> = parts.iter().map(Part::look).collect();
            assert_eq!(matches.len(), ENGINES);
            for found in matches.iter() {
                let engine = engines
                    .iter()
                    .position(|&engine| engine == found.engine)
                    .unwrap();
                for (tiers, &depth) in found.depths.iter().enumerate() {
                    let seen = std::iter::once(engine).chain(ENGINES..ENGINES + tiers);
                    let looks: Vec<_> = seen.map(|at| (&before[at][..], &after[at][..])).collect();
                    let (least, most) = bounds(&looks);
                    let depth = depth as usize;
                    assert!(depth >= least, "missed a block that was there all along");
                    assert!(depth <= most, "saw a block that was absent all along");
                    if least == most && most < PROMPT {
                        exact.fetch_add(1, SeqCst);
                    }
                }
            }
        }
    };
    thread::scope(|scope| {
        let mut seats: Vec<&[Part]> = parts[..ENGINES].chunks(1).collect();
        seats.push(&parts[ENGINES..]);
        let writers: Vec<_> = seats
            .into_iter()
            .enumerate()
            .map(|(seed, parts)| scope.spawn(move || write(parts, seed)))
            .collect();
        for _ in 0..2 {
            scope.spawn(read);
        }
        for writer in writers {
            writer.join().unwrap();
        }
        stop.store(true, SeqCst);
    });
    assert!(
        exact.load(SeqCst) > 0,
        "the readers saw nothing for certain"
    );
    // One is dropped; the others stay.
    index.drop_holder(engines[0]).unwrap();
    let mut matches = Matches::new();
    index.matches(&hashes, &mut matches);
    assert_eq!(matches.len(), 2);
    assert_eq!(index.stats().holders, 3);
}

/// Writers of different holders meet in the same runs, the table grows below them, and one holder after the
/// other comes and goes; afterwards the index holds what a quiet one would.
#[test]
fn writers_side_by_side_lose_nothing() {
    const ENGINES: u64 = 4;
    const KEPT: u64 = 200;
    let index = PrefixIndex::new(None);
    let prompts = |number: u64| -> Vec<u64> {
        (0..100)
            .map(|at| block(if at < 30 { 0 } else { number }, at))
            .collect()
    };
    let engines: Vec<_> = (0..ENGINES)
        .map(|n| index.add_engine(&format!("engine-{n}"), None).unwrap())
        .collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = engines
            .iter()
            .map(|&engine| {
                let index = &index;
                scope.spawn(move || {
                    for number in 1..2_000 {
                        let hashes = prompts(number);
                        index.store(engine, &hashes, None, Tier::Device).unwrap();
                        if number > KEPT {
                            let mut tail = prompts(number - KEPT).split_off(30);
                            tail.reverse();
                            index.remove(engine, &tail, Tier::Device).unwrap();
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let guest = prompts(0);
            let mut matches = Matches::new();
            while !stop.load(SeqCst) {
                let id = index.add_engine("guest", None).unwrap();
                index.store(id, &guest, None, Tier::Device).unwrap();
                index.matches(&guest, &mut matches);
                let found = matches.iter().find(|found| found.engine == id);
                assert_eq!(found.unwrap().depths, [100; 4]);
                index.drop_holder(id).unwrap();
                index.matches(&guest, &mut matches);
                assert!(matches.iter().all(|found| found.engine != id));
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        stop.store(true, SeqCst);
    });
    let stats = index.stats();
    assert_eq!(stats.held, ENGINES * (30 + 70 * KEPT));
    assert_eq!(stats.blocks as u64, 30 + 70 * KEPT);
    let mut matches = Matches::new();
    for number in 1..2_000 {
        let depth = if number < 2_000 - KEPT { 30 } else { 100 };
        index.matches(&prompts(number), &mut matches);
        assert_eq!(matches.len() as u64, ENGINES);
        assert!(matches.iter().all(|found| found.depths == [depth; 4]));
    }
    for &engine in &engines {
        index.drop_holder(engine).unwrap();
    }
    let empty = index.stats();
    assert_eq!((empty.blocks, empty.held, empty.runs), (0, 0, 0));
}
