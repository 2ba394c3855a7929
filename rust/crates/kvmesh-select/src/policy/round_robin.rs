//! `round-robin`: in turn, by stable key, whoever comes and goes.

use rand::RngCore;

use super::Policy;
use crate::types::{Candidate, Request};

#[derive(Default)]
pub struct RoundRobin {
    last: Option<u64>,
}

impl Policy for RoundRobin {
    /// 0 for the next one around the ring of keys, 1 for the others.
    fn costs(
        &mut self,
        _: &Request,
        candidates: &[Candidate],
        _: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        let last = self.last.unwrap_or(u64::MAX);
        let step = |key: u64| key.wrapping_sub(last).wrapping_sub(1);
        let next = candidates.iter().map(|candidate| step(candidate.key)).min();
        let cost = |candidate: &Candidate| f64::from(u8::from(Some(step(candidate.key)) != next));
        costs.extend(candidates.iter().map(cost));
    }

    fn placed(&mut self, winner: &Candidate) {
        self.last = Some(winner.key);
    }

    fn memory(&self) -> u128 {
        self.last.map_or(0, |key| u128::from(key) + 1)
    }

    fn recall(&mut self, memory: u128) {
        self.last = memory.checked_sub(1).map(|key| key as u64);
    }
}
