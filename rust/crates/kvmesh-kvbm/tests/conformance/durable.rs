//! What outlives the process.

use std::sync::Arc;

use kvmesh_kvbm::block::lease;
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::journal::Change;
use kvmesh_kvbm::tiers::{NvmeTier, ObjectTier, Tier};
use kvmesh_kvbm::{Digest, Namespace};

use crate::fixtures::{SEGMENTS, TIER_BYTES, chain, content, namespace, objects, rooms, store};
use crate::s3::{self, S3Server};

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
fn what_is_in_object_storage_is_every_stores() {
    let (files, bucket) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = S3Server::start(bucket.path(), None);
    for settings in [
        objects(format!("fs://{}/some/where", files.path().display()), None),
        objects(s3::URL.into(), Some(&server)),
    ] {
        let writer = ObjectTier::new(&settings, Policy::Lru).unwrap();
        assert_eq!(writer.health().problem, None);
        let tier: Arc<dyn Tier> = writer.clone();
        assert!(tier.capabilities().durable);
        let other = tier.open(&namespace("other")).unwrap();
        let id = tier.open(&namespace("m")).unwrap();
        let (kept, gone) = (chain(1, 6), chain(2, 5));
        store(&tier, id, None, &kept);
        store(&tier, id, None, &gone);
        store(&tier, other, None, &kept[..1]);
        tier.evict(id, &gone[3..]);
        let pending = rooms(&tier, id, None, &chain(3, 2));
        // Another node's, while the first one works; then it is gone.
        let reader = ObjectTier::new(&settings, Policy::Lru).unwrap();
        let before = reader.health().recovered;
        assert!(
            (10..=12).contains(&before),
            "{before}: deletions may be under way"
        );
        writer.stop();
        drop(pending);
        reader.stop();
        let reader = ObjectTier::new(&settings, Policy::Lru).unwrap();
        assert_eq!(reader.health().recovered, 10);
        let tier: Arc<dyn Tier> = reader.clone();
        let hashes: Vec<_> = kept.iter().map(Digest::block_hash).collect();
        let announced = tier.journal().unwrap().drain();
        let whole = Change::Stored {
            parent: None,
            hashes,
        };
        assert!(
            announced.contains(&whole),
            "parents are known: {announced:?}"
        );
        let id = tier.open(&namespace("m")).unwrap();
        assert_eq!((tier.lookup(id, &kept), tier.lookup(id, &gone)), (6, 3));
        assert_eq!(tier.lookup(id, &chain(3, 2)), 0);
        let leased = lease(&tier, id, &kept, usize::MAX);
        for (index, digest) in kept.iter().enumerate() {
            let mut whole = vec![0; SEGMENTS.iter().sum::<u32>() as usize];
            leased.read(index, 0..SEGMENTS.len(), &mut whole).unwrap();
            assert_eq!(whole, content(digest).concat());
        }
        drop(leased);
        let revised = Namespace {
            revision: "2".into(),
            ..namespace("m")
        };
        let id = tier.open(&revised).unwrap();
        assert_eq!(tier.lookup(id, &kept), 0);
        assert_eq!(tier.flush(), 10);
        reader.stop();
        let empty = ObjectTier::new(&settings, Policy::Lru).unwrap();
        assert_eq!(empty.health().recovered, 0);
    }
}
