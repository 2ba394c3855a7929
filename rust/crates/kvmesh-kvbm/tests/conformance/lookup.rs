//! What is found, and what is told of it.

use kvmesh_kvbm::block::lease;
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::journal::Change;
use kvmesh_kvbm::{Digest, Namespace};

use crate::fixtures::{Fixture, chain, namespace, retaining, rooms, store};

#[test]
fn a_lookup_ends_at_the_first_block_that_is_missing() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let blocks = chain(1, 4);
        store(&tier, id, None, &blocks[..2]);
        store(&tier, id, Some(&blocks[2]), &blocks[3..]);
        assert_eq!(tier.lookup(id, &blocks), 2);
        assert_eq!(lease(&tier, id, &blocks, usize::MAX).slots().len(), 2);
        assert_eq!(lease(&tier, id, &blocks, 1).slots().len(), 1);
        assert_eq!(tier.stats().hits, 2);
        assert_eq!(tier.stats().lookups, 4);
    }
}

#[test]
fn namespaces_are_apart() {
    for Fixture { tier, .. } in retaining() {
        let blocks = chain(1, 2);
        let first = tier.open(&namespace("m")).unwrap();
        store(&tier, first, None, &blocks);
        assert_eq!(tier.open(&namespace("m")).unwrap(), first);
        let others = [
            namespace("other"),
            Namespace {
                revision: "2".into(),
                ..namespace("m")
            },
            Namespace {
                dtype: "f32".into(),
                ..namespace("m")
            },
            Namespace {
                layout: "hnd".into(),
                ..namespace("m")
            },
            Namespace {
                rank: 1,
                ..namespace("m")
            },
            Namespace {
                ranks: 2,
                ..namespace("m")
            },
        ];
        for other in others {
            let id = tier.open(&other).unwrap();
            assert_eq!(tier.lookup(id, &blocks), 0, "{other:?}");
        }
    }
}

#[test]
fn the_journal_tells_what_the_snapshot_shows() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let other_rank = tier
            .open(&Namespace {
                rank: 1,
                ranks: 2,
                ..namespace("m")
            })
            .unwrap();
        let blocks = chain(1, 4);
        let hashes: Vec<_> = blocks.iter().map(Digest::block_hash).collect();
        store(&tier, id, None, &blocks[..3]);
        store(&tier, id, Some(&blocks[1]), &blocks[3..]);
        store(&tier, other_rank, None, &blocks[..1]);
        assert_eq!(
            tier.journal().unwrap().drain(),
            [
                Change::Stored {
                    parent: None,
                    hashes: hashes[..3].to_vec()
                },
                Change::Stored {
                    parent: Some(hashes[1]),
                    hashes: vec![hashes[3]]
                },
            ]
        );
        tier.evict(id, &blocks[2..3]);
        let (pending, mut state) = tier.snapshot();
        assert_eq!(
            pending,
            [Change::Removed {
                hashes: vec![hashes[2]]
            }]
        );
        assert_eq!(
            state.remove(0),
            Change::Stored {
                parent: None,
                hashes: vec![hashes[0], hashes[1], hashes[3]]
            }
        );
        assert!(state.is_empty());
        assert!(tier.journal().unwrap().drain().is_empty());
    }
}

#[test]
fn a_chain_is_named_by_its_hashes_too() {
    for Fixture { tier, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let other = tier.open(&namespace("other")).unwrap();
        let blocks = chain(1, 4);
        let hashes: Vec<_> = blocks.iter().map(Digest::block_hash).collect();
        store(&tier, id, None, &blocks[..2]);
        store(&tier, id, Some(&blocks[2]), &blocks[3..]);
        let before = tier.stats();
        assert_eq!(tier.digests(id, &hashes), blocks[..2]);
        assert_eq!(tier.digests(id, &hashes[3..]), blocks[3..]);
        assert!(tier.digests(other, &hashes).is_empty());
        assert_eq!(tier.stats(), before, "counts as no look-up");
    }
}

#[test]
fn a_walk_leases_every_registered_block_once_and_uses_none() {
    for Fixture { tier, policy, .. } in retaining() {
        let id = tier.open(&namespace("m")).unwrap();
        let other = tier.open(&namespace("other")).unwrap();
        let (first, second) = (chain(1, 9), chain(2, 7));
        store(&tier, id, None, &first);
        store(&tier, other, None, &second);
        let pending = rooms(&tier, id, None, &chain(3, 2));
        let before = tier.stats();
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let held = tier.walk(after, 5);
            let Some(last) = held.last() else { break };
            after = Some(last.slot);
            assert!(held.len() <= 5);
            for block in held {
                assert_eq!(tier.evict(block.namespace, &[block.digest]), 0, "leased");
                seen.push((block.namespace, block.digest));
                tier.release(&[block.slot]);
            }
        }
        seen.sort_by_key(|(namespace, digest)| (namespace.0, *digest.as_bytes()));
        let named = |id, blocks: &[Digest]| blocks.iter().map(|b| (id, *b)).collect::<Vec<_>>();
        let mut expected = [named(id, &first), named(other, &second)].concat();
        expected.sort_by_key(|(namespace, digest)| (namespace.0, *digest.as_bytes()));
        assert_eq!(seen, expected);
        let slot = tier.hold(id, &first[3]).expect("it is there");
        assert_eq!(tier.evict(id, &first[3..4]), 0);
        tier.release(&[slot]);
        assert_eq!(tier.hold(id, &second[0]), None);
        assert_eq!(tier.stats(), before, "neither looked up nor used");
        drop(pending);
        if policy == Some(Policy::Lru) {
            // The second chain is still the one used last.
            store(&tier, id, None, &chain(4, 18));
            assert_eq!(
                (tier.lookup(id, &first), tier.lookup(other, &second)),
                (7, 7)
            );
        }
    }
}
