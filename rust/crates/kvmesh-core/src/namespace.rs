//! Seeds that keep the blocks of different tenants and adapters apart.
//!
//! SGLang 0.5.23 seeds two chains. Storage keys, and so KVBM's digests, are seeded by LoRA adapter
//! and salt together (`mem_cache/utils.py`, `storage_namespace_seed`). The hashes in its KV events
//! are seeded by the salt alone (`compute_node_event_hash_values`). Without salt and adapter
//! there is no seed and the two chains are the same.

use sha2::{Digest as _, Sha256};

use crate::Digest;

/// The seed of storage keys for a request's `extra_key` (LoRA adapter) and `cache_salt`.
///
/// `None` without either. An empty string is not the same as an absent one.
pub fn namespace_seed(extra_key: Option<&str>, cache_salt: Option<&str>) -> Option<Digest> {
    if extra_key.is_none() && cache_salt.is_none() {
        return None;
    }
    let mut seed = Sha256::new_with_prefix(b"sglang-cache-namespace-v1");
    for part in [extra_key, cache_salt] {
        match part {
            None => seed.update([0]),
            Some(text) => {
                seed.update([1]);
                seed.update((text.len() as u64).to_le_bytes());
                seed.update(text);
            }
        }
    }
    Some(Digest::new(seed.finalize().into()))
}

/// The seed of the hashes in an engine's KV events for a request's `cache_salt`; `None` without one.
pub fn event_namespace_seed(cache_salt: Option<&str>) -> Option<Digest> {
    let seed = Sha256::new_with_prefix(b"sglang-cache-salt-v1\0").chain_update(cache_salt?);
    Some(Digest::new(seed.finalize().into()))
}
