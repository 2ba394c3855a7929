//! Copies between private memory and shared slots, checksummed as they go.
//!
//! The checksum is always computed over the private side, just copied and still in the core's cache: what a reader
//! verifies is what it got, not what the shared memory may have turned into meanwhile.

use twox_hash::XxHash3_64;

use crate::image::Segment;

/// Bytes copied before they are hashed; well inside a core's second-level cache.
const CHUNK: usize = 64 << 10;

/// Where pages lie in this process's memory: segment `s` of page `p` is at `bases[s] + p * strides[s]`.
#[derive(Debug)]
pub struct Pages {
    runs: Vec<Run>,
    count: usize,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    base: usize,
    stride: usize,
    bytes: usize,
}

/// A page or segment that is not there.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct PageError(String);

impl Pages {
    /// Describes `count` pages whose segments start at `bases`, `strides` bytes apart, `bytes` long.
    ///
    /// # Safety
    /// For as long as the value is used, `bases[s] .. bases[s] + (count - 1) * strides[s] + bytes[s]` must be memory
    /// of this process that may be read and written, and while a page is copied nobody else may write it or, where
    /// the copy goes to the page, read it.
    pub unsafe fn new(
        bases: &[usize],
        strides: &[usize],
        bytes: &[usize],
        count: usize,
    ) -> Result<Self, PageError> {
        if bases.len() != strides.len()
            || bases.len() != bytes.len()
            || bases.is_empty()
            || count == 0
        {
            return Err(PageError(
                "pages need one base, stride and length a segment, and a count".into(),
            ));
        }
        let runs = (bases.iter().zip(strides).zip(bytes))
            .map(|((&base, &stride), &bytes)| {
                let last = (count - 1)
                    .checked_mul(stride)
                    .and_then(|n| n.checked_add(bytes));
                let fits = last.and_then(|n| base.checked_add(n)).is_some();
                (base != 0 && fits && bytes <= stride).then_some(Run {
                    base,
                    stride,
                    bytes,
                })
            })
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| PageError("a segment overlaps the next page or wraps around".into()))?;
        Ok(Self { runs, count })
    }

    /// Bytes of each segment.
    pub fn segment_bytes(&self) -> impl Iterator<Item = usize> + '_ {
        self.runs.iter().map(|run| run.bytes)
    }

    /// Pages described.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Fails unless the pages have exactly these segments and all of `ids` exist.
    pub fn check(&self, segments: &[Segment], ids: &[u32]) -> Result<(), PageError> {
        if !self
            .segment_bytes()
            .eq(segments.iter().map(|segment| segment.bytes))
        {
            return Err(PageError(
                "the pages' segments are not the namespace's".into(),
            ));
        }
        match ids.iter().find(|&&id| id as usize >= self.count) {
            Some(id) => Err(PageError(format!(
                "there is no page {id}, only {}",
                self.count
            ))),
            None => Ok(()),
        }
    }

    fn segment(&self, id: u32, segment: usize) -> (*mut u8, usize) {
        assert!((id as usize) < self.count, "page id out of range");
        let run = self.runs[segment];
        ((run.base + id as usize * run.stride) as *mut u8, run.bytes)
    }

    /// Copies a page's segment to `slot`; returns its checksum.
    ///
    /// # Safety
    /// `slot` must be valid for writes of the segment's bytes, and nobody else may access them meanwhile.
    pub(crate) unsafe fn copy_to(&self, id: u32, segment: usize, slot: *mut u8) -> u64 {
        let (page, bytes) = self.segment(id, segment);
        // SAFETY: the caller vouches for `slot`, `new`'s caller for the page; they never overlap.
        unsafe { put(page, slot, bytes) }
    }

    /// Copies `slot` to a page's segment; returns the checksum of what arrived.
    ///
    /// # Safety
    /// `slot` must be valid for reads of the segment's bytes.
    pub(crate) unsafe fn copy_from(&self, id: u32, segment: usize, slot: *const u8) -> u64 {
        let (page, bytes) = self.segment(id, segment);
        // SAFETY: the caller vouches for `slot`, `new`'s caller for the page; they never overlap.
        unsafe { get(slot, page, bytes) }
    }
}

/// Copies private memory to a shared slot; returns its checksum.
///
/// # Safety
/// `private` must be valid for reads and `slot` for writes of `bytes`, apart from each other, and nobody else may
/// write the one or access the other meanwhile.
pub(crate) unsafe fn put(private: *const u8, slot: *mut u8, bytes: usize) -> u64 {
    let mut sum = 0;
    for start in (0..bytes).step_by(CHUNK) {
        let length = CHUNK.min(bytes - start);
        // SAFETY: the caller's promise, for a part.
        unsafe { std::ptr::copy_nonoverlapping(private.add(start), slot.add(start), length) };
        // SAFETY: the caller's promise, for a part.
        sum = chain(sum, unsafe {
            std::slice::from_raw_parts(private.add(start), length)
        });
    }
    sum
}

/// Copies a shared slot to private memory; returns the checksum of what arrived.
///
/// # Safety
/// `slot` must be valid for reads and `private` for writes of `bytes`, apart from each other, and nobody else may
/// access `private` meanwhile.
pub(crate) unsafe fn get(slot: *const u8, private: *mut u8, bytes: usize) -> u64 {
    let mut sum = 0;
    for start in (0..bytes).step_by(CHUNK) {
        let length = CHUNK.min(bytes - start);
        // SAFETY: the caller's promise, for a part.
        unsafe { std::ptr::copy_nonoverlapping(slot.add(start), private.add(start), length) };
        // SAFETY: just written, and nobody else accesses it now.
        sum = chain(sum, unsafe {
            std::slice::from_raw_parts(private.add(start), length)
        });
    }
    sum
}

/// The checksum of a segment in memory.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(CHUNK).fold(0, chain)
}

fn chain(sum: u64, chunk: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(sum, chunk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_there_and_back_keeps_bytes_and_checksum() {
        const BYTES: usize = 3 * CHUNK + 17;
        let source: Vec<u8> = (0..2 * BYTES).map(|i| (i * 31 % 251) as u8).collect();
        let target = vec![0_u8; 2 * BYTES];
        let mut slot = vec![0_u8; BYTES];
        // SAFETY: both vectors hold two pages of BYTES and outlive the descriptions.
        let pages = |memory: &Vec<u8>| unsafe {
            Pages::new(&[memory.as_ptr() as usize], &[BYTES], &[BYTES], 2)
        };
        let (from, to) = (pages(&source).unwrap(), pages(&target).unwrap());
        // SAFETY: `slot` holds BYTES and is this thread's.
        let (put, got) = unsafe {
            (
                from.copy_to(1, 0, slot.as_mut_ptr()),
                to.copy_from(0, 0, slot.as_ptr()),
            )
        };
        assert_eq!(put, got);
        assert_eq!(put, checksum(&source[BYTES..]));
        assert_eq!(target[..BYTES], source[BYTES..]);
    }

    #[test]
    fn descriptions_that_make_no_sense_are_refused() {
        // SAFETY: none of these is ever used to touch memory.
        unsafe {
            assert!(Pages::new(&[4096], &[8], &[16], 2).is_err());
            assert!(Pages::new(&[4096], &[usize::MAX], &[16], 3).is_err());
            assert!(Pages::new(&[], &[], &[], 1).is_err());
            assert!(Pages::new(&[0], &[16], &[16], 1).is_err());
        }
    }
}
