//! Stores that share object storage: what one wrote, the other has, and nothing wrong with it.

mod common;
#[path = "common/s3.rs"]
mod s3;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Random, digest, namespace, settled};
use kvmesh_core::Tier as Kind;
use kvmesh_kvbm::block::{self, Reservation};
use kvmesh_kvbm::embedded::BlockStore;
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::store::{Recalled, Settings, Store};
use kvmesh_kvbm::tiers::{Credentials, NamespaceId, ObjectSettings, Tier};
use kvmesh_kvbm::{Digest, Error};
use s3::S3Server;

const BLOCK: usize = 500;
const SLOT: u64 = 4096;

fn objects(url: String, server: Option<&S3Server>) -> ObjectSettings {
    ObjectSettings {
        url,
        endpoint: server.map(S3Server::endpoint),
        region: None,
        credentials: server.map(|_| s3::credentials()),
        bytes: 1 << 30,
        timeout: Duration::from_secs(20),
        refresh: Duration::from_secs(3600),
        writable: true,
    }
}

fn in_files(dir: &Path) -> ObjectSettings {
    objects(format!("fs://{}/objects", dir.display()), None)
}

fn settings(dir: &Path, host: u64, objects: &ObjectSettings) -> Settings {
    Settings {
        // Which makes room for whatever comes.
        policy: Policy::Lru,
        objects: Some(objects.clone()),
        ..Settings::host(dir, host * SLOT)
    }
}

fn store(dir: &Path, host: u64, objects: &ObjectSettings) -> BlockStore {
    BlockStore::new(&settings(dir, host, objects), BLOCK as u32).expect("a store")
}

fn content(number: u64) -> Vec<u8> {
    (0..BLOCK as u64)
        .map(|at| (number * 31 + at * 7 + at / 251) as u8)
        .collect()
}

fn problem(store: &BlockStore) -> Option<String> {
    let (.., health) = store.store().object_flow().expect("an object tier");
    health.problem
}

fn recalled(store: &Store) -> Recalled {
    store.object_flow().expect("an object tier").1
}

fn in_object_storage(store: &BlockStore) -> kvmesh_kvbm::tiers::Stats {
    store.store().objects().expect("an object tier").stats()
}

fn put(store: &BlockStore, numbers: std::ops::Range<u64>) {
    for number in numbers {
        assert!(store.put(digest(number), &content(number)).expect("a put"));
    }
}

/// All files of objects with blocks.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.to_string_lossy().contains("/kv1/") && !path.ends_with("fields") {
            found.push(path);
        }
    }
    found
}

#[test]
fn another_store_has_what_one_that_is_gone_wrote_behind() {
    let bucket = tempfile::tempdir().unwrap();
    let server = S3Server::start(bucket.path(), None);
    let dir = tempfile::tempdir().unwrap();
    for objects in [in_files(dir.path()), objects(s3::URL.into(), Some(&server))] {
        let first = store(dir.path(), 64, &objects);
        assert_eq!(problem(&first), None);
        put(&first, 0..200);
        // Nobody asked for it to be written, and most of it has left memory.
        settled("all is written", || in_object_storage(&first).blocks == 200);
        let (archived, ..) = first.store().object_flow().unwrap();
        assert_eq!(
            (archived.written, archived.shed, archived.left),
            (200, 0, 0)
        );
        drop(first);
        let second = store(dir.path(), 64, &objects);
        let all: Vec<Digest> = (0..200).map(digest).collect();
        assert_eq!(second.contains(&all), [Some(Kind::Network); 200]);
        let mut out = vec![0; BLOCK];
        for number in 0..200 {
            let from = second.get(digest(number), &mut out).unwrap();
            assert_eq!(from, Some(Kind::Network));
            assert_eq!(out, content(number));
            let from = second.get(digest(number), &mut out).unwrap();
            assert_eq!(from, Some(Kind::Host));
        }
        assert_eq!(second.get(digest(999), &mut out).unwrap(), None);
        // What came from there is not written again.
        second.flush().unwrap();
        assert_eq!(second.store().object_flow().unwrap().0.written, 0);
        // Blocks of another size are other blocks.
        let other = BlockStore::new(&settings(dir.path(), 64, &objects), 100).unwrap();
        assert_eq!(other.contains(&[digest(1)]), [None]);
    }
}

#[test]
fn ten_thousand_flipped_bits_are_all_caught() {
    const ROUND: u64 = 200;
    let dir = tempfile::tempdir().unwrap();
    let objects = in_files(dir.path());
    let store = store(dir.path(), 2 * ROUND, &objects);
    let (mut random, mut out) = (Random(7), vec![0; BLOCK]);
    for round in 0..10_000 / ROUND {
        let numbers = round * ROUND..(round + 1) * ROUND;
        put(&store, numbers.clone());
        store.flush().unwrap();
        store.store().host().flush();
        let mut flipped = 0;
        for path in files(dir.path()) {
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(path);
            let file = file.unwrap();
            let place = random.below(file.metadata().unwrap().len());
            let mut byte = [0];
            file.read_exact_at(&mut byte, place).unwrap();
            let bit = 1 << random.below(8);
            file.write_all_at(&[byte[0] ^ bit], place).unwrap();
            flipped += 1;
        }
        assert_eq!(flipped, ROUND);
        for number in numbers {
            assert_eq!(store.get(digest(number), &mut out).unwrap(), None);
        }
        let caught = in_object_storage(&store).corrupt;
        assert_eq!(caught, (round + 1) * ROUND);
        // They are deleted, too.
        settled("nothing is left", || files(dir.path()).is_empty());
    }
    assert_eq!(in_object_storage(&store).blocks_in_use, 0);
}

#[test]
fn a_service_that_is_down_costs_a_tier_until_it_is_back() {
    let (bucket, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = S3Server::start(bucket.path(), None);
    let port = server.port();
    let objects = objects(s3::URL.into(), Some(&server));
    let store = store(dir.path(), 32, &objects);
    put(&store, 0..100);
    settled("all is written", || in_object_storage(&store).blocks == 100);
    drop(server);
    let mut out = vec![0; BLOCK];
    let found = (0..100).filter(|&n| store.get(digest(n), &mut out).unwrap().is_some());
    assert!(found.count() <= 32, "memory alone");
    let why = problem(&store).expect("it is noticed");
    assert!(!why.contains(s3::SECRET), "{why}");
    assert_eq!(
        in_object_storage(&store).blocks,
        0,
        "what is not to be had is not announced"
    );
    put(&store, 500..600);
    assert!(matches!(store.flush(), Err(Error::Storage { .. })));
    settled("what cannot be written is shed", || {
        let (archived, ..) = store.store().object_flow().unwrap();
        archived.shed + archived.failed >= 100
    });
    let _server = S3Server::start(bucket.path(), Some(port));
    settled("it comes back", || problem(&store).is_none());
    let (.., health) = store.store().object_flow().unwrap();
    assert_eq!((health.outages, health.recovered), (1, 100));
    for number in 0..100 {
        assert!(store.get(digest(number), &mut out).unwrap().is_some());
        assert_eq!(out, content(number));
    }
}

#[test]
fn wrong_credentials_and_no_bucket_are_told_and_no_secret_is() {
    let (bucket, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = S3Server::start(bucket.path(), None);
    let mut wrong = objects(s3::URL.into(), Some(&server));
    wrong.credentials = Some(Credentials {
        secret_access_key: "a-wrong-secret".into(),
        ..s3::credentials()
    });
    let refused = store(dir.path(), 32, &wrong);
    let why = problem(&refused).expect("refused");
    assert!(why.contains("access denied"), "{why}");
    put(&refused, 0..10);
    assert!(!format!("{why} {wrong:?} {:?}", refused.flush()).contains("secret"));
    let missing = objects("s3://nowhere/at/all".into(), Some(&server));
    let why = problem(&store(dir.path(), 32, &missing)).expect("no bucket");
    assert!(why.contains("no such bucket"), "{why}");
    for url in ["", "http://x/y", "s3://", "s3:///x", "fs://relative"] {
        let made = BlockStore::new(&settings(dir.path(), 32, &objects(url.into(), None)), 100);
        assert!(matches!(made, Err(Error::Invalid(why)) if why.contains("kvbm.object.url")));
    }
}

#[test]
fn what_may_be_there_is_not_exceeded_by_any_store() {
    let dir = tempfile::tempdir().unwrap();
    let objects = ObjectSettings {
        bytes: 64 * SLOT,
        ..in_files(dir.path())
    };
    let first = store(dir.path(), 32, &objects);
    put(&first, 0..200);
    first.flush().unwrap();
    settled("what left is deleted", || files(dir.path()).len() <= 64);
    assert!(in_object_storage(&first).evicted.room >= 100);
    let larger = ObjectSettings {
        bytes: 1 << 30,
        ..objects.clone()
    };
    let second = store(dir.path(), 32, &larger);
    put(&second, 1000..1100);
    second.flush().unwrap();
    drop(second);
    // At the next listing, those written longest ago are too many.
    let third = store(dir.path(), 32, &objects);
    settled("they are deleted", || files(dir.path()).len() <= 64);
    let newest = third.contains(&(1090..1100).map(digest).collect::<Vec<_>>());
    assert_eq!(newest, [Some(Kind::Network); 10]);
}

#[test]
fn stores_that_share_objects_serve_only_what_was_put() {
    let dir = tempfile::tempdir().unwrap();
    let objects = ObjectSettings {
        bytes: 96 * SLOT,
        refresh: Duration::from_millis(20),
        ..in_files(dir.path())
    };
    let stores = [0, 1].map(|_| store(dir.path(), 32, &objects));
    let (mut random, mut out) = (Random(11), vec![0; BLOCK]);
    let mut was_put = [false; 200];
    let mut hits = 0;
    for step in 0..4000 {
        let store = &stores[random.below(2) as usize];
        let number = random.below(200);
        match random.below(100) {
            0..40 => {
                let stored = store.put(digest(number), &content(number)).unwrap();
                was_put[number as usize] |= stored;
            }
            40..98 => {
                if let Some(tier) = store.get(digest(number), &mut out).unwrap() {
                    assert!(was_put[number as usize], "block {number} was never put");
                    assert_eq!(out, content(number), "step {step}");
                    hits += u32::from(tier == Kind::Network);
                }
            }
            98 => drop(store.store().host().flush()),
            _ => drop(
                store
                    .store()
                    .objects()
                    .unwrap()
                    .evict(NamespaceId(0), &[digest(number)]),
            ),
        }
    }
    assert!(hits > 100, "{hits}");
    for store in &stores {
        assert_eq!(problem(store), None);
        settled("all leases end", || {
            let stats = store.store().stats();
            stats.iter().all(|(_, stats)| stats.blocks_in_use == 0)
        });
        assert_eq!(in_object_storage(store).corrupt, 0);
    }
}

/// A store of an engine's blocks, and what it stores in them.
fn of_engine(dir: &Path, objects: &ObjectSettings) -> (Store, NamespaceId) {
    let store = Store::new(&settings(dir, 512, objects)).expect("a store");
    let id = store.open(&namespace("m")).expect("a namespace");
    (store, id)
}

fn fill(store: &Store, id: NamespaceId, chain: &[Digest]) {
    let host: Arc<dyn Tier> = store.host().clone();
    for (room, place) in block::reserve(&host, id, None, chain)
        .into_iter()
        .zip(0u8..)
    {
        let Reservation::Room(reserved) = room else {
            panic!("no room");
        };
        let segments = [vec![place; 4000], vec![!place; 4000]];
        let filled = reserved
            .fill(&segments.each_ref().map(Vec::as_slice))
            .expect("filled");
        block::register(vec![filled]);
    }
    store.stored();
}

#[test]
fn a_chain_is_recalled_by_its_hashes_from_a_store_that_came_later() {
    let dir = tempfile::tempdir().unwrap();
    let objects = in_files(dir.path());
    // The reader has listed before anything was written.
    let (reader, id) = of_engine(dir.path(), &objects);
    let (writer, of_writer) = of_engine(dir.path(), &objects);
    let chain: Vec<Digest> = (0..100).map(digest).collect();
    let hashes: Vec<_> = chain.iter().map(Digest::block_hash).collect();
    fill(&writer, of_writer, &chain);
    writer.persist(None).unwrap();
    drop(writer);
    assert!(reader.digests(id, &hashes).is_empty());
    let patience = Duration::from_secs(60);
    reader.recall(id, &[], &hashes, patience);
    settled("it is there", || reader.host().stats().blocks == 100);
    let (lease, coming) = reader.lease(id, &chain);
    assert!(coming.is_empty());
    for place in 0..100 {
        let mut out = vec![0; 8000];
        lease.read(place, 0..2, &mut out).unwrap();
        assert_eq!((out[0], out[7999]), (place as u8, !place as u8));
    }
    drop(lease);
    let journal = reader.objects().unwrap().snapshot().1;
    assert_eq!(
        journal.len(),
        1,
        "one chain, its parents known: {journal:?}"
    );
    // No longer than they are there, and no later than they are wanted.
    reader.host().flush();
    reader.objects().unwrap().flush();
    settled("they are deleted", || files(dir.path()).is_empty());
    reader.recall(id, &chain, &hashes, patience);
    settled("they are absent", || recalled(&reader).absent == 100);
    reader.recall(id, &chain, &hashes, Duration::ZERO);
    settled("nothing is in use", || {
        let stats = reader.stats();
        stats.iter().all(|(_, stats)| stats.blocks_in_use == 0)
    });
    assert_eq!(recalled(&reader).blocks, 100);
}

#[test]
fn vacant_memory_is_warmed_from_storage_that_is_not_the_stores_own() {
    let dir = tempfile::tempdir().unwrap();
    let objects = in_files(dir.path());
    let (writer, of_writer) = of_engine(dir.path(), &objects);
    let chain: Vec<Digest> = (0..100).map(digest).collect();
    fill(&writer, of_writer, &chain);
    writer.persist(None).unwrap();
    drop(writer);
    let store = Store::new(&Settings::host(dir.path(), 64 * 3 * SLOT)).unwrap();
    assert!(
        store
            .warming_from("m", &objects_at("fs:///proc/nothing"))
            .is_err()
    );
    assert_eq!(store.warming_from("other", &objects).unwrap().left, 0);
    let mut plan = store.warming_from("m", &objects).unwrap();
    let (mut brought, mut to_come) = (0, 1);
    while to_come > 0 {
        let warmed = store.warm(&mut plan, 16);
        assert_eq!(warmed.failed, 0);
        (brought, to_come) = (brought + warmed.brought, warmed.to_come);
    }
    assert_eq!(brought, store.host().stats().blocks);
    assert!(brought >= 60, "{brought}");
    assert_eq!(brought + plan.left, 100);
    assert_eq!(
        store
            .hottest("m", 1000)
            .iter()
            .map(|(.., run)| run.len())
            .sum::<usize>() as u64,
        brought
    );
    assert_eq!(
        files(dir.path()).len(),
        100,
        "what is read once is not written"
    );
}

fn objects_at(url: &str) -> ObjectSettings {
    objects(url.into(), None)
}

#[test]
fn a_flush_says_what_object_storage_has_no_room_for() {
    let dir = tempfile::tempdir().unwrap();
    let objects = ObjectSettings {
        bytes: 32 * SLOT,
        ..in_files(dir.path())
    };
    let store = store(dir.path(), 64, &objects);
    put(&store, 0..20);
    store.flush().unwrap();
    let there = in_object_storage(&store).blocks;
    put(&store, 20..50);
    let error = store.flush().unwrap_err();
    assert_eq!(there, 20);
    assert!(
        matches!(error, Error::NotKept { of: 50, missing, .. } if missing >= 18),
        "{error}"
    );
    assert!(problem(&store).is_none(), "it is only small");
    store.close();
}
