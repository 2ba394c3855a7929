//! What would be chosen, for callers that do not want it kept.

use crate::{
    explain::Weighed,
    selector::{Context, NoWorker, Selector},
    types::{Placed, Request},
};

impl Selector {
    /// The placement that a request would have, were it made now: its lease is 0, and nothing that a later decision depends
    /// on has changed. It neither waits nor is it refused while no worker has room.
    pub fn select(
        &mut self,
        request: &Request,
        context: &mut Context<'_>,
    ) -> Result<Placed, NoWorker> {
        if !self.can_place(request) {
            return Err(NoWorker);
        }
        let policy = request.policy.unwrap_or(self.config.policy);
        let keys = [false, true].map(|partners| (policy, partners));
        let memories = keys.map(|key| self.policies.get(&key).map_or(0, |one| one.memory()));
        self.candidates(request, policy, context);
        let at = self.choose(request, policy, false, context);
        for (key, memory) in keys.into_iter().zip(memories) {
            if let Some(one) = self.policies.get_mut(&key) {
                one.recall(memory);
            }
        }
        let Weighed { candidates, costs } = self.cheapest(usize::MAX);
        Ok(Placed {
            request: request.id,
            lease: 0,
            winner: self.scratch.candidates[at],
            policy,
            candidates,
            costs,
            held_ms: 0.0,
            shadows: Vec::new(),
        })
    }
}
