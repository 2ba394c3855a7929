//! Blocks that go between the host tier and those below one by one, while their caller waits.

use std::sync::Arc;
use std::time::Duration;

use kvmesh_core::Digest;

use super::Store;
use crate::block::{self, Reservation};
use crate::error::{Error, Result};
use crate::tiers::{NamespaceId, Tier};

impl Store {
    /// Reads the leading blocks of the chain that are on the disk into the host tier. Blocks.
    pub(crate) fn bring(&self, namespace: NamespaceId, chain: &[Digest]) {
        if let Some(lower) = &self.lower {
            lower.promoter.bring(namespace, None, chain);
            self.make_way();
        }
    }

    /// Reads a block that is only on the disk to the host tier, and to `out` as it is verified; false: it is not in `out`,
    /// for want of room, because it is not to be had, or because somebody else is reading it. Blocks.
    pub(crate) fn bring_to(
        &self,
        namespace: NamespaceId,
        chain: &[Digest; 1],
        out: &mut [u8],
    ) -> bool {
        let Some(lower) = &self.lower else {
            return false;
        };
        let came = lower.promoter.bring_to(namespace, chain, out);
        self.make_way();
        came
    }

    /// Copies a block from the disk tier to `out`, verified; false if it is not there, or not whole.
    pub(crate) fn read_below(
        &self,
        namespace: NamespaceId,
        chain: &[Digest; 1],
        out: &mut [u8],
    ) -> Result<bool> {
        let open = self.shared.open(namespace);
        let (Some(nvme), Some(below)) = (self.nvme(), open.below) else {
            return Ok(false);
        };
        let tier: Arc<dyn Tier> = nvme.clone();
        let lease = block::lease(&tier, below, chain, 1);
        if lease.slots().is_empty() {
            return Ok(false);
        }
        match lease.read(0, 0..open.layout.segments().len(), out) {
            Ok(()) => Ok(true),
            Err(Error::Corrupt { .. } | Error::Io { .. } | Error::Offline(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes a block of one segment to the disk tier alone; whether it is there now. Blocks.
    pub(crate) fn put_below(
        &self,
        namespace: NamespaceId,
        digest: Digest,
        data: &[u8],
    ) -> Result<bool> {
        match (self.nvme(), self.shared.open(namespace).below) {
            (Some(nvme), Some(below)) => put_alone(nvme.clone(), below, digest, data),
            _ => Ok(false),
        }
    }

    /// The same of object storage.
    pub(crate) fn put_objects(
        &self,
        namespace: NamespaceId,
        digest: Digest,
        data: &[u8],
    ) -> Result<bool> {
        match (self.objects(), self.shared.open(namespace).remote) {
            (Some(tier), Some(remote)) => put_alone(tier.clone(), remote, digest, data),
            _ => Ok(false),
        }
    }

    /// Whether the disk tier has the block; counted as a look-up there.
    pub(crate) fn lookup_below(&self, namespace: NamespaceId, chain: &[Digest; 1]) -> bool {
        let below = self.shared.open(namespace).below;
        match (self.nvme(), below) {
            (Some(nvme), Some(below)) => nvme.lookup(below, chain) == 1,
            _ => false,
        }
    }

    /// Reads the leading blocks of the chain that are in object storage into the host tier. Blocks.
    pub(crate) fn bring_objects(&self, namespace: NamespaceId, chain: &[Digest], within: Duration) {
        if let Some(objects) = &self.objects {
            objects.recaller.bring(namespace, None, chain, within);
        }
    }

    /// Whether object storage is known to have the block; counted as a look-up there.
    pub(crate) fn lookup_objects(&self, namespace: NamespaceId, chain: &[Digest; 1]) -> bool {
        let remote = self.shared.open(namespace).remote;
        match (self.objects(), remote) {
            (Some(tier), Some(remote)) => tier.lookup(remote, chain) == 1,
            _ => false,
        }
    }

    /// Copies a block from object storage to `out`, verified; false if it is not there, or not whole. Blocks.
    pub(crate) fn read_objects(
        &self,
        namespace: NamespaceId,
        chain: &[Digest; 1],
        out: &mut [u8],
    ) -> Result<bool> {
        let open = self.shared.open(namespace);
        let (Some(objects), Some(remote)) = (self.objects(), open.remote) else {
            return Ok(false);
        };
        let tier: Arc<dyn Tier> = objects.clone();
        let lease = block::lease(&tier, remote, chain, 1);
        if lease.slots().is_empty() {
            return Ok(false);
        }
        match lease.read(0, 0..open.layout.segments().len(), out) {
            Ok(()) => Ok(true),
            Err(Error::Corrupt { .. } | Error::Storage { .. } | Error::Lost(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Stores a block of one segment in a tier; false where there is no room, or the tier fails.
fn put_alone(
    tier: Arc<dyn Tier>,
    namespace: NamespaceId,
    digest: Digest,
    data: &[u8],
) -> Result<bool> {
    match block::reserve(&tier, namespace, None, &[digest]).pop() {
        Some(Reservation::Room(reserved)) => match reserved.fill(&[data]) {
            Ok(filled) => {
                block::register(vec![filled]);
                Ok(true)
            }
            Err(
                Error::Io { .. } | Error::Offline(_) | Error::Storage { .. } | Error::NotFilled,
            ) => Ok(false),
            Err(error) => Err(error),
        },
        Some(Reservation::Present) => Ok(true),
        Some(Reservation::Full) | None => Ok(false),
    }
}
