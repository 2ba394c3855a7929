//! What has happened on all streams, until the caller's thread asks.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::Notify;
use tonic::{Code, Status, metadata::KeyAndValueRef};

use crate::StreamId;

/// Bytes kept for a caller that does not poll; beyond, streams are read no further.
const MAX_UNPOLLED: usize = 64 << 20;

/// Something that happened on a stream.
#[derive(Debug)]
pub enum Event {
    /// A caller opened a stream of this method.
    Opened(StreamId, String),
    /// A message came.
    Message(StreamId, Bytes),
    /// The other end of a served stream will send no more.
    HalfClosed(StreamId),
    /// All that was sent has been taken, after a `send` that said it had not.
    Writable(StreamId),
    /// The stream is over. Nothing else follows.
    Closed(StreamId, End),
}

/// How a stream ended, as gRPC says it.
#[derive(Debug, Default)]
pub struct End {
    /// gRPC status code; 0 is OK.
    pub code: i32,
    /// The status message.
    pub message: String,
    /// Trailing metadata with binary values.
    pub details: Vec<(String, Vec<u8>)>,
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        let details = status
            .metadata()
            .iter()
            .filter_map(|entry| match entry {
                KeyAndValueRef::Binary(key, value) => {
                    Some((key.to_string(), value.to_bytes().ok()?.to_vec()))
                }
                KeyAndValueRef::Ascii(..) => None,
            })
            .collect();
        Self {
            code: Code::from(status.code() as i32) as i32,
            message: status.message().to_owned(),
            details,
        }
    }
}

pub struct Inbox {
    waiting: Mutex<Waiting>,
    room: Notify,
    fd: OwnedFd,
}

#[derive(Default)]
struct Waiting {
    events: Vec<Event>,
    bytes: usize,
}

impl Inbox {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            waiting: Mutex::default(),
            room: Notify::new(),
            fd: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn push(&self, event: Event) {
        let mut waiting = self.waiting.lock();
        let first = waiting.events.is_empty();
        if let Event::Message(_, message) = &event {
            waiting.bytes += message.len();
        }
        waiting.events.push(event);
        drop(waiting);
        if first {
            // Fails only when the counter would overflow, and then the descriptor is readable anyway.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Returns when the caller has not fallen too far behind.
    pub async fn room(&self) {
        loop {
            let room = self.room.notified();
            if self.waiting.lock().bytes < MAX_UNPOLLED {
                return;
            }
            room.await;
        }
    }

    pub fn take(&self) -> Vec<Event> {
        // Before the events: one that comes in between makes the descriptor readable again.
        let _ = rustix::io::read(&self.fd, &mut [0; 8]);
        let taken = std::mem::take(&mut *self.waiting.lock());
        if taken.bytes >= MAX_UNPOLLED {
            self.room.notify_waiters();
        }
        taken.events
    }
}
