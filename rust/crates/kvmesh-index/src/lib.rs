//! Which worker holds which block of KV, in which tier.
//!
//! The state is a set of (holder, tier, block hash), and membership in it alone decides a match. A
//! block hash names the block and its whole prefix, so nothing else has to be compared, and the
//! order of events across blocks does not matter: a hole shortens a match, storing the block again
//! heals it, and a block may come before its parent.
//!
//! **Structure.** Blocks that were stored one after the other lie in one [run](run::Run) of at most
//! 64. Who holds which of them is a [list](cover::Cover) of masks, and of groups of 64 holders that hold the same start of the run, so that a
//! chain shared by many holders costs each of them a few bits. A match goes from a run to the one behind it, with a
//! [table](table::Table) that finds any block's place where that is not known, so once per run at most and not per block. Runs are layout
//! only: how blocks are cut into runs never changes an answer.
//!
//! **Guarantees.** Every method may be called from any thread. Matches take no lock, wait for
//! nobody and, without a cap, write nothing that others see; with one, they note at times when a run was
//! last of use. Writers of different holders go on side by side; those of one holder take turns. A
//! match never reports a block that was absent during all of it, nor misses one that was present during all of it;
//! blocks that come or go meanwhile may be seen or not, each by itself. Memory, as asked of the allocator,
//! stays below `max_bytes`; at the cap the least recently matched leaves are forgotten, so that
//! the index may report less than the truth but never more.

#![forbid(unsafe_code)]

mod batch;
mod blocks;
mod cap;
mod cover;
mod holders;
mod index;
mod line;
mod lock;
mod matches;
mod piece;
mod pool;
mod run;
mod snapshot;
mod sync;
mod table;
mod walk;
mod write;

// Finding a block reads one line of its run.
const _: () = assert!(size_of::<run::Run>() == 64);

pub use batch::Change;
pub use holders::{HolderId, MAX_HOLDERS};
pub use index::{PrefixIndex, Stats};
pub use matches::{Match, Matches};
