//! A discrete-event simulator of a mesh: engines with continuous batching, chunked prefill and a paged prefix
//! cache, KVBM tiers, P/D transfer and lagging KV events, under any [`Router`](router::Router).
//!
//! Time is simulated milliseconds; chance comes from seeds. The same inputs give the same outcome.

pub mod cache;
pub mod cli;
pub mod cluster;
pub mod command;
pub mod engine;
mod error;
mod event;
pub mod fit;
pub mod formats;
pub mod job;
pub mod mesh;
pub mod rates;
pub mod report;
pub mod router;
mod run;
pub mod store;
pub mod synthetic;
pub mod timeline;
pub mod timing;
pub mod trace;
pub mod watch;

use std::io::Write;

pub use error::{Error, Result};

/// Writes to stdout; a reader that left is an error, not a panic.
fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|error| Error::invalid(format!("stdout: {error}")))
}
