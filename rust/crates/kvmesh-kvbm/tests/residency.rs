//! What is asked of a store beside blocks: where they are, that they come up, and that they are sound.

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use common::{BLOCK, SLOT, digest, namespace, settings, settled};
use kvmesh_core::Tier as Kind;
use kvmesh_kvbm::block::{Reservation, register, reserve};
use kvmesh_kvbm::store::{Checked, ScrubSettings, Settings, Store};
use kvmesh_kvbm::tiers::{NamespaceId, Tier};
use kvmesh_kvbm::{Digest, Namespace};

const LONG: Duration = Duration::from_secs(60);

fn chain(blocks: u64) -> Vec<Digest> {
    (0..blocks).map(digest).collect()
}

/// Stores a chain in the host tier.
fn put(store: &Store, id: NamespaceId, blocks: &[Digest]) {
    let host: std::sync::Arc<dyn Tier> = store.host().clone();
    let rooms = reserve(&host, id, None, blocks).into_iter().zip(blocks);
    let filled = rooms.map(|(room, block)| match room {
        Reservation::Room(room) => {
            let bytes = vec![block.as_bytes()[9]; BLOCK];
            room.fill(&[&bytes, &bytes]).expect("a filled block")
        }
        _ => panic!("no room"),
    });
    register(filled.collect());
}

/// A store whose disk alone holds a chain of a model that no engine has asked for yet.
fn restarted(dir: &Path, host: u64, blocks: &[Digest]) -> Store {
    let first = Store::new(&settings(dir, 64, 256)).expect("a store");
    put(&first, first.open(&namespace("m")).expect("m"), blocks);
    put(
        &first,
        first.open(&namespace("other")).expect("other"),
        &blocks[..1],
    );
    first.persist(None).expect("a flush");
    first.stop();
    Store::new(&settings(dir, host, 256)).expect("a store")
}

/// Checks all of a tier.
fn check(store: &Store, kind: Kind) -> Checked {
    let mut all = Checked::default();
    loop {
        let some = store.check(kind, all.next, 7).expect("a tier that works");
        all.blocks += some.blocks;
        all.bytes += some.bytes;
        all.corrupt.extend(some.corrupt);
        all.next = some.next;
        if all.next.is_none() {
            return all;
        }
    }
}

fn flip_all_on_disk(dir: &Path, at: u64) {
    let slabs = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join("nvme/slabs"));
    let slabs = slabs.expect("the slab file");
    for slot in (0..slabs.metadata().expect("its size").len() / SLOT).map(|slot| slot * SLOT) {
        let mut byte = [0];
        slabs.read_exact_at(&mut byte, slot + at).expect("a byte");
        slabs
            .write_all_at(&[byte[0] ^ 4], slot + at)
            .expect("a byte");
    }
}

fn flip_in_memory(store: &Store, id: NamespaceId, block: &Digest) {
    let host = store.host();
    let slot = host.hold(id, block).expect("it is there");
    host.release(&[slot]);
    let file = host
        .arena()
        .descriptor()
        .try_clone_to_owned()
        .expect("a descriptor");
    let file = std::fs::File::from(file);
    let mut byte = [0];
    file.read_exact_at(&mut byte, slot.0 + 200).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], slot.0 + 200)
        .expect("a byte");
}

#[test]
fn a_model_found_on_the_disk_can_be_asked_for_before_its_engines_come() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = chain(40);
    let store = restarted(dir.path(), 64, &blocks);
    let [id] = store.namespaces_of("m")[..] else {
        panic!("one namespace")
    };
    assert_eq!(store.name_of(id), namespace("m"));
    assert_eq!(store.namespaces_of("").len(), 2);
    assert!(store.namespaces_of("third").is_empty());
    let hashes: Vec<_> = blocks.iter().map(Digest::block_hash).collect();
    assert_eq!(store.digests(id, &hashes), blocks);
    assert_eq!(store.places_of(id, &blocks[39]), [Kind::Nvme]);
    assert_eq!(store.places_of(id, &digest(99)), []);
    assert_eq!(store.evict(Kind::Nvme, id, &blocks[35..]), 5);
    assert_eq!(store.digests(id, &hashes), blocks[..35]);
    assert_eq!(
        store.open(&namespace("m")).unwrap(),
        id,
        "an engine gets the same"
    );
}

#[test]
fn a_prefetch_brings_the_chain_up_unless_its_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = chain(24);
    let store = restarted(dir.path(), 64, &blocks);
    let id = store.namespaces_of("m")[0];
    let late = store.prefetch(id, &blocks[..8], Duration::ZERO);
    assert_eq!((late.here, late.coming), (0, 8));
    settled("the late one is given up", || store.flow().late == 8);
    assert_eq!((store.flow().coming, store.flow().promoted), (0, 0));
    let wished = store.prefetch(id, &blocks, LONG);
    assert_eq!((wished.here, wished.coming), (0, 24));
    settled("all are up", || store.flow().promoted == 24);
    assert_eq!(store.places_of(id, &blocks[23]), [Kind::Host, Kind::Nvme]);
    let again = store.prefetch(id, &blocks, LONG);
    assert_eq!((again.here, again.coming), (24, 0));
    assert_eq!(store.flow().coming, 0);
}

#[test]
fn warming_fills_vacant_room_with_what_was_used_last() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = chain(40);
    let store = restarted(dir.path(), 32, &blocks);
    let mut plan = store.warming("m");
    assert_eq!(plan.left, 8);
    let first = store.warm(&mut plan, 1);
    assert!(
        first.brought >= 1 && first.brought + first.to_come == 32,
        "{first:?}"
    );
    while store.warm(&mut plan, 8).to_come > 0 {}
    let id = store.namespaces_of("m")[0];
    let up = (blocks.iter()).filter(|b| store.places_of(id, b).contains(&Kind::Host));
    assert_eq!(up.count(), 32);
    assert_eq!(
        store.host().stats().evicted.room,
        0,
        "nothing had to go for it"
    );
    assert_eq!(store.warming("m").left, 8);
    assert_eq!(store.warming("third").left, 0);
    let other = store.namespaces_of("other")[0];
    assert_eq!(store.places_of(other, &blocks[0]), [Kind::Nvme]);
}

#[test]
fn a_check_finds_every_bad_block_and_looks_at_its_copies() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = chain(30);
    let store = restarted(dir.path(), 64, &blocks);
    let id = store.namespaces_of("m")[0];
    assert_eq!(
        (
            check(&store, Kind::Nvme).blocks,
            check(&store, Kind::Host).blocks
        ),
        (31, 0)
    );
    let mut plan = store.warming("m");
    store.warm(&mut plan, 30);
    let sound = check(&store, Kind::Host);
    assert_eq!(
        (sound.blocks, sound.bytes, sound.corrupt),
        (30, 30 * 8000, vec![])
    );
    flip_in_memory(&store, id, &blocks[4]);
    assert_eq!(check(&store, Kind::Host).corrupt, [(Kind::Host, blocks[4])]);
    assert_eq!(
        store.places_of(id, &blocks[4]),
        [Kind::Nvme],
        "its copy is sound"
    );
    flip_in_memory(&store, id, &blocks[7]);
    flip_all_on_disk(dir.path(), 5000);
    assert_eq!(
        check(&store, Kind::Host).corrupt,
        [(Kind::Host, blocks[7]), (Kind::Nvme, blocks[7])]
    );
    assert!(store.places_of(id, &blocks[7]).is_empty());
    assert_eq!(
        store.host().lookup(id, &blocks[8..]),
        22,
        "the others are untouched"
    );
    assert_eq!(check(&store, Kind::Nvme).corrupt.len(), 30);
    assert_eq!(store.nvme().unwrap().stats().blocks, 0);
    assert_eq!(store.host().stats().blocks_in_use, 0);
    assert!(store.check(Kind::Network, None, 1).is_err());
}

#[test]
fn the_scrubber_finds_bad_blocks_without_being_asked() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        scrub: Some(ScrubSettings {
            bytes_per_s: 1 << 40,
            pause: Duration::from_millis(1),
        }),
        ..settings(dir.path(), 64, 256)
    };
    let store = Store::new(&settings).unwrap();
    let id = store.open(&namespace("m")).unwrap();
    let blocks = chain(20);
    put(&store, id, &blocks);
    store.persist(None).unwrap();
    flip_in_memory(&store, id, &blocks[3]);
    flip_all_on_disk(dir.path(), 300);
    let of = |kind| {
        let all = store.scrubbed();
        all.into_iter()
            .find(|(of, _)| *of == kind)
            .expect("its numbers")
            .1
    };
    settled("all bad blocks are gone", || {
        store.nvme().unwrap().stats().blocks == 0 && of(Kind::Host).corrupt > 0
    });
    settled("passes go on", || {
        of(Kind::Host).passes > 3 && of(Kind::Nvme).passes > 3
    });
    let corrupt = |tier: &dyn Tier| tier.stats().corrupt;
    assert_eq!(
        (corrupt(&**store.host()), corrupt(&**store.nvme().unwrap())),
        (1, 20)
    );
    assert_eq!(store.host().lookup(id, &blocks), 3);
    store.stop();
    let done = store.scrubbed();
    assert_eq!(store.scrubbed(), done);
}

#[test]
fn a_namespace_too_large_for_memory_is_left_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let large = Namespace {
        segments: vec![30_000],
        ..namespace("large")
    };
    let first = Store::new(&settings(dir.path(), 256, 256)).unwrap();
    first.open(&large).unwrap();
    first.stop();
    let second = Store::new(&settings(dir.path(), 32, 256)).unwrap();
    assert!(second.namespaces_of("large").is_empty());
    assert_eq!(second.warming("").left, 0);
}
