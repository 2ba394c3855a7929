//! `power-of-two`: the less loaded of two chosen by chance (Mitzenmacher, "The power of two choices in
//! randomized load balancing", 2001); all others cost infinitely much.

use rand::{Rng, RngCore};

use super::Policy;
use crate::types::{Candidate, Request};

pub struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn costs(
        &mut self,
        _: &Request,
        candidates: &[Candidate],
        chance: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        let count = candidates.len();
        costs.extend(candidates.iter().map(|_| f64::INFINITY));
        let first = chance.random_range(0..count);
        let second = (first + chance.random_range(1..count.max(2))) % count;
        for at in [first, second] {
            costs[at] = f64::from(candidates[at].requests);
        }
    }
}
