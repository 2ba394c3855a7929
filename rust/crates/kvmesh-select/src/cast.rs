//! What shadows say of a request that is about to be placed.

use std::mem::swap;

use rand::RngCore;

use crate::{
    rates::ClassRates,
    selector::{Context, Selector},
    shadow::{GivenRates, Shadow},
    types::{Candidate, Found, Lookup, Request, Shadowed},
};

/// The look-up of a shadow: nothing that was not looked up before.
struct Again<'a>(&'a mut dyn Lookup);

impl Lookup for Again<'_> {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        self.0.again(blocks, found);
    }
}

impl Selector {
    /// Replaces the policies that look on.
    pub fn set_shadows(&mut self, shadows: Vec<Shadow>) {
        self.shadows = shadows;
    }

    /// What each shadow would choose for a request that is about to be placed on `winner`.
    pub(crate) fn cast_shadows(
        &mut self,
        request: &Request,
        winner: &Candidate,
        context: &mut Context<'_>,
    ) -> Vec<Shadowed> {
        let mut shadows = std::mem::take(&mut self.shadows);
        let cast = shadows
            .iter_mut()
            .filter_map(|shadow| self.cast(shadow, request, winner, context))
            .collect();
        self.shadows = shadows;
        cast
    }

    fn cast(
        &mut self,
        shadow: &mut Shadow,
        request: &Request,
        winner: &Candidate,
        context: &mut Context<'_>,
    ) -> Option<Shadowed> {
        let policy = shadow
            .policy
            .or(request.policy)
            .unwrap_or(self.config.policy);
        let learned = (!shadow.given.is_empty()).then(|| self.give_rates(&shadow.given));
        swap(&mut self.scratch, &mut shadow.scratch);
        swap(&mut self.policies, &mut shadow.policies);
        let mut own = Context {
            now: context.now,
            lookup: &mut Again(context.lookup),
            chance: &mut shadow.chance as &mut dyn RngCore,
            placed: &mut Vec::new(),
            refused: &mut Vec::new(),
        };
        self.candidates(request, policy, &mut own);
        let found = !self.scratch.candidates.is_empty();
        let chosen = found.then(|| {
            let at = self.choose(request, policy, false, &mut own);
            let mut candidates = self.scratch.candidates.iter();
            // With another decode worker: as it was predicted when it was chosen.
            let live = candidates.find(|one| one.is_as(winner)).unwrap_or(winner);
            Shadowed {
                policy,
                choice: self.scratch.candidates[at],
                live: live.terms,
            }
        });
        swap(&mut self.policies, &mut shadow.policies);
        swap(&mut self.scratch, &mut shadow.scratch);
        if let Some(learned) = learned {
            self.rates = learned;
        }
        chosen
    }

    /// Lays given rates over those learned, which it returns.
    fn give_rates(&mut self, given: &GivenRates) -> Vec<ClassRates> {
        let learned = self.rates.clone();
        for (name, &class) in &self.classes {
            if let Some(laws) = given.get(name) {
                self.rates[class].give(laws);
            }
        }
        learned
    }
}
