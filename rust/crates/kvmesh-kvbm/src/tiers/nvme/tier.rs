//! How a block's bytes get to the disk from the heap, and back: one by one, for callers that wait.

use std::ops::Range;

use kvmesh_core::Digest;
use parking_lot::Mutex;

use super::NvmeTier;
use super::io::{Direction, Transfer};
use crate::copy::checksum;
use crate::error::{Error, Result};
use crate::image::{AT_REST, Layout};
use crate::journal::Journal;
use crate::namespace::Namespace;
use crate::tiers::contents::Contents;
use crate::tiers::kept::Kept;
use crate::tiers::{NamespaceId, Slot};

impl Kept for NvmeTier {
    const KIND: kvmesh_core::Tier = kvmesh_core::Tier::Nvme;

    fn contents(&self) -> &Mutex<Contents> {
        &self.contents
    }

    fn changes(&self) -> &Journal {
        &self.journal
    }

    fn open_kept(&self, namespace: &Namespace) -> Result<NamespaceId> {
        self.contents.lock().catalog.open(namespace)
    }

    fn is_writable(&self) -> bool {
        true
    }

    /// `write` puts it on record, before the first byte.
    fn made_room(&self) {}

    fn changed(&self) {
        self.record();
    }

    fn write_block(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Layout,
        checksums: &[u64],
        segments: &[&[u8]],
    ) -> Result<()> {
        let mut image = aligned(layout.slot_bytes())?;
        let header = layout.encode_header(digest, checksums);
        image[..header.len()].copy_from_slice(&header);
        image[..8].copy_from_slice(&AT_REST.to_le_bytes());
        for (bytes, segment) in segments.iter().zip(layout.segments()) {
            image[segment.offset..segment.offset + segment.bytes].copy_from_slice(bytes);
        }
        let pieces = [(image.as_mut_ptr(), image.len())];
        // SAFETY: `image` is ours and outlives the transfer.
        let mut transfer = |place| unsafe { Transfer::new(Direction::Write, place, &pieces) };
        self.write(slot, &mut transfer)
    }

    fn read_block(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Layout,
        segments: Range<usize>,
        out: &mut [u8],
    ) -> Result<()> {
        let mut image = aligned(layout.slot_bytes())?;
        let pieces = [(image.as_mut_ptr(), image.len())];
        let mut moved = Err(Error::NotFilled);
        // SAFETY: `image` is ours and outlives the transfer.
        let transfer = |place| unsafe { Transfer::new(Direction::Read, place, &pieces) };
        self.fetch(&[slot], &mut |place, _| transfer(place), |_, result| {
            moved = result;
        });
        moved?;
        let digest = *digest;
        let corrupt = |what| Error::Corrupt { digest, what };
        let checksums = layout
            .decode_as(AT_REST, &image[..layout.header_bytes()], &digest)
            .ok_or_else(|| corrupt("header"))?;
        let wanted = &layout.segments()[segments.clone()];
        let mut rest = out;
        for (segment, expected) in wanted.iter().zip(&checksums[segments]) {
            let (this, next) = rest.split_at_mut(segment.bytes);
            this.copy_from_slice(&image[segment.offset..segment.offset + segment.bytes]);
            if checksum(this) != *expected {
                return Err(corrupt("segment"));
            }
            rest = next;
        }
        Ok(())
    }
}

/// Zeroed memory that direct I/O takes.
fn aligned(bytes: usize) -> Result<memmap2::MmapMut> {
    memmap2::MmapMut::map_anon(bytes).map_err(Error::io("cannot get memory for", "a block"))
}
