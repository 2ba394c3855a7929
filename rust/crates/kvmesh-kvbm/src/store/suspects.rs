//! Blocks that an engine has found to be wrong in memory: their copies in the other tiers are checked at once, on a
//! thread of their own, because reading them may take long and engines wait for their connection's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvmesh_core::{Digest, Tier as Kind};
use parking_lot::{Condvar, Mutex};

use super::scrub::Checker;
use crate::error::{Error, Result};
use crate::tiers::NamespaceId;

/// Blocks that may wait; of more the copies are checked when they are read, or scrubbed.
const MOST: usize = 1024;

/// The thread that checks them.
pub(super) struct Suspects {
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Queue {
    /// By the host tier's numbers; None: it is time to stop.
    blocks: Mutex<Option<VecDeque<(NamespaceId, Digest)>>>,
    changed: Condvar,
}

impl Suspects {
    pub(super) fn start(checker: Checker) -> Result<Self> {
        let queue = Arc::new(Queue {
            blocks: Mutex::new(Some(VecDeque::new())),
            changed: Condvar::new(),
        });
        let of_thread = queue.clone();
        let thread = thread::Builder::new()
            .name("kvbm-suspects".into())
            .spawn(move || of_thread.run(&checker))
            .map_err(Error::io("cannot start", "the thread that checks copies"))?;
        Ok(Self {
            queue,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// This block was wrong in the host tier. Waits for nothing.
    pub(super) fn add(&self, namespace: NamespaceId, digest: Digest) {
        if let Some(blocks) = &mut *self.queue.blocks.lock()
            && blocks.len() < MOST
        {
            blocks.push_back((namespace, digest));
            self.queue.changed.notify_one();
        }
    }

    /// Ends the thread; what waits stays unchecked. Idempotent.
    pub(super) fn stop(&self) {
        *self.queue.blocks.lock() = None;
        self.queue.changed.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn run(&self, checker: &Checker) {
        let mut scratch = Vec::new();
        while let Some((namespace, digest)) = self.next() {
            checker.check_copies(Kind::Host, namespace, &digest, &mut scratch);
        }
    }

    /// Waits for one; None: it is time to stop.
    fn next(&self) -> Option<(NamespaceId, Digest)> {
        let mut blocks = self.blocks.lock();
        loop {
            if let Some(next) = blocks.as_mut()?.pop_front() {
                return Some(next);
            }
            self.changed.wait(&mut blocks);
        }
    }
}
