//! Disks that are full or read-only take their tier out, say why, and bring it back when they do again.
//!
//! Each disk is a small file system of its own, mounted for the test; who may not mount has nothing to test with.
#![expect(clippy::unwrap_used, reason = "a failure of these is the test's")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{BLOCK, SLOT, digest, settings, settled};
use kvmesh_kvbm::embedded::BlockStore;

const BLOCKS: u64 = 256;

/// A mounted file system in memory, gone with its value.
struct Mount(PathBuf);

impl Mount {
    /// None where this process may not mount.
    fn new(dir: &Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(dir).unwrap();
        mount(options, dir).then(|| Self(dir.to_owned()))
    }

    fn change(&self, options: &str) {
        assert!(mount(&format!("remount,{options}"), &self.0), "{options}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(options: &str, dir: &Path) -> bool {
    let mut command = Command::new("mount");
    let command = command.args(["-t", "tmpfs", "-o", options, "kvmesh"]);
    let done = command.arg(dir).stderr(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}

/// What happens to a store whose disk has `options` at first and `repaired` later.
fn goes_without_until_repaired(options: &str, repaired: &str, reason: &str) {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Mount::new(&dir.path().join("nvme"), options) else {
        eprintln!("skipped: this process may not mount");
        return;
    };
    let store = BlockStore::new(&settings(dir.path(), 32, BLOCKS), BLOCK as u32).unwrap();
    let problem = || store.store().health().unwrap().problem;
    let why = problem().expect("it is out");
    assert!(why.contains(reason), "{why}");
    // Memory goes on without it, and nobody waits.
    let block = vec![7; BLOCK];
    for number in 0..64 {
        assert!(store.put(digest(number), &block).unwrap());
    }
    assert!(store.flush().is_err());

    disk.change(repaired);
    settled("it comes back by itself", || problem().is_none());
    for number in 100..164 {
        assert!(store.put(digest(number), &block).unwrap());
    }
    store.flush().unwrap();
    let places = store.contains(&(100..164).map(digest).collect::<Vec<_>>());
    assert!(places.iter().all(Option::is_some), "{places:?}");
    store.close();
}

#[test]
fn a_full_disk() {
    let (small, large) = (BLOCKS * SLOT / 2, BLOCKS * SLOT * 4);
    goes_without_until_repaired(
        &format!("size={small}"),
        &format!("size={large}"),
        "No space left on device",
    );
}

#[test]
fn a_read_only_disk() {
    goes_without_until_repaired("ro", "rw", "Read-only file system");
}
