//! What the workers of a mesh report and what the router asks, made from a trace of real conversations.
//!
//! Every block of the trace is 8 chained index blocks. A worker keeps the last C blocks it used and evicts a
//! chain's tail first. A request goes with 70 % to the home worker of its conversation (a hash of its second
//! block), else to any. It looks its prompt up, then its worker stores what it did not hold and removes
//! what that evicts. Copies of the trace share its first block and nothing else.

use std::{collections::VecDeque, ops::Range, path::Path};

use dynamo_kv_router::protocols::LocalBlockHash;
use kv_index::{ContentHash, SequenceHash, StoredBlock};
use rustc_hash::FxHashMap;

/// Index blocks in a block of the trace.
const SPLIT: u64 = 8;

/// One request: ranges are positions in the stream's columns.
pub struct Request {
    pub worker: u32,
    /// The whole prompt.
    pub prompt: Range<usize>,
    /// What the worker did not hold of it: its end.
    pub stored: Range<usize>,
    pub parent: Option<u64>,
    /// What storing that evicted, in `Stream::removed`.
    pub removed: Range<usize>,
}

/// Requests in order, and their blocks in the form that each index reads.
pub struct Stream {
    pub workers: u32,
    pub requests: Vec<Request>,
    /// Hashes that name a block and its prefix; hashes of a block's own content; both.
    pub hashes: Vec<u64>,
    pub contents: Vec<LocalBlockHash>,
    pub peer_contents: Vec<ContentHash>,
    pub blocks: Vec<StoredBlock>,
    pub removed: Vec<u64>,
    pub removed_sequence: Vec<SequenceHash>,
}

impl Stream {
    /// Reads the trace at `path` for `workers` workers of `capacity` blocks each, `copies` times.
    pub fn new(path: &Path, workers: u32, capacity: usize, copies: u64) -> Self {
        #[derive(serde::Deserialize)]
        struct Line {
            hash_ids: Vec<u64>,
        }
        let text = std::fs::read_to_string(path).expect("the trace is readable");
        let prompts: Vec<Vec<u64>> = text
            .lines()
            .map(|line| {
                serde_json::from_str::<Line>(line)
                    .expect("a line of the trace")
                    .hash_ids
            })
            .collect();
        let mut stream = Self {
            workers,
            requests: Vec::new(),
            hashes: Vec::new(),
            contents: Vec::new(),
            peer_contents: Vec::new(),
            blocks: Vec::new(),
            removed: Vec::new(),
            removed_sequence: Vec::new(),
        };
        let mut caches: Vec<Cache> = (0..workers).map(|_| Cache::default()).collect();
        let mut seed = 7;
        for copy in 0..copies {
            for prompt in &prompts {
                let ids: Vec<u64> = prompt
                    .iter()
                    .map(|&id| if id == 0 { 0 } else { id + copy * 1_000_000 })
                    .flat_map(|id| (0..SPLIT).map(move |part| id * SPLIT + part))
                    .take(capacity)
                    .collect();
                seed = mix(seed);
                let home = ids.get(SPLIT as usize).map_or(seed, |&second| mix(second));
                let at = if seed % 10 < 7 { home } else { mix(seed) };
                stream.push(
                    (at % u64::from(workers)) as u32,
                    &ids,
                    &mut caches,
                    capacity,
                );
            }
        }
        stream.removed_sequence = stream.removed.iter().copied().map(SequenceHash).collect();
        stream
    }

    fn push(&mut self, worker: u32, ids: &[u64], caches: &mut [Cache], capacity: usize) {
        let start = self.hashes.len();
        for &id in ids {
            let (hash, content) = (mix(id), mix(!id));
            self.hashes.push(hash);
            self.contents.push(LocalBlockHash(content));
            self.peer_contents.push(ContentHash(content));
            self.blocks.push(StoredBlock {
                seq_hash: SequenceHash(hash),
                content_hash: ContentHash(content),
            });
        }
        let cache = &mut caches[worker as usize];
        let held = self.hashes[start..]
            .iter()
            .take_while(|hash| cache.used.contains_key(hash))
            .count();
        for &hash in self.hashes[start..].iter().rev() {
            cache.touch(hash);
        }
        let first_removed = self.removed.len();
        while cache.used.len() > capacity {
            self.removed.extend(cache.evict());
        }
        self.requests.push(Request {
            worker,
            prompt: start..self.hashes.len(),
            stored: start + held..self.hashes.len(),
            parent: held.checked_sub(1).map(|last| self.hashes[start + last]),
            removed: first_removed..self.removed.len(),
        });
    }

    /// Blocks stored and removed in all.
    pub fn operations(&self) -> usize {
        self.requests
            .iter()
            .map(|r| r.stored.len() + r.removed.len())
            .sum()
    }

    /// (worker, block) pairs held after the last request.
    pub fn held(&self) -> usize {
        self.requests.iter().map(|r| r.stored.len()).sum::<usize>() - self.removed.len()
    }
}

/// A worker's blocks by last use.
#[derive(Default)]
struct Cache {
    used: FxHashMap<u64, u64>,
    order: VecDeque<(u64, u64)>,
    clock: u64,
}

impl Cache {
    fn touch(&mut self, hash: u64) {
        self.clock += 1;
        self.used.insert(hash, self.clock);
        self.order.push_back((hash, self.clock));
    }

    /// Drops the oldest entry; the block, unless it was used again since.
    fn evict(&mut self) -> Option<u64> {
        let (hash, clock) = self.order.pop_front()?;
        (self.used.get(&hash) == Some(&clock)).then(|| {
            self.used.remove(&hash);
            hash
        })
    }
}

/// SplitMix64's step (Steele, Lea and Flood, 2014).
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
