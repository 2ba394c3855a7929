//! All streams of a process, and the thread they live on.

use std::{io, net, os::fd::BorrowedFd, sync::Arc, thread::JoinHandle};

use bytes::Bytes;
use http::uri::PathAndQuery;
use parking_lot::Mutex;
use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};
use tonic::{
    Code, Status,
    metadata::{BinaryMetadataKey, BinaryMetadataValue, MetadataMap},
};

use crate::{
    Certificates, Event, Listen, StreamId, client,
    inbox::Inbox,
    registry::Registry,
    server,
    tls::{Current, Tls},
};

/// Listens, opens streams, and carries their messages. No method blocks.
pub struct Streams {
    registry: Arc<Registry>,
    runtime: Handle,
    tls: Current,
    thread: Mutex<Option<(oneshot::Sender<()>, JoinHandle<()>)>>,
}

impl Streams {
    /// Starts the thread.
    pub fn new() -> io::Result<Self> {
        let registry = Arc::new(Registry::new(Arc::new(Inbox::new()?)));
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("kvmesh-streams".to_owned())
            .spawn(move || {
                let _ = runtime.block_on(stopped);
            })?;
        Ok(Self {
            registry,
            runtime: handle,
            tls: Current::default(),
            thread: Mutex::new(Some((stop, thread))),
        })
    }

    /// Readable while [`Self::poll`] has something to return.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.registry.inbox().fd()
    }

    /// Connections made from now on, either way, are TLS with these certificates. Fails with `InvalidData` where they
    /// cannot be used; then all stays as it is.
    pub fn secure(&self, certificates: &Certificates) -> io::Result<()> {
        let tls = Tls::new(certificates)?;
        *self.tls.write() = Some(Arc::new(tls));
        Ok(())
    }

    /// Serves `listen` on an address until [`Self::close`]; returns the port. `host` is an IP address or a name.
    pub fn listen(&self, host: &str, port: u16, listen: Listen) -> io::Result<u16> {
        let listener = net::TcpListener::bind((host, port))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let _runtime = self.runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        self.runtime.spawn(server::accept(
            listener,
            listen,
            Arc::clone(&self.registry),
            Arc::clone(&self.tls),
        ));
        Ok(port)
    }

    /// Opens a stream on a connection of its own. Messages may be sent at once; a failure is an [`Event::Closed`].
    /// `method` is a path; fails with `InvalidInput` when it is none.
    pub fn open(&self, address: &str, method: &str) -> io::Result<StreamId> {
        let method = PathAndQuery::try_from(method).map_err(io::Error::other)?;
        let (stream, outgoing) = self.registry.add();
        let inbox = Arc::clone(self.registry.inbox());
        let task = self.runtime.spawn(client::run(
            stream,
            address.to_owned(),
            method,
            outgoing,
            inbox,
            self.tls.read().clone(),
        ));
        self.registry.started(stream, task.abort_handle());
        Ok(stream)
    }

    /// Queues a message. Returns false when the transport is behind: [`Event::Writable`] tells when it has caught up, and
    /// what is sent meanwhile is queued all the same. What is sent on a stream that is over is dropped.
    pub fn send(&self, stream: StreamId, message: Bytes) -> bool {
        self.registry.send(stream, message)
    }

    /// Ends this side after what was sent: a served stream with OK, an opened one by a half-close.
    pub fn end(&self, stream: StreamId) {
        self.registry.end(stream, Ok(()));
    }

    /// Ends a served stream, after what was sent, with a status; `details` is trailing metadata, keys ending in
    /// `-bin`. A key that is none is left out.
    pub fn fail(&self, stream: StreamId, code: i32, message: &str, details: &[(String, Vec<u8>)]) {
        let mut metadata = MetadataMap::new();
        for (key, value) in details {
            if let Ok(key) = BinaryMetadataKey::from_bytes(key.as_bytes()) {
                metadata.insert_bin(key, BinaryMetadataValue::from_bytes(value));
            }
        }
        let status = Status::with_metadata(Code::from(code), message, metadata);
        self.registry.end(stream, Err(status));
    }

    /// Cancels an opened stream at once; there is no event of it any more but those already waiting.
    pub fn cancel(&self, stream: StreamId) {
        self.registry.remove(stream);
    }

    /// What has happened since the last call, in the order of each stream.
    pub fn poll(&self) -> Vec<Event> {
        let events = self.registry.inbox().take();
        for event in &events {
            if let Event::Closed(stream, _) = event {
                self.registry.remove(*stream);
            }
        }
        events
    }

    /// Stops listening, drops every stream and ends the thread. Idempotent.
    pub fn close(&self) {
        let thread = self.thread.lock().take();
        if let Some((stop, thread)) = thread {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.close();
    }
}
