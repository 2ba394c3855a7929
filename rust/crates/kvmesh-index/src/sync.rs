//! What threads share memory with. The crate takes it from here alone, so that `tests/model.rs` can compile it with
//! another such module, whose every operation a model checker schedules.

pub use std::{
    hint::spin_loop,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicUsize, fence},
    },
    thread::yield_now,
};

pub use arc_swap::{ArcSwap, Guard};
pub use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
