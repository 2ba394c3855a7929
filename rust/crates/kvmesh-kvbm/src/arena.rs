//! Memory that every process of the node can map.
//!
//! An arena is a file without a name: the owner passes its descriptor to engines, and the kernel frees it with the last
//! of them. So no crash, not even of the machine's whole mesh, leaves an arena behind.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate, fstat, statvfs};

use crate::copy;
use crate::error::{Error, Result};
use crate::pages;

/// A mapped arena.
#[derive(Debug)]
pub struct Arena {
    file: File,
    map: MmapRaw,
}

impl Arena {
    /// Makes an arena of `bytes` in `dir`, which should be memory-backed.
    ///
    /// All of it is allocated now (about a second a GiB), so that no process can be killed later because memory it was
    /// promised is not there; in huge pages where `dir` grants them, on all NUMA nodes in turn.
    pub fn create(dir: &Path, bytes: u64) -> Result<Self> {
        let space = statvfs(dir).map_err(|error| Error::io("cannot use", dir)(error.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let no_space = || Error::NoSpace {
            dir: dir.to_owned(),
            wanted: bytes,
            free,
        };
        if free < bytes {
            return Err(no_space());
        }
        let file =
            tempfile::tempfile_in(dir).map_err(Error::io("cannot create the arena in", dir))?;
        let cannot = Error::io("cannot map the arena in", dir);
        let arena = (file.set_len(bytes).and_then(|()| Self::map(file))).map_err(cannot)?;
        pages::interleave(&arena.map);
        let _ = pages::populate(&arena.map);
        // Says what is wrong where that could not allocate all; allocates it where the kernel has no such call.
        match fallocate(&arena.file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => Ok(arena),
            Err(rustix::io::Errno::NOSPC) => Err(no_space()),
            Err(error) => Err(Error::io("cannot allocate the arena in", dir)(error.into())),
        }
    }

    /// Maps an arena made elsewhere.
    pub fn open(descriptor: OwnedFd) -> io::Result<Self> {
        Self::map(File::from(descriptor))
    }

    fn map(file: File) -> io::Result<Self> {
        let bytes = fstat(&file)?.st_size as usize;
        let map = MmapOptions::new().len(bytes).map_raw(&file)?;
        pages::prefer_huge(&map);
        Ok(Self { file, map })
    }

    /// Bytes of the arena.
    pub fn bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// Those of them that are in huge pages. Not for use on a hot path.
    pub fn huge_bytes(&self) -> u64 {
        pages::huge_bytes(&self.map)
    }

    /// Where it is mapped in this process, for transfers into slots the caller owns.
    pub fn address(&self) -> usize {
        self.map.as_mut_ptr() as usize
    }

    /// The descriptor to give to other processes.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The address of `length` bytes at `offset`. Panics where they are not inside the arena.
    pub(crate) fn at(&self, offset: u64, length: usize) -> *mut u8 {
        let end = offset.checked_add(length as u64);
        assert!(
            end.is_some_and(|end| end <= self.bytes()),
            "outside the arena"
        );
        self.map.as_mut_ptr().wrapping_add(offset as usize)
    }

    /// Whether `length` bytes at `offset` are inside the arena.
    pub(crate) fn contains(&self, offset: u64, length: usize) -> bool {
        offset
            .checked_add(length as u64)
            .is_some_and(|end| end <= self.bytes())
    }

    /// A private copy of `length` bytes at `offset`.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut copy = vec![0; length];
        // SAFETY: `at` checks the bounds and `copy` is ours. Another process may be writing (a dying or faulty one);
        // then the copy holds some mixture, which its checksum exposes.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at(offset, length), copy.as_mut_ptr(), length)
        };
        copy
    }

    /// Writes `bytes` at `offset`; the caller must own that part of the arena.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        // SAFETY: `at` checks the bounds; only the reservation's owner writes here, and readers check what they read.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset, bytes.len()), bytes.len())
        };
    }
}

impl Arena {
    /// Writes `bytes` at `offset` and returns their checksum; the caller must own that part of the arena.
    pub(crate) fn put(&self, offset: u64, bytes: &[u8]) -> u64 {
        // SAFETY: as in `write`.
        unsafe { copy::put(bytes.as_ptr(), self.at(offset, bytes.len()), bytes.len()) }
    }

    /// Copies what is at `offset` to `out` and returns the checksum of what arrived.
    pub(crate) fn get(&self, offset: u64, out: &mut [u8]) -> u64 {
        // SAFETY: as in `read`.
        unsafe { copy::get(self.at(offset, out.len()), out.as_mut_ptr(), out.len()) }
    }

    /// The checksum of `length` bytes at `offset` as they are now.
    pub(crate) fn checksum(&self, offset: u64, length: usize) -> u64 {
        // SAFETY: `at` checks the bounds. Slots are summed while a lease or a reservation keeps them from being written;
        // a faulty process that writes nevertheless is exposed when the block is read.
        copy::checksum(unsafe { std::slice::from_raw_parts(self.at(offset, length), length) })
    }

    /// Lets other processes see a word, and with it everything written before it.
    pub(crate) fn publish(&self, offset: u64, word: u64) {
        self.word(offset).store(word.to_le(), Ordering::Release);
    }

    /// A word another process may publish.
    pub(crate) fn observe(&self, offset: u64) -> u64 {
        u64::from_le(self.word(offset).load(Ordering::Acquire))
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset % 8 == 0, "words are aligned");
        // SAFETY: `at` checks the bounds, the map is aligned to pages and lives as long as `self`; words that are
        // published are accessed as atomics while anyone else may look at them.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let arena = Arena::create(dir.path(), 1 << 16).unwrap();
        let other = Arena::open(arena.descriptor().try_clone_to_owned().unwrap()).unwrap();
        arena.write(4096, b"whole");
        assert_eq!(other.read(4096, 5), b"whole");
        assert_eq!(other.bytes(), 1 << 16);
    }

    #[test]
    fn leaves_no_file_behind() {
        let dir = tempfile::tempdir().unwrap();
        let _arena = Arena::create(dir.path(), 1 << 16).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_arena_larger_than_its_file_system_is_refused_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let error = Arena::create(dir.path(), 1 << 60).unwrap_err().to_string();
        assert!(
            error.contains("kvbm.host_bytes") && error.contains("kvbm.shm_dir"),
            "{error}"
        );
    }
}
