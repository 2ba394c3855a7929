//! Decisions made again: a log of all that a selector was told, and what reads it.
//!
//! A [`Driver`] owns a selector with its chance and its look-ups, and every call goes through it as an [`Input`]. With a [`Log`]
//! it writes each call, what was looked up meanwhile and what came of it, one JSON line each. [`replay()`] makes the same
//! calls again, compares, and asks other policies and rates at every decision what they would have done.
//!
//! The format and why it is so: `docs/adr/0014-decision-log.md`.

mod driver;
mod error;
mod files;
mod input;
mod line;
mod log;
mod lookups;
mod regret;
mod replay;
mod witness;

pub use driver::{Changes, Driver, UnknownName};
pub use error::{ReplayError, Result};
pub use input::{Answer, Input};
pub use log::{Log, LogConfig, LogStats};
pub use regret::Tally;
pub use replay::{Difference, Options, Report, replay};
