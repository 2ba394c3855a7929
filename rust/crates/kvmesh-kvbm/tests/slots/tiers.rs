//! The host tier's part of `src/tiers`.

#[path = "../../src/tiers/by_name.rs"]
mod by_name;
#[path = "../../src/tiers/catalog/mod.rs"]
mod catalog;
#[path = "../../src/tiers/chains.rs"]
mod chains;
#[path = "../../src/tiers/contract.rs"]
mod contract;
#[path = "../../src/tiers/entry.rs"]
mod entry;
#[path = "../../src/tiers/host.rs"]
mod host;
#[path = "../../src/tiers/host_below.rs"]
mod host_below;
#[path = "../../src/tiers/ranking.rs"]
mod ranking;
#[path = "../../src/tiers/slabs.rs"]
mod slabs;
#[path = "../../src/tiers/tenant_weights.rs"]
mod tenant_weights;

pub use contract::*;
pub use host::HostTier;
pub use tenant_weights::TenantWeights;
