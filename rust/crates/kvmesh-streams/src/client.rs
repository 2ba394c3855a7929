//! Streams this process opens.

use std::{error::Error, io, sync::Arc, time::Duration};

use http::{Uri, uri::PathAndQuery};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_stream::StreamExt;
use tonic::{
    Request, Status,
    client::Grpc,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use crate::{
    CONNECTION_WINDOW, MAX_MESSAGE_BYTES, PING_ANSWER, PING_EVERY, STREAM_WINDOW, StreamId,
    codec::RawCodec,
    inbox::{End, Event, Inbox},
    outbox::Outgoing,
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
) {
    let end = match exchange(stream, &address, method, outgoing, &inbox, tls).await {
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
) -> Result<(), Status> {
    let channel = connect(address, tls).await?;
    let mut grpc = Grpc::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    grpc.ready().await.map_err(|error| unavailable(&error))?;
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

async fn connect(address: &str, tls: Option<Arc<Tls>>) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| Status::invalid_argument(format!("address {address}: {error}")))?
        .connect_timeout(CONNECT_WITHIN)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER);
    let connected = match tls {
        None => endpoint.connect().await,
        Some(tls) => {
            let secured = service_fn(move |peer: Uri| secured(peer, Arc::clone(&tls)));
            endpoint.connect_with_connector(secured).await
        }
    };
    connected.map_err(|error| unavailable(&error))
}

async fn secured(
    peer: Uri,
    tls: Arc<Tls>,
) -> io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>> {
    let host = peer.host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, peer.port_u16().unwrap_or_default())).await?;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(tls.connect(host, stream).await?))
}

/// tonic says "transport error"; the reason is the innermost source.
fn unavailable(error: &dyn Error) -> Status {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    Status::unavailable(innermost.to_string())
}
