//! Real threads: a match never reports a block that was absent during the whole call, and never
//! misses one that was present during the whole call.

#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod prompts;

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
};

use kvmesh_core::Tier;
use kvmesh_index::{Matches, PrefixIndex};
use prompts::block;

const PROMPT: u64 = 300;
/// The blocks every engine always holds; the rest comes and goes.
const STABLE: u64 = 130;

fn prompt() -> Vec<u64> {
    (0..PROMPT)
        .map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .collect()
}

#[test]
fn matches_under_writers_are_bounded_by_the_truth() {
    let index = PrefixIndex::new(None);
    let hashes = prompt();
    let engines: Vec<_> = (0..3)
        .map(|n| index.add_engine(&format!("engine-{n}"), None).unwrap())
        .collect();
    for &engine in &engines {
        index
            .store(engine, &hashes[..STABLE as usize], None, Tier::Device)
            .unwrap();
    }
    // Depth an engine's prompt may have reached since the reader looked, by engine.
    let ceilings: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(STABLE)).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for (n, &engine) in engines.iter().enumerate() {
            let (index, hashes, ceiling, stop) = (&index, &hashes, &ceilings[n], &stop);
            scope.spawn(move || {
                let mut end = STABLE;
                for round in 0..3_000 {
                    let next = STABLE + (round * 37 + n as u64 * 11) % (PROMPT - STABLE) + 1;
                    let (from, to) = (end.min(next) as usize, end.max(next) as usize);
                    let piece = &hashes[from..to];
                    if next > end {
                        ceiling.fetch_max(next, SeqCst);
                        index
                            .store(engine, piece, Some(hashes[from - 1]), Tier::Device)
                            .unwrap();
                    } else {
                        index.remove(engine, piece, Tier::Device).unwrap();
                    }
                    end = next;
                }
                stop.store(true, SeqCst);
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                let mut matches = Matches::new();
                while !stop.load(SeqCst) {
                    index.matches(&hashes, &mut matches);
                    assert_eq!(matches.len(), engines.len());
                    for found in matches.iter() {
                        let n = engines
                            .iter()
                            .position(|&engine| engine == found.engine)
                            .unwrap();
                        let depth = u64::from(found.depths[0]);
                        assert!(depth >= STABLE, "missed blocks that were always there");
                        assert!(
                            depth <= ceilings[n].load(SeqCst),
                            "saw blocks before their store"
                        );
                    }
                }
            });
        }
    });
    // Drop one while it is read; the others stay.
    index.drop_holder(engines[0]).unwrap();
    let mut matches = Matches::new();
    index.matches(&hashes, &mut matches);
    assert_eq!(matches.len(), 2);
    assert_eq!(index.stats().holders, 2);
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
