//! What engines ask for and this node lacks: told once, and waited for until it is settled or late.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{SLOT, digest, namespace};
use kvmesh_core::BlockHash;
use kvmesh_kvbm::Digest;
use kvmesh_kvbm::store::{Elsewhere, Found, Settings, Store};
use kvmesh_kvbm::tiers::NamespaceId;

/// In how long the engines here compute a block, and how long nobody has to wait for anything.
const SLOW: Duration = Duration::from_secs(1);
const SOON: Duration = Duration::from_millis(1);
const NOTHING: Found = Found {
    blocks: 0,
    coming: false,
};
const WAIT: Found = Found {
    blocks: 0,
    coming: true,
};

/// Another node that has the leading blocks of every chain, and counts who asks.
#[derive(Default)]
struct Other {
    has: AtomicUsize,
    asked: AtomicUsize,
}

impl Elsewhere for Other {
    fn leading(&self, chain: &[BlockHash]) -> usize {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.has.load(Ordering::Relaxed).min(chain.len())
    }
}

fn store(dir: &Path, has: usize) -> (Store, NamespaceId, Arc<Other>) {
    let store = Store::new(&Settings::host(dir, 64 * SLOT)).expect("a store");
    let id = store.open(&namespace("m")).expect("a namespace");
    let other = Arc::new(Other::default());
    other.has.store(has, Ordering::Relaxed);
    store.look_elsewhere(other.clone());
    (store, id, other)
}

fn chain(from: u64, blocks: u64) -> Vec<Digest> {
    (from..from + blocks).map(digest).collect()
}

#[test]
fn a_want_is_told_once_and_waited_for_until_it_is_settled() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, id, other) = store(dir.path(), 8);
    let chain = chain(0, 10);
    assert_eq!(store.lookup_for(id, &chain, SLOW), WAIT);
    assert_eq!(store.lookup_for(id, &chain, SLOW), WAIT);
    assert_eq!(
        other.asked.load(Ordering::Relaxed),
        1,
        "a scheduler asks again and again"
    );
    let wanted = store.wanted(SOON);
    let [want] = &wanted[..] else {
        panic!("told once: {wanted:?}");
    };
    assert_eq!(want.chain, chain[..8]);
    assert_eq!((want.namespace, want.parent), (id, None));
    let left = want.until.saturating_duration_since(Instant::now());
    assert!(left > 4 * SLOW && left <= 5 * SLOW, "five seconds at most");
    assert!(store.wanted(SOON).is_empty());
    store.settle(want.number);
    assert_eq!(store.lookup_for(id, &chain, SLOW), NOTHING);
    assert!(store.wanted(SOON).is_empty(), "not tried again at once");
    assert_eq!(store.wanted_total(), (8, 0));
}

#[test]
fn chains_that_share_what_is_brought_wait_for_it_together() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, id, _) = store(dir.path(), 4);
    let shared = chain(0, 4);
    let one = [&shared[..], &chain(100, 4)].concat();
    let other = [&shared[..], &chain(200, 4)].concat();
    assert_eq!(store.lookup_for(id, &one, SLOW), WAIT);
    assert_eq!(store.lookup_for(id, &other, SLOW), WAIT);
    assert_eq!(store.wanted(SOON).len(), 1);
}

#[test]
fn what_is_late_is_not_waited_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, id, _) = store(dir.path(), 10);
    let (chain, began) = (chain(0, 10), Instant::now());
    assert!(store.lookup_for(id, &chain, 10 * SOON).coming);
    while store.lookup_for(id, &chain, 10 * SOON).coming {
        assert!(began.elapsed() < SLOW * 20, "for ever");
        std::thread::sleep(SOON);
    }
    assert!(began.elapsed() >= 100 * SOON, "not before its time");
    assert_eq!(store.wanted(SOON).len(), 1);
}

#[test]
fn nothing_is_wanted_where_it_would_not_help() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, id, other) = store(dir.path(), 10);
    let chain = chain(0, 10);
    assert_eq!(
        store.lookup_for(id, &chain, Duration::ZERO),
        NOTHING,
        "its speed is not known"
    );
    assert_eq!(other.asked.load(Ordering::Relaxed), 0);
    other.has.store(0, Ordering::Relaxed);
    assert_eq!(store.lookup_for(id, &chain, SLOW), NOTHING);
    assert!(store.wanted(SOON).is_empty());
    let alone = Store::new(&Settings::host(dir.path(), 64 * SLOT)).expect("a store");
    let of_alone = alone.open(&namespace("m")).expect("a namespace");
    assert_eq!(alone.lookup_for(of_alone, &chain, SLOW), NOTHING);
}

#[test]
fn wants_are_bounded() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, id, _) = store(dir.path(), 2);
    let coming = (0..20).filter(|n| store.lookup_for(id, &chain(100 * n, 2), SLOW).coming);
    assert_eq!(coming.count(), 16);
    assert_eq!(store.wanted_total(), (32, 8));
    let wanted = store.wanted(SOON);
    store.settle(wanted[3].number);
    assert!(store.lookup_for(id, &chain(10_000, 2), SLOW).coming);
}

#[test]
fn a_store_that_stops_lets_go_of_who_waits_for_wants() {
    let dir = tempfile::tempdir().expect("a directory");
    let (store, ..) = store(dir.path(), 0);
    let store = Arc::new(store);
    let waiting = {
        let store = store.clone();
        std::thread::spawn(move || store.wanted(Duration::from_secs(60)))
    };
    store.stop();
    assert!(waiting.join().expect("no panic").is_empty());
}
