//! Where an arena's memory comes from: huge pages where the file system grants them, and all NUMA nodes in turn.
//!
//! Both are speed alone. What the kernel refuses is done without.

use std::ffi::c_void;
use std::fs;

use memmap2::MmapRaw;
use rustix::mm::{Advice, madvise};

/// Asks for huge pages wherever this mapping has, or gets, memory.
pub fn prefer_huge(map: &MmapRaw) {
    // Not granted by most mounts unless they are told to: `huge=advise`.
    let _ = advise(map, Advice::LinuxHugepage);
}

/// Memory that is allocated from now on comes from all allowed nodes in turn, for engines of each of them read an arena;
/// unless whoever started the process has chosen nodes for it, as `numactl` does.
pub fn interleave(map: &MmapRaw) {
    if chosen() {
        return;
    }
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let allowed = status
        .lines()
        .find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    let nodes = mask(allowed.unwrap_or_default());
    if nodes.count_ones() > 1 {
        let _ = bind(map, libc::MPOL_INTERLEAVE, nodes);
    }
}

/// Allocates all of it, through the mapping: what is allocated through the file has no huge pages. Errors where the
/// kernel cannot, or has no room; then some of it may be allocated.
pub fn populate(map: &MmapRaw) -> rustix::io::Result<()> {
    advise(map, Advice::LinuxPopulateWrite)
}

/// Bytes of the mapping that are in huge pages. Reads the process's page tables: nothing to do often.
pub fn huge_bytes(map: &MmapRaw) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let head = format!("{:x}-", map.as_ptr() as usize);
    let kib = (maps.lines().skip_while(|line| !line.starts_with(&head)))
        .find_map(|line| line.strip_prefix("ShmemPmdMapped:"))
        .and_then(|size| size.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn advise(map: &MmapRaw, advice: Advice) -> rustix::io::Result<()> {
    // SAFETY: the range is that of a live mapping of ours, and neither advice takes memory away.
    unsafe { madvise(map.as_mut_ptr().cast::<c_void>(), map.len(), advice) }
}

/// Whether this thread's memory has another policy than the system's.
fn chosen() -> bool {
    let (mut policy, none) = (libc::MPOL_DEFAULT, 0_u64);
    // SAFETY: the kernel writes one number, the policy; no mask is asked for (get_mempolicy(2)).
    let result =
        unsafe { libc::syscall(libc::SYS_get_mempolicy, &mut policy, none, none, none, none) };
    result == 0 && policy != libc::MPOL_DEFAULT
}

fn bind(map: &MmapRaw, policy: i32, nodes: u64) -> std::io::Result<()> {
    let (none, bits) = (0_u64, u64::BITS as usize + 1);
    // SAFETY: the range is that of a live mapping of ours; the mask has as many bits as are said, the last of which the
    // kernel does not read (mbind(2), maxnode); the policy of pages does not change what is in them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            map.as_mut_ptr(),
            map.len(),
            policy,
            &nodes,
            bits,
            none,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// The nodes of a list like `0-1,4`, a bit each; those past 63 are left out.
fn mask(list: &str) -> u64 {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<u32>> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    (list.split(',').filter_map(range).flatten())
        .filter(|&node| node < u64::BITS)
        .fold(0, |mask, node| mask | 1 << node)
}

#[cfg(test)]
mod tests {
    use memmap2::MmapOptions;

    use super::*;

    fn mapping() -> MmapRaw {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 22).unwrap();
        MmapOptions::new().len(1 << 22).map_raw(&file).unwrap()
    }

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(mask("\t0-1,4\n"), 0b1_0011);
        assert_eq!(mask("63-70"), 1 << 63);
        assert_eq!(mask(""), 0);
        assert_eq!(mask("nodes"), 0);
    }

    #[test]
    fn a_policy_that_was_chosen_is_seen() {
        std::thread::spawn(|| {
            assert!(!chosen());
            let node = 1_u64;
            // SAFETY: the mask has the bits that are said; the policy is this thread's, which ends.
            let set = unsafe {
                let bits = u64::BITS as usize + 1;
                libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_BIND, &node, bits)
            };
            // A kernel without NUMA, or a container, does not let it be chosen.
            assert_eq!(chosen(), set == 0);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_kernel_takes_what_it_is_asked() {
        let map = mapping();
        prefer_huge(&map);
        interleave(&map);
        match bind(&map, libc::MPOL_INTERLEAVE, 1) {
            Ok(()) => {}
            // A kernel without NUMA, or a container that may not choose.
            Err(error) => assert!(
                matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)),
                "{error}"
            ),
        }
        populate(&map).unwrap();
        assert!(huge_bytes(&map) <= 1 << 22);
    }
}
