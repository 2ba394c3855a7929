//! What an engine reports as wrong is dropped everywhere it was copied from.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::{Engine, SLOT, digest, namespace, settings, settled};
use kvmesh_kvbm::control::StoreServer;
use kvmesh_kvbm::store::Store;
use kvmesh_kvbm::tiers::Tier;
use kvmesh_kvbm::{Digest, Error};

/// Of an image, a place in its first segment.
const INSIDE: u64 = 4096 + 100;

#[test]
fn copies_of_what_an_engine_found_wrong_are_checked_and_only_bad_ones_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvbm.sock");
    let settings = settings(dir.path(), 64, 512);
    let server = StoreServer::start(&path, Arc::new(Store::new(&settings).unwrap())).unwrap();
    let store = server.store();
    let engine = Engine::new(&path, 8);
    let ids: Vec<u32> = (0..8).collect();
    let chain: Vec<Digest> = (0..8).map(digest).collect();
    let offloaded = engine.client.offload(None, &chain, &engine.pages, &ids);
    assert_eq!(offloaded.unwrap().stored, 8);
    store.persist(None).unwrap();

    // Both copies of block 3 go bad, and of block 5 the one in memory.
    let host: Arc<dyn Tier> = store.host().clone();
    let id = host.open(&namespace("m")).unwrap();
    let arena = store.host().arena().descriptor().try_clone_to_owned();
    let arena = memmap2::MmapOptions::new()
        .len(64 * SLOT as usize)
        .map_raw(&std::fs::File::from(arena.unwrap()))
        .unwrap();
    for block in [3, 5] {
        let slot = host.hold(id, &chain[block]).unwrap();
        // SAFETY: inside the mapping, and nobody else accesses the arena now.
        unsafe { *arena.as_mut_ptr().add((slot.0 + INSIDE) as usize) ^= 0x10 };
        host.release(&[slot]);
    }
    let slabs = dir.path().join("nvme/slabs");
    let images = std::fs::read(&slabs).unwrap();
    let of_three = images.chunks_exact(SLOT as usize).position(|image| {
        (image[..4096].windows(Digest::LEN)).any(|bytes| bytes == chain[3].as_bytes())
    });
    let file = std::fs::OpenOptions::new().write(true).open(slabs).unwrap();
    let place = of_three.unwrap() as u64 * SLOT + INSIDE;
    file.write_all_at(&[0xEE; 16], place).unwrap();

    for part in [0..5, 5..8] {
        let mut lease = engine.client.lease(&chain[part.clone()]).unwrap().unwrap();
        let error = lease.load(&engine.pages, &ids[part], 0, 2).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        lease.release();
    }
    let corrupt = || -> Vec<u64> {
        let stats = store.stats();
        stats.iter().map(|(_, stats)| stats.corrupt).collect()
    };
    settled("the bad copy on the disk is found", || corrupt() == [2, 1]);
    let nvme = store.nvme().unwrap();
    settled("it is dropped", || nvme.stats().blocks == 7);
    // Block 5 comes up from its good copy; of block 3 there is none left.
    settled("the chain ends before it", || {
        engine.client.lookup(&chain).unwrap() == 3
    });
    let mut lease = engine.client.lease(&chain[5..]).unwrap().unwrap();
    lease.load(&engine.pages, &ids[5..], 0, 2).unwrap();
    lease.release();
    assert_eq!(corrupt(), [2, 1]);
    settled("nothing is in use", || {
        let stats = store.stats();
        stats.iter().all(|(_, stats)| stats.blocks_in_use == 0)
    });
}
