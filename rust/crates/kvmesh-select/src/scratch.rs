//! What a decision works on; kept, so that no decision allocates it anew.

use crate::{
    explain::Rejected,
    types::{Candidate, Found, WorkerId},
};

/// Used again by every decision.
#[derive(Default)]
pub struct Scratch {
    pub found: Vec<Found>,
    /// By worker: leading blocks by tier, speculation included.
    pub depths: Vec<[u32; 4]>,
    /// By worker: evictions of late, in blocks a window.
    pub evictions: Vec<f64>,
    pub mean_evictions: f64,
    /// When that was, and after how many of their changes.
    pub evictions_of: Option<(f64, u64)>,
    /// Decode workers as partners of any prefill worker.
    pub partners: Vec<Candidate>,
    /// Of each, the factor of the best link that a prefill worker of the request has to it.
    pub links: Vec<f64>,
    /// Of these, of every pool, those that were not chosen.
    pub rejected: Vec<Rejected>,
    /// Costs are milliseconds, and those of some pairs are not those of their halves: links differ.
    pub uneven: bool,
    pub candidates: Vec<Candidate>,
    /// Those of all requests of a plan.
    pub planned: Vec<Candidate>,
    pub costs: Vec<f64>,
}

impl Scratch {
    /// Leading blocks of the request last looked up that a worker sees, by tier.
    pub fn depth(&self, worker: WorkerId) -> [u32; 4] {
        self.depths[worker.index as usize]
    }
}
