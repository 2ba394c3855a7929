//! What can go wrong with a log that is read.

use std::path::PathBuf;

/// Why a log cannot be replayed. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file system refused.
    #[error("cannot read {path}: {why}")]
    Io {
        /// What was to be read.
        path: PathBuf,
        /// Why not.
        why: std::io::Error,
    },
    /// A line that no log of this version has.
    #[error("{path}, line {line}: {why}")]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1 on.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// Nothing there.
    #[error(
        "no decision log in {0}; name a directory that `router.decision_log.path` named, or a file of it"
    )]
    Nothing(PathBuf),
    /// A policy that cannot be asked again.
    #[error("{0}")]
    Policy(String),
}

/// Of this crate.
pub type Result<T> = std::result::Result<T, ReplayError>;
