//! What every kvmesh crate shares: the identity of a block of KV, tiers, and errors.
//!
//! A block is `page_size` tokens. Its [`Digest`] is SGLang's page hash, a SHA-256 chain over the
//! prompt's pages; its [`BlockHash`] is the first 64 bits of that. Both name the block *and* the
//! whole prefix before it, so equal hashes mean equal prefixes.

mod block;
mod error;
mod hash;
mod namespace;
mod set_digest;
#[cfg(target_arch = "x86_64")]
mod sha_x86;
mod tier;

pub use block::{BlockHash, Digest};
pub use error::{Error, ErrorKind, Result};
pub use hash::{HashChain, hash_pages, hash_tokens};
pub use namespace::{event_namespace_seed, namespace_seed};
pub use set_digest::SetDigest;
pub use tier::Tier;
