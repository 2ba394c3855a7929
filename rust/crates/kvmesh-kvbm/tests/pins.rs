//! Pins: kept within a budget, until their time.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Engine, SLOT, digest, namespace, settings, settled};
use kvmesh_kvbm::Digest;
use kvmesh_kvbm::control::StoreServer;
use kvmesh_kvbm::store::{PinError, Settings, Store};
use kvmesh_kvbm::tiers::Tier;

#[test]
fn pins_keep_blocks_within_a_budget_until_their_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::new(&Settings {
        pin_bytes: 10 * SLOT,
        ..settings(dir.path(), 64, 512)
    })
    .unwrap();
    let id = store.open(&namespace("m")).unwrap();
    let slot = store.host().layout(id).slot_bytes() as u64;
    assert_eq!(slot, SLOT);
    let chain: Vec<Digest> = (0..8).map(digest).collect();
    let forever = Duration::MAX;
    assert_eq!(store.pin("a", "m", &chain, forever), Err(PinError::Absent));
    let put = |chain: &[Digest]| {
        let host: Arc<dyn Tier> = store.host().clone();
        for digest in chain {
            let room = kvmesh_kvbm::block::reserve(&host, id, None, &[*digest]).pop();
            if let Some(kvmesh_kvbm::block::Reservation::Room(room)) = room {
                let filled = room.fill(&[&[1; 4000], &[2; 4000]]).unwrap();
                kvmesh_kvbm::block::register(vec![filled]);
            }
        }
    };
    put(&chain);
    let pinned = store.pin("a", "", &chain, forever).unwrap();
    assert_eq!((pinned.blocks, pinned.bytes), (8, 8 * SLOT));
    let refused = store.pin("a", "m", &chain[..3], forever).unwrap_err();
    assert!(
        refused.to_string().contains("3 more") || matches!(refused, PinError::OverBudget { .. })
    );
    let brief = store
        .pin("b", "m", &chain[..3], Duration::from_millis(1))
        .unwrap();
    settled("its time is over", || store.pinned().0 == 1);
    assert!(!store.unpin(brief.receipt));
    for number in 100..400 {
        put(&[digest(number)]);
    }
    assert_eq!(
        store.host().lookup(id, &chain),
        8,
        "through a flood of others"
    );
    assert!(store.unpin(pinned.receipt));
    assert!(!store.unpin(pinned.receipt));
    assert_eq!(store.pinned(), (0, 0));
    settled("they may leave again", || {
        store.host().stats().blocks_in_use == 0
    });
}

#[test]
fn a_pin_whose_time_is_over_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kvbm.sock");
    let settings = Settings {
        pin_bytes: 1 << 30,
        nvme: None,
        ..settings(dir.path(), 64, 0)
    };
    let server = StoreServer::start(&path, Arc::new(Store::new(&settings).unwrap())).unwrap();
    let engine = Engine::new(&path, 64);
    let ids: Vec<u32> = (0..64).collect();
    let chain: Vec<Digest> = (0..64).map(digest).collect();
    let full = engine.client.offload(None, &chain, &engine.pages, &ids);
    let kept = chain[..full.unwrap().stored].to_vec();
    let (store, time) = (server.store(), Duration::from_millis(200));
    assert_eq!(store.pin("a", "", &kept, time).unwrap().blocks, kept.len());
    let other = [digest(1000)];
    // Nobody asks about pins: whoever needs the room gets it.
    settled("there is room for another", || {
        let done = engine
            .client
            .offload(None, &other, &engine.pages, &ids[..1]);
        done.unwrap().stored == 1
    });
}
