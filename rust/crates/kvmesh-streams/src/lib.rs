//! Bidirectional gRPC streams for callers with an event loop of theirs, carried by that loop's own thread.
//!
//! The data plane sends one small message an engine step, hundreds a second on each stream. What that
//! costs is wake-ups: here a message takes none but the loop's own.
//!
//! Messages are opaque bytes; the protocol is gRPC's own (by tonic), so that any gRPC client or server can be at
//! the other end. Nothing in here blocks, and nothing moves but in [`Streams::poll`], which returns what has happened
//! since the last time: call it when [`Streams::fd`] is readable, and soon after any other call.
//!
//! A listener serves the methods it was given, streams and unary calls; every other call on its port is passed on to a second
//! gRPC server on a unix socket, so that a role has one address for all its services.
//!
//! Connections are plain until [`Streams::secure`] names certificates, which may be replaced at any time.

mod client;
mod codec;
mod driver;
mod inbox;
mod outbox;
mod reactor;
mod registry;
mod server;
mod socket;
mod streams;
mod tasks;
mod tls;
mod unary;

pub use inbox::{End, Event};
pub use registry::StreamId;
pub use server::{Listen, Method};
pub use streams::Streams;
pub use tls::Certificates;

/// Bytes of a message at most, either way.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// HTTP/2 flow control: what may be on its way unread, of one stream and of one connection.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// A peer that vanished without closing its connection is noticed after the sum of both. An answer takes the peer's
/// event loop, which a busy machine holds up for seconds.
const PING_EVERY: std::time::Duration = std::time::Duration::from_secs(10);
const PING_ANSWER: std::time::Duration = std::time::Duration::from_secs(20);
