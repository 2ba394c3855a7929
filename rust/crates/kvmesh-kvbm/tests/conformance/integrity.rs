//! No bytes but a block's own are served as it.

use kvmesh_kvbm::Error;
use kvmesh_kvbm::block::lease;

use crate::fixtures::{Fixture, SEGMENTS, chain, namespace, retaining, rooms, store};

#[test]
fn a_slots_last_block_does_not_prove_its_next() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let blocks = chain(1, 1);
        store(&tier, id, None, &blocks);
        tier.flush();
        let room = rooms(&tier, id, None, &blocks).remove(0);
        assert!(matches!(room.seal(), Err(Error::NotFilled)));
        assert_eq!(
            tier.stats().used_bytes,
            0,
            "a failed seal gives the slot back"
        );
    }
}

#[test]
fn a_flipped_bit_is_found_and_its_block_dropped() {
    for Fixture { tier, flip, .. } in retaining() {
        let flip = flip.expect("a tier that retains can be corrupted");
        let id = tier.open(&namespace("m")).unwrap();
        let layout = tier.layout(id);
        let places = [0, 20, layout.header_bytes() - 1].into_iter().chain(
            layout
                .segments()
                .iter()
                .flat_map(|s| [s.offset, s.offset + s.bytes - 1]),
        );
        for (count, place) in places.enumerate() {
            let blocks = chain(1, 3);
            store(&tier, id, None, &blocks);
            let leased = lease(&tier, id, &blocks, usize::MAX);
            flip(leased.slots()[1].0 + place as u64);
            let mut out = vec![0; SEGMENTS.iter().sum::<u32>() as usize];
            leased.read(0, 0..3, &mut out).unwrap();
            assert!(
                matches!(leased.read(1, 0..3, &mut out), Err(Error::Corrupt { .. })),
                "byte {place}"
            );
            assert_eq!(tier.lookup(id, &blocks), 1, "not served again");
            assert_eq!(tier.stats().corrupt, count as u64 + 1);
            drop(leased);
            assert_eq!(
                store(&tier, id, Some(&blocks[0]), &blocks[1..2]),
                1,
                "stored anew"
            );
            assert_eq!(tier.lookup(id, &blocks), 3);
            tier.flush();
            assert_eq!(tier.stats().used_bytes, 0);
        }
    }
}
