//! Policies take memory for the blocks in the cache and a fixed number beyond, not for all blocks ever seen.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvmesh_eviction::{BlockId, Hints, Key, Policy, PrefixCache, Use};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it is; only a number is kept beside.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes a policy holds after `uses` uses, each of another block, with `capacity` blocks in the cache.
fn bytes_after(policy: Policy, capacity: u32, uses: u64) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    let mut cache = PrefixCache::new(policy.build(), capacity as usize);
    let mut vacant: Vec<BlockId> = (0..=capacity).map(BlockId).collect();
    for tick in 1..=uses {
        let block = vacant.pop().expect("one more number than blocks");
        let at = Use {
            key: Key(tick.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            parent: None,
            tail: true,
            tick,
            seconds: tick as f64,
            hints: Hints::default(),
        };
        cache.touch(block, None, &at, &mut vacant);
        if !cache.holds(block) {
            vacant.push(block);
        }
    }
    LIVE.load(Ordering::Relaxed) - before
}

#[test]
fn memory_is_bounded_by_the_blocks_in_the_cache() {
    for policy in Policy::ALL {
        let some = bytes_after(policy, 1000, 100_000);
        let more = bytes_after(policy, 1000, 400_000);
        // Tables grow by doubling.
        assert!(more <= some * 2, "{policy:?}: {some}, then {more}");
        // About a kilobyte for a block, which has 64 KiB or more, beside what it takes at the least.
        let large = bytes_after(policy, 20_000, 400_000);
        assert!(large < some + 20_000 * 1500, "{policy:?}: {large}");
    }
}
