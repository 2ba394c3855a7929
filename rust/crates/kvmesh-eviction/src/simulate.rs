//! Runs a policy over a recorded or made-up trace.

use rustc_hash::FxHashMap;

use crate::{BlockId, EvictionPolicy, Hints, Key, PrefixCache, Use};

/// One request of a trace.
#[derive(Debug, Clone)]
pub struct Request {
    /// When it came, in seconds; never decreases from one request to the next.
    pub seconds: f64,
    /// Tokens of its prompt.
    pub tokens: u64,
    /// The blocks of its prompt; the last may be filled in part.
    pub chain: Vec<Key>,
    /// What its client said.
    pub hints: Hints,
}

/// What a policy reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Tokens of the counted requests.
    pub tokens: u64,
    /// Of these, found in the cache: the longest prefix of each request.
    pub hit_tokens: u64,
    /// Block uses of all requests.
    pub touches: u64,
}

impl Outcome {
    /// Hit tokens a token.
    pub fn hit_rate(&self) -> f64 {
        self.hit_tokens as f64 / self.tokens.max(1) as f64
    }
}

/// Sends the requests through one cache of `capacity` blocks of `block_tokens` tokens. All blocks of a request are
/// offered to the cache. The requests before `counted_from` only fill it.
pub fn simulate(
    trace: &[Request],
    block_tokens: u64,
    policy: Box<dyn EvictionPolicy>,
    capacity: usize,
    counted_from: usize,
) -> Outcome {
    let mut cache = PrefixCache::new(policy, capacity);
    let mut ids: FxHashMap<Key, BlockId> = FxHashMap::default();
    let mut keys: Vec<Key> = Vec::new();
    let mut vacant: Vec<BlockId> = Vec::new();
    let mut outcome = Outcome::default();
    let mut evicted = Vec::new();
    for (number, request) in trace.iter().enumerate() {
        let mut parent = None;
        let mut hits = 0;
        for (place, &key) in request.chain.iter().enumerate() {
            let block = *ids.entry(key).or_insert_with(|| {
                vacant.pop().unwrap_or_else(|| {
                    keys.push(key);
                    BlockId(keys.len() as u32 - 1)
                })
            });
            keys[block.at()] = key;
            let at = Use {
                key,
                parent: place.checked_sub(1).map(|before| request.chain[before]),
                tail: place + 1 == request.chain.len(),
                tick: number as u64 + 1,
                seconds: request.seconds,
                hints: request.hints,
            };
            hits += u64::from(cache.touch(block, parent, &at, &mut evicted));
            if !cache.holds(block) {
                evicted.push(block);
            }
            for gone in evicted.drain(..) {
                ids.remove(&keys[gone.at()]);
                vacant.push(gone);
            }
            parent = cache.holds(block).then_some(block);
        }
        outcome.touches += request.chain.len() as u64;
        if number >= counted_from {
            outcome.tokens += request.tokens;
            outcome.hit_tokens += request.tokens.min(hits * block_tokens);
        }
    }
    outcome
}
