//! A block as bytes: what a slot of any tier holds.
//!
//! A slot is a header, then the segments one after the other, padded to [`ALIGNMENT`]. The header names the block and
//! carries a checksum of every segment and of itself. It is written last and erased first, so a slot with a valid
//! header holds a whole block whatever moment its writer died in. All numbers are little-endian.
//!
//! At rest in a lower tier the image is the same but for its first word, so that what is read straight into a slot
//! proves nothing there until somebody has checked it and wrote that word.

use kvmesh_core::Digest;
use twox_hash::XxHash3_64;

use crate::namespace::Namespace;

/// Slots start at multiples of this: a page, and what direct I/O asks for.
pub const ALIGNMENT: usize = 4096;
/// Segments start at multiples of this from the slot's start: a cache line.
const LINE: usize = 64;
/// First word of a slot that can be read.
pub(crate) const LIVE: u64 = u64::from_le_bytes(*b"KVMBLK01");
/// First word of a block in a tier that is not mapped.
pub(crate) const AT_REST: u64 = u64::from_le_bytes(*b"KVMRST01");
/// First word of a slot whose block will not come.
pub(crate) const FAILED: u64 = u64::from_le_bytes(*b"KVMFAIL1");
/// Magic, header checksum, digest, fingerprint, segment count.
const FIXED: usize = 8 + 8 + 32 + 8 + 8;

/// Geometry of the slots of one namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    fingerprint: u64,
    segments: Vec<Segment>,
    header_bytes: usize,
    slot_bytes: usize,
}

/// One contiguous run of a block's bytes: a layer's K, V, or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Bytes from the start of the slot.
    pub offset: usize,
    /// Bytes of the segment.
    pub bytes: usize,
}

impl Layout {
    /// The layout of a namespace's blocks.
    pub fn new(namespace: &Namespace) -> Self {
        let header_bytes = FIXED + 8 * namespace.segments.len();
        let mut offset = header_bytes;
        let segments = namespace
            .segments
            .iter()
            .map(|&bytes| {
                let segment = Segment {
                    offset: offset.next_multiple_of(LINE),
                    bytes: bytes as usize,
                };
                offset = segment.offset + segment.bytes;
                segment
            })
            .collect();
        Self {
            fingerprint: namespace.fingerprint(),
            segments,
            header_bytes,
            slot_bytes: offset.next_multiple_of(ALIGNMENT),
        }
    }

    /// Bytes a slot takes.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Bytes of the header at the slot's start.
    pub fn header_bytes(&self) -> usize {
        self.header_bytes
    }

    /// The segments in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The header of a readable block with these segment checksums.
    pub fn encode_header(&self, digest: &Digest, checksums: &[u64]) -> Vec<u8> {
        debug_assert_eq!(checksums.len(), self.segments.len());
        let mut header = Vec::with_capacity(self.header_bytes);
        header.extend(LIVE.to_le_bytes());
        header.extend([0; 8]);
        header.extend(digest.as_bytes());
        header.extend(self.fingerprint.to_le_bytes());
        header.extend((self.segments.len() as u64).to_le_bytes());
        for checksum in checksums {
            header.extend(checksum.to_le_bytes());
        }
        let own = XxHash3_64::oneshot(&header[16..]);
        header[8..16].copy_from_slice(&own.to_le_bytes());
        header
    }

    /// The segment checksums of `digest`'s block, if `header` is its valid header.
    pub fn decode_header(&self, header: &[u8], digest: &Digest) -> Option<Vec<u64>> {
        self.decode_as(LIVE, header, digest)
    }

    /// The same of a header that begins with another word.
    pub(crate) fn decode_as(&self, word: u64, header: &[u8], digest: &Digest) -> Option<Vec<u64>> {
        let valid = header.len() == self.header_bytes
            && read_u64(header, 0) == word
            && read_u64(header, 8) == XxHash3_64::oneshot(&header[16..])
            && header[16..48] == digest.as_bytes()[..]
            && read_u64(header, 48) == self.fingerprint
            && read_u64(header, 56) == self.segments.len() as u64;
        valid.then(|| {
            header[FIXED..]
                .chunks_exact(8)
                .map(|chunk| read_u64(chunk, 0))
                .collect()
        })
    }
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace() -> Namespace {
        Namespace {
            model: "m".into(),
            revision: "r".into(),
            dtype: "f32".into(),
            layout: "nhd".into(),
            rank: 0,
            ranks: 1,
            segments: vec![100, 200, 64],
        }
    }

    #[test]
    fn segments_are_aligned_and_apart() {
        let layout = Layout::new(&namespace());
        let mut end = layout.header_bytes();
        for segment in layout.segments() {
            assert!(segment.offset >= end && segment.offset % LINE == 0);
            end = segment.offset + segment.bytes;
        }
        assert!(layout.slot_bytes() >= end && layout.slot_bytes() % ALIGNMENT == 0);
    }

    #[test]
    fn any_flipped_bit_invalidates_a_header() {
        let layout = Layout::new(&namespace());
        let header = layout.encode_header(&Digest::new([7; 32]), &[1, 2, 3]);
        assert_eq!(
            layout.decode_header(&header, &Digest::new([7; 32])),
            Some(vec![1, 2, 3])
        );
        for bit in 0..header.len() * 8 {
            let mut bad = header.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                layout.decode_header(&bad, &Digest::new([7; 32])),
                None,
                "bit {bit}"
            );
        }
    }

    #[test]
    fn a_header_is_of_one_digest_and_namespace() {
        let layout = Layout::new(&namespace());
        let header = layout.encode_header(&Digest::new([7; 32]), &[1, 2, 3]);
        assert_eq!(layout.decode_header(&header, &Digest::new([8; 32])), None);
        let other = Layout::new(&Namespace {
            revision: "other".into(),
            ..namespace()
        });
        assert_eq!(other.decode_header(&header, &Digest::new([7; 32])), None);
    }
}
