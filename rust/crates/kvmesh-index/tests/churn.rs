//! Many blocks coming and going: what short programs are too short to meet.

#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod prompts;

use std::collections::HashSet;

use kvmesh_core::Tier;
use kvmesh_index::{HolderId, Matches, PrefixIndex};
use prompts::block;

const ENGINES: usize = 4;

/// Prompts behind a common start, kept for a while and evicted block by block from their ends, as engines do it.
#[test]
fn a_long_life_leaves_nothing_behind() {
    let index = PrefixIndex::new(None);
    let engines: Vec<HolderId> = (0..ENGINES)
        .map(|n| index.add_engine(&format!("engine-{n}"), None).unwrap())
        .collect();
    let prompt = |number: u64| -> Vec<u64> {
        let length = 40 + number % 171;
        (0..length)
            .map(|at| block(if at < 20 { 0 } else { number }, at))
            .collect()
    };
    let mut held: Vec<HashSet<u64>> = vec![HashSet::new(); ENGINES];
    let mut matches = Matches::new();
    const KEPT: u64 = 500;
    for number in 1..20_000 {
        let at = (number * 7 % 13) as usize % ENGINES;
        let hashes = prompt(number);
        index
            .store(engines[at], &hashes, None, Tier::Device)
            .unwrap();
        held[at].extend(&hashes);
        if number > KEPT {
            let at = ((number - KEPT) * 7 % 13) as usize % ENGINES;
            let mut tail = prompt(number - KEPT).split_off(20);
            tail.reverse();
            index.remove(engines[at], &tail, Tier::Device).unwrap();
            tail.iter().for_each(|hash| {
                held[at].remove(hash);
            });
        }
        if number % 97 == 0 {
            index.matches(&hashes, &mut matches);
            for found in matches.iter() {
                let at = engines.iter().position(|&id| id == found.engine).unwrap();
                let depth = hashes
                    .iter()
                    .take_while(|hash| held[at].contains(hash))
                    .count();
                assert_eq!(found.depths, [depth as u32; 4]);
            }
        }
    }
    let distinct: HashSet<u64> = held.iter().flatten().copied().collect();
    let stats = index.stats();
    assert_eq!(stats.blocks, distinct.len());
    assert_eq!(
        stats.held,
        held.iter().map(HashSet::len).sum::<usize>() as u64
    );
    for &engine in &engines {
        index.clear(engine, None).unwrap();
    }
    let empty = index.stats();
    assert_eq!((empty.blocks, empty.held, empty.runs), (0, 0, 0));
    assert_eq!(empty.bytes, stats.bytes, "memory is kept for use");
}

/// A run that hundreds hold, each to another depth.
#[test]
fn every_holder_of_a_shared_run_is_told_apart() {
    let index = PrefixIndex::new(None);
    let hashes: Vec<u64> = (0..64).map(|at| block(1, at)).collect();
    let engines: Vec<HolderId> = (0..700)
        .map(|n| index.add_engine(&format!("engine-{n}"), None).unwrap())
        .collect();
    let depth = |n: usize| n * 37 % 64 + 1;
    for (n, &engine) in engines.iter().enumerate() {
        index
            .store(engine, &hashes[..depth(n)], None, Tier::Device)
            .unwrap();
    }
    assert_eq!(index.stats().runs, 1);
    let mut matches = Matches::new();
    index.matches(&hashes, &mut matches);
    assert_eq!(matches.len(), engines.len());
    for found in matches.iter() {
        let n = engines.iter().position(|&id| id == found.engine).unwrap();
        assert_eq!(found.depths[0] as usize, depth(n));
    }
    for &engine in &engines[..699] {
        index.drop_holder(engine).unwrap();
    }
    index.matches(&hashes, &mut matches);
    assert_eq!(matches.len(), 1);
    assert_eq!(index.stats().blocks, depth(699));
}
