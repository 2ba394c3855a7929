//! The tiers: [`Tier`] is the contract, the others are what keeps it.

mod by_name;
mod catalog;
mod chains;
mod contents;
mod contract;
mod entry;
mod host;
mod host_below;
mod host_objects;
mod kept;
mod noop;
mod nvme;
mod object;
mod ranking;
mod slabs;
mod tenant_weights;

pub(crate) use catalog::Leaving;
pub use contract::{Capabilities, Evicted, Held, NamespaceId, Origins, Room, Slot, Stats, Tier};
pub use host::HostTier;
pub use noop::NoopTier;
pub(crate) use nvme::{Direction, Transfer, Writes};
pub use nvme::{Health, NvmeTier};
pub(crate) use object::parts;
pub use object::{Credentials, ObjectSettings, ObjectTier};
pub use tenant_weights::TenantWeights;
