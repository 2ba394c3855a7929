//! The store and its engines, over a real socket and a real arena.
#![expect(clippy::unwrap_used, reason = "a failure of these is the test's")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmesh_kvbm::control::{Offloaded, StoreClient, StoreServer};
use kvmesh_kvbm::store::{self, Settings};
use kvmesh_kvbm::tiers::Tier;
use kvmesh_kvbm::{Digest, Error, Namespace, Pages};

const PAGES: usize = 64;
const SEGMENTS: [u32; 4] = [1024, 512, 1024, 512];
const BLOCK: usize = 3072;

fn namespace() -> Namespace {
    Namespace {
        model: "m".into(),
        revision: "1".into(),
        dtype: "bf16".into(),
        layout: "nhd".into(),
        rank: 0,
        ranks: 1,
        segments: SEGMENTS.to_vec(),
    }
}

struct Store {
    server: Option<StoreServer>,
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Store {
    fn start(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kvbm.sock");
        let mut store = Self {
            server: None,
            path,
            dir,
        };
        store.restart(bytes);
        store
    }

    fn restart(&mut self, bytes: u64) {
        self.server = None;
        let tier = Arc::new(store::Store::new(&Settings::host(self.dir.path(), bytes)).unwrap());
        self.server = Some(StoreServer::start(&self.path, tier).unwrap());
    }

    fn server(&self) -> &StoreServer {
        self.server.as_ref().unwrap()
    }

    fn client(&self, engine: u64) -> StoreClient {
        let client = StoreClient::new(&self.path, namespace(), engine, Duration::from_secs(5));
        client.connect().unwrap();
        client
    }

    fn settled(&self, holds: impl Fn(&StoreServer) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !holds(self.server()) {
            assert!(
                Instant::now() < deadline,
                "{:?}",
                self.server().store().host().stats()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// An engine's pages: one buffer a segment, as a device pool has them.
struct Pool {
    buffers: Vec<Vec<u8>>,
    pages: Pages,
}

impl Pool {
    fn new(seed: u8) -> Self {
        let fill = |(s, &bytes): (usize, &u32)| {
            (0..bytes as usize * PAGES)
                .map(|i| seed ^ s as u8 ^ (i / 7 % 256) as u8)
                .collect::<Vec<u8>>()
        };
        let buffers: Vec<Vec<u8>> = SEGMENTS.iter().enumerate().map(fill).collect();
        let bases: Vec<usize> = buffers
            .iter()
            .map(|buffer| buffer.as_ptr() as usize)
            .collect();
        let bytes = SEGMENTS.map(|bytes| bytes as usize);
        // SAFETY: the buffers hold PAGES pages each, live as long as `pages`, and one thread uses them at a time.
        let pages = unsafe { Pages::new(&bases, &bytes, &bytes, PAGES).unwrap() };
        Self { buffers, pages }
    }

    fn page(&self, id: u32) -> Vec<u8> {
        let parts = self.buffers.iter().zip(SEGMENTS).map(|(buffer, bytes)| {
            let (start, bytes) = (id as usize * bytes as usize, bytes as usize);
            buffer[start..start + bytes].to_vec()
        });
        parts.collect::<Vec<_>>().concat()
    }
}

fn chain(name: u8, blocks: usize) -> Vec<Digest> {
    (0..blocks)
        .map(|i| {
            Digest::new(std::array::from_fn(|at| {
                if at == 0 { name } else { (i * 11 + at) as u8 }
            }))
        })
        .collect()
}

#[test]
fn another_engine_gets_the_pages_one_has_offloaded() {
    let store = Store::start(1 << 20);
    let (source, target) = (Pool::new(3), Pool::new(200));
    let (writer, reader) = (store.client(1), store.client(2));
    let blocks = chain(1, 20);
    let from: Vec<u32> = (0..20).map(|i| (i * 7) % 64).collect();
    let to: Vec<u32> = (0..20).map(|i| 63 - i).collect();
    let offloaded = writer.offload(None, &blocks, &source.pages, &from).unwrap();
    assert_eq!(
        offloaded,
        Offloaded {
            stored: 20,
            present: 0,
            full: 0
        }
    );
    let again = writer.offload(None, &blocks, &source.pages, &from).unwrap();
    assert_eq!(
        again,
        Offloaded {
            stored: 0,
            present: 20,
            full: 0
        }
    );
    assert_eq!(reader.lookup(&blocks).unwrap(), 20);
    let mut lease = reader.lease(&blocks).unwrap().unwrap();
    for layer in 0..2 {
        lease
            .load(&target.pages, &to, 2 * layer, 2 * layer + 2)
            .unwrap();
    }
    for (&from, &to) in from.iter().zip(&to) {
        assert_eq!(source.page(from), target.page(to));
    }
    assert_eq!(store.server().engines(), 2);
    lease.release();
    store.settled(|server| server.store().host().stats().blocks_in_use == 0);
}

#[test]
fn a_lease_is_for_the_whole_chain_or_none() {
    let store = Store::start(1 << 20);
    let (pool, client) = (Pool::new(1), store.client(1));
    let blocks = chain(1, 4);
    client
        .offload(None, &blocks[..3], &pool.pages, &[0, 1, 2])
        .unwrap();
    assert!(client.lease(&blocks).unwrap().is_none());
    assert!(client.lease(&[]).unwrap().is_none());
    assert_eq!(store.server().store().host().stats().blocks_in_use, 0);
    assert_eq!(client.lease(&blocks[..3]).unwrap().unwrap().blocks(), 3);
}

#[test]
fn an_engine_that_goes_leaves_nothing_reserved_or_leased() {
    let store = Store::start(1 << 20);
    let (pool, client, other) = (Pool::new(1), store.client(1), store.client(2));
    let blocks = chain(1, 4);
    client
        .offload(None, &blocks, &pool.pages, &[0, 1, 2, 3])
        .unwrap();
    let lease = client.lease(&blocks).unwrap();
    assert_eq!(store.server().store().host().stats().blocks_in_use, 4);
    client.close();
    assert_eq!(
        store.server().store().host().stats().blocks_in_use,
        4,
        "a lease outlives its client"
    );
    drop(lease);
    store.settled(|server| {
        server.store().host().stats().blocks_in_use == 0 && server.engines() == 1
    });
    assert_eq!(other.lookup(&blocks).unwrap(), 4);
}

#[test]
fn a_full_store_takes_the_head_of_a_chain() {
    let store = Store::start(32 * 4096);
    let (pool, client) = (Pool::new(1), store.client(1));
    let ids: Vec<u32> = (0..40).collect();
    let offloaded = client
        .offload(None, &chain(1, 40), &pool.pages, &ids)
        .unwrap();
    assert_eq!(
        offloaded,
        Offloaded {
            stored: 32,
            present: 0,
            full: 8
        }
    );
    assert_eq!(client.lookup(&chain(1, 40)).unwrap(), 32);
}

#[test]
fn a_lease_survives_its_store_and_the_client_finds_the_next_one() {
    let mut store = Store::start(1 << 20);
    let (source, target) = (Pool::new(3), Pool::new(9));
    let client = store.client(1);
    let blocks = chain(1, 8);
    let ids: Vec<u32> = (0..8).collect();
    client.offload(None, &blocks, &source.pages, &ids).unwrap();
    let mut lease = client.lease(&blocks).unwrap().unwrap();
    lease.load(&target.pages, &ids, 0, 2).unwrap();
    store.server = None;
    assert!(!client.is_connected());
    assert!(matches!(
        client.lookup(&blocks),
        Err(Error::Disconnected(_))
    ));
    assert!(matches!(client.connect(), Err(Error::Disconnected(_))));
    lease.load(&target.pages, &ids, 2, 4).unwrap();
    assert!(ids.iter().all(|&id| source.page(id) == target.page(id)));
    drop(lease);
    store.restart(1 << 20);
    client.connect().unwrap();
    assert!(client.is_connected());
    assert_eq!(client.lookup(&blocks).unwrap(), 0, "the new store is empty");
    assert_eq!(
        client
            .offload(None, &blocks, &source.pages, &ids)
            .unwrap()
            .stored,
        8
    );
}

#[test]
fn a_corrupt_block_is_reported_and_dropped() {
    let store = Store::start(1 << 20);
    let (pool, client) = (Pool::new(3), store.client(1));
    let blocks = chain(1, 3);
    client
        .offload(None, &blocks, &pool.pages, &[0, 1, 2])
        .unwrap();
    let file = store
        .server()
        .store()
        .host()
        .arena()
        .descriptor()
        .try_clone_to_owned()
        .unwrap();
    let map = memmap2::MmapOptions::new()
        .len(1 << 20)
        .map_raw(&std::fs::File::from(file))
        .unwrap();
    let tier: Arc<dyn Tier> = store.server().store().host().clone();
    let id = tier.open(&namespace()).unwrap();
    let slot = tier.lease(id, &blocks, 3)[1];
    tier.release(&tier.lease(id, &blocks, 0));
    let last = tier.layout(id).segments()[3].offset as u64;
    // SAFETY: inside the mapping, and nobody else accesses the arena now.
    unsafe { *map.as_mut_ptr().add((slot.0 + last) as usize) ^= 0x10 };
    let mut lease = client.lease(&blocks).unwrap().unwrap();
    lease.load(&pool.pages, &[3, 4, 5], 0, 2).unwrap();
    let error = lease.load(&pool.pages, &[3, 4, 5], 2, 4).unwrap_err();
    assert!(
        matches!(error, Error::Corrupt { digest, .. } if digest == blocks[1]),
        "{error}"
    );
    lease.release();
    assert_eq!(client.lookup(&blocks).unwrap(), 1);
    assert_eq!(tier.stats().corrupt, 1);
}

#[test]
fn a_layout_the_store_cannot_hold_is_refused_with_advice() {
    let store = Store::start(1 << 20);
    let large = Namespace {
        segments: vec![1 << 20],
        ..namespace()
    };
    let client = StoreClient::new(&store.path, large, 1, Duration::from_secs(5));
    let error = client.connect().unwrap_err();
    assert!(
        matches!(&error, Error::Refused(reason) if reason.contains("kvbm.host_bytes")),
        "{error}"
    );
}

#[test]
fn a_store_that_hangs_costs_one_timeout_and_then_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvbm.sock");
    let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let client = StoreClient::new(&path, namespace(), 1, Duration::from_millis(50));
    assert!(matches!(client.connect(), Err(Error::Disconnected(_))));
    let start = Instant::now();
    assert!(matches!(
        client.lookup(&chain(1, 1)),
        Err(Error::Disconnected(_))
    ));
    assert!(start.elapsed() < Duration::from_millis(40));
}

#[test]
fn one_socket_has_one_store_and_a_dead_ones_is_taken_over() {
    let store = Store::start(1 << 20);
    let tier = || Arc::new(store::Store::new(&Settings::host(store.dir.path(), 1 << 20)).unwrap());
    assert!(matches!(
        StoreServer::start(&store.path, tier()),
        Err(Error::SocketTaken(_))
    ));
    let stale = store.dir.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(StoreServer::start(&stale, tier()).is_ok());
    let long = store.dir.path().join("x".repeat(120));
    assert!(matches!(
        StoreServer::start(&long, tier()),
        Err(Error::SocketPathTooLong { .. })
    ));
}

#[test]
fn many_engines_at_once_never_see_each_others_bytes() {
    let store = Store::start(64 * 4096);
    std::thread::scope(|scope| {
        for engine in 0..4_u8 {
            let client = store.client(u64::from(engine));
            scope.spawn(move || {
                let (source, target) = (Pool::new(engine), Pool::new(255));
                for round in 0..60_u32 {
                    // Two engines share every chain name, so they race to store the same blocks.
                    let blocks = chain(engine / 2 * 16 + (round % 5) as u8, 12);
                    let ids: Vec<u32> = (0..12).map(|i| (i + round) % 64).collect();
                    client.offload(None, &blocks, &source.pages, &ids).unwrap();
                    if let Some(mut lease) = client.lease(&blocks).unwrap() {
                        lease.load(&target.pages, &ids, 0, 4).unwrap();
                    }
                }
            });
        }
    });
    store.settled(|server| server.store().host().stats().blocks_in_use == 0);
    let stats = store.server().store().host().stats();
    assert!(
        stats.loaded > 0 && stats.evicted.room > 0 && stats.corrupt == 0,
        "{stats:?}"
    );
    assert_eq!(stats.used_bytes, stats.blocks * 4096);
    store.server().store().host().flush();
    assert_eq!(store.server().store().host().stats().used_bytes, 0);
    assert_eq!(BLOCK, SEGMENTS.iter().sum::<u32>() as usize);
}
