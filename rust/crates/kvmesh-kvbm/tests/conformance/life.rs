//! A block's life: reserved, filled, registered, leased, gone.

use kvmesh_kvbm::Error;
use kvmesh_kvbm::block::{lease, register};
use kvmesh_kvbm::tiers::Room;

use crate::fixtures::{
    Fixture, SEGMENTS, chain, content, namespace, retaining, rooms, store, tiers,
};

#[test]
fn blocks_come_back_as_they_went_in() {
    for Fixture { tier, .. } in tiers() {
        let id = tier.open(&namespace("m")).unwrap();
        let blocks = chain(1, 5);
        let stored = store(&tier, id, None, &blocks);
        assert_eq!(stored, if tier.capabilities().retains { 5 } else { 0 });
        assert_eq!(tier.lookup(id, &blocks), stored);
        let leased = lease(&tier, id, &blocks, usize::MAX);
        assert_eq!(leased.slots().len(), stored);
        for (index, digest) in blocks[..stored].iter().enumerate() {
            for (number, expected) in content(digest).iter().enumerate() {
                let mut out = vec![0; expected.len()];
                leased.read(index, number..number + 1, &mut out).unwrap();
                assert_eq!(&out, expected);
            }
            let mut whole = vec![0; SEGMENTS.iter().sum::<u32>() as usize];
            leased.read(index, 0..SEGMENTS.len(), &mut whole).unwrap();
            assert_eq!(whole, content(digest).concat());
        }
        drop(leased);
        assert_eq!(tier.stats().blocks_in_use, 0);
    }
}

#[test]
fn nothing_is_found_before_it_is_registered() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let blocks = chain(1, 1);
        let room = rooms(&tier, id, None, &blocks).remove(0);
        assert_eq!(tier.lookup(id, &blocks), 0);
        assert_eq!(
            tier.reserve(id, None, &blocks),
            [Room::Present],
            "somebody is filling it"
        );
        assert!(
            matches!(tier.seal(room.slot()), Err(Error::NotFilled)),
            "an empty slot proves nothing"
        );
        let segments = content(&blocks[0]);
        let filled = room
            .fill(&segments.iter().map(Vec::as_slice).collect::<Vec<_>>())
            .unwrap();
        assert_eq!(tier.lookup(id, &blocks), 0);
        register(vec![filled]);
        assert_eq!(tier.lookup(id, &blocks), 1);
    }
}

#[test]
fn dropped_reservations_leave_nothing() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let blocks = chain(1, 6);
        let mut reserved = rooms(&tier, id, None, &blocks);
        let segments = content(&blocks[5]);
        let filled = reserved
            .pop()
            .unwrap()
            .fill(&segments.iter().map(Vec::as_slice).collect::<Vec<_>>())
            .unwrap();
        assert_eq!(tier.stats().blocks_in_use, 6);
        drop(reserved);
        drop(filled);
        let stats = tier.stats();
        assert_eq!(
            (stats.blocks_in_use, stats.used_bytes, stats.blocks),
            (0, 0, 0)
        );
        assert_eq!(store(&tier, id, None, &blocks), 6);
    }
}

#[test]
fn leased_blocks_stay_until_the_last_lease_ends() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let blocks = chain(1, 32);
        store(&tier, id, None, &blocks);
        let (first, second) = (
            lease(&tier, id, &blocks, usize::MAX),
            lease(&tier, id, &blocks, 2),
        );
        assert_eq!(store(&tier, id, None, &chain(2, 1)), 0);
        assert_eq!((tier.flush(), tier.evict(id, &blocks)), (0, 0));
        let weak = first.downgrade();
        assert_eq!(tier.evict(id, &blocks), 30);
        assert_eq!(weak.upgrade().slots().len(), 2);
        drop(second);
        assert_eq!(tier.flush(), 2);
        assert!(weak.upgrade().slots().is_empty());
        assert_eq!(tier.stats().used_bytes, 0);
    }
}

#[test]
fn a_tier_that_does_not_retain_says_full() {
    for Fixture { tier, .. } in tiers()
        .into_iter()
        .filter(|f| !f.tier.capabilities().retains)
    {
        let id = tier.open(&namespace("m")).unwrap();
        assert_eq!(
            tier.reserve(id, None, &chain(1, 2)),
            [Room::Full, Room::Full]
        );
        assert_eq!(tier.lookup(id, &chain(1, 2)), 0);
        let stats = tier.stats();
        assert_eq!(
            (stats.lookups, stats.hits, stats.blocks, stats.used_bytes),
            (2, 0, 0, 0)
        );
    }
}
