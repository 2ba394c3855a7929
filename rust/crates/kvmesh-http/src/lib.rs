//! Requests as most clients send them, read in one go: to one of the endpoints that generate, with fields that say no
//! more than which model, which prompt, and how tokens are chosen.
//!
//! What is not so is no error here: [`read`] says that it is another, and the HTTP server and the validation of bodies,
//! which know all there is to know, read it from its first byte. So nothing is taken here that they would refuse, or
//! would read in another way.

mod body;
mod head;

pub use body::{Message, PlainBody, Prompt, Role, Stop, StreamOptions, StringOr};
pub use head::{Endpoint, Head, Header};

/// What the bytes are that came since the last request.
#[derive(Debug)]
pub enum Read<'a> {
    /// A plain request, all of them.
    Plain(Box<PlainRequest<'a>>),
    /// The beginning of what may be one, up to so many bytes before its end.
    Missing(usize),
    /// Another request, or more or less than one.
    Other,
}

/// A request, as far as it is plain: what it borrows from its bytes, it borrows.
#[derive(Debug)]
pub struct PlainRequest<'a> {
    /// Its line and headers.
    pub head: Head<'a>,
    /// Its fields.
    pub body: PlainBody<'a>,
}

/// What is taken.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of a target, and of names and values of headers.
    pub header_bytes: usize,
    /// Bytes of a body.
    pub body_bytes: usize,
}

/// Reads what came since the last request.
pub fn read(bytes: &[u8], bounds: Bounds) -> Read<'_> {
    let Some((head, length, come)) = Head::read(bytes, bounds) else {
        return Read::Other;
    };
    if come.len() < length {
        return Read::Missing(length - come.len());
    }
    if come.len() > length {
        return Read::Other;
    }
    match PlainBody::read(come, head.endpoint) {
        Some(body) => Read::Plain(Box::new(PlainRequest { head, body })),
        None => Read::Other,
    }
}
