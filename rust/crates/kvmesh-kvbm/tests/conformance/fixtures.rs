//! The tiers, and small blocks to put into them.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvmesh_kvbm::block::{Reservation, Reserved, register, reserve};
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::tiers::{
    HostTier, NamespaceId, NoopTier, NvmeTier, ObjectSettings, ObjectTier, Slot, Tier,
};
use kvmesh_kvbm::{Digest, Namespace};

use crate::s3::{self, S3Server};

pub const SEGMENTS: [u32; 3] = [1000, 3000, 64];
/// Slots of 8 KiB in a tier of 16.
pub const TIER_BYTES: u64 = 32 * 8192;

pub struct Fixture {
    pub tier: Arc<dyn Tier>,
    /// None: it evicts nothing.
    pub policy: Option<Policy>,
    /// Flips a bit of the byte at an offset from a slot.
    pub flip: Option<Box<dyn Fn(u64)>>,
    _server: Option<S3Server>,
    _dir: tempfile::TempDir,
}

pub fn tiers() -> Vec<Fixture> {
    let noop = Fixture {
        tier: Arc::new(NoopTier::default()),
        policy: None,
        flip: None,
        _server: None,
        _dir: tempfile::tempdir().expect("a directory"),
    };
    let hosts = Policy::ALL.into_iter().map(host);
    let disks = [Policy::Default, Policy::Lru].into_iter().map(nvme);
    let files = [Policy::Default, Policy::Lru].into_iter().map(files);
    (hosts.chain(disks).chain(files))
        .chain([bucket(Policy::Lru), noop])
        .collect()
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
    let flip = move |offset: u64| flip_file(&path, place(offset));
    Fixture {
        tier,
        policy: Some(policy),
        flip: Some(Box::new(flip)),
        _server: None,
        _dir: dir,
    }
}

/// Object storage at a URL, for as long as a test.
pub fn objects(url: String, server: Option<&S3Server>) -> ObjectSettings {
    ObjectSettings {
        url,
        endpoint: server.map(S3Server::endpoint),
        region: None,
        credentials: server.map(|_| s3::credentials()),
        bytes: TIER_BYTES,
        timeout: Duration::from_secs(30),
        refresh: Duration::from_secs(3600),
        writable: true,
    }
}

fn files(policy: Policy) -> Fixture {
    let dir = tempfile::tempdir().expect("a directory");
    let settings = objects(format!("fs://{}", dir.path().display()), None);
    let root = dir.path().to_owned();
    object(settings, policy, root, None, dir)
}

fn bucket(policy: Policy) -> Fixture {
    let dir = tempfile::tempdir().expect("a directory");
    let server = S3Server::start(dir.path(), None);
    let settings = objects(s3::URL.into(), Some(&server));
    let root = s3::objects_in(dir.path());
    object(settings, policy, root, Some(server), dir)
}

fn object(
    settings: ObjectSettings,
    policy: Policy,
    root: PathBuf,
    server: Option<S3Server>,
    dir: tempfile::TempDir,
) -> Fixture {
    let tier = ObjectTier::new(&settings, policy).expect("an object tier");
    assert_eq!(tier.health().problem, None);
    let of_flip = tier.clone();
    let flip = move |offset: u64| {
        let slot = Slot(offset / 8192 * 8192);
        let path = root.join(of_flip.object_of(slot).expect("an object"));
        flip_file(&path, body_offset(offset % 8192));
    };
    Fixture {
        tier,
        policy: Some(policy),
        flip: Some(Box::new(flip)),
        _server: server,
        _dir: dir,
    }
}

/// Where the byte at an offset from a slot is in an object, which has no padding.
fn body_offset(at: u64) -> u64 {
    let layout = kvmesh_kvbm::image::Layout::new(&namespace("m"));
    let mut place = layout.header_bytes();
    for segment in layout.segments() {
        if (segment.offset..segment.offset + segment.bytes).contains(&(at as usize)) {
            return (place + at as usize - segment.offset) as u64;
        }
        place += segment.bytes;
    }
    assert!((at as usize) < layout.header_bytes());
    at
}

fn flip_file(path: &Path, place: u64) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path);
    let file = file.expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], place).expect("a byte");
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
        _server: None,
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
