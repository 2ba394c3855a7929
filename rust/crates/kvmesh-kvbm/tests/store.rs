//! Both tiers as one: what goes down comes up again, and nothing wrong with it.
#![expect(clippy::unwrap_used, reason = "a failure of these is the test's")]

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::{BLOCK, Engine, Random, SLOT, content, digest, namespace, settings, settled, store};
use kvmesh_kvbm::Digest;
use kvmesh_kvbm::control::StoreServer;
use kvmesh_kvbm::embedded::BlockStore;
use kvmesh_kvbm::eviction::{Hints, Policy};
use kvmesh_kvbm::store::{Settings, Store};
use kvmesh_kvbm::tiers::Tier;

/// Bits that are flipped in a tier.
const FLIPS: u64 = 10_000;

#[test]
fn what_leaves_memory_is_found_on_the_disk_and_comes_back() {
    // LRU takes every block in. Others weigh a block that is read against what is in memory, by the clock too, and may
    // have it read past memory.
    for policy in [Policy::Lru, Policy::Default] {
        leave_and_come_back(policy);
    }
}

fn leave_and_come_back(policy: Policy) {
    const BLOCKS: u64 = 256;
    const IN_MEMORY: u64 = 64;
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        policy,
        ..settings(dir.path(), IN_MEMORY, 2 * BLOCKS)
    };
    let store = BlockStore::new(&settings, BLOCK as u32 + 4000).unwrap();
    for number in 0..BLOCKS {
        assert!(store.put(digest(number), &content(number)).unwrap());
    }
    let flow = store.store().flow();
    assert_eq!(
        (flow.shed, flow.unplaced),
        (0, 0),
        "a writer that waits loses nothing"
    );
    let places = store.contains(&(0..BLOCKS).map(digest).collect::<Vec<_>>());
    assert!(places.iter().all(Option::is_some));
    let mut out = vec![0; BLOCK + 4000];
    for number in 0..BLOCKS {
        let place = places[number as usize];
        let from = store.get(digest(number), &mut out).unwrap();
        assert!(from.is_some(), "block {number}, which was in {place:?}");
        assert_eq!(out, content(number));
        let again = store.get(digest(number), &mut out).unwrap();
        assert_eq!(out, content(number));
        if policy == Policy::Lru {
            let host = Some(kvmesh_core::Tier::Host);
            assert_eq!(again, host, "block {number} has just been read");
        }
    }
    let flow = store.store().flow();
    assert!(
        policy != Policy::Lru || flow.promoted >= BLOCKS - IN_MEMORY,
        "{flow:?}"
    );
    assert_eq!(flow.failed, 0);
    assert_eq!(store.get(digest(999), &mut out).unwrap(), None);
    store.close();
}

#[test]
fn flipped_bits_on_the_disk_are_found_and_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 32, 400);
    let slabs = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.path().join("nvme/slabs"))
        .unwrap();
    let (mut random, mut out) = (Random(7), vec![0; BLOCK + 4000]);
    let (mut flipped, mut caught) = (0, 0);
    for round in 0.. {
        if flipped >= FLIPS {
            break;
        }
        let numbers: Vec<u64> = (round * 1000..round * 1000 + 300).collect();
        for &number in &numbers {
            assert!(store.put(digest(number), &content(number)).unwrap());
        }
        store.flush().unwrap();
        store.store().host().flush();
        // One bit in every slot of the file, past the padding.
        let bytes = slabs.metadata().unwrap().len();
        for slot in (0..bytes / SLOT).map(|slot| slot * SLOT) {
            let place = slot + random.below(72 + 8000);
            if (slot + 72..slot + 128).contains(&place) {
                continue;
            }
            let mut byte = [0];
            slabs.read_exact_at(&mut byte, place).unwrap();
            slabs
                .write_all_at(&[byte[0] ^ (1 << random.below(8))], place)
                .unwrap();
            flipped += 1;
        }
        for &number in &numbers {
            if store.get(digest(number), &mut out).unwrap().is_some() {
                // Its flip fell on padding.
                assert_eq!(out, content(number), "block {number}");
            }
        }
        caught = store.store().stats()[1].1.corrupt;
        store.store().nvme().unwrap().flush();
        store.store().host().flush();
    }
    // Not in every slot that was flipped was a block.
    assert!(caught > FLIPS / 2, "{caught} caught of {flipped} flipped");
    assert_eq!(store.store().stats()[1].1.blocks_in_use, 0);
    store.close();
}

#[test]
fn flipped_bits_in_memory_are_found_and_never_served() {
    const SLOTS: u64 = 256;
    let dir = tempfile::tempdir().unwrap();
    let size = BLOCK + 4000;
    let settings = Settings::host(dir.path(), SLOTS * SLOT);
    let store = BlockStore::new(&settings, size as u32).unwrap();
    let host = store.store().host().clone();
    let arena = std::fs::File::from(host.arena().descriptor().try_clone_to_owned().unwrap());
    let (mut random, mut out, mut flipped) = (Random(9), vec![0; size], 0);
    while flipped < FLIPS {
        let numbers = flipped..flipped + SLOTS;
        for number in numbers.clone() {
            assert!(store.put(digest(number), &content(number)).unwrap());
        }
        // One bit in every slot, of the header or of the block.
        for slot in (0..SLOTS).map(|slot| slot * SLOT) {
            let place = slot + random.below(72 + size as u64);
            let place = if (slot + 72..slot + 128).contains(&place) {
                slot + 128
            } else {
                place
            };
            let mut byte = [0];
            arena.read_exact_at(&mut byte, place).unwrap();
            byte[0] ^= 1 << random.below(8);
            arena.write_all_at(&byte, place).unwrap();
        }
        for number in numbers {
            let got = store.get(digest(number), &mut out).unwrap();
            assert_eq!(got, None, "block {number} was served with a wrong bit");
        }
        flipped += SLOTS;
        assert_eq!(
            (host.stats().blocks, host.stats().used_bytes),
            (0, 0),
            "dropped where they were"
        );
    }
    assert_eq!(host.stats().corrupt, flipped);
    store.close();
}

#[test]
fn a_million_random_operations_serve_only_what_was_put_and_leak_nothing() {
    let mut steps = 0;
    for policy in [Policy::Default, Policy::Lru] {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), 32, 160);
        steps += operate(&Settings { policy, ..settings }, BLOCK + 4000, 50_000);
    }
    // Disks take their time, memory alone does not.
    for policy in Policy::ALL {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings::host(dir.path(), 32 * SLOT);
        steps += operate(
            &Settings { policy, ..settings },
            100,
            900_000 / Policy::ALL.len(),
        );
    }
    assert_eq!(steps, 1_000_000);
}

/// A random program on a store of blocks of `size`; its steps.
fn operate(settings: &Settings, size: usize, steps: usize) -> usize {
    let contents: Vec<Vec<u8>> = (0..400)
        .map(|number| content(number)[..size].to_vec())
        .collect();
    let mut store = BlockStore::new(settings, size as u32).unwrap();
    let (mut random, mut out) = (Random(11), vec![0; size]);
    let mut put = vec![false; 400];
    let mut pins: Vec<u64> = Vec::new();
    let mut hits = [0, 0];
    for step in 0..steps {
        // Some blocks much oftener than others.
        let number = random.below(20).min(random.below(400)) * random.below(20) % 400;
        let content = &contents[number as usize];
        if step % 7000 == 6999 {
            pins.clear();
            store.flush().unwrap();
            store.close();
            store = BlockStore::new(settings, size as u32).unwrap();
        }
        match random.below(100) {
            0..40 => put[number as usize] |= store.put(digest(number), content).unwrap(),
            40..90 => {
                if let Some(tier) = store.get(digest(number), &mut out).unwrap() {
                    assert!(put[number as usize], "block {number} was never put");
                    assert_eq!(&out, content);
                    hits[usize::from(tier == kvmesh_core::Tier::Nvme)] += 1;
                }
            }
            90..95 => {
                let pinned = pins.len() < 8 && store.pin(digest(number));
                pins.extend(pinned.then_some(number));
            }
            95..100 => {
                if let Some(number) = pins.pop() {
                    let tier = store.get(digest(number), &mut out).unwrap();
                    assert_eq!(tier, Some(kvmesh_core::Tier::Host));
                    assert!(store.unpin(digest(number)));
                }
            }
            _ => unreachable!("below 100"),
        }
    }
    assert!(hits[0] > 1000, "{hits:?}");
    assert!(settings.nvme.is_none() || hits[1] > 100, "{hits:?}");
    for number in pins.drain(..) {
        assert!(store.unpin(digest(number)));
    }
    settled("all leases end", || {
        let stats = store.store().stats();
        stats.iter().all(|(_, stats)| stats.blocks_in_use == 0)
    });
    // Again and again: a write to the disk that is under way keeps its block until it is done.
    settled("nothing is left", || {
        store.store().tiers().iter().all(|tier| {
            tier.flush();
            (tier.stats().blocks, tier.stats().used_bytes) == (0, 0)
        })
    });
    assert!(
        store
            .store()
            .stats()
            .iter()
            .all(|(_, stats)| stats.corrupt == 0)
    );
    store.close();
    steps
}

#[test]
fn an_engine_gets_from_the_disk_what_memory_has_lost() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvbm.sock");
    let settings = settings(dir.path(), 128, 512);
    let server = StoreServer::start(&path, Arc::new(Store::new(&settings).unwrap())).unwrap();
    let mut engine = Engine::new(&path, 48);
    let ids: Vec<u32> = (0..48).collect();
    let chain: Vec<Digest> = (0..48).map(digest).collect();
    engine
        .client
        .offload(None, &chain, &engine.pages, &ids)
        .unwrap();
    server.store().persist(None).unwrap();
    server.store().host().flush();
    assert_eq!(server.store().host().stats().blocks, 0);
    engine.wipe();
    // Of the first request that asks: look-up and lease do not wait, the load does.
    assert_eq!(engine.client.lookup(&chain).unwrap(), 48);
    let mut lease = engine
        .client
        .lease(&chain)
        .unwrap()
        .expect("the whole chain");
    lease.load(&engine.pages, &ids, 0, 2).unwrap();
    lease.release();
    for part in 0..2 {
        let right = engine.buffers[part].iter().enumerate();
        assert!(
            right
                .clone()
                .all(|(at, &byte)| byte == ((at / 4000) * 3 + part) as u8)
        );
    }
    settled("nothing is in use", || {
        let stats = server.store().stats();
        stats.iter().all(|(_, stats)| stats.blocks_in_use == 0)
    });
    // A block in the middle that only memory has, or only the disk.
    server.store().host().flush();
    server.store().nvme().unwrap().flush();
    engine
        .client
        .offload(None, &chain[..30], &engine.pages, &ids[..30])
        .unwrap();
    server.store().persist(None).unwrap();
    let host = server.store().host();
    let id = host.open(&namespace("m")).unwrap();
    assert_eq!(host.evict(id, &chain[10..20]), 10);
    assert_eq!(engine.client.lookup(&chain).unwrap(), 30);
    let mut lease = engine
        .client
        .lease(&chain[..30])
        .unwrap()
        .expect("30 blocks");
    lease.load(&engine.pages, &ids[..30], 0, 2).unwrap();
    lease.release();
    engine.client.hint(&chain, &Hints::default()).unwrap();
}

#[test]
fn a_block_that_goes_bad_on_the_disk_fails_the_load_that_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvbm.sock");
    let settings = settings(dir.path(), 64, 512);
    let server = StoreServer::start(&path, Arc::new(Store::new(&settings).unwrap())).unwrap();
    let engine = Engine::new(&path, 8);
    let ids: Vec<u32> = (0..8).collect();
    let chain: Vec<Digest> = (0..8).map(digest).collect();
    engine
        .client
        .offload(None, &chain, &engine.pages, &ids)
        .unwrap();
    server.store().persist(None).unwrap();
    server.store().host().flush();
    let slabs = dir.path().join("nvme/slabs");
    let file = std::fs::OpenOptions::new().write(true).open(slabs).unwrap();
    let bytes = file.metadata().unwrap().len();
    for slot in (0..bytes / SLOT).map(|slot| slot * SLOT) {
        file.write_all_at(&[0xEE; 16], slot + 200).unwrap();
    }
    let mut lease = engine
        .client
        .lease(&chain)
        .unwrap()
        .expect("they seem to be there");
    let error = lease.load(&engine.pages, &ids, 0, 2).unwrap_err();
    assert!(matches!(error, kvmesh_kvbm::Error::Lost(_)), "{error}");
    lease.release();
    settled("all are found out", || {
        server.store().stats()[1].1.corrupt == 8
    });
    assert_eq!(engine.client.lookup(&chain).unwrap(), 0);
    settled("nothing is in use", || {
        let stats = server.store().stats();
        stats.iter().all(|(_, stats)| stats.blocks_in_use == 0)
    });
    server.store().host().flush();
    assert_eq!(server.store().host().stats().used_bytes, 0);
}

#[test]
fn a_disk_that_goes_away_takes_the_tier_out_until_it_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 32, 200);
    for number in 0..100 {
        store.put(digest(number), &content(number)).unwrap();
    }
    store.flush().unwrap();
    let (place, away) = (dir.path().join("nvme"), dir.path().join("away"));
    std::fs::rename(&place, &away).unwrap();
    // Something else is there, so that the tier cannot make itself anew.
    std::fs::write(&place, b"").unwrap();
    let problem = || store.store().health().unwrap().problem;
    settled("it is noticed", || problem().is_some());
    let mut out = vec![0; BLOCK + 4000];
    let found = (0..100).filter(|&n| store.get(digest(n), &mut out).unwrap().is_some());
    assert!(found.count() <= 32, "memory alone");
    store.put(digest(500), &content(500)).unwrap();
    assert!(store.flush().is_err());
    std::fs::remove_file(&place).unwrap();
    std::fs::rename(&away, &place).unwrap();
    settled("it comes back", || problem().is_none());
    let health = store.store().health().unwrap();
    assert_eq!(health.outages, 1);
    assert!(health.recovered >= 100);
    for number in 0..100 {
        assert!(store.get(digest(number), &mut out).unwrap().is_some());
        assert_eq!(out, content(number));
    }
    store.close();
}

#[test]
fn two_stores_do_not_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(dir.path(), 32, 64);
    let second = BlockStore::new(&settings(dir.path(), 32, 64), 8000).unwrap();
    let problem = || second.store().health().unwrap().problem;
    assert!(problem().is_some_and(|why| why.contains("kvbm.nvme.path")));
    second.put(digest(1), &content(1)).unwrap();
    first.close();
    settled("the other takes it over", || problem().is_none());
    second.close();
}
