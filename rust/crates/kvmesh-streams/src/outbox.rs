//! What a stream has to send: filled by the caller, emptied by the transport as flow control allows.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures_util::future::AbortHandle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::Stream;
use tonic::Status;

use crate::{
    StreamId,
    inbox::{End, Event, Inbox},
};

/// Messages the transport may be behind before the caller is asked to wait.
const BEHIND: usize = 4;

enum Item {
    Message(Bytes),
    End(Result<(), Status>),
}

/// The caller's side of one stream.
pub struct Outbox {
    items: UnboundedSender<Item>,
    progress: Arc<Progress>,
}

#[derive(Default)]
struct Progress {
    queued: AtomicUsize,
    // The caller waits for `queued` to fall to 0.
    waited_for: AtomicBool,
}

impl Outbox {
    pub fn new(stream: StreamId, inbox: Arc<Inbox>) -> (Self, Outgoing) {
        let (items, queue) = unbounded_channel();
        let progress = Arc::<Progress>::default();
        let outgoing = Outgoing {
            stream,
            inbox,
            queue,
            progress: Arc::clone(&progress),
            ended: false,
            served: false,
            reader: None,
        };
        (Self { items, progress }, outgoing)
    }

    /// Returns whether more may be sent at once; if not, [`Event::Writable`] tells when. A stream that is
    /// over takes everything and sends nothing.
    pub fn send(&self, message: Bytes) -> bool {
        let queued = self.progress.queued.fetch_add(1, SeqCst) + 1;
        if self.items.send(Item::Message(message)).is_err() || queued < BEHIND {
            return true;
        }
        self.progress.waited_for.store(true, SeqCst);
        // If it was emptied before the flag could be seen, nobody else takes the flag back.
        self.progress.queued.load(SeqCst) == 0 && self.progress.waited_for.swap(false, SeqCst)
    }

    /// Ends this side after what was sent: with a status where it is a server's, as a half-close where a client's.
    pub fn end(&self, how: Result<(), Status>) {
        let _ = self.items.send(Item::End(how));
    }
}

/// The transport's side. Of a served stream its end of life is the stream's.
pub struct Outgoing {
    stream: StreamId,
    inbox: Arc<Inbox>,
    queue: UnboundedReceiver<Item>,
    progress: Arc<Progress>,
    ended: bool,
    served: bool,
    reader: Option<AbortHandle>,
}

impl Outgoing {
    /// Makes this a served stream: its end stops the reader, where there is one, and is told to the caller.
    pub fn served(&mut self, reader: Option<AbortHandle>) {
        self.served = true;
        self.reader = reader;
    }
}

impl Stream for Outgoing {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        match ready!(self.queue.poll_recv(context)) {
            Some(Item::Message(message)) => {
                let progress = &self.progress;
                if progress.queued.fetch_sub(1, SeqCst) == 1
                    && progress.waited_for.swap(false, SeqCst)
                {
                    self.inbox.push(Event::Writable(self.stream));
                }
                Poll::Ready(Some(Ok(message)))
            }
            Some(Item::End(Err(status))) => {
                self.ended = true;
                Poll::Ready(Some(Err(status)))
            }
            Some(Item::End(Ok(()))) | None => {
                self.ended = true;
                Poll::Ready(None)
            }
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.served {
            return;
        }
        if let Some(reader) = &self.reader {
            reader.abort();
        }
        let end = if self.ended {
            End::default()
        } else {
            Status::cancelled("the caller hung up").into()
        };
        self.inbox.push(Event::Closed(self.stream, end));
    }
}
