//! Where a block lives.

use std::{fmt, str::FromStr};

use crate::{Error, Result};

/// Where a block of KV lives, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Tier {
    /// An engine's own pool.
    Device = 0,
    /// A node's arena in memory.
    Host = 1,
    /// A node's disks.
    Nvme = 2,
    /// Other nodes' arenas and object storage.
    Network = 3,
}

impl Tier {
    /// All tiers, fastest first.
    pub const ALL: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Nvme, Tier::Network];

    /// The tier's name in APIs, configuration and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Nvme => "nvme",
            Tier::Network => "network",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tier {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Tier::ALL
            .into_iter()
            .find(|tier| tier.name() == name)
            .ok_or_else(|| {
                Error::invalid("unknown tier; use device, host, nvme or network")
                    .with_context("tier", name)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for tier in Tier::ALL {
            assert_eq!(tier.name().parse::<Tier>().unwrap(), tier);
        }
        assert!("disk".parse::<Tier>().is_err());
    }
}
