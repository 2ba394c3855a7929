//! The streams that are not over, by their numbers.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use futures_util::future::AbortHandle;
use parking_lot::Mutex;
use tonic::Status;

use crate::{
    inbox::Inbox,
    outbox::{Outbox, Outgoing},
};

/// Names a stream in this process; never reused.
pub type StreamId = u64;

/// The streams that are not over.
pub struct Registry {
    inbox: Arc<Inbox>,
    open: Mutex<HashMap<StreamId, Open>>,
    next: AtomicU64,
}

struct Open {
    outbox: Outbox,
    // Of a stream that was opened here.
    task: Option<AbortHandle>,
}

impl Registry {
    pub fn new(inbox: Arc<Inbox>) -> Self {
        Self {
            inbox,
            open: Mutex::default(),
            next: AtomicU64::new(1),
        }
    }

    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    pub fn add(&self) -> (StreamId, Outgoing) {
        let stream = self.next.fetch_add(1, Relaxed);
        let (outbox, outgoing) = Outbox::new(stream, Arc::clone(&self.inbox));
        self.open.lock().insert(stream, Open { outbox, task: None });
        (stream, outgoing)
    }

    pub fn end(&self, stream: StreamId, how: Result<(), Status>) {
        if let Some(open) = self.open.lock().get(&stream) {
            open.outbox.end(how);
        }
    }

    /// The task that runs a stream opened here.
    pub fn started(&self, stream: StreamId, task: AbortHandle) {
        if let Some(open) = self.open.lock().get_mut(&stream) {
            open.task = Some(task);
        }
    }

    /// Returns whether more may be sent at once.
    pub fn send(&self, stream: StreamId, message: Bytes) -> bool {
        match self.open.lock().get(&stream) {
            Some(open) => open.outbox.send(message),
            None => true,
        }
    }

    /// Forgets a stream; one opened here is cancelled unless it is over.
    pub fn remove(&self, stream: StreamId) {
        if let Some(task) = self.open.lock().remove(&stream).and_then(|o| o.task) {
            task.abort();
        }
    }
}
