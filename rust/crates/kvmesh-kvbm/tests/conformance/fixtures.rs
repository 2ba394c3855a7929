//! The tiers, and small blocks to put into them.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kvmesh_kvbm::block::{Reservation, Reserved, register, reserve};
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::tiers::{HostTier, NamespaceId, NoopTier, NvmeTier, Tier};
use kvmesh_kvbm::{Digest, Namespace};

pub const SEGMENTS: [u32; 3] = [1000, 3000, 64];
/// Slots of 8 KiB in a tier of 16.
pub const TIER_BYTES: u64 = 32 * 8192;

pub struct Fixture {
    pub tier: Arc<dyn Tier>,
    /// None: it evicts nothing.
    pub policy: Option<Policy>,
    /// Flips a bit of the byte at an offset from a slot.
    pub flip: Option<Box<dyn Fn(u64)>>,
    _dir: tempfile::TempDir,
}

pub fn tiers() -> Vec<Fixture> {
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
pub fn retaining() -> impl Iterator<Item = Fixture> {
    tiers()
        .into_iter()
        .filter(|fixture| fixture.tier.capabilities().retains)
}

pub fn namespace(model: &str) -> Namespace {
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

pub fn chain(name: u8, blocks: usize) -> Vec<Digest> {
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

pub fn content(digest: &Digest) -> Vec<Vec<u8>> {
    SEGMENTS
        .iter()
        .map(|&bytes| {
            (0..bytes)
                .map(|i| digest.as_bytes()[0] ^ digest.as_bytes()[1] ^ (i % 251) as u8)
                .collect()
        })
        .collect()
}

pub fn rooms(
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
pub fn store(
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
