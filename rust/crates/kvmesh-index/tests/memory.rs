//! The cap against the allocator's own count, not the index's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kvmesh_core::Tier;
use kvmesh_index::{Matches, PrefixIndex};

mod prompts;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is; only a number is kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ENGINES: u64 = 8;

/// Many prompts of many engines, far more than fit.
#[test]
fn the_index_takes_no_more_than_its_cap() {
    for cap in [100_000, 1 << 20] {
        let index = PrefixIndex::new(Some(cap));
        let engines: Vec<_> = (0..ENGINES)
            .map(|n| {
                index
                    .add_engine(&format!("engine-{n}"), None)
                    .expect("room for it")
            })
            .collect();
        let mut matches = Matches::new();
        // Names, locks and tallies of holders lie beside the blocks, and so does what a match writes to.
        let mut store = |number: u64| {
            let hashes: Vec<u64> = (0..40).map(|at| prompts::block(number / 3, at)).collect();
            let engine = engines[(number % ENGINES) as usize];
            index
                .store(engine, &hashes, None, Tier::Device)
                .expect("a live engine");
            index.matches(&hashes, &mut matches);
        };
        (0..ENGINES).for_each(&mut store);
        let beside = LIVE.load(Relaxed) - index.stats().bytes;
        for number in ENGINES..30_000 {
            store(number);
            let taken = LIVE.load(Relaxed) - beside;
            assert!(taken <= cap, "{taken} of {cap} bytes");
        }
        let stats = index.stats();
        assert!(
            stats.forgotten > 0,
            "{} bytes are room for all",
            stats.bytes
        );
        assert!(LIVE.load(Relaxed) - beside > cap / 2, "the cap is used");
    }
}
