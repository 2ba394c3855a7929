//! A lock that is one bit of a word, for words too many to have a mutex each. Held for tens of
//! nanoseconds, and by writers only: readers never look at it.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::sync::{AtomicU32, spin_loop, yield_now};

/// The bit. Whoever holds it may change the other bits.
pub const LOCKED: u32 = 1 << 31;

/// Tries before the thread lets others run: the holder may have been preempted.
const SPINS: u32 = 64;

/// Sets the bit as soon as nobody else has. Who is `alone` has no need of it.
#[inline]
pub fn lock(word: &AtomicU32, alone: bool) -> Locked<'_> {
    if alone {
        return Locked { word, bit: 0 };
    }
    let free = word.load(Relaxed) & !LOCKED;
    if word
        .compare_exchange_weak(free, free | LOCKED, Acquire, Relaxed)
        .is_err()
    {
        wait(word);
    }
    Locked { word, bit: LOCKED }
}

#[cold]
fn wait(word: &AtomicU32) {
    for tries in 1.. {
        let free = word.load(Relaxed) & !LOCKED;
        if word
            .compare_exchange_weak(free, free | LOCKED, Acquire, Relaxed)
            .is_ok()
        {
            return;
        }
        if tries % SPINS == 0 {
            yield_now();
        } else {
            spin_loop();
        }
    }
}

/// A word whose bit this thread has set; cleared on drop.
pub struct Locked<'a> {
    word: &'a AtomicU32,
    bit: u32,
}

impl Locked<'_> {
    /// The other bits.
    pub fn get(&self) -> u32 {
        self.word.load(Relaxed) & !LOCKED
    }

    /// Changes the other bits.
    pub fn set(&self, bits: u32) {
        debug_assert_eq!(bits & LOCKED, 0);
        self.word.store(bits | self.bit, Relaxed);
    }
}

impl Drop for Locked<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.bit != 0 {
            self.word.store(self.get(), Release);
        }
    }
}
