//! Streams this process opens.

use std::{error::Error, sync::Arc, time::Duration};

use http::uri::PathAndQuery;
use tokio_stream::StreamExt;
use tonic::{
    Request, Status,
    client::Grpc,
    transport::{Channel, Endpoint},
};

use crate::{
    CONNECTION_WINDOW, MAX_MESSAGE_BYTES, PING_ANSWER, PING_EVERY, STREAM_WINDOW, StreamId,
    codec::RawCodec,
    inbox::{End, Event, Inbox},
    outbox::Outgoing,
};

const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Runs one stream on a connection of its own, until either end is done with it.
pub async fn run(
    stream: StreamId,
    address: String,
    method: PathAndQuery,
    outgoing: Outgoing,
    inbox: Arc<Inbox>,
) {
    let end = match exchange(stream, &address, method, outgoing, &inbox).await {
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
) -> Result<(), Status> {
    let channel = connect(address).await?;
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

async fn connect(address: &str) -> Result<Channel, Status> {
    Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| Status::invalid_argument(format!("address {address}: {error}")))?
        .connect_timeout(CONNECT_WITHIN)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .connect()
        .await
        .map_err(|error| unavailable(&error))
}

/// tonic says "transport error"; the reason is the innermost source.
fn unavailable(error: &dyn Error) -> Status {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    Status::unavailable(innermost.to_string())
}
