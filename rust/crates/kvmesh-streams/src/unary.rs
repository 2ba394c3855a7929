//! Calls of one message each way: to whoever answers, streams of one message.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::Request;
use hyper::body::Incoming;
use tokio_stream::StreamExt;
use tonic::{Code, Status, Streaming, metadata::MetadataMap, server::ClientStreamingService};

use crate::{MAX_MESSAGE_BYTES, driver::Driver, inbox::Event, registry::Registry};

/// A call of one of the listener's unary methods.
pub struct Call {
    pub method: String,
    pub registry: Arc<Registry>,
    pub driver: Driver,
}

/// Whether a call's messages come as they are; the others are for a server that knows how to unpack them.
pub fn plain(request: &Request<Incoming>) -> bool {
    let encoding = request.headers().get("grpc-encoding");
    encoding.is_none_or(|encoding| encoding == "identity")
}

impl ClientStreamingService<Bytes> for Call {
    type Response = Bytes;
    type Future = BoxFuture<'static, Result<tonic::Response<Bytes>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Bytes>>) -> Self::Future {
        let within = timeout(request.metadata());
        let reactor = Arc::clone(&self.driver.reactor);
        let method = std::mem::take(&mut self.method);
        let answer = answer(method, request, Arc::clone(&self.registry));
        match within {
            None => answer.boxed(),
            Some(within) => async move {
                let in_time = reactor.within(within, answer).await;
                in_time.unwrap_or_else(|_| Err(Status::deadline_exceeded("deadline exceeded")))
            }
            .boxed(),
        }
    }
}

/// Dropped before it is done, the caller has left, or its time is over: the call's [`Event::Closed`] says so.
async fn answer(
    method: String,
    request: tonic::Request<Streaming<Bytes>>,
    registry: Arc<Registry>,
) -> Result<tonic::Response<Bytes>, Status> {
    let (metadata, _, mut incoming) = request.into_parts();
    let inbox = Arc::clone(registry.inbox());
    inbox.room().await;
    let Some(message) = incoming.message().await.map_err(as_grpc_says)? else {
        return Err(Status::internal("the call has no message"));
    };
    let traceparent = metadata
        .get("traceparent")
        .and_then(|text| text.to_str().ok());
    let (stream, mut outgoing) = registry.add();
    outgoing.served(None);
    inbox.push(Event::Called {
        stream,
        method,
        traceparent: traceparent.unwrap_or_default().to_owned(),
        message,
    });
    let mut answer = Err(Status::internal("the call has no answer"));
    while let Some(item) = outgoing.next().await {
        answer = item;
    }
    match answer? {
        message if message.len() > MAX_MESSAGE_BYTES => {
            Err(Status::resource_exhausted("the answer is too large"))
        }
        message => Ok(tonic::Response::new(message)),
    }
}

/// A message that is too large has another status in tonic than everywhere else.
fn as_grpc_says(status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => Status::resource_exhausted(status.message()),
        _ => status,
    }
}

/// How long a caller waits: at most 8 digits and a unit ("gRPC over HTTP2", `Timeout`). What is none counts as absent.
fn timeout(metadata: &MetadataMap) -> Option<Duration> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let value = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &'static str) -> Option<Duration> {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", text.parse().expect("ASCII"));
        timeout(&metadata)
    }

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        assert_eq!(of("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(of("3M"), Some(Duration::from_secs(180)));
        assert_eq!(of("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(of("1500m"), Some(Duration::from_millis(1500)));
        assert_eq!(of("20u"), Some(Duration::from_micros(20)));
        assert_eq!(of("7n"), Some(Duration::from_nanos(7)));
        for none in ["", "S", "5", "5s", "+5S", "-5S", "100000000S"] {
            assert_eq!(of(none), None, "{none}");
        }
        assert_eq!(timeout(&MetadataMap::new()), None);
    }
}
