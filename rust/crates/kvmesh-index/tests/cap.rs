//! What is forgotten at the memory cap, and what is kept.

use kvmesh_core::Tier;
use kvmesh_index::{HolderId, Matches, PrefixIndex};

const CAP: usize = 1 << 20;

fn prompt(number: u64, blocks: u64) -> Vec<u64> {
    (0..blocks)
        .map(|at| (number << 32 | at).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .collect()
}

fn device_depth(index: &PrefixIndex, hashes: &[u64]) -> u32 {
    let mut matches = Matches::new();
    index.matches(hashes, &mut matches);
    matches
        .iter()
        .map(|found| found.depths[0])
        .next()
        .unwrap_or(0)
}

fn index_and_engine() -> (PrefixIndex, HolderId) {
    let index = PrefixIndex::new(Some(CAP));
    let engine = index
        .add_engine("engine", None)
        .expect("room for one engine");
    (index, engine)
}

#[test]
fn what_is_matched_stays() {
    let (index, engine) = index_and_engine();
    let dear = prompt(0, 200);
    index
        .store(engine, &dear, None, Tier::Device)
        .expect("a live engine");
    for number in 1..5_000 {
        assert_eq!(device_depth(&index, &dear), 200);
        index
            .store(engine, &prompt(number, 40), None, Tier::Device)
            .expect("a live engine");
        assert!(index.stats().bytes <= CAP);
    }
    let stats = index.stats();
    assert_eq!(stats.blocks as u64 + stats.forgotten, 200 + 4_999 * 40);
    assert_eq!(
        device_depth(&index, &prompt(1, 40)),
        0,
        "the oldest prompt is gone"
    );
    assert_eq!(
        device_depth(&index, &prompt(4_999, 40)),
        40,
        "the newest is there"
    );
    assert!(
        stats.bytes > CAP / 2,
        "the cap is used, {} bytes",
        stats.bytes
    );
}

#[test]
fn leaves_go_before_what_they_hang_on() {
    let (index, engine) = index_and_engine();
    // A shared stem and a thousand branches, all stored after it and never matched.
    let stem = prompt(0, 64);
    index
        .store(engine, &stem, None, Tier::Device)
        .expect("a live engine");
    for number in 1..5_000 {
        let branch = prompt(number, 40);
        index
            .store(engine, &branch, stem.last().copied(), Tier::Device)
            .expect("a live engine");
    }
    assert!(index.stats().forgotten > 0);
    assert_eq!(device_depth(&index, &stem), 64);
}

#[test]
fn a_cap_too_small_for_anything_forgets_everything() {
    let index = PrefixIndex::new(Some(100));
    let engine = index
        .add_engine("engine", None)
        .expect("room for one engine");
    index
        .store(engine, &prompt(0, 500), None, Tier::Device)
        .expect("a live engine");
    assert_eq!(device_depth(&index, &prompt(0, 500)), 0);
    assert_eq!(index.stats().forgotten, 500);
}

#[test]
fn what_is_forgotten_is_counted_for_its_holder() {
    let (index, small) = index_and_engine();
    let large = index
        .add_engine("large", None)
        .expect("room for another engine");
    let store = |engine, number| {
        index
            .store(engine, &prompt(number, 40), None, Tier::Device)
            .expect("a live engine");
    };
    let missing = |engine, stored: u64| {
        let digest = index.digest(engine, Tier::Device).expect("a live engine");
        let forgotten = index.forgotten(engine, Tier::Device);
        assert_eq!(
            digest.count + forgotten.expect("a live engine"),
            stored,
            "every block is held or counted"
        );
        stored - digest.count
    };
    // Both have the first prompt; then one of them fills the index, and the prompt is forgotten for both.
    store(small, 0);
    (0..5_000).for_each(|number| store(large, number));
    assert_eq!(missing(small, 40), 40);
    assert!(missing(large, 5_000 * 40) > 40);
    let sum = index.stats().forgotten;
    assert_eq!(
        sum,
        missing(large, 5_000 * 40),
        "one both had counts once there"
    );

    index.clear(large, None).expect("a live engine");
    assert_eq!(missing(large, 0), 0, "nothing is missing of nothing");
    assert_eq!(missing(small, 40), 40, "another holder's count is its own");
    index.drop_holder(small).expect("a live engine");
    let next = index.add_engine("next", None).expect("room for an engine");
    assert_eq!(
        index.forgotten(next, Tier::Device).expect("a live engine"),
        0
    );
}
