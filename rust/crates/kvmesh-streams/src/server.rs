//! Streams others open here, their unary calls, and the way on for every other one.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Request, Response};
use hyper::{
    body::Incoming,
    client::conn::http2::{SendRequest, handshake},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::{Status, Streaming, body::Body, server::Grpc, server::StreamingService};

use crate::{
    CONNECTION_WINDOW, MAX_MESSAGE_BYTES, PING_ANSWER, PING_EVERY, STREAM_WINDOW, StreamId,
    codec::RawCodec,
    driver::Driver,
    inbox::{Event, Inbox},
    outbox::Outgoing,
    registry::Registry,
    socket::{Socket, connect_unix},
    tls::Current,
    unary::{Call, plain},
};

/// Calls at once on one connection, and of these how many may be cancelled before they were looked at.
const MAX_CALLS: u32 = 1 << 16;
const MAX_CANCELLED: usize = 1 << 10;
/// After a connection that could not be accepted.
const RETRY: Duration = Duration::from_millis(10);

/// How a method is served.
#[derive(Clone, Copy, Debug)]
pub enum Method {
    /// Messages both ways, for as long as either end likes.
    Stream,
    /// One message each way.
    Unary,
}

/// What a listener serves.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Methods served here, by path: `/package.Service/Method`.
    pub methods: HashMap<String, Method>,
    /// Unix socket of the gRPC server that takes all other calls.
    pub others: PathBuf,
}

/// Accepts connections for as long as it is polled; those accepted live on.
pub async fn accept(
    listener: Socket<TcpListener>,
    listen: Listen,
    registry: Arc<Registry>,
    tls: Current,
    driver: Driver,
) {
    let listen = Arc::new(listen);
    loop {
        match listener.accept(&driver.reactor).await {
            Ok(connection) => {
                let tls = tls.read().clone();
                let (listen, registry) = (Arc::clone(&listen), Arc::clone(&registry));
                let on = driver.clone();
                driver.tasks.spawn(async move {
                    let Some(tls) = tls else {
                        return serve(connection, listen, registry, on).await;
                    };
                    // Whoever is refused has been told by the protocol.
                    if let Ok(connection) = tls.accept(connection, &on.reactor).await {
                        serve(connection, listen, registry, on).await;
                    }
                });
            }
            // Out of descriptors, or a caller that left at once.
            Err(_) => driver.reactor.sleep_until(Instant::now() + RETRY).await,
        }
    }
}

async fn serve<C>(connection: C, listen: Arc<Listen>, registry: Arc<Registry>, driver: Driver)
where
    C: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let others = Others::default();
    let on = driver.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (listen, registry) = (Arc::clone(&listen), Arc::clone(&registry));
        let (others, driver) = (others.clone(), on.clone());
        async move {
            let method = request.uri().path().to_owned();
            Ok::<_, Infallible>(match listen.methods.get(&method) {
                Some(Method::Stream) => {
                    let open = Open {
                        method,
                        registry,
                        driver,
                    };
                    grpc().streaming(open, request).await
                }
                Some(Method::Unary) if plain(&request) => {
                    let call = Call {
                        method,
                        registry,
                        driver,
                    };
                    grpc().client_streaming(call, request).await
                }
                _ => others
                    .call(&listen.others, request, &driver)
                    .await
                    .unwrap_or_else(Status::into_http),
            })
        }
    });
    // Ends with the connection; why is the callers' concern.
    let _ = http2::Builder::new(driver.tasks.clone())
        .timer(driver.timer())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_CALLS)
        .max_pending_accept_reset_streams(MAX_CANCELLED)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .serve_connection(TokioIo::new(connection), service)
        .await;
}

fn grpc() -> Grpc<RawCodec> {
    Grpc::new(RawCodec)
        .apply_max_message_size_config(Some(MAX_MESSAGE_BYTES), Some(MAX_MESSAGE_BYTES))
}

/// A call of one of the listener's streaming methods.
struct Open {
    method: String,
    registry: Arc<Registry>,
    driver: Driver,
}

impl StreamingService<Bytes> for Open {
    type Response = Bytes;
    type ResponseStream = Outgoing;
    type Future = std::future::Ready<Result<tonic::Response<Outgoing>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Bytes>>) -> Self::Future {
        let registry = &self.registry;
        let (stream, mut outgoing) = registry.add();
        let inbox = Arc::clone(registry.inbox());
        inbox.push(Event::Opened(stream, std::mem::take(&mut self.method)));
        let reader = read(request.into_inner(), stream, Arc::clone(registry), inbox);
        outgoing.served(Some(self.driver.tasks.spawn_abortable(reader)));
        std::future::ready(Ok(tonic::Response::new(outgoing)))
    }
}

async fn read(
    mut incoming: Streaming<Bytes>,
    stream: StreamId,
    registry: Arc<Registry>,
    inbox: Arc<Inbox>,
) {
    loop {
        inbox.room().await;
        match incoming.message().await {
            Ok(Some(message)) => inbox.push(Event::Message(stream, message)),
            Ok(None) => return inbox.push(Event::HalfClosed(stream)),
            // Something no message can be made of. If it is the caller that is gone, nobody reads this.
            Err(status) => return registry.end(stream, Err(status)),
        }
    }
}

/// One caller's connection to the other server, made when first needed.
#[derive(Clone, Default)]
struct Others(Arc<tokio::sync::Mutex<Option<SendRequest<Incoming>>>>);

impl Others {
    async fn call(
        &self,
        socket: &Path,
        request: Request<Incoming>,
        driver: &Driver,
    ) -> Result<Response<Body>, Status> {
        let mut sender = self.connected(socket, driver).await?;
        match sender.send_request(request).await {
            Ok(response) => Ok(response.map(Body::new)),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    async fn connected(
        &self,
        socket: &Path,
        driver: &Driver,
    ) -> Result<SendRequest<Incoming>, Status> {
        let mut held = self.0.lock().await;
        if let Some(sender) = held.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let failed = |error: &dyn std::fmt::Display| Status::unavailable(error.to_string());
        let stream = connect_unix(&driver.reactor, socket);
        let stream = TokioIo::new(stream.await.map_err(|e| failed(&e))?);
        let (sender, connection) = handshake(driver.tasks.clone(), stream)
            .await
            .map_err(|e| failed(&e))?;
        driver.tasks.spawn(connection);
        *held = Some(sender.clone());
        Ok(sender)
    }
}
