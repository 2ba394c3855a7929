//! `read_plain_request`: a request as most clients send them, read in one go.

use kvmesh_http::{Bounds, Endpoint, PlainBody, PlainRequest, Prompt, Read, Stop};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict, PyList, PyTuple},
};

/// What came since the last request. A plain one: its path, its headers (pairs of a name in small letters and a value,
/// bytes), its fields, by name, those that are null left out, and of completions by token ids the ids as the bytes of an
/// array of 32-bit integers, which are not among the fields. The beginning of what may be one: the number of bytes that
/// it lacks. Anything else: None; then nothing is known of it.
///
/// max_header_bytes, max_body_bytes: what is taken.
#[pyfunction]
#[pyo3(signature = (data, max_header_bytes, max_body_bytes), text_signature = "(data, max_header_bytes, max_body_bytes)")]
pub fn read_plain_request<'py>(
    py: Python<'py>,
    data: &[u8],
    max_header_bytes: usize,
    max_body_bytes: usize,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let bounds = Bounds {
        header_bytes: max_header_bytes,
        body_bytes: max_body_bytes,
    };
    match kvmesh_http::read(data, bounds) {
        Read::Plain(request) => Ok(Some(whole(py, *request)?.into_any())),
        Read::Missing(bytes) => Ok(Some(bytes.into_pyobject(py)?.into_any())),
        Read::Other => Ok(None),
    }
}

fn whole<'py>(py: Python<'py>, request: PlainRequest<'_>) -> PyResult<Bound<'py, PyTuple>> {
    let PlainRequest { head, body } = request;
    let headers = PyList::empty(py);
    for (name, value) in &head.headers {
        let name = PyBytes::new(py, name.to_ascii_lowercase().as_bytes());
        headers.append((name, PyBytes::new(py, value)))?;
    }
    let tokens = match &body.prompt {
        Some(Prompt::List(tokens)) => Some(native_bytes(py, tokens)?),
        _ => None,
    };
    let path = match head.endpoint {
        Endpoint::Chat => pyo3::intern!(py, "/v1/chat/completions"),
        Endpoint::Completions => pyo3::intern!(py, "/v1/completions"),
    };
    let fields = fields(py, body)?;
    (path, headers, fields, tokens).into_pyobject(py)
}

fn native_bytes<'py>(py: Python<'py>, tokens: &[u32]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, 4 * tokens.len(), |bytes| {
        for (place, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            place.copy_from_slice(&token.to_ne_bytes());
        }
        Ok(())
    })
}

fn fields<'py>(py: Python<'py>, body: PlainBody<'_>) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    macro_rules! set {
        ($($name:ident),*) => {
            $(if let Some(value) = body.$name {
                fields.set_item(pyo3::intern!(py, stringify!($name)), value)?;
            })*
        };
    }
    fields.set_item(pyo3::intern!(py, "model"), body.model)?;
    if let Some(Prompt::String(text)) = body.prompt {
        fields.set_item(pyo3::intern!(py, "prompt"), text)?;
    }
    if let Some(messages) = body.messages {
        let list = PyList::empty(py);
        for message in messages {
            let said = PyDict::new(py);
            said.set_item(pyo3::intern!(py, "role"), message.role.name())?;
            said.set_item(pyo3::intern!(py, "content"), message.content)?;
            list.append(said)?;
        }
        fields.set_item(pyo3::intern!(py, "messages"), list)?;
    }
    match body.stop {
        Some(Stop::String(stop)) => fields.set_item(pyo3::intern!(py, "stop"), stop)?,
        Some(Stop::List(stops)) => fields.set_item(pyo3::intern!(py, "stop"), stops)?,
        None => {}
    }
    if let Some(options) = body.stream_options {
        let said = PyDict::new(py);
        if let Some(include) = options.include_usage {
            said.set_item(pyo3::intern!(py, "include_usage"), include)?;
        }
        fields.set_item(pyo3::intern!(py, "stream_options"), said)?;
    }
    set!(
        max_tokens,
        max_completion_tokens,
        temperature,
        top_p,
        top_k,
        frequency_penalty,
        presence_penalty,
        seed,
        ignore_eos,
        stream,
        n,
        user
    );
    Ok(fields)
}
