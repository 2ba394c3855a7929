//! What tenants' shares of a tier are.

use std::collections::HashMap;

use crate::error::{Error, Result};

/// The weight of those that are not named is under this name.
const OTHERS: &str = "*";

/// Weights of tenants: each one's share is its weight among those of all that hold something.
#[derive(Debug, Clone, PartialEq)]
pub struct TenantWeights {
    named: HashMap<String, f64>,
}

impl TenantWeights {
    /// Weights by tenants' names; `*` is every tenant that is not named, 1 unless it is given. What is nobody's is the
    /// tenant without a name. Fails where a weight is not a positive number.
    pub fn new(named: HashMap<String, f64>) -> Result<Self> {
        match (named.iter()).find(|(_, weight)| !weight.is_normal() || **weight < 0.0) {
            Some((name, weight)) => Err(Error::Invalid(format!(
                "tenant {name:?} has the weight {weight}; weights are above 0 (kvbm.tenant_weights)"
            ))),
            None => Ok(Self { named }),
        }
    }

    /// A tenant's weight.
    pub fn of(&self, tenant: &str) -> f64 {
        let weight = self.named.get(tenant).or_else(|| self.named.get(OTHERS));
        weight.copied().unwrap_or(1.0)
    }
}
