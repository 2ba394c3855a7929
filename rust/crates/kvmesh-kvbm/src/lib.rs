//! The KV block manager below the device: blocks of KV cache in tiers, found by digest.
//!
//! * [`tiers`] holds the contract of a tier and its implementations.
//! * [`block`] is a block's life in types: reserved, filled, registered and leased, weak. Only a whole block can be
//!   registered, only a registered one leased, and every step undoes itself when it is dropped.
//! * [`image`] is a block as bytes: a header that proves what it is, then the segments it checks; `slot` is the order
//!   in which processes read and write them in shared memory.
//! * [`control`] joins the process that owns the tiers and the engines of its node: requests over a unix socket, bytes
//!   through shared memory.
//! * [`store`] makes one of a node's tiers; [`embedded`] is that within one process, block by block.
//! * [`latency`] counts how long what takes.
//! * [`eviction`] decides what leaves a full tier.

pub mod arena;
pub mod block;
pub mod control;
mod copy;
pub mod embedded;
mod error;
pub mod image;
pub mod journal;
pub mod latency;
mod namespace;
mod pages;
mod slot;
pub mod store;
mod sync;
pub mod tiers;

pub use kvmesh_eviction as eviction;

pub use copy::{PageError, Pages};
pub use error::{Error, Result};
pub use kvmesh_core::Digest;
pub use namespace::Namespace;
