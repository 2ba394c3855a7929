//! The error of kvmesh's Rust crates: a kind to act on, a message to read, context to find it by.

use std::fmt;

/// What a caller can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The call itself is wrong; the same call will fail again.
    #[error("invalid argument")]
    InvalidArgument,
    /// What the call names does not exist, or no longer.
    #[error("not found")]
    NotFound,
    /// A fixed limit is reached; release something first.
    #[error("limit exceeded")]
    LimitExceeded,
}

/// `message, key: value, ...`. Messages are lowercase, without a full stop, and say what to do.
#[derive(Debug, thiserror::Error)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    context: Vec<(&'static str, String)>,
}

/// A result with kvmesh's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` that tells the reader `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            context: Vec::new(),
        }
    }

    /// An [`ErrorKind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// Adds what the error is about.
    #[must_use]
    pub fn with_context(mut self, key: &'static str, value: impl ToString) -> Self {
        self.context.push((key, value.to_string()));
        self
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.context
            .iter()
            .try_for_each(|(key, value)| write!(f, ", {key}: {value}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_as_one_line() {
        let error = Error::invalid("page_size must be at least 1").with_context("page_size", 0);
        assert_eq!(
            error.to_string(),
            "page_size must be at least 1, page_size: 0"
        );
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
