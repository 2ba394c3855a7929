//! A request's line and headers.

use crate::Bounds;

/// Requests with more go the long way.
const MOST_HEADERS: usize = 48;
/// Headers that change how the body, or the connection, is to be read.
const NOT_PLAIN: [&str; 7] = [
    "transfer-encoding",
    "content-encoding",
    "content-type",
    "connection",
    "expect",
    "upgrade",
    "http2-settings",
];

/// Where a plain request goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

impl Endpoint {
    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
        }
    }

    fn of(target: &str) -> Option<Self> {
        let all = [Endpoint::Chat, Endpoint::Completions];
        all.into_iter().find(|endpoint| endpoint.path() == target)
    }
}

/// A name as it was written, and a value.
pub type Header<'a> = (&'a str, &'a [u8]);

/// A request's line and headers.
#[derive(Debug)]
pub struct Head<'a> {
    /// Where it goes to.
    pub endpoint: Endpoint,
    /// In the order in which they came.
    pub headers: Vec<Header<'a>>,
}

impl<'a> Head<'a> {
    /// The head, the length of the body that it says, and what has come behind it; None where it is not plain, or not
    /// whole.
    pub(crate) fn read(bytes: &'a [u8], bounds: Bounds) -> Option<(Self, usize, &'a [u8])> {
        if !bytes.starts_with(b"POST /v1/") {
            return None;
        }
        let mut found = [httparse::EMPTY_HEADER; MOST_HEADERS];
        let mut request = httparse::Request::new(&mut found);
        let httparse::Status::Complete(size) = request.parse(bytes).ok()? else {
            return None;
        };
        let (head, body) = bytes.split_at(size);
        // The parser takes lines that end without a carriage return, which the server's does not.
        let ends = head.iter().filter(|&&byte| byte == b'\n').count();
        let lines = 2 + request.headers.len();
        if ends != lines || head.iter().filter(|&&byte| byte == b'\r').count() != lines {
            return None;
        }
        let target = request.path?;
        let endpoint = Endpoint::of(target)?;
        if request.version? != 1 {
            return None;
        }
        let headers: Vec<Header<'a>> = request.headers.iter().map(|h| (h.name, h.value)).collect();
        let sizes = headers.iter().map(|(name, value)| name.len() + value.len());
        let is_plain = headers.iter().all(is_plain);
        let length = declared_length(&headers)?;
        if !is_plain
            || target.len() + sizes.sum::<usize>() > bounds.header_bytes
            || length > bounds.body_bytes
        {
            return None;
        }
        Some((Self { endpoint, headers }, length, body))
    }
}

fn is_plain(&(name, value): &Header<'_>) -> bool {
    let known = NOT_PLAIN
        .iter()
        .find(|known| name.eq_ignore_ascii_case(known));
    match known {
        None => true,
        // What HTTP/1.1 means anyway.
        Some(&"connection") => value.eq_ignore_ascii_case(b"keep-alive"),
        Some(&"content-encoding") => value.eq_ignore_ascii_case(b"identity"),
        Some(&"content-type") => {
            let kind = value.split(|&byte| byte == b';').next().unwrap_or_default();
            kind.trim_ascii().eq_ignore_ascii_case(b"application/json")
        }
        Some(_) => false,
    }
}

/// The body's length, said once and in digits alone.
fn declared_length(headers: &[Header<'_>]) -> Option<usize> {
    let mut said = headers
        .iter()
        .filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let (_, digits) = said.next()?;
    if said.next().is_some() || digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}
