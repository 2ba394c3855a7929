//! What stores lend each other: bytes that are copied from arena to arena, as a transfer would, and checked.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{SLOT, digest, namespace};
use kvmesh_kvbm::block::{self, Reservation};
use kvmesh_kvbm::store::{Incoming, Lent, Settings, Store, WORD};
use kvmesh_kvbm::tiers::{NamespaceId, Tier};
use kvmesh_kvbm::{Digest, Namespace};

const BLOCKS: u64 = 16;

fn store(dir: &Path) -> (Store, NamespaceId) {
    let store = Store::new(&Settings::host(dir, 64 * SLOT)).expect("a store");
    let id = store.open(&namespace("m")).expect("a namespace");
    (store, id)
}

fn chain() -> Vec<Digest> {
    (0..BLOCKS).map(digest).collect()
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
}

/// Reads lent blocks into the slots that expect them, as a NIXL READ does.
fn transfer(from: &Store, lent: &Lent, to: &Store, incoming: &Incoming) {
    let (source, target) = (from.host().arena().address(), to.host().arena().address());
    let bytes = incoming.slot_bytes() - WORD;
    for block in incoming.blocks() {
        let there = source + lent.slots()[block.place].0 as usize + WORD;
        let here = target + block.slot.0 as usize + WORD;
        // SAFETY: both slots are inside their arenas, one leased and the other reserved.
        unsafe { std::ptr::copy_nonoverlapping(there as *const u8, here as *mut u8, bytes) };
    }
}

/// Flips a bit inside a block's first segment.
fn damage(store: &Store, slot: u64) {
    let place = store.host().arena().address() + slot as usize + 1000;
    // SAFETY: inside the arena; nobody else looks at it meanwhile.
    unsafe { *(place as *mut u8) ^= 1 };
}

fn in_use(store: &Store) -> u64 {
    store.host().stats().blocks_in_use
}

#[test]
fn what_is_lent_arrives_and_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let ((source, of_source), (reader, id)) = (store(dir.path()), store(dir.path()));
    fill(&source, of_source, &chain());
    let lent = source.lend(&namespace("m"), &chain()).expect("known");
    assert_eq!(lent.digests(), chain());
    assert_eq!(in_use(&source), BLOCKS);
    assert_eq!(source.host().flush(), 0, "they stay where they are");
    let mut incoming = reader.expect(id, None, &chain());
    assert_eq!(
        (incoming.blocks().len(), incoming.slot_bytes()),
        (16, lent.slot_bytes())
    );
    let (lease, coming) = reader.lease(id, &chain());
    assert_eq!(coming.len(), 16, "engines may lease them and wait");
    assert!(
        lease.read(0, 0..2, &mut vec![0; 8000]).is_err(),
        "before they are there"
    );
    transfer(&source, &lent, &reader, &incoming);
    assert!(incoming.arrived().is_empty());
    for place in 0..16 {
        let mut out = vec![0; 8000];
        lease.read(place, 0..2, &mut out).unwrap();
        assert_eq!((out[0], out[7999]), (place as u8, !place as u8));
    }
    drop((lease, incoming, lent));
    assert_eq!((in_use(&source), in_use(&reader)), (0, 0));
    let again = reader.expect(id, None, &chain());
    assert!(again.blocks().is_empty(), "what is here is not expected");
}

#[test]
fn a_block_that_arrives_wrong_is_dropped_where_it_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let ((source, of_source), (reader, id)) = (store(dir.path()), store(dir.path()));
    fill(&source, of_source, &chain());
    let lent = source.lend(&namespace("m"), &chain()).unwrap();
    let mut incoming = reader.expect(id, None, &chain());
    // One is bad at the source, one on the way.
    damage(&source, lent.slots()[3].0);
    transfer(&source, &lent, &reader, &incoming);
    damage(&reader, incoming.blocks()[9].slot.0);
    let wrong = incoming.arrived();
    assert_eq!(wrong, [3, 9]);
    assert_eq!(reader.host().stats().blocks, 14);
    assert_eq!(reader.host().lookup(id, &chain()), 3);
    assert_eq!(lent.doubt(&wrong), 1, "the other one is right there");
    assert_eq!(lent.doubt(&[99]), 0);
    drop((incoming, lent));
    assert_eq!(source.host().stats().corrupt, 1);
    assert_eq!(source.host().lookup(of_source, &chain()), 3);
    assert_eq!((in_use(&source), in_use(&reader)), (0, 0));
}

#[test]
fn what_does_not_arrive_lets_go_of_readers_at_once_and_of_slots_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (reader, id) = store(dir.path());
    let incoming = reader.expect(id, None, &chain());
    let (lease, _) = reader.lease(id, &chain());
    incoming.give_up();
    assert_eq!(reader.lookup(id, &chain()), 0, "engines compute them");
    assert!(reader.lease(id, &chain()).0.slots().is_empty());
    // Bytes may still be on their way: nobody else gets these slots.
    let used = reader.host().stats().used_bytes;
    assert!(used >= BLOCKS * incoming.slot_bytes() as u64);
    assert!(lease.read(0, 0..2, &mut vec![0; 8000]).is_err());
    drop(lease);
    assert_eq!(reader.host().stats().used_bytes, used);
    drop(incoming);
    let stats = reader.host().stats();
    assert_eq!(
        (stats.used_bytes, stats.blocks_in_use, stats.blocks),
        (0, 0, 0)
    );
}

#[test]
fn blocks_are_lent_under_exactly_their_namespace() {
    let dir = tempfile::tempdir().unwrap();
    let (source, id) = store(dir.path());
    fill(&source, id, &chain()[..4]);
    for other in [
        Namespace {
            revision: "2".into(),
            ..namespace("m")
        },
        Namespace {
            segments: vec![4000],
            ..namespace("m")
        },
        namespace("other"),
    ] {
        assert!(source.lend(&other, &chain()).is_none(), "{other:?}");
    }
    let lent = source.lend(&namespace("m"), &chain()).unwrap();
    assert_eq!(lent.digests(), &chain()[..4], "the leading ones");
    drop(lent);
    let none = source.lend(&namespace("m"), &chain()[8..]).unwrap();
    assert!(none.slots().is_empty());
    let full = Store::new(&Settings::host(dir.path(), 128 * SLOT)).unwrap();
    let of_full = full.open(&namespace("m")).unwrap();
    let many: Vec<Digest> = (100..400).map(digest).collect();
    let incoming = full.expect(of_full, None, &many);
    assert_eq!(incoming.blocks().len(), 128, "as many as there is room for");
}

#[test]
fn an_expected_block_is_never_taken_for_the_one_whose_slot_it_has() {
    const ROUNDS: usize = 2000;
    let dir = tempfile::tempdir().unwrap();
    let (store, id) = store(dir.path());
    let last = [digest(BLOCKS - 1)];
    for _ in 0..ROUNDS {
        fill(&store, id, &chain());
        assert_eq!(store.host().flush(), BLOCKS as usize);
        std::thread::scope(|scope| {
            let engine = scope.spawn(|| {
                loop {
                    let (lease, coming) = store.lease(id, &last);
                    if !coming.is_empty() {
                        let place = store.host().arena().address() + lease.slots()[0].0 as usize;
                        // SAFETY: inside the arena, aligned, and written as a whole.
                        return unsafe { (*(place as *const AtomicU64)).load(Ordering::Acquire) };
                    }
                    std::thread::yield_now();
                }
            });
            let incoming = store.expect(id, None, &chain());
            assert_eq!(
                engine.join().expect("a word"),
                0,
                "not what was there before"
            );
            drop(incoming);
        });
    }
}
