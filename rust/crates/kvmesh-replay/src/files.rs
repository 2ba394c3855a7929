//! Where a log's files are, and in what order.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// A file's name: the log's, its number, and what it is.
const ENDING: &str = ".jsonl";

/// One file of a log.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogFile {
    /// Of the log.
    pub name: String,
    /// From 1 on, over all lives of its router.
    pub number: u64,
    pub path: PathBuf,
}

/// A model's name as that of a file: what a path could stumble over is replaced, and a digest keeps names apart.
pub fn name_of(model: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = model
        .chars()
        .map(|c| if plain(c) { c } else { '_' })
        .take(100)
        .collect();
    if name == model && !name.starts_with('.') && !name.is_empty() {
        return name;
    }
    // FNV-1a.
    let digest = model.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("log-{name}-{digest:016x}")
}

/// Where a file of a log is.
pub fn path_of(directory: &Path, name: &str, number: u64) -> PathBuf {
    directory.join(format!("{name}.{number:08}{ENDING}"))
}

/// A path as a log's file; None when it is none.
pub fn parse(path: &Path) -> Option<LogFile> {
    let stem = path.file_name()?.to_str()?.strip_suffix(ENDING)?;
    let (name, number) = stem.rsplit_once('.')?;
    Some(LogFile {
        name: name.to_owned(),
        number: number.parse().ok()?,
        path: path.to_owned(),
    })
}

/// All logs' files in a directory, by name and number.
pub fn list(directory: &Path) -> io::Result<Vec<LogFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        files.extend(parse(&entry?.path()));
    }
    files.sort();
    Ok(files)
}
