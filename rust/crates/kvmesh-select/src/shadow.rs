//! Policies that look on: what they would have chosen in the place of the one that does.
//!
//! A shadow sees the state that the live placement was made from, and leaves it as it is: it has policies, chance and,
//! where wanted, rates of its own. It chooses for one request at the moment at which that is placed; of a joint plan it knows
//! nothing, and as `kv` it takes the lowest cost.

use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rustc_hash::FxHashMap;

use crate::{
    policy::{Policy, PolicyName},
    scratch::Scratch,
};

/// Milliseconds by hardware class, law and coefficient, as [`crate::Selector::rates`] names them.
pub type GivenRates = FxHashMap<String, FxHashMap<String, FxHashMap<String, f64>>>;

/// One policy that looks on.
pub struct Shadow {
    /// None: the policy of each request.
    pub(crate) policy: Option<PolicyName>,
    pub(crate) policies: FxHashMap<(PolicyName, bool), Box<dyn Policy>>,
    pub(crate) chance: ChaCha8Rng,
    pub(crate) given: GivenRates,
    pub(crate) scratch: Scratch,
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
