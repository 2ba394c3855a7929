//! What every task needs of the loop it runs on.

use std::{io, sync::Arc};

use crate::{
    reactor::{Reactor, Timer},
    tasks::Tasks,
};

/// Where tasks run, and what they wait by.
#[derive(Clone)]
pub struct Driver {
    pub tasks: Tasks,
    pub reactor: Arc<Reactor>,
}

impl Driver {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            tasks: Tasks::default(),
            reactor: Arc::new(Reactor::new()?),
        })
    }

    pub fn timer(&self) -> Timer {
        Timer(Arc::clone(&self.reactor))
    }

    /// Does all that can be done without waiting.
    pub fn turn(&self) {
        self.reactor.turn();
        self.tasks.run();
    }
}
