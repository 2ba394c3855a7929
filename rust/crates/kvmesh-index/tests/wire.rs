//! Batches as they come over the wire, and snapshots.

#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod columns;
mod prompts;

use columns::{CLEARED, Columns, REMOVED};
use kvmesh_core::{ErrorKind, Tier};
use kvmesh_index::{Matches, PrefixIndex};
use prompts::block;
use proptest::prelude::*;

fn hashes(prompt: u64, len: u64) -> Vec<u64> {
    (0..len).map(|at| block(prompt, at)).collect()
}

fn depths(index: &PrefixIndex, hashes: &[u64]) -> Vec<[u32; 4]> {
    let mut matches = Matches::new();
    index.matches(hashes, &mut matches);
    let mut all: Vec<_> = matches
        .iter()
        .map(|found| (found.engine, found.depths))
        .collect();
    all.sort();
    all.into_iter().map(|(_, depths)| depths).collect()
}

#[test]
fn a_batch_applies_in_order_and_skips_foreign_tiers() {
    let index = PrefixIndex::new(None);
    index.add_engine("engine", Some("node")).unwrap();
    index.add_store("store", Some("node")).unwrap();
    let prompt = hashes(1, 100);
    let engine = Columns {
        holder: "engine",
        ..Columns::default()
    };
    let batch = engine
        .clone()
        .event(1, 0, None, &prompt[..60])
        .event(1, 1, Some(prompt[59]), &prompt[60..])
        .event(2, 0, None, &prompt) // an engine has no host tier
        .event(9, 0, None, &prompt) // nobody knows this one
        .event(1, REMOVED, None, &prompt[90..]);
    index.apply(&batch.bytes()).unwrap();
    assert_eq!(depths(&index, &prompt), [[90; 4]]);
    let store = Columns {
        holder: "store",
        ..Columns::default()
    };
    index
        .apply(&store.clone().event(2, 0, None, &prompt).bytes())
        .unwrap();
    assert_eq!(depths(&index, &prompt), [[90, 100, 100, 100]]);
    index
        .apply(&store.clone().event(3, CLEARED, None, &[]).bytes())
        .unwrap();
    assert_eq!(depths(&index, &prompt), [[90, 100, 100, 100]]);
    index
        .apply(&store.event(2, CLEARED, None, &[]).bytes())
        .unwrap();
    index
        .apply(&engine.clone().event(0, CLEARED, None, &[]).bytes())
        .unwrap();
    assert_eq!(depths(&index, &prompt), [[0; 4]; 0]);
    index.apply(&engine.bytes()).unwrap();
}

#[test]
fn columns_that_do_not_add_up_change_nothing() {
    let index = PrefixIndex::new(None);
    let id = index.add_engine("engine", None).unwrap();
    let prompt = hashes(1, 10);
    let good = Columns {
        holder: "engine",
        ..Columns::default()
    }
    .event(1, 0, None, &prompt[..4])
    .event(1, 1, Some(prompt[3]), &prompt[4..]);
    let spoil: [fn(&mut Columns); 7] = [
        |b| b.ops.push(4),
        |b| b.counts[0] += 1,
        |b| b.counts = vec![u64::MAX, 11],
        |b| b.hashes.truncate(9),
        |b| b.parents.clear(),
        |b| b.parents.push(1),
        |b| b.ops[1] = 4 + CLEARED,
    ];
    for spoil in spoil {
        let mut bad = good.clone();
        spoil(&mut bad);
        let error = index.apply(&bad.bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
    let nobody = Columns {
        holder: "nobody",
        ..good
    };
    assert_eq!(
        index.apply(&nobody.bytes()).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    assert_eq!(index.digest(id, Tier::Device).unwrap().count, 0);
}

/// Engines and stores with shared prompts, holes and a dropped holder.
fn full_index() -> PrefixIndex {
    let index = PrefixIndex::new(None);
    let gone = index.add_engine("gone", None).unwrap();
    for n in 0..5u64 {
        let engine = index
            .add_engine(&format!("engine-{n}"), Some("node"))
            .unwrap();
        index
            .store(engine, &hashes(n % 2, 150 + n), None, Tier::Device)
            .unwrap();
        index
            .remove(engine, &[block(n % 2, 70 + n)], Tier::Device)
            .unwrap();
    }
    let store = index.add_store("store", Some("node")).unwrap();
    index
        .store(store, &hashes(1, 90), None, Tier::Nvme)
        .unwrap();
    let cluster = index.add_store("cluster", None).unwrap();
    index
        .store(cluster, &hashes(0, 30), None, Tier::Network)
        .unwrap();
    index.drop_holder(gone).unwrap();
    index
}

#[test]
fn a_snapshot_brings_everything_back() {
    let index = full_index();
    let copy = PrefixIndex::restore(&index.snapshot(), None).unwrap();
    for prompt in [hashes(0, 200), hashes(1, 200)] {
        assert_eq!(depths(&copy, &prompt), depths(&index, &prompt));
    }
    let (a, b) = (index.stats(), copy.stats());
    assert_eq!((a.blocks, a.held, a.holders), (b.blocks, b.held, b.holders));
    // The next ids are those that the first index would have given.
    let next = |index: &PrefixIndex| index.add_engine("next", None).unwrap();
    assert_eq!(next(&copy), next(&index));
    assert!(copy.add_engine("engine-1", None).is_err());
    // Under a cap, less.
    let small = PrefixIndex::restore(&index.snapshot(), Some(10_000)).unwrap();
    assert!(small.stats().bytes <= 10_000);
}

#[test]
fn another_version_is_named() {
    let mut bytes = PrefixIndex::new(None).snapshot();
    bytes[12] = 200;
    let error = PrefixIndex::restore(&bytes, None).err().unwrap();
    assert!(error.to_string().contains("version: 200"), "{error}");
}

proptest! {
    #[test]
    fn damaged_snapshots_are_refused(at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<bool>()) {
        let mut bytes = full_index().snapshot();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= flip;
        }
        prop_assert!(PrefixIndex::restore(&bytes, None).is_err());
    }

    #[test]
    fn any_bytes_are_a_batch_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let index = PrefixIndex::new(None);
        if let Err(error) = index.apply(&bytes) {
            prop_assert!(matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::NotFound));
        }
    }
}
