//! The slab file: slots of all sizes in one preallocated file, past the page cache where the file system allows it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use super::io::{Engine, Source, Transfer};
use crate::error::{Error, Result};

const NAME: &str = "slabs";

/// An open slab file, this process's alone.
pub(super) struct Disk {
    file: File,
    path: PathBuf,
    engine: Engine,
    direct: bool,
    /// When what is under way began.
    running: Mutex<FxHashMap<u64, Instant>>,
    next: AtomicU64,
    /// What is written next waits for this.
    #[cfg(test)]
    held: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
}

impl Disk {
    /// Opens the file in `dir`, made if need be, and allocates all of it. Waits so long for another process to let go of
    /// it.
    pub(super) fn open(dir: &Path, bytes: u64, patience: Duration) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io("cannot use", dir))?;
        let path = dir.join(NAME);
        let open = |flags| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.custom_flags(flags).open(&path)
        };
        let failed = || Error::io("cannot use", &path);
        let (file, direct) = match open(libc::O_DIRECT) {
            Ok(file) => (file, true),
            // Some file systems have no direct I/O.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                (open(0).map_err(failed())?, false)
            }
            Err(error) => return Err(failed()(error)),
        };
        let began = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if began.elapsed() < patience => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(Error::DirectoryTaken(dir.to_owned()));
                }
                Err(error) => return Err(failed()(error.into())),
            }
        }
        if file.metadata().map_err(failed())?.len() > bytes {
            file.set_len(bytes).map_err(failed())?;
        }
        fallocate(&file, FallocateFlags::empty(), 0, bytes)
            .map_err(|error| Error::io("cannot allocate", &path)(error.into()))?;
        Ok(Self {
            file,
            path,
            engine: Engine::probe(),
            direct,
            running: Mutex::default(),
            next: AtomicU64::new(0),
            #[cfg(test)]
            held: Mutex::default(),
        })
    }

    /// The next write waits until this is dropped.
    #[cfg(test)]
    pub(super) fn hold_next(&self) -> std::sync::mpsc::Sender<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        *self.held.lock() = Some(receiver);
        sender
    }

    /// Whether a write waits that was to be held, or has waited.
    #[cfg(test)]
    pub(super) fn is_holding(&self) -> bool {
        self.held.lock().is_none()
    }

    /// How bytes are moved.
    pub(super) fn describe(&self) -> String {
        let cache = if self.direct { "direct" } else { "page cache" };
        format!("{}, {cache}", self.engine.name())
    }

    /// Runs the transfers; `done` hears of each as it ends.
    pub(super) fn run(&self, transfers: &[Transfer], mut done: impl FnMut(usize, Result<()>)) {
        let timed = self.begin();
        self.engine.run(&self.file, transfers, |place, result| {
            timed.still();
            done(place, result.map_err(|error| self.failed(error)));
        });
    }

    /// Runs what the source has, until it has no more and all has ended.
    pub(super) fn stream(&self, source: &mut dyn Source) {
        let timed = self.begin();
        self.engine
            .stream(&self.file, &mut Watched { timed, source });
    }

    /// What a transfer's failure means.
    pub(super) fn failed(&self, error: io::Error) -> Error {
        Error::io("cannot use", &self.path)(error)
    }

    /// Makes what was written outlive the machine.
    pub(super) fn sync(&self) -> Result<()> {
        let _timed = self.begin();
        self.file
            .sync_data()
            .map_err(Error::io("cannot write", &self.path))
    }

    /// How long the disk has not answered.
    pub(super) fn silent(&self) -> Duration {
        let running = self.running.lock();
        running
            .values()
            .map(Instant::elapsed)
            .max()
            .unwrap_or_default()
    }

    /// Fails unless the file is still at its path.
    pub(super) fn check(&self) -> Result<()> {
        let gone = |error| Error::io("lost", &self.path)(error);
        let (here, there) = (
            self.file.metadata().map_err(gone)?,
            std::fs::metadata(&self.path).map_err(gone)?,
        );
        if (here.dev(), here.ino()) == (there.dev(), there.ino()) {
            Ok(())
        } else {
            Err(gone(io::Error::other("another file took its place")))
        }
    }

    pub(super) fn begin(&self) -> Timed<'_> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.running.lock().insert(id, Instant::now());
        Timed { disk: self, id }
    }
}

/// A source of which is known how long the disk keeps it waiting.
struct Watched<'a> {
    timed: Timed<'a>,
    source: &'a mut dyn Source,
}

impl Source for Watched<'_> {
    fn next(&mut self, most: usize) -> Vec<(u64, Transfer)> {
        let next = self.source.next(most);
        #[cfg(test)]
        if !next.is_empty()
            && let Some(held) = { self.timed.disk.held.lock().take() }
        {
            let _ = held.recv();
        }
        next
    }

    fn ended(&mut self, ended: Vec<(u64, io::Result<()>)>) {
        self.timed.still();
        self.source.ended(ended);
    }
}

pub(super) struct Timed<'a> {
    disk: &'a Disk,
    id: u64,
}

impl Timed<'_> {
    /// The disk has answered.
    fn still(&self) {
        self.disk.running.lock().insert(self.id, Instant::now());
    }
}

impl Drop for Timed<'_> {
    fn drop(&mut self) {
        self.disk.running.lock().remove(&self.id);
    }
}
