//! The locks that order what threads of the store do with slots. The host tier takes them from here alone, so that
//! `tests/slots.rs` can compile it with another such module, whose every operation a model checker schedules.

pub(crate) use parking_lot::{Condvar, Mutex};
