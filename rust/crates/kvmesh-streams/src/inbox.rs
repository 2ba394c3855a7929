//! What has happened on all streams, until the caller asks.

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tonic::{Code, Status, metadata::KeyAndValueRef};

use crate::StreamId;

/// Bytes of messages that one poll takes in; beyond, streams are read no further until the next one.
const A_POLL: usize = 4 << 20;

/// Something that happened on a stream.
#[derive(Debug)]
pub enum Event {
    /// A caller opened a stream of this method.
    Opened(StreamId, String),
    /// A caller made a unary call: a served stream whose one message has come and that takes one.
    Called {
        /// The call.
        stream: StreamId,
        /// Its method, a path.
        method: String,
        /// The metadata of that name; empty: none.
        traceparent: String,
        /// The request.
        message: Bytes,
    },
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

#[derive(Default)]
pub struct Inbox {
    waiting: Mutex<Waiting>,
    room: Notify,
}

#[derive(Default)]
struct Waiting {
    events: Vec<Event>,
    bytes: usize,
}

impl Inbox {
    pub fn push(&self, event: Event) {
        let mut waiting = self.waiting.lock();
        if let Event::Message(_, message) | Event::Called { message, .. } = &event {
            waiting.bytes += message.len();
        }
        waiting.events.push(event);
    }

    /// Returns when the next message may be read.
    pub async fn room(&self) {
        loop {
            let room = self.room.notified();
            if self.waiting.lock().bytes < A_POLL {
                return;
            }
            room.await;
        }
    }

    /// All there is, and whether tasks that waited for room go on.
    pub fn take(&self) -> (Vec<Event>, bool) {
        let taken = std::mem::take(&mut *self.waiting.lock());
        let full = taken.bytes >= A_POLL;
        if full {
            self.room.notify_waiters();
        }
        (taken.events, full)
    }
}
