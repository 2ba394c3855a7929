//! Policies that look on: what they would have chosen in the place of the one that does.
//!
//! A shadow sees the state that the live placement was made from, and leaves it as it is: it has policies, chance and,
//! where wanted, rates of its own. It chooses for one request at the moment at which that is placed; of a joint plan it knows
//! nothing, and as `kv` it takes the lowest cost.

use std::mem::swap;

use rand::RngCore;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rustc_hash::FxHashMap;

use crate::{
    candidates::Scratch,
    policy::{Policy, PolicyName},
    rates::ClassRates,
    selector::{Context, Selector},
    types::{Candidate, Found, Lookup, Request, Shadowed},
};

/// Milliseconds by hardware class, law and coefficient, as [`Selector::rates`] names them.
pub type GivenRates = FxHashMap<String, FxHashMap<String, FxHashMap<String, f64>>>;

/// One policy that looks on.
pub struct Shadow {
    /// None: the policy of each request.
    policy: Option<PolicyName>,
    policies: FxHashMap<(PolicyName, bool), Box<dyn Policy>>,
    chance: ChaCha8Rng,
    given: GivenRates,
    scratch: Scratch,
}

impl Shadow {
    /// A policy of ours; None: whichever a request was placed by.
    pub fn new(policy: Option<PolicyName>) -> Self {
        let seed = policy.map_or("", PolicyName::name).bytes();
        Self {
            policy,
            policies: FxHashMap::default(),
            chance: ChaCha8Rng::seed_from_u64(seed.fold(0, |sum, byte| {
                sum.wrapping_mul(31).wrapping_add(u64::from(byte))
            })),
            given: GivenRates::default(),
            scratch: Scratch::default(),
        }
    }

    /// A policy of the caller's, with instances that judge nothing else: of placements, and of decode partners.
    pub fn external(number: u16, judge: Box<dyn Policy>, partners: Box<dyn Policy>) -> Self {
        let name = PolicyName::External(number);
        let mut shadow = Self::new(Some(name));
        shadow.policies.insert((name, false), judge);
        shadow.policies.insert((name, true), partners);
        shadow
    }

    /// Judges by these rates in place of what was learned; what is not given stays.
    pub fn with_rates(mut self, given: GivenRates) -> Self {
        self.given = given;
        self
    }

    /// Its policy; None: each request's own.
    pub fn policy(&self) -> Option<PolicyName> {
        self.policy
    }
}

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
            let same =
                |one: &&Candidate| (one.prefill, one.decode) == (winner.prefill, winner.decode);
            // With another decode worker: as it was predicted when it was chosen.
            let live = self.scratch.candidates.iter().find(same).unwrap_or(winner);
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
