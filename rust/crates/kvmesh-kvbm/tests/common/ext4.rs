//! A disk whose faults are the kernel's own: ext4 on a loop device, whose file system can be shut down or frozen and whose image cut short.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const BYTES: u64 = 32 << 20;
/// Bytes of the file system's blocks.
const UNIT: u64 = 4096;
/// Of Linux's `fs.h`.
const FIBMAP: libc::c_ulong = 1;
/// `FS_IOC_SHUTDOWN` of Linux's `ext4.h` (`_IOR('X', 125, __u32)`), and its "without the journal".
const SHUTDOWN: libc::c_ulong = 0x8004_587D;
static WITHOUT_JOURNAL: u32 = 2;

/// Mounted until dropped.
pub struct Ext4 {
    image: PathBuf,
    pub dir: PathBuf,
}

impl Ext4 {
    /// None where this process cannot have one, which is said.
    pub fn new(parent: &Path) -> Option<Self> {
        let (image, dir) = (parent.join("image"), parent.join("nvme"));
        std::fs::create_dir_all(&dir).unwrap();
        File::create(&image).unwrap().set_len(BYTES).unwrap();
        let disk = Self { image, dir };
        let image = disk.image.as_os_str();
        let options = ["-q", "-F", "-b", "4096"].map(OsStr::new);
        let made = run("mkfs.ext4", &[&options[..], &[image]].concat()) && disk.try_mount();
        if !made {
            eprintln!("skipped: this process cannot make an ext4 file system, or not mount it");
        }
        made.then_some(disk)
    }

    fn try_mount(&self) -> bool {
        let (image, dir) = (self.image.as_os_str(), self.dir.as_os_str());
        run("mount", &["-o".as_ref(), "loop".as_ref(), image, dir])
    }

    pub fn mount(&self) {
        assert!(self.try_mount());
    }

    /// Whether it could be: nobody has a file open.
    pub fn unmount(&self) -> bool {
        run("umount", &[self.dir.as_os_str()])
    }

    /// Also where files are open: their path leads elsewhere.
    pub fn tear_off(&self) {
        assert!(run("umount", &["-l".as_ref(), self.dir.as_os_str()]));
    }

    /// From now on every access fails with EIO, as where the kernel has given a disk up.
    pub fn shut_down(&self) {
        let dir = File::open(&self.dir).unwrap();
        // SAFETY: the call reads one u32.
        let done = unsafe { libc::ioctl(dir.as_raw_fd(), SHUTDOWN, &raw const WITHOUT_JOURNAL) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// Writes do not end, as of a disk that hangs, while the value lives.
    pub fn freeze(&self) -> Frozen<'_> {
        let frozen = ["--freeze".as_ref(), self.dir.as_os_str()];
        assert!(run("fsfreeze", &frozen));
        Frozen(self)
    }

    /// What has been written to a file from `offset` on cannot be read any more, until it is written again.
    pub fn lose(&self, name: &str, offset: u64) {
        let file = File::open(self.dir.join(name)).unwrap();
        let place = |unit: u64| -> u64 {
            let mut number = unit as libc::c_int;
            // SAFETY: `FIBMAP` reads and writes one int.
            let done = unsafe { libc::ioctl(file.as_raw_fd(), FIBMAP, &raw mut number) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            number as u64
        };
        let (begin, lost) = (place(0), place(offset / UNIT));
        assert_eq!(begin + offset / UNIT, lost, "the file is in one piece");
        let image = OpenOptions::new().write(true).open(&self.image).unwrap();
        image.set_len(lost * UNIT).unwrap();
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        run("umount", &["-l".as_ref(), self.dir.as_os_str()]);
    }
}

pub struct Frozen<'a>(&'a Ext4);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let thawed = ["--unfreeze".as_ref(), self.0.dir.as_os_str()];
        run("fsfreeze", &thawed);
    }
}

fn run(program: &str, arguments: &[&OsStr]) -> bool {
    let mut command = Command::new(program);
    let done = command.args(arguments).stderr(Stdio::null()).status();
    done.is_ok_and(|status| status.success())
}
