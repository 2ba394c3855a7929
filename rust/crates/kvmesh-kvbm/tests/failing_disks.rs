//! Disks that fail under engines at work: their tier goes out and says why, engines and memory go on, and it comes back with what is left.
//!
//! The faults are the kernel's own, of a file system made for the test; who may not mount has nothing to test with.
#![expect(clippy::unwrap_used, reason = "a failure of these is the test's")]

mod common;
#[path = "common/ext4.rs"]
mod ext4;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Engine, SLOT, digest, namespace, settings, settled};
use ext4::Ext4;
use kvmesh_kvbm::control::{StoreClient, StoreServer};
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::store::{Settings, Store};
use kvmesh_kvbm::tiers::{Health, Tier};

/// Blocks in memory, and on the disk.
const HOST: u64 = 128;
const NVME: u64 = 1024;
/// Of memory's blocks, those in places of the disk that fail.
const LOST: u64 = 6;
const PAGES: usize = 8;
/// Blocks that an engine offloads while a disk is out: many times what memory holds.
const MEANWHILE: u64 = 5_000;
/// So much of them may be there after all.
const FLAT: u64 = 16 << 20;

/// A store with its disk, and an engine.
struct Node {
    engine: Engine,
    server: StoreServer,
    next: u64,
}

impl Node {
    fn new(dir: &Path) -> Self {
        let settings = Settings {
            // Takes every newcomer.
            policy: Policy::Lru,
            ..settings(dir, HOST, NVME)
        };
        let store = Store::new(&settings).unwrap();
        let path = dir.join("kvbm.sock");
        let server = StoreServer::start(&path, Arc::new(store)).unwrap();
        let node = Self {
            engine: Engine::new(&path, PAGES),
            server,
            next: 0,
        };
        assert_eq!(node.health().problem, None);
        node
    }

    fn health(&self) -> Health {
        self.server.store().health().unwrap()
    }

    fn outage(&self) -> Option<String> {
        self.health().problem
    }

    /// A request of one new block: it is not there, is computed and offered; whether the store took it. Fails if the
    /// store does not answer.
    fn request(&mut self) -> bool {
        let (name, page) = (digest(self.next), self.next as u32 % PAGES as u32);
        self.next += 1;
        let Engine { client, pages, .. } = &self.engine;
        assert_eq!(client.lookup(&[name]).unwrap(), 0);
        let offloaded = client.offload(None, &[name], pages, &[page]).unwrap();
        offloaded.stored == 1
    }

    fn requests(&mut self, count: u64) {
        (0..count).for_each(|_| {
            self.request();
        });
    }

    /// Whether the store has block `number`, and gives it whole.
    fn has(&mut self, number: u64) -> bool {
        let (chain, page) = ([digest(number)], number as usize % PAGES);
        if self.engine.client.lookup(&chain).unwrap() == 0 {
            return false;
        }
        let Some(mut lease) = self.engine.client.lease(&chain).unwrap() else {
            return false;
        };
        let own = [0, 1].map(|part| self.engine.buffers[part][page * 4000..][..4000].to_vec());
        for part in &mut self.engine.buffers {
            part[page * 4000..][..4000].fill(0xEE);
        }
        let loaded = lease.load(&self.engine.pages, &[page as u32], 0, 2).is_ok();
        for (part, own) in self.engine.buffers.iter_mut().zip(own) {
            let page = &mut part[page * 4000..][..4000];
            assert!(!loaded || page == own, "another block's bytes");
            page.copy_from_slice(&own);
        }
        loaded
    }

    /// Reads of places that failed, or gave other bytes.
    fn found_out(&self) -> u64 {
        self.health().outages + self.server.store().stats()[1].1.corrupt
    }

    /// Requests go on, and what they bring does not pile up anywhere.
    fn goes_on(&mut self) {
        self.requests(MEANWHILE / 10);
        let (before, mut stored) = (resident(), 0);
        for _ in 0..MEANWHILE {
            let last = self.next;
            let taken = self.request();
            assert_eq!(self.has(last), taken);
            stored += u64::from(taken);
        }
        assert!(stored > MEANWHILE / 2, "{stored} stored");
        let more = resident().saturating_sub(before);
        assert!(more < FLAT, "{more} bytes more");
        assert!(self.outage().is_some(), "it is still out");
    }
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn one_that_answers_with_errors() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Ext4::new(dir.path()) else {
        return;
    };
    let mut node = Node::new(dir.path());
    let kept = HOST / 2;
    node.requests(kept);
    node.server.store().persist(None).unwrap();
    disk.shut_down();
    settled("it goes out", || {
        node.request();
        node.outage().is_some()
    });
    let why = node.outage().unwrap();
    assert!(why.contains("Input/output error"), "{why}");
    node.goes_on();

    // The store has let go of it, so that it can be repaired.
    settled("it can be unmounted", || disk.unmount());
    disk.mount();
    settled("it comes back by itself", || node.outage().is_none());
    assert!((0..kept).all(|number| node.has(number)));
    let late = node.next;
    node.requests(HOST / 2);
    node.server.store().persist(None).unwrap();
    assert!((late..node.next).all(|number| node.has(number)));
}

#[test]
fn one_that_is_not_mounted_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Ext4::new(dir.path()) else {
        return;
    };
    let mut node = Node::new(dir.path());
    node.requests(HOST / 2);
    node.server.store().persist(None).unwrap();
    disk.tear_off();
    let missing = |why: String| why.contains("nothing is mounted");
    settled("it is missed", || node.outage().is_some_and(missing));
    node.goes_on();
    let beneath = std::fs::read_dir(&disk.dir).unwrap().count();
    assert_eq!(beneath, 0, "the disk beneath is not taken for it");
    disk.mount();
    settled("it comes back by itself", || node.outage().is_none());
    assert!((0..HOST / 2).all(|number| node.has(number)));
}

#[test]
fn one_that_has_lost_some_places() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Ext4::new(dir.path()) else {
        return;
    };
    let mut node = Node::new(dir.path());
    node.requests(HOST);
    node.server.store().persist(None).unwrap();
    node.server.store().host().flush();
    assert_eq!(node.server.store().host().stats().blocks, 0);
    disk.lose("slabs", SLOT * (HOST - LOST));
    // What cannot be read is forgotten as it is found out: it takes the tier out once, not as often as it is wanted.
    // As soon as a place behind it has been written, a lost one reads as zeros.
    let mut lost = 0;
    for number in 0..HOST {
        if node.has(number) {
            continue;
        }
        lost += 1;
        settled("it is found out", || node.found_out() == lost);
        settled("it comes back", || node.outage().is_none());
        assert!(!node.has(number), "block {number} was read");
        assert_eq!(node.found_out(), lost, "block {number} was still there");
    }
    assert_eq!(lost, LOST);
    assert!(node.health().outages > 0);
    // The tier takes others.
    let late = node.next;
    node.requests(HOST / 2);
    node.server.store().persist(None).unwrap();
    assert!((late..node.next).all(|number| node.has(number)));
    assert_eq!(node.found_out(), lost);
}

#[test]
fn one_that_is_slow_and_then_silent() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Ext4::new(dir.path()) else {
        return;
    };
    let mut node = Node::new(dir.path());
    let begun = Instant::now();
    let slow = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..10 {
                let frozen = disk.freeze();
                std::thread::sleep(Duration::from_millis(200));
                drop(frozen);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        while begun.elapsed() < Duration::from_secs(2) {
            node.request();
        }
        node.server.store().flow()
    });
    assert_eq!(node.outage(), None, "slow is not out");
    assert!(slow.spilled > 0 && slow.shed > 0, "{slow:?}");

    let (frozen, before) = (disk.freeze(), node.server.store().flow().shed);
    settled("the writer hangs", || {
        node.request();
        node.server.store().flow().shed > before
    });
    // An engine of another model does not wait for it.
    let path = dir.path().join("kvbm.sock");
    let other = StoreClient::new(&path, namespace("other"), 2, Duration::from_secs(5));
    other.connect().unwrap();
    assert_eq!(node.outage(), None, "it is not out yet");
    settled("it goes out", || {
        node.request();
        node.outage().is_some()
    });
    let why = node.outage().unwrap();
    assert!(why.contains("has not answered"), "{why}");
    node.goes_on();
    drop(frozen);
    settled("it comes back by itself", || node.outage().is_none());
    let late = node.next;
    node.requests(HOST / 2);
    node.server.store().persist(None).unwrap();
    assert!((late..node.next).all(|number| node.has(number)));
}
