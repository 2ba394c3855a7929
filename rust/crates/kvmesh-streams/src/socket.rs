//! Sockets that tasks wait for.

use std::{
    io::{self, IoSlice, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    thread,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, addr::SocketAddrArg, connect,
        socket_with, sockopt::socket_error,
    },
};
use std::future::poll_fn;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};

use crate::reactor::{Reactor, Source, Way};

/// A socket on a reactor.
pub struct Socket<S> {
    // Closed before the source goes.
    socket: S,
    source: Source,
}

impl<S: AsFd> Socket<S> {
    /// `socket` must not block.
    pub fn new(socket: S, reactor: &Arc<Reactor>) -> io::Result<Self> {
        let source = reactor.watch(&socket)?;
        Ok(Self { socket, source })
    }

    /// What `attempt` returns once it need not wait.
    fn poll<T>(
        &self,
        way: Way,
        context: &Context<'_>,
        mut attempt: impl FnMut(&S) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        loop {
            ready!(self.source.poll_ready(way, context));
            match attempt(&self.socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.source.exhausted(way);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }

    async fn connected(self) -> io::Result<Self> {
        poll_fn(|context| self.source.poll_ready(Way::Write, context)).await;
        socket_error(&self.socket)??;
        Ok(self)
    }
}

impl Socket<TcpListener> {
    /// The next caller's connection.
    pub async fn accept(&self, reactor: &Arc<Reactor>) -> io::Result<Socket<TcpStream>> {
        let accept =
            |context: &mut Context<'_>| self.poll(Way::Read, context, |listener| listener.accept());
        let (connection, _) = poll_fn(accept).await?;
        connection.set_nonblocking(true)?;
        connection.set_nodelay(true)?;
        Socket::new(connection, reactor)
    }
}

/// A connection to a port of a host, which is an IP address or a name.
pub async fn connect_tcp(
    reactor: &Arc<Reactor>,
    host: &str,
    port: u16,
) -> io::Result<Socket<TcpStream>> {
    let mut failure = io::ErrorKind::NotFound.into();
    for address in lookup(reactor, host, port).await? {
        match connect_to(reactor, address).await {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn connect_to(reactor: &Arc<Reactor>, address: SocketAddr) -> io::Result<Socket<TcpStream>> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let stream = TcpStream::from(begin(family, &address)?);
    stream.set_nodelay(true)?;
    Socket::new(stream, reactor)?.connected().await
}

/// A connection to a unix socket; fails where its server's queue is full.
pub async fn connect_unix(reactor: &Arc<Reactor>, path: &Path) -> io::Result<Socket<UnixStream>> {
    let socket = begin(AddressFamily::UNIX, &SocketAddrUnix::new(path)?)?;
    Socket::new(UnixStream::from(socket), reactor)?
        .connected()
        .await
}

fn begin(family: AddressFamily, address: &impl SocketAddrArg) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, address) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

async fn lookup(reactor: &Arc<Reactor>, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (found, answer) = oneshot::channel();
    let (host, reactor) = (host.to_owned(), Arc::clone(reactor));
    // The resolver blocks.
    thread::Builder::new()
        .name("kvmesh-lookup".to_owned())
        .spawn(move || {
            let addresses = (host.as_str(), port).to_socket_addrs();
            let _ = found.send(addresses.map(Vec::from_iter));
            reactor.news();
        })?;
    answer.await.map_err(io::Error::other)?
}

impl<S> AsyncRead for Socket<S>
where
    S: AsFd + Unpin,
    for<'a> &'a S: Read,
{
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let room = into.initialize_unfilled();
        let read = ready!(self.poll(Way::Read, context, |mut socket| socket.read(room)))?;
        if 0 < read && read < room.len() {
            // All there was: the next event says when there is more.
            self.source.exhausted(Way::Read);
        }
        into.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl<S> AsyncWrite for Socket<S>
where
    S: AsFd + Unpin,
    for<'a> &'a S: Write,
{
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(Way::Write, context, |mut socket| socket.write(from))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(Way::Write, context, |mut socket| {
            socket.write_vectored(from)
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write) {
            Err(Errno::NOTCONN) | Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}
