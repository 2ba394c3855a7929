//! Where a request runs: what each placement would take and cost, in milliseconds, and the choice.
//!
//! No clock, no chance and no I/O of its own: times, index look-ups and a random source are passed in, so that
//! service, simulator and replay decide alike, bit for bit.
//!
//! **Use.** One [`Selector`] a model. The caller tells it of workers ([`Selector::add_worker`]), of requests
//! ([`Selector::submit`]), of how they fare ([`Selector::report`]) and of KV events
//! ([`Selector::stored`], [`Selector::removed`]). Any of these may make placements, of requests held before too: they are
//! found in [`Context::placed`]. A request is placed, refused ([`Context::refused`]) or withdrawn, exactly once. [`Selector::wakes_at`] says when to call [`Selector::tick`] if nothing happens.
//!
//! **How.** A worker is known by its leases and [`Slots`], its queue of prompts, its class' learned [`rates`],
//! what its cache evicts, and blocks it will have (speculation). From these every candidate gets [`Terms`]; a
//! [`policy`] turns candidates into costs, and [`choose`] costs into a winner. `kv` places waiting requests jointly
//! ([`plan`]). When no worker has room, requests wait in line: by priority, tenant and deadline ([`Admission`]).

mod accuracy;
mod active;
mod admission;
mod admit;
mod adopt;
mod candidates;
mod cast;
pub mod choose;
mod config;
mod cost;
mod dispatch;
mod drain;
mod eviction;
mod explain;
pub mod fit;
mod held;
mod joint;
mod line;
mod links;
mod members;
mod pace;
pub mod plan;
pub mod policy;
mod queue;
pub mod rates;
mod reports;
pub mod saved;
mod scratch;
mod select;
mod selector;
mod shadow;
mod slots;
mod speculation;
mod tail;
mod types;
mod urgency;
mod worker;

pub use accuracy::Errors;
pub use admission::{Admission, Reason, Refused};
pub use adopt::Adopted;
pub use config::Config;
pub use cost::Prices;
pub use policy::{Policy, PolicyName, UnknownPolicy};
pub use rates::{Law, Probe};
pub use reports::Report;
pub use selector::{Context, NoWorker, Selector};
pub use shadow::{GivenRates, Shadow};
pub use slots::{Changed, Lease, Leases, Progress, Slots};
pub use types::{
    Candidate, Found, Lookup, Placed, Request, Role, Shadowed, Terms, WorkerId, WorkerSpec,
};
