//! What a flush promises: all that memory had is on the disk and on record, or it says what is not.
#![expect(clippy::unwrap_used, reason = "a failure of these is the test's")]

mod common;

use std::path::Path;

use common::{BLOCK, Random, content, digest, settings, store};
use kvmesh_kvbm::embedded::BlockStore;
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::store::Settings;
use kvmesh_kvbm::tiers::Tier;

#[test]
fn flushed_blocks_are_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path(), 64, 512);
    for number in 0..100 {
        assert!(first.put(digest(number), &content(number)).unwrap());
    }
    first.flush().unwrap();
    first.close();
    let second = store(dir.path(), 64, 512);
    assert_eq!(second.store().health().unwrap().recovered, 100);
    let mut out = vec![0; BLOCK + 4000];
    for number in 0..100 {
        let from = second.get(digest(number), &mut out).unwrap();
        assert_eq!(from, Some(kvmesh_core::Tier::Nvme));
        assert_eq!(out, content(number));
    }
    second.close();
    // Blocks of another size are other blocks.
    let other = BlockStore::new(&settings(dir.path(), 64, 512), 100).unwrap();
    assert_eq!(other.contains(&[digest(1)]), [None]);
    other.close();
}

/// What is on record when a flush returns: by the disk tier of a process that opens a copy of it.
fn on_record(dir: &Path, numbers: &[u64]) -> Vec<u64> {
    let copy = tempfile::tempdir().unwrap();
    std::fs::create_dir(copy.path().join("nvme")).unwrap();
    for name in ["map", "slabs"] {
        let there = copy.path().join("nvme").join(name);
        std::fs::copy(dir.join("nvme").join(name), there).unwrap();
    }
    let killed = store(copy.path(), 64, DISK);
    let mut out = vec![0; BLOCK + 4000];
    let lost = |number: &&u64| {
        let found = killed.get(digest(**number), &mut out).unwrap();
        assert!(found.is_none() || out == content(**number));
        found.is_none()
    };
    let lost = numbers.iter().filter(lost).copied().collect();
    killed.close();
    lost
}

/// Blocks that the disk of these tests has room for.
const DISK: u64 = 200;

#[test]
fn a_flush_returns_when_all_that_memory_had_is_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 64, DISK);
    let nvme = store.store().nvme().unwrap().clone();
    let namespace = kvmesh_kvbm::tiers::NamespaceId(0);
    // More than the disk has room for: its policy, too, is asked for room, and its slots are written again.
    for round in 0..30 {
        let numbers = round * 32..(round + 1) * 32;
        for number in numbers.clone() {
            assert!(store.put(digest(number), &content(number)).unwrap());
        }
        let here = numbers
            .filter(|number| (store.store().host()).lookup(namespace, &[digest(*number)]) == 1);
        let here: Vec<u64> = here.collect();
        store.flush().unwrap();
        for &number in &here {
            let there = nvme.lookup(namespace, &[digest(number)]);
            assert_eq!(there, 1, "round {round}, block {number}");
        }
        if round % 10 == 9 {
            let lost = on_record(dir.path(), &here);
            assert_eq!(lost, [0; 0], "round {round}");
        }
    }
    store.close();
}

#[test]
fn what_a_disk_would_rather_not_have_is_flushed_too() {
    // It weighs newcomers against blocks that return.
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        policy: Policy::Default,
        ..settings(dir.path(), 64, DISK)
    };
    let store = BlockStore::new(&settings, BLOCK as u32 + 4000).unwrap();
    let nvme = store.store().nvme().unwrap().clone();
    let host = store.store().host().clone();
    let namespace = kvmesh_kvbm::tiers::NamespaceId(0);
    let (mut random, mut out) = (Random(5), vec![0; BLOCK + 4000]);
    let mut passed_over = 0;
    for round in 0..30 {
        // Blocks that return again and again, and some that never will.
        for _ in 0..300 {
            let number = random.below(190);
            if store.get(digest(number), &mut out).unwrap().is_none() {
                store.put(digest(number), &content(number)).unwrap();
            }
        }
        let new = 1000 + round * 8..1008 + round * 8;
        for number in new.clone() {
            store.put(digest(number), &content(number)).unwrap();
        }
        let here = (0..190).chain(new);
        let here: Vec<u64> = here
            .filter(|&number| host.lookup(namespace, &[digest(number)]) == 1)
            .collect();
        store.flush().unwrap();
        let there = |number: &&u64| nvme.lookup(namespace, &[digest(**number)]) == 1;
        passed_over += here.len() - here.iter().filter(there).count();
    }
    assert_eq!(passed_over, 0);
    store.close();
}
