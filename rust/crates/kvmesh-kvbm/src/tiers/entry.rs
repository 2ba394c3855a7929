//! One block of a catalog.

use std::hash::{Hash, Hasher};

use kvmesh_core::{BlockHash, Digest};

use super::NamespaceId;
use super::catalog::PartId;
use crate::eviction::{self, BlockId, Tick};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(pub(super) NamespaceId, pub(super) Digest);

impl Key {
    /// Digests are uniform: some bits of one are a hash already.
    pub(super) fn name(&self) -> eviction::Key {
        Self::name_of(self.0, self.1.block_hash())
    }

    /// The name of a block of which nothing but this is known.
    pub(super) fn name_of(namespace: NamespaceId, hash: BlockHash) -> eviction::Key {
        eviction::Key(hash.0 ^ u64::from(namespace.0))
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.name().0);
    }
}

pub(super) struct Block {
    pub(super) key: Key,
    pub(super) parent: Option<Digest>,
    pub(super) state: State,
    pub(super) used: Tick,
    /// Whose ranking it is in.
    pub(super) part: PartId,
    /// Its number there, while it is in the index.
    pub(super) id: BlockId,
    /// Chosen to leave next, and as which: then it does not count as following its parent.
    pub(super) parked: Option<u64>,
    /// It came up from this tier, and no engine has read it since.
    pub(super) came_from: Option<kvmesh_core::Tier>,
}

impl Block {
    /// Registered, and nobody reads it.
    pub(super) fn is_idle(&self) -> bool {
        self.state == State::Registered { readers: 0 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Reserved,
    Sealed,
    /// Being read from a lower tier. Readers may wait for it.
    Promoting {
        readers: u32,
    },
    Registered {
        readers: u32,
    },
    /// No longer to be found; the slot is free after the last reader.
    Doomed {
        readers: u32,
    },
}
