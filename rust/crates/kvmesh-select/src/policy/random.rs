//! `random`: by chance, all alike.

use rand::RngCore;

use super::Policy;
use crate::types::{Candidate, Request};

pub struct Random;

impl Policy for Random {
    fn costs(
        &mut self,
        _: &Request,
        candidates: &[Candidate],
        _: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        costs.extend(candidates.iter().map(|_| 0.0));
    }
}
