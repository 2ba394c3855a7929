//! What protobuf's own Python objects cost more for than all else of a message: long lists of integers, and the many
//! small steps of requests.

use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyBytes, PyList},
};

use crate::integers::Tokens;

/// Wire types (https://protobuf.dev/programming-guides/encoding/#structure): an integer, eight bytes, what says its
/// length, and four bytes.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const DELIMITED: u64 = 2;
const FIXED32: u64 = 5;

// Of `GenerateResponse` and `PrefillResponse`, and of `RequestStep` (proto/kvmesh/v1/engine.proto).
const STEPS: u64 = 1;
const ID: u64 = 1;
const TOKEN_IDS: u64 = 2;

/// A `repeated uint32` field, packed (https://protobuf.dev/programming-guides/encoding/#packed): fit to be put behind
/// a serialized message without it.
///
/// field: its number, 1 or more. tokens: as for hash_tokens.
#[pyfunction]
#[pyo3(signature = (field, tokens), text_signature = "(field, tokens)")]
pub fn packed_field<'py>(py: Python<'py>, field: u32, tokens: Tokens) -> Bound<'py, PyBytes> {
    let mut packed = Vec::with_capacity(3 * tokens.0.len());
    for token in tokens.0 {
        varint(&mut packed, token.into());
    }
    let mut whole = Vec::with_capacity(packed.len() + 10);
    varint(&mut whole, u64::from(field) << 3 | DELIMITED);
    varint(&mut whole, packed.len() as u64);
    whole.append(&mut packed);
    PyBytes::new(py, &whole)
}

fn varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

type Step<'py> = (u64, Bound<'py, PyList>, Option<Bound<'py, PyBytes>>);

/// The steps of a worker's message: the request's id, its new tokens, and the step as it was written where it says
/// more than that, else None. Raises ValueError for what is no such message.
#[pyfunction]
#[pyo3(signature = (message), text_signature = "(message)")]
pub fn read_steps<'py>(py: Python<'py>, message: &[u8]) -> PyResult<Vec<Step<'py>>> {
    let malformed = || PyValueError::new_err("not a message of steps");
    let mut steps = Vec::new();
    for field in Fields(message) {
        if let (STEPS, Value::Bytes(step)) = field.ok_or_else(malformed)? {
            let (id, tokens, says_more) = read_step(step).ok_or_else(malformed)?;
            let rest = says_more.then(|| PyBytes::new(py, step));
            steps.push((id, PyList::new(py, tokens)?, rest));
        }
    }
    Ok(steps)
}

fn read_step(step: &[u8]) -> Option<(u64, Vec<u32>, bool)> {
    let (mut id, mut tokens, mut says_more) = (0, Vec::new(), false);
    for field in Fields(step) {
        match field? {
            (ID, Value::Integer(value)) => id = value,
            (TOKEN_IDS, Value::Integer(token)) => tokens.push(token as u32),
            (TOKEN_IDS, Value::Bytes(mut packed)) => {
                while !packed.is_empty() {
                    tokens.push(take_varint(&mut packed)? as u32);
                }
            }
            _ => says_more = true,
        }
    }
    Some((id, tokens, says_more))
}

enum Value<'a> {
    Integer(u64),
    Bytes(&'a [u8]),
    /// Of a fixed width, which nothing here reads.
    Fixed,
}

/// The fields of a message, by number; None for what is none, and nothing after it.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = take_field(&mut self.0);
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

fn take_field<'a>(from: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let key = take_varint(from)?;
    let value = match key & 7 {
        VARINT => Value::Integer(take_varint(from)?),
        DELIMITED => {
            let size = take_varint(from)?;
            Value::Bytes(take(from, usize::try_from(size).ok()?)?)
        }
        FIXED64 => take(from, 8).map(|_| Value::Fixed)?,
        FIXED32 => take(from, 4).map(|_| Value::Fixed)?,
        _ => return None,
    };
    Some((key >> 3, value))
}

fn take<'a>(from: &mut &'a [u8], size: usize) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(size)?;
    *from = rest;
    Some(taken)
}

fn take_varint(from: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(from, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
