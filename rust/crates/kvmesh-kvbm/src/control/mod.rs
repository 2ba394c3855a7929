//! The way between the process that owns the tiers and the engines of its node.
//!
//! Requests and answers go over a unix socket, one at a time a connection; bytes go through the arena, which the engine
//! maps when it connects. The connection is the lease: when it ends, for whatever reason, everything reserved or
//! leased over it is released.

mod client;
mod lease;
mod server;
mod wire;

pub use client::{Offloaded, StoreClient};
pub use lease::ClientLease;
pub use server::StoreServer;
