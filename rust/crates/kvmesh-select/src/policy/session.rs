//! `session`: all of a session on one worker, and few sessions moved when workers come or go: the worker with the
//! highest hash of session and worker wins (rendezvous hashing: Thaler and Ravishankar, 1998). A request
//! without a session goes to the least loaded.

use rand::RngCore;

use super::Policy;
use crate::types::{Candidate, Request};

pub struct Session;

impl Policy for Session {
    fn costs(
        &mut self,
        request: &Request,
        candidates: &[Candidate],
        _: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        costs.extend(candidates.iter().map(|candidate| match request.session {
            0 => f64::from(candidate.requests),
            session => mix(session ^ mix(candidate.key)) as f64,
        }));
    }
}

/// The finaliser of MurmurHash3.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}
