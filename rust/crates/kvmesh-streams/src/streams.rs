//! All streams of an event loop.

use std::{io, net, os::fd::BorrowedFd, sync::Arc};

use bytes::Bytes;
use http::uri::PathAndQuery;
use tonic::{
    Code, Status,
    metadata::{BinaryMetadataKey, BinaryMetadataValue, MetadataMap},
};

use crate::{
    Certificates, Event, Listen, StreamId, client,
    driver::Driver,
    inbox::Inbox,
    registry::Registry,
    server,
    socket::Socket,
    tls::{Current, Tls},
};

/// Listens, opens streams, and carries their messages. No method blocks.
pub struct Streams {
    registry: Arc<Registry>,
    driver: Driver,
    tls: Current,
}

impl Streams {
    /// Fails where there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            registry: Arc::new(Registry::new(Arc::<Inbox>::default())),
            driver: Driver::new()?,
            tls: Current::default(),
        })
    }

    /// Readable while there is something for [`Self::poll`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.driver.reactor.fd()
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
        let listener = Socket::new(listener, &self.driver.reactor)?;
        self.driver.tasks.spawn(server::accept(
            listener,
            listen,
            Arc::clone(&self.registry),
            Arc::clone(&self.tls),
            self.driver.clone(),
        ));
        Ok(port)
    }

    /// Opens a stream on a connection of its own. Messages may be sent at once; a failure is an [`Event::Closed`].
    /// `method` is a path; fails with `InvalidInput` when it is none.
    pub fn open(&self, address: &str, method: &str) -> io::Result<StreamId> {
        let method = PathAndQuery::try_from(method).map_err(io::Error::other)?;
        let (stream, outgoing) = self.registry.add();
        let inbox = Arc::clone(self.registry.inbox());
        let task = self.driver.tasks.spawn_abortable(client::run(
            stream,
            address.to_owned(),
            method,
            outgoing,
            inbox,
            self.tls.read().clone(),
            self.driver.clone(),
        ));
        self.registry.started(stream, task);
        Ok(stream)
    }

    /// Queues a message. Returns false when the transport is behind: [`Event::Writable`] tells when it has caught up, and
    /// what is sent meanwhile is queued all the same. What is sent on a stream that is over is dropped.
    pub fn send(&self, stream: StreamId, message: Bytes) -> bool {
        self.registry.send(stream, message)
    }

    /// Ends this side after what was sent: a served stream with OK, an opened one by a half-close. A unary call is
    /// answered by what was sent last.
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

    /// Cancels an opened stream; there is no event of it any more but those already waiting.
    pub fn cancel(&self, stream: StreamId) {
        self.registry.remove(stream);
    }

    /// Carries on with what can be done without waiting; what has happened since the last call, in the order of
    /// each stream.
    pub fn poll(&self) -> Vec<Event> {
        self.driver.turn();
        let (events, more) = self.registry.inbox().take();
        if more {
            self.driver.reactor.news();
        }
        for event in &events {
            if let Event::Closed(stream, _) = event {
                self.registry.remove(*stream);
            }
        }
        events
    }

    /// Stops listening and drops every stream; what was sent leaves as far as that needs no waiting. Idempotent.
    pub fn close(&self) {
        self.driver.turn();
        self.driver.tasks.clear();
        self.registry.inbox().take();
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        // Tasks hold the driver, which holds them.
        self.driver.tasks.clear();
    }
}
