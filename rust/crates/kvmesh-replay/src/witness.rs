//! Policies from outside: what they said is noted, and said again in a replay, where they are not.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use kvmesh_select::{Candidate, Policy, Request, choose::Margin};
use rand_chacha::rand_core::RngCore;

/// The costs of each judgement in a call, in order.
#[derive(Clone, Default)]
pub struct Judged(Arc<Mutex<VecDeque<Vec<f64>>>>);

impl Judged {
    fn with<R>(&self, what: impl FnOnce(&mut VecDeque<Vec<f64>>) -> R) -> R {
        what(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All since the last time.
    pub fn take(&self) -> Vec<Vec<f64>> {
        self.with(|all| all.drain(..).collect())
    }

    /// What is to be said in the call that begins.
    pub fn begin(&self, judged: Vec<Vec<f64>>) {
        self.with(|all| *all = judged.into());
    }
}

/// A policy that is there, and heard.
pub struct Witnessed {
    pub inner: Box<dyn Policy>,
    pub judged: Judged,
}

impl Policy for Witnessed {
    fn costs(
        &mut self,
        request: &Request,
        candidates: &[Candidate],
        chance: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        let before = costs.len();
        self.inner.costs(request, candidates, chance, costs);
        self.judged
            .with(|all| all.push_back(costs[before..].to_vec()));
    }

    fn margin(&self) -> Margin {
        self.inner.margin()
    }

    fn placed(&mut self, winner: &Candidate) {
        self.inner.placed(winner);
    }
}

/// A policy that is not there any more.
pub struct Quoted(pub Judged);

impl Policy for Quoted {
    fn costs(
        &mut self,
        _: &Request,
        candidates: &[Candidate],
        _: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        let said = self.0.with(VecDeque::pop_front).unwrap_or_default();
        if said.len() == candidates.len() {
            costs.extend(said);
        } else {
            // The comparison with the log will tell.
            costs.extend(candidates.iter().map(|one| one.terms.total()));
        }
    }
}
