//! `least-loaded`: the fewest live requests; blind to caches.

use rand::RngCore;

use super::Policy;
use crate::types::{Candidate, Request};

pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn costs(
        &mut self,
        _: &Request,
        candidates: &[Candidate],
        _: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        costs.extend(
            candidates
                .iter()
                .map(|candidate| f64::from(candidate.requests)),
        );
    }
}
