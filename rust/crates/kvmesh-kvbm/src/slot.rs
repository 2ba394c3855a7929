//! The order in which processes read and write a slot of the arena: with no lock between them, it is what keeps a block
//! that is not whole from being read.
//!
//! * The store [`erase`]s a slot's first word before the slot is anybody's, so that nothing proves its last block.
//! * Whoever [`fill`]s it writes the segments, then the header, then the first word, which publishes all of them.
//! * A block that comes from elsewhere is at rest, which proves nothing, until the store has checked it and [`settle`]s
//!   what it is; until then readers [`look`] at the first word.
//! * A reader takes the checksums of the header, copies, and then compares what has arrived with them: whatever happens
//!   to the slot meanwhile, it does not take other bytes for the block's.
//!
//! Only a lease or a reservation keeps a slot from being given to another; the catalog, under its lock, sees to that.
//! `tests/slots.rs` runs this file and the host tier under a model checker.

use kvmesh_core::Digest;

use crate::arena::Arena;
use crate::image::{AT_REST, FAILED, LIVE, Layout};

/// Bytes of the first word.
const WORD: usize = 8;

/// What the first word says of a block that was on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// It is there.
    Here,
    /// It will not come.
    Failed,
    /// Neither yet.
    Coming,
}

/// Nothing proves this slot's last block any more.
pub(crate) fn erase(arena: &Arena, slot: u64) {
    arena.publish(slot, 0);
}

/// Writes a block into a slot of the caller's: `put` writes a segment, by its number, at an offset and returns its
/// checksum.
pub(crate) fn fill(
    arena: &Arena,
    slot: u64,
    layout: &Layout,
    digest: &Digest,
    mut put: impl FnMut(usize, u64) -> u64,
) {
    let segments = layout.segments().iter().enumerate();
    let checksums: Vec<u64> = segments
        .map(|(number, segment)| put(number, slot + segment.offset as u64))
        .collect();
    let header = layout.encode_header(digest, &checksums);
    arena.write(slot + WORD as u64, &header[WORD..]);
    arena.publish(slot, LIVE);
}

/// Writes a block's image at rest into a slot that is expected to have it, all but the first word.
pub(crate) fn unpack(arena: &Arena, slot: u64, layout: &Layout, header: &[u8], segments: &[&[u8]]) {
    arena.write(slot + WORD as u64, &header[WORD..]);
    for (bytes, segment) in segments.iter().zip(layout.segments()) {
        arena.write(slot + segment.offset as u64, bytes);
    }
}

/// What was written behind the first word is a block at rest, if it is one.
pub(crate) fn rest(arena: &Arena, slot: u64) {
    arena.publish(slot, AT_REST);
}

/// The checksums of `digest`'s block, if it is in the slot and can be read.
pub(crate) fn checksums(
    arena: &Arena,
    slot: u64,
    layout: &Layout,
    digest: &Digest,
) -> Option<Vec<u64>> {
    if arena.observe(slot) != LIVE {
        return None;
    }
    layout.decode_header(&arena.read(slot, layout.header_bytes()), digest)
}

/// The same of a block whose segments are right, too; `at_rest`: of one that cannot be read yet.
pub(crate) fn proven(
    arena: &Arena,
    slot: u64,
    layout: &Layout,
    digest: &Digest,
    at_rest: bool,
) -> Option<Vec<u64>> {
    let sum = |at, bytes| arena.checksum(at, bytes);
    proven_by(arena, slot, layout, digest, at_rest, sum)
}

/// The same where `sum` takes the checksum of so many bytes at an offset, segment by segment.
pub(crate) fn proven_by(
    arena: &Arena,
    slot: u64,
    layout: &Layout,
    digest: &Digest,
    at_rest: bool,
    mut sum: impl FnMut(u64, usize) -> u64,
) -> Option<Vec<u64>> {
    let checksums = if at_rest {
        layout.decode_as(AT_REST, &arena.read(slot, layout.header_bytes()), digest)?
    } else {
        checksums(arena, slot, layout, digest)?
    };
    let right = (layout.segments().iter().zip(&checksums))
        .all(|(segment, &expected)| sum(slot + segment.offset as u64, segment.bytes) == expected);
    right.then_some(checksums)
}

/// A block that was on its way can be read, or will not come.
pub(crate) fn settle(arena: &Arena, slot: u64, here: bool) {
    arena.publish(slot, if here { LIVE } else { FAILED });
}

/// Whether a block on its way has come.
pub(crate) fn look(arena: &Arena, slot: u64) -> Arrival {
    match arena.observe(slot) {
        LIVE => Arrival::Here,
        FAILED => Arrival::Failed,
        _ => Arrival::Coming,
    }
}
