//! What is going to happen in a simulation, the next first.

use std::{cmp::Ordering, rc::Rc};

use crate::store::Change;

/// What happens.
pub enum Happening {
    Arrival {
        request: usize,
    },
    Pass {
        worker: usize,
        version: u64,
    },
    Transferred {
        request: usize,
    },
    Stored {
        worker: usize,
        chain: Rc<[u64]>,
        from: usize,
        to: usize,
    },
    Removed {
        worker: usize,
        hashes: Vec<u64>,
    },
    Kept {
        node: usize,
        change: Change,
    },
    Slowdown {
        worker: usize,
        factor: f64,
    },
    Wake {
        version: u64,
    },
}

/// A happening and its time.
pub struct Event {
    pub at: f64,
    /// Numbers grow.
    pub number: u64,
    pub what: Happening,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    // The earliest is the greatest; at the same time the one noted first.
    fn cmp(&self, other: &Self) -> Ordering {
        let key = other.at.total_cmp(&self.at);
        key.then_with(|| other.number.cmp(&self.number))
    }
}
