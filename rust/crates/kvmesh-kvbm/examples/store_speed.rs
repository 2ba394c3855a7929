//! Speed of the host tier from an engine's side, beside memcpy of the same bytes: `cargo run --release --example
//! store_speed`. Look-ups of 512 blocks; offload and load of scattered pages of three model sizes.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmesh_kvbm::block::{Reservation, register, reserve};
use kvmesh_kvbm::control::{StoreClient, StoreServer};
use kvmesh_kvbm::store::{NvmeSettings, Settings, Store};
use kvmesh_kvbm::tiers::Tier;
use kvmesh_kvbm::{Digest, Namespace, Pages};

const ROUNDS: usize = 7;

fn main() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    for (name, layers, segment) in [
        ("64 KiB", 8, 4 << 10),
        ("360 KiB", 30, 6 << 10),
        ("2 MiB", 32, 32 << 10),
    ] {
        let path = dir.path().join(format!("{segment}.sock"));
        let blocks = (512 << 20) / (2 * layers * segment);
        let start = Instant::now();
        let tier = Arc::new(Store::new(&Settings::host(dir.path(), 1 << 30)).expect("a tier"));
        let made = start.elapsed();
        let server = StoreServer::start(&path, tier).expect("a server");
        run(&server, &path, name, layers, segment, blocks);
        println!("  arena of 1 GiB made in {made:.0?}");
    }
    on_disk(dir.path());
}

/// Look-ups of 512 blocks that are only on the disk. Memory is too small to bring them up, so all look-ups are alike.
fn on_disk(dir: &std::path::Path) {
    let path = dir.join("disk.sock");
    let disk = tempfile::tempdir().expect("a directory");
    let settings = Settings {
        nvme: Some(NvmeSettings {
            dir: disk.path().to_owned(),
            bytes: 64 << 20,
            bytes_per_day: None,
        }),
        ..Settings::host(dir, 4 << 20)
    };
    let store = Arc::new(Store::new(&settings).expect("a store"));
    let server = StoreServer::start(&path, store).expect("a server");
    let namespace = namespace(16 << 10, 1);
    let nvme = server.store().nvme().expect("a disk tier").clone();
    server.store().open(&namespace).expect("a namespace");
    let id = nvme.open(&namespace).expect("a namespace");
    let chain = digests(512);
    let nvme: Arc<dyn Tier> = nvme;
    for reservation in reserve(&nvme, id, None, &chain) {
        if let Reservation::Room(room) = reservation {
            register(vec![room.fill(&[&[1; 16 << 10]]).expect("a block")]);
        }
    }
    let client = StoreClient::new(&path, namespace, 1, Duration::from_secs(10));
    client.connect().expect("a connection");
    let mut lookups: Vec<Duration> = (0..2000)
        .map(|_| {
            let start = Instant::now();
            client.lookup(&chain).expect("an answer");
            start.elapsed()
        })
        .collect();
    lookups.sort();
    println!(
        "look-up of 512 blocks on the disk: median {:.0?}, p99 {:.0?}",
        lookups[1000], lookups[1980]
    );
}

fn namespace(segment: usize, segments: usize) -> Namespace {
    Namespace {
        model: "m".into(),
        revision: String::new(),
        dtype: String::new(),
        layout: String::new(),
        rank: 0,
        ranks: 1,
        segments: vec![segment as u32; segments],
    }
}

fn digests(blocks: usize) -> Vec<Digest> {
    (0..blocks as u64)
        .map(|i| {
            let mut digest = [7; 32];
            digest[..8].copy_from_slice(&i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
            Digest::new(digest)
        })
        .collect()
}

fn run(
    server: &StoreServer,
    path: &std::path::Path,
    name: &str,
    layers: usize,
    segment: usize,
    blocks: usize,
) {
    let segments = 2 * layers;
    let client = StoreClient::new(
        path,
        namespace(segment, segments),
        1,
        Duration::from_secs(10),
    );
    client.connect().expect("a connection");
    let buffers: Vec<Vec<u8>> = (0..segments)
        .map(|s| vec![s as u8 + 1; segment * blocks])
        .collect();
    let bases: Vec<usize> = buffers.iter().map(|b| b.as_ptr() as usize).collect();
    let sizes = vec![segment; segments];
    // SAFETY: the buffers hold `blocks` pages each and outlive `pages`; one thread uses them.
    let pages = unsafe { Pages::new(&bases, &sizes, &sizes, blocks).expect("pages") };
    let ids: Vec<u32> = (0..blocks as u32)
        .map(|i| (i * 7919) % blocks as u32)
        .collect();
    let chain = digests(blocks);
    let bytes = (blocks * segments * segment) as f64;
    let rate = |times: &mut Vec<Duration>| {
        times.sort();
        bytes / times[times.len() / 2].as_secs_f64() / 1e9
    };
    let (mut put, mut get, mut copy) = (Vec::new(), Vec::new(), Vec::new());
    let mut target = vec![1_u8; blocks * segments * segment];
    for _ in 0..ROUNDS {
        server.store().host().flush();
        let start = Instant::now();
        client
            .offload(None, &chain, &pages, &ids)
            .expect("offloaded");
        put.push(start.elapsed());
        let start = Instant::now();
        let mut lease = client.lease(&chain).expect("an answer").expect("a lease");
        for layer in 0..layers {
            lease
                .load(&pages, &ids, 2 * layer, 2 * layer + 2)
                .expect("loaded");
        }
        get.push(start.elapsed());
        lease.release();
        // The same pattern of segments, no checksums, no store.
        let start = Instant::now();
        for (place, &id) in ids.iter().enumerate() {
            for (s, buffer) in buffers.iter().enumerate() {
                let from = id as usize * segment;
                let to = (place * segments + s) * segment;
                target[to..to + segment].copy_from_slice(&buffer[from..from + segment]);
            }
        }
        black_box(&target);
        copy.push(start.elapsed());
    }
    println!(
        "{name}: offload {:.1} GB/s, load {:.1}, memcpy {:.1}",
        rate(&mut put),
        rate(&mut get),
        rate(&mut copy)
    );
    let page_chain = &chain[..chain.len().min(512)];
    let mut lookups: Vec<Duration> = (0..2000)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(
                client.lookup(page_chain).expect("an answer"),
                page_chain.len()
            );
            start.elapsed()
        })
        .collect();
    lookups.sort();
    println!(
        "  look-up of {} blocks: median {:.0?}, p99 {:.0?}",
        page_chain.len(),
        lookups[1000],
        lookups[1980]
    );
}
