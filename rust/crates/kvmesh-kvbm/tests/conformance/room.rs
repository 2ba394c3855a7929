//! What leaves a full tier.

use kvmesh_kvbm::block::{lease, register};
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::tiers::Room;
use kvmesh_kvbm::{Error, Namespace};

use crate::fixtures::{Fixture, chain, namespace, retaining, rooms, store};

#[test]
fn a_chain_leaves_from_its_tail_and_the_coldest_chain_first() {
    // The others rank by more than the last use. The default has learned nothing yet.
    let by_use = [Policy::Default, Policy::ClassIndex, Policy::Lru].map(Some);
    for Fixture { tier, .. } in retaining().filter(|fixture| by_use.contains(&fixture.policy)) {
        let id = tier.open(&namespace("m")).unwrap();
        let (old, warm) = (chain(1, 8), chain(2, 8));
        store(&tier, id, None, &old);
        store(&tier, id, None, &warm);
        // Used again, so now the other one is older.
        drop(lease(&tier, id, &old, usize::MAX));
        let room = 32 - 16;
        assert_eq!(store(&tier, id, None, &chain(3, room)), room);
        assert_eq!(store(&tier, id, None, &chain(4, 3)), 3);
        assert_eq!(tier.lookup(id, &old), 8);
        assert_eq!(tier.lookup(id, &warm), 5);
        assert_eq!(tier.stats().evicted.room, 3);
    }
}

#[test]
fn extending_a_chain_never_evicts_what_it_extends() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let blocks = chain(1, 40);
        assert_eq!(store(&tier, id, None, &blocks[..20]), 20);
        assert_eq!(
            store(&tier, id, Some(&blocks[19]), &blocks[20..]),
            12,
            "only what fits"
        );
        assert_eq!(tier.lookup(id, &blocks), 32);
        assert!(
            tier.reserve(id, Some(&blocks[31]), &blocks[32..])
                .iter()
                .all(|room| *room == Room::Full)
        );
    }
}

#[test]
fn an_unused_layout_makes_room_for_another() {
    for Fixture { tier, .. } in retaining() {
        let (old, new) = (
            namespace("old"),
            Namespace {
                segments: vec![12_000],
                ..namespace("new")
            },
        );
        let old_id = tier.open(&old).unwrap();
        assert_eq!(store(&tier, old_id, None, &chain(1, 32)), 32);
        let error = tier.open(&new).unwrap_err();
        assert!(matches!(error, Error::LayoutTooLarge { .. }), "{error}");
        let small = Namespace {
            segments: vec![2000],
            ..namespace("new")
        };
        let id = tier.open(&small).unwrap();
        let mut stored = 0;
        for digest in chain(9, 64) {
            stored += rooms(&tier, id, None, &[digest])
                .into_iter()
                .map(|room| register(vec![room.fill(&[&[1; 2000]]).unwrap()]))
                .count();
        }
        assert_eq!(stored, 64, "two to a region");
        assert_eq!(tier.lookup(old_id, &chain(1, 32)), 0);
    }
}
