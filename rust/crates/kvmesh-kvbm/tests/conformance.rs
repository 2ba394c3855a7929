//! What every tier must do, run on all of them.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvmesh_kvbm::block::{Reservation, Reserved, lease, register, reserve};
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::journal::Change;
use kvmesh_kvbm::tiers::{HostTier, NamespaceId, NoopTier, NvmeTier, Room, Tier};
use kvmesh_kvbm::{Digest, Error, Namespace};

const SEGMENTS: [u32; 3] = [1000, 3000, 64];
/// Slots of 8 KiB in a tier of 16.
const TIER_BYTES: u64 = 32 * 8192;

struct Fixture {
    tier: Arc<dyn Tier>,
    /// None: it evicts nothing.
    policy: Option<Policy>,
    flip: Option<Box<dyn Fn(u64)>>,
    _dir: tempfile::TempDir,
}

fn tiers() -> Vec<Fixture> {
    let noop = Fixture {
        tier: Arc::new(NoopTier::default()),
        policy: None,
        flip: None,
        _dir: tempfile::tempdir().expect("a directory"),
    };
    let hosts = Policy::ALL.into_iter().map(host);
    let disks = [Policy::Default, Policy::Lru].into_iter().map(nvme);
    hosts.chain(disks).chain([noop]).collect()
}

/// The byte offset of a slot of the disk tier.
fn place(slot: u64) -> u64 {
    slot & ((1 << 48) - 1)
}

fn nvme(policy: Policy) -> Fixture {
    let dir = tempfile::tempdir().expect("a directory");
    let tier = NvmeTier::new(dir.path(), TIER_BYTES, policy);
    assert_eq!(tier.health().problem, None);
    let path = dir.path().join("slabs");
    let flip = move |offset: u64| {
        let slabs = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path);
        let slabs = slabs.expect("the slab file");
        let mut byte = [0];
        slabs
            .read_exact_at(&mut byte, place(offset))
            .expect("a byte");
        slabs
            .write_all_at(&[byte[0] ^ 1], place(offset))
            .expect("a byte");
    };
    Fixture {
        tier,
        policy: Some(policy),
        flip: Some(Box::new(flip)),
        _dir: dir,
    }
}

fn host(policy: Policy) -> Fixture {
    let dir = tempfile::tempdir().expect("a directory");
    let host = HostTier::with_policy(dir.path(), TIER_BYTES, policy).expect("a host tier");
    let file = host
        .arena()
        .descriptor()
        .try_clone_to_owned()
        .expect("a descriptor");
    let map = memmap2::MmapOptions::new()
        .len(TIER_BYTES as usize)
        .map_raw(&std::fs::File::from(file))
        .expect("a map");
    let flip = move |offset: u64| {
        assert!(offset < TIER_BYTES);
        // SAFETY: inside the mapping; the test has one thread.
        unsafe { *map.as_mut_ptr().add(offset as usize) ^= 1 };
    };
    Fixture {
        tier: Arc::new(host),
        policy: Some(policy),
        flip: Some(Box::new(flip)),
        _dir: dir,
    }
}

/// Fixtures of tiers that keep what they are given.
fn retaining() -> impl Iterator<Item = Fixture> {
    tiers()
        .into_iter()
        .filter(|fixture| fixture.tier.capabilities().retains)
}

fn namespace(model: &str) -> Namespace {
    Namespace {
        model: model.into(),
        revision: "1".into(),
        dtype: "bf16".into(),
        layout: "nhd".into(),
        rank: 0,
        ranks: 1,
        segments: SEGMENTS.to_vec(),
    }
}

fn chain(name: u8, blocks: usize) -> Vec<Digest> {
    (0..blocks)
        .map(|i| {
            Digest::new(std::array::from_fn(|at| {
                if at == 0 {
                    name
                } else {
                    (i * 7 + at * 13) as u8
                }
            }))
        })
        .collect()
}

fn content(digest: &Digest) -> Vec<Vec<u8>> {
    SEGMENTS
        .iter()
        .map(|&bytes| {
            (0..bytes)
                .map(|i| digest.as_bytes()[0] ^ digest.as_bytes()[1] ^ (i % 251) as u8)
                .collect()
        })
        .collect()
}

fn rooms(
    tier: &Arc<dyn Tier>,
    id: NamespaceId,
    parent: Option<&Digest>,
    blocks: &[Digest],
) -> Vec<Reserved> {
    let reservations = reserve(tier, id, parent, blocks);
    reservations
        .into_iter()
        .filter_map(|r| {
            if let Reservation::Room(room) = r {
                Some(room)
            } else {
                None
            }
        })
        .collect()
}

/// Stores a chain; returns how many blocks there was room for.
fn store(
    tier: &Arc<dyn Tier>,
    id: NamespaceId,
    parent: Option<&Digest>,
    blocks: &[Digest],
) -> usize {
    let reserved = rooms(tier, id, parent, blocks);
    let filled: Vec<_> = (reserved.into_iter().zip(blocks))
        .map(|(room, digest)| {
            let segments = content(digest);
            room.fill(&segments.iter().map(Vec::as_slice).collect::<Vec<_>>())
                .expect("a filled block")
        })
        .collect();
    let count = filled.len();
    register(filled);
    count
}

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

#[test]
fn what_a_durable_tier_holds_outlives_it() {
    for policy in [Policy::Default, Policy::Lru] {
        let dir = tempfile::tempdir().unwrap();
        let disk = NvmeTier::new(dir.path(), TIER_BYTES, policy);
        let tier: Arc<dyn Tier> = disk.clone();
        assert!(tier.capabilities().durable);
        let other = tier.open(&namespace("other")).unwrap();
        let id = tier.open(&namespace("m")).unwrap();
        let (kept, gone) = (chain(1, 6), chain(2, 5));
        store(&tier, id, None, &kept);
        store(&tier, id, None, &gone);
        store(&tier, other, None, &kept[..1]);
        tier.evict(id, &gone[3..]);
        let pending = rooms(&tier, id, None, &chain(3, 2));
        disk.stop();
        drop(pending);
        let disk = NvmeTier::new(dir.path(), TIER_BYTES, policy);
        assert_eq!(disk.health().recovered, 10);
        let tier: Arc<dyn Tier> = disk.clone();
        let hashes = |blocks: &[Digest]| blocks.iter().map(Digest::block_hash).collect::<Vec<_>>();
        let mut recovered: Vec<Vec<_>> = (tier.journal().unwrap().drain().into_iter())
            .map(|change| match change {
                Change::Stored { hashes, .. } => hashes,
                other => panic!("{other:?}"),
            })
            .collect();
        recovered.sort();
        let mut expected = vec![hashes(&kept), hashes(&gone[..3]), hashes(&kept[..1])];
        expected.sort();
        assert_eq!(recovered, expected);
        // Opened in another order than before.
        let id = tier.open(&namespace("m")).unwrap();
        assert_eq!(tier.lookup(id, &kept), 6);
        assert_eq!(tier.lookup(id, &gone), 3);
        assert_eq!(tier.lookup(id, &chain(3, 2)), 0);
        let leased = lease(&tier, id, &kept, usize::MAX);
        for (index, digest) in kept.iter().enumerate() {
            let mut whole = vec![0; SEGMENTS.iter().sum::<u32>() as usize];
            leased.read(index, 0..SEGMENTS.len(), &mut whole).unwrap();
            assert_eq!(whole, content(digest).concat());
        }
        drop(leased);
        for changed in [
            Namespace {
                revision: "2".into(),
                ..namespace("m")
            },
            Namespace {
                dtype: "f32".into(),
                ..namespace("m")
            },
            Namespace {
                rank: 1,
                ranks: 2,
                ..namespace("m")
            },
        ] {
            let id = tier.open(&changed).unwrap();
            assert_eq!(tier.lookup(id, &kept), 0, "{changed:?}");
        }
        assert_eq!(tier.flush(), 10);
        assert_eq!(tier.stats().used_bytes, 0);
        let all: Vec<Digest> = (10..42).flat_map(|name| chain(name, 1)).collect();
        let stored: usize = (all.iter()).map(|b| store(&tier, id, None, &[*b])).sum();
        assert_eq!(stored, 32, "no slot is lost");
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
