//! Long lists of integers as protobuf writes them: element by element they would cost more than all else of a message.

use pyo3::{prelude::*, types::PyBytes};

use crate::integers::Tokens;

/// Wire type of what says its length.
const DELIMITED: u64 = 2;

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
