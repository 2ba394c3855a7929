//! Streams this process opens.

use std::{error::Error, sync::Arc, time::Duration};

use http::{Uri, uri::PathAndQuery};
use hyper::client::conn::http2;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::StreamExt;
use tonic::{Request, Status, body::Body, client::Grpc};
use tower::service_fn;

use crate::{
    CONNECTION_WINDOW, MAX_MESSAGE_BYTES, PING_ANSWER, PING_EVERY, STREAM_WINDOW, StreamId,
    codec::RawCodec,
    driver::Driver,
    inbox::{End, Event, Inbox},
    outbox::Outgoing,
    socket::connect_tcp,
    tls::Tls,
};

const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Runs one stream on a connection of its own, until either end is done with it.
pub async fn run(
    stream: StreamId,
    address: String,
    method: PathAndQuery,
    outgoing: Outgoing,
    inbox: Arc<Inbox>,
    tls: Option<Arc<Tls>>,
    driver: Driver,
) {
    let end = match exchange(stream, &address, method, outgoing, &inbox, tls, driver).await {
        Ok(()) => End::default(),
        // One that the other end sent has no cause here; any other means that the connection is gone.
        Err(status) if status.source().is_some() => unavailable(&status).into(),
        Err(status) => status.into(),
    };
    inbox.push(Event::Closed(stream, end));
}

async fn exchange(
    stream: StreamId,
    address: &str,
    method: PathAndQuery,
    outgoing: Outgoing,
    inbox: &Inbox,
    tls: Option<Arc<Tls>>,
    driver: Driver,
) -> Result<(), Status> {
    let peer: Uri = format!("http://{address}")
        .parse()
        .map_err(|error| Status::invalid_argument(format!("address {address}: {error}")))?;
    let sender = driver
        .reactor
        .within(CONNECT_WITHIN, connect(&peer, tls, &driver))
        .await
        .map_err(|error| unavailable(&error))??;
    let calls = service_fn(move |request| sender.clone().send_request(request));
    let mut grpc = Grpc::with_origin(calls, peer)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    // A client ends its side without a status.
    let messages = outgoing.map_while(Result::ok);
    let mut incoming = grpc
        .streaming(Request::new(messages), method, RawCodec)
        .await?
        .into_inner();
    loop {
        inbox.room().await;
        match incoming.message().await? {
            Some(message) => inbox.push(Event::Message(stream, message)),
            None => return Ok(()),
        }
    }
}

async fn connect(
    peer: &Uri,
    tls: Option<Arc<Tls>>,
    driver: &Driver,
) -> Result<http2::SendRequest<Body>, Status> {
    let host = peer.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let socket = connect_tcp(&driver.reactor, host, peer.port_u16().unwrap_or_default());
    let socket = socket.await.map_err(|error| unavailable(&error))?;
    let Some(tls) = tls else {
        return handshake(socket, driver).await;
    };
    let secured = tls.connect(host, socket, &driver.reactor).await;
    handshake(secured.map_err(|error| unavailable(&error))?, driver).await
}

async fn handshake<C>(connection: C, driver: &Driver) -> Result<http2::SendRequest<Body>, Status>
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http2::Builder::new(driver.tasks.clone())
        .timer(driver.timer())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .handshake(TokioIo::new(connection))
        .await
        .map_err(|error| unavailable(&error))?;
    driver.tasks.spawn(connection);
    Ok(sender)
}

/// hyper and tonic say "transport error"; the reason is the innermost source.
fn unavailable(error: &dyn Error) -> Status {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    Status::unavailable(innermost.to_string())
}
