//! What a router is to the simulator: it hears what a real one would hear, and places requests.

use std::rc::Rc;

use crate::{store::Change, trace::Request};

/// Where a request runs. Both are the same for an aggregated worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The request's position in the trace.
    pub request: usize,
    /// Computes the prompt.
    pub prefill: usize,
    /// Generates.
    pub decode: usize,
}

/// A router under simulation. `now` is in milliseconds. After every call the simulator carries out what the call
/// added to `placements`; a router may hold a request back and place it in a later call.
pub trait Router {
    /// A request has come; `id` is its position in the trace.
    fn arrived(&mut self, now: f64, id: usize, request: &Request, placements: &mut Vec<Placement>);

    /// Its prompt has been computed.
    fn prefilled(&mut self, now: f64, id: usize, placements: &mut Vec<Placement>);

    /// Its KV has reached the decode worker. Only of split requests.
    fn transferred(&mut self, _now: f64, _id: usize, _placements: &mut Vec<Placement>) {}

    /// It is over, with this many tokens generated.
    fn finished(&mut self, now: f64, id: usize, output: u32, placements: &mut Vec<Placement>);

    /// A worker has cached `chain[from..]`, whose blocks before `from` it had.
    fn stored(&mut self, now: f64, worker: usize, chain: &Rc<[u64]>, from: usize, to: usize);

    /// A worker has evicted blocks.
    fn removed(&mut self, now: f64, worker: usize, hashes: &[u64]);

    /// The contents of a node's store have changed, or, where that many nodes have one, of the network's.
    fn kept(&mut self, _now: f64, _node: usize, _change: &Change) {}

    /// Adds the requests that it has refused since the last call; they are over.
    fn take_refused(&mut self, _into: &mut Vec<usize>) {}

    /// When it wants to be called without cause.
    fn wakes_at(&self, _now: f64) -> Option<f64> {
        None
    }

    /// The time it asked for is there.
    fn wake(&mut self, _now: f64, _placements: &mut Vec<Placement>) {}
}
