//! What a store is made of.

use std::path::{Path, PathBuf};

use super::ScrubSettings;
use crate::eviction::Policy;
use crate::tiers::{ObjectSettings, TenantWeights};

/// What a store is made of.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A directory in memory, for the host tier.
    pub shm_dir: PathBuf,
    /// Bytes of the host tier.
    pub host_bytes: u64,
    /// Which blocks leave a full tier.
    pub policy: Policy,
    /// Tenants' shares of the host tier; None: they have none, and any may push out all others' blocks.
    pub tenant_weights: Option<TenantWeights>,
    /// The disk tier, if there is one.
    pub nvme: Option<NvmeSettings>,
    /// The object tier, if there is one.
    pub objects: Option<ObjectSettings>,
    /// Bytes each tenant may pin.
    pub pin_bytes: u64,
    /// How blocks at rest are checked; None: only when they are read.
    pub scrub: Option<ScrubSettings>,
}

/// A disk tier.
#[derive(Debug, Clone)]
pub struct NvmeSettings {
    /// Its directory.
    pub dir: PathBuf,
    /// Bytes it may hold.
    pub bytes: u64,
    /// Bytes it may be written a day; None: no limit.
    pub bytes_per_day: Option<u64>,
}

impl Settings {
    /// A host tier alone.
    pub fn host(shm_dir: &Path, host_bytes: u64) -> Self {
        Self {
            shm_dir: shm_dir.to_owned(),
            host_bytes,
            policy: Policy::default(),
            tenant_weights: None,
            nvme: None,
            objects: None,
            pin_bytes: host_bytes / 4,
            scrub: None,
        }
    }
}
