//! What evicting a cached block costs later.
//!
//! A sample of evicted blocks is remembered; how many of them are asked for again says how likely the next one will be.
//! A worker that evicts faster than others has younger, and so more valuable, blocks at its cache's end: the chance that
//! an idle block is asked for again falls about as the inverse of its age.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

/// One block in this many is remembered, chosen by its hash.
const SAMPLE: u64 = 8;
/// Evicted blocks remembered.
const MEMORY: usize = 16_384;
/// Discount of the past by each sampled eviction or return.
const KEEP: f64 = 0.9995;
/// Milliseconds over which a worker's evictions are averaged.
const WINDOW_MS: f64 = 300_000.0;

/// The chance that an evicted block is asked for again, learned over all workers.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Returns {
    gone: FxHashMap<u64, u64>,
    order: VecDeque<(u64, u64)>,
    number: u64,
    evicted: f64,
    returned: f64,
}

impl Returns {
    /// Blocks that no worker asked for has any more.
    pub fn removed(&mut self, hashes: &[u64]) {
        for &hash in hashes.iter().filter(|hash| *hash % SAMPLE == 0) {
            self.number += 1;
            self.evicted = self.evicted * KEEP + 1.0;
            self.returned *= KEEP;
            self.gone.insert(hash, self.number);
            self.order.push_back((hash, self.number));
            if self.order.len() > MEMORY {
                if let Some((oldest, number)) = self.order.pop_front() {
                    if self.gone.get(&oldest) == Some(&number) {
                        self.gone.remove(&oldest);
                    }
                }
            }
        }
    }

    /// Blocks that a prompt needs and that are cached nowhere.
    pub fn missed(&mut self, hashes: &[u64]) {
        for hash in hashes.iter().filter(|hash| *hash % SAMPLE == 0) {
            if self.gone.remove(hash).is_some() {
                self.returned += 1.0;
            }
        }
    }

    /// The chance, from 0 to 1; 0 before anything was evicted.
    pub fn chance(&self) -> f64 {
        (self.returned / (self.evicted + 100.0)).min(1.0)
    }
}

/// One worker's cache as its events show it.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Residency {
    /// Blocks it has cached.
    pub blocks: u64,
    rate: f64,
    at: f64,
}

impl Residency {
    /// It has cached more.
    pub fn stored(&mut self, count: usize) {
        self.blocks += count as u64;
    }

    /// It has nothing left.
    pub fn cleared(&mut self) {
        self.blocks = 0;
    }

    /// It has evicted some.
    pub fn removed(&mut self, now: f64, count: usize) {
        self.blocks = self.blocks.saturating_sub(count as u64);
        self.rate = self.rate(now) + count as f64;
        self.at = now;
    }

    /// Evictions of late, in blocks a window.
    pub fn rate(&self, now: f64) -> f64 {
        self.rate * (-(now - self.at) / WINDOW_MS).exp()
    }

    /// Of `count` new blocks in a pool of `capacity`, those that push out others.
    pub fn evicted_by(&self, count: u32, in_use: u64, capacity: u32) -> f64 {
        let held = self.blocks.max(in_use);
        (held + u64::from(count))
            .saturating_sub(u64::from(capacity))
            .min(u64::from(count)) as f64
    }
}
