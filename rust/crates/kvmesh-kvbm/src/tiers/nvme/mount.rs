//! Where the tier's disk is mounted: when it is not any more, the directory's path leads to another disk.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The root of the file system that a directory is in.
pub(super) struct Mount(PathBuf);

impl Mount {
    pub(super) fn of(dir: &Path) -> Result<Self> {
        let failed = || Error::io("cannot use", dir);
        let dir = dir.canonicalize().map_err(failed())?;
        let own = device(&dir).map_err(failed())?;
        let within = |above: &&Path| device(above).is_ok_and(|device| device == own);
        let root = dir.ancestors().take_while(within).last().unwrap_or(&dir);
        Ok(Self(root.to_owned()))
    }

    /// Fails where the root of no file system is there now.
    pub(super) fn check(&self) -> Result<()> {
        let lost = || Error::io("lost", &self.0);
        let Some(above) = self.0.parent() else {
            return Ok(());
        };
        if device(&self.0).map_err(lost())? == device(above).map_err(lost())? {
            return Err(lost()(io::Error::other("nothing is mounted there")));
        }
        Ok(())
    }
}

fn device(path: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(path)?.dev())
}
