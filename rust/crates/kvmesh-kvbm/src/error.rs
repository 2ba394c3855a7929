//! What can go wrong, in words an operator can act on.

use std::io;
use std::path::PathBuf;

use kvmesh_core::Digest;

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of a tier or of the way to it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arena's file system cannot hold it.
    #[error(
        "the host tier needs {wanted} bytes and {} has {free} free; lower kvbm.host_bytes, enlarge it \
         (containers: --shm-size), or name another directory in kvbm.shm_dir", dir.display()
    )]
    NoSpace {
        /// Where the arena was to be.
        dir: PathBuf,
        /// Bytes of the arena.
        wanted: u64,
        /// Bytes left there.
        free: u64,
    },
    /// Blocks of this layout do not fit the tier.
    #[error(
        "a block of {slot} bytes needs a tier of at least {needed} bytes; raise kvbm.host_bytes or kvbm.nvme.capacity"
    )]
    LayoutTooLarge {
        /// Bytes of one slot.
        slot: u64,
        /// The smallest tier that holds such slots.
        needed: u64,
    },
    /// Another process has the disk tier's directory.
    #[error(
        "{} is in use by another kvbm, or by a transfer that has not ended; give each kvbm a kvbm.nvme.path of its own",
        .0.display()
    )]
    DirectoryTaken(PathBuf),
    /// The disk tier is out.
    #[error("the nvme tier in {} is out", .0.display())]
    Offline(PathBuf),
    /// The disk does not answer.
    #[error("the disk of {} has not answered for {seconds} s", path.display())]
    Silent {
        /// The tier's directory.
        path: PathBuf,
        /// Since when.
        seconds: u64,
    },
    /// The object storage does not do what it should.
    #[error("the object storage at {at}: {why}")]
    Storage {
        /// Its URL.
        at: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// Another process serves the socket.
    #[error("another kvbm serves {}; stop it, or set kvbm.socket to another path", .0.display())]
    SocketTaken(PathBuf),
    /// The path does not fit a socket address.
    #[error("the socket path {} is longer than {max} bytes; set kvbm.socket to a shorter one", path.display())]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
        /// Longest path a unix socket can have.
        max: usize,
    },
    /// The file system refused.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The store is not there, went away, or did not answer in time.
    #[error("the store is not reachable: {0}")]
    Disconnected(String),
    /// The store refused a request and says why.
    #[error("the store refused: {0}")]
    Refused(String),
    /// A message that is no part of the protocol.
    #[error("malformed message: {0}")]
    Protocol(&'static str),
    /// A block's bytes are not those that were stored. It has been dropped.
    #[error("block {digest} is corrupt ({what}); it has been dropped")]
    Corrupt {
        /// The block.
        digest: Digest,
        /// Which part.
        what: &'static str,
    },
    /// A block that was on its way from a lower tier has not come.
    #[error("block {0} did not come up from a lower tier")]
    Lost(Digest),
    /// A flush ended without these on a tier that outlives the machine.
    #[error("{missing} of {of} blocks are not kept, {first} among them: {why}")]
    NotKept {
        /// How many.
        missing: usize,
        /// Blocks that memory had when the flush began.
        of: usize,
        /// One of them.
        first: Digest,
        /// Why the first of them is not.
        why: String,
    },
    /// A slot that was to be registered does not hold a whole block.
    #[error("the slot does not hold a whole block")]
    NotFilled,
    /// An argument does not fit the layout.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
