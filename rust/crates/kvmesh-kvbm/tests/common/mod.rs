//! A store of small blocks, and an engine that uses it.
#![allow(dead_code)]

use std::path::Path;
use std::time::{Duration, Instant};

use kvmesh_kvbm::control::StoreClient;
use kvmesh_kvbm::embedded::BlockStore;
use kvmesh_kvbm::store::{NvmeSettings, Settings};
use kvmesh_kvbm::{Digest, Namespace, Pages};

pub const BLOCK: usize = 4000;
pub const SLOT: u64 = 4096 + 4096;
const PATIENCE: Duration = Duration::from_secs(30);

pub fn settings(dir: &Path, host: u64, nvme: u64) -> Settings {
    Settings {
        nvme: Some(NvmeSettings {
            dir: dir.join("nvme"),
            bytes: nvme * SLOT,
            bytes_per_day: None,
        }),
        ..Settings::host(dir, host * SLOT)
    }
}

/// A store of blocks of 8,000 bytes, with so many slots in memory and on the disk.
pub fn store(dir: &Path, host: u64, nvme: u64) -> BlockStore {
    let settings = settings(dir, host, nvme);
    let store = BlockStore::new(&settings, BLOCK as u32 + 4000).expect("a store");
    let health = store.store().health().expect("a disk tier");
    assert_eq!(health.problem, None);
    store
}

/// Of a block of such a store.
pub fn content(number: u64) -> Vec<u8> {
    (0..BLOCK as u64 + 4000)
        .map(|at| (number * 31 + at * 7 + at / 251) as u8)
        .collect()
}

/// Xorshift: the same on every run.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

pub fn digest(number: u64) -> Digest {
    let mut bytes = [3; 32];
    bytes[..8].copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    bytes[8..16].copy_from_slice(&number.to_be_bytes());
    Digest::new(bytes)
}

pub fn settled(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn namespace(model: &str) -> Namespace {
    Namespace {
        model: model.into(),
        revision: "1".into(),
        dtype: "f32".into(),
        layout: "nhd".into(),
        rank: 0,
        ranks: 1,
        segments: vec![4000, 4000],
    }
}

/// An engine's pages: block i is filled with its number.
pub struct Engine {
    pub buffers: [Vec<u8>; 2],
    pub pages: Pages,
    pub client: StoreClient,
}

impl Engine {
    pub fn new(path: &Path, pages: usize) -> Self {
        let buffers = [0, 1].map(|part| -> Vec<u8> {
            (0..pages * 4000)
                .map(|at| ((at / 4000) * 3 + part) as u8)
                .collect()
        });
        let bases = buffers.each_ref().map(|buffer| buffer.as_ptr() as usize);
        // SAFETY: both buffers hold the pages and live as long as they are used.
        let view = unsafe { Pages::new(&bases, &[4000; 2], &[4000; 2], pages).expect("pages") };
        let client = StoreClient::new(path, namespace("m"), 1, Duration::from_secs(20));
        client.connect().expect("a connection");
        Self {
            buffers,
            pages: view,
            client,
        }
    }

    pub fn wipe(&mut self) {
        self.buffers.iter_mut().for_each(|buffer| buffer.fill(0));
    }
}
