//! `Streams`: gRPC streams for an asyncio loop.

use std::{collections::HashSet, os::fd::AsRawFd, path::PathBuf};

use kvmesh_streams::{Certificates, Event, Listen, Method, Streams};
use pyo3::{
    intern,
    prelude::*,
    types::{PyBytes, PyDict, PyList, PyTuple},
};

/// Bidirectional gRPC streams of opaque messages, carried by the thread that calls `poll`.
///
/// Nothing blocks, and nothing moves but in `poll`: call it when the descriptor `fileno` is readable, and soon after any
/// other call. It returns what has happened since the last time as tuples:
/// ("opened", stream, method), ("called", stream, (method, traceparent, bytes)), ("message", stream, bytes), ("half_closed", stream, None), ("writable", stream, None),
/// ("closed", stream, (gRPC status code, message, {key: bytes of trailing metadata})).
#[pyclass(name = "Streams", module = "kvmesh.core", frozen)]
pub struct PyStreams(Streams);

#[pymethods]
impl PyStreams {
    /// Raises OSError where there are no descriptors left.
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(Streams::new()?))
    }

    fn fileno(&self) -> i32 {
        self.0.fd().as_raw_fd()
    }

    /// Connections made from now on, either way, are TLS with these certificates (PEM): of this process, its key, and
    /// the authorities of all others'. `server_name` is what servers' certificates are for; empty: the host they are reached
    /// by. Raises OSError where they cannot be used; then all stays as it is.
    fn secure(
        &self,
        cert: Vec<u8>,
        key: Vec<u8>,
        ca: Vec<u8>,
        require_client: bool,
        server_name: String,
    ) -> PyResult<()> {
        Ok(self.0.secure(&Certificates {
            cert,
            key,
            ca,
            require_client,
            server_name,
        })?)
    }

    /// Serve methods (paths), as streams or unary, on host:port; every other call goes to the gRPC server on the
    /// unix socket `others`. Returns the port. Raises OSError when it cannot listen there.
    fn listen(
        &self,
        host: &str,
        port: u16,
        streams: HashSet<String>,
        unary: HashSet<String>,
        others: PathBuf,
    ) -> PyResult<u16> {
        let streams = streams.into_iter().map(|path| (path, Method::Stream));
        let unary = unary.into_iter().map(|path| (path, Method::Unary));
        let methods = streams.chain(unary).collect();
        Ok(self.0.listen(host, port, Listen { methods, others })?)
    }

    /// Open a stream of a method (a path) on a connection of its own; returns its number. Messages may be sent
    /// at once; a failure is a "closed" event. Raises OSError for a method that is no path.
    fn open(&self, address: &str, method: &str) -> PyResult<u64> {
        Ok(self.0.open(address, method)?)
    }

    /// Queue a message. False when the transport is behind; a "writable" event tells when it has caught up.
    fn send(&self, stream: u64, message: &[u8]) -> bool {
        self.0.send(stream, message.to_vec().into())
    }

    /// End this side after what was sent: a served stream with OK, an opened one by a half-close. A unary call is answered
    /// by what was sent last.
    fn end(&self, stream: u64) {
        self.0.end(stream);
    }

    /// End a served stream, after what was sent, with a gRPC status; `details` is trailing metadata, with keys that
    /// end in "-bin".
    #[pyo3(signature = (stream, code, message, details))]
    fn fail(&self, stream: u64, code: i32, message: &str, details: Vec<(String, Vec<u8>)>) {
        self.0.fail(stream, code, message, &details);
    }

    /// Cancel an opened stream; no event of it follows but those already waiting.
    fn cancel(&self, stream: u64) {
        self.0.cancel(stream);
    }

    /// Carry on with what can be done without waiting; what has happened since the last call, in order. Keeps the GIL: what it
    /// takes are microseconds.
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for event in self.0.poll() {
            list.append(convert(py, event)?)?;
        }
        Ok(list)
    }

    /// Stop listening and drop every stream; what was sent leaves as far as that needs no waiting. Idempotent.
    fn close(&self) {
        self.0.close();
    }
}

fn convert(py: Python<'_>, event: Event) -> PyResult<Bound<'_, PyTuple>> {
    match event {
        Event::Opened(stream, method) => (intern!(py, "opened"), stream, method).into_pyobject(py),
        Event::Called {
            stream,
            method,
            traceparent,
            message,
        } => {
            let call = (method, traceparent, PyBytes::new(py, &message));
            (intern!(py, "called"), stream, call).into_pyobject(py)
        }
        Event::Message(stream, message) => {
            (intern!(py, "message"), stream, PyBytes::new(py, &message)).into_pyobject(py)
        }
        Event::HalfClosed(stream) => {
            (intern!(py, "half_closed"), stream, py.None()).into_pyobject(py)
        }
        Event::Writable(stream) => (intern!(py, "writable"), stream, py.None()).into_pyobject(py),
        Event::Closed(stream, end) => {
            let details = PyDict::new(py);
            for (key, value) in end.details {
                details.set_item(key, PyBytes::new(py, &value))?;
            }
            (
                intern!(py, "closed"),
                stream,
                (end.code, end.message, details),
            )
                .into_pyobject(py)
        }
    }
}
