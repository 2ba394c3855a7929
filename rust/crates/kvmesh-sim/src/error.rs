//! What can be wrong with a simulation's inputs.

use std::path::Path;

/// Why a simulation has no outcome.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An input that cannot be simulated; the message says which and why.
    #[error("{0}")]
    Invalid(String),
    /// Whoever watched it had enough.
    #[error("interrupted")]
    Interrupted,
}

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error that says `message`.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(message.into())
    }

    /// An error in a line of a file, counted from 0.
    pub fn at_line(number: usize, what: impl std::fmt::Display) -> Self {
        Self::Invalid(format!("line {}: {what}", number + 1))
    }

    /// The same error, in a file.
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            Self::Invalid(message) => Self::Invalid(format!("{}: {message}", path.display())),
            other => other,
        }
    }
}
