//! Token ids and block hashes as Python passes them: lists, or NumPy arrays and other buffers.
//!
//! They are copied, so that nothing Python does meanwhile is seen while the GIL is released.

use pyo3::{
    Borrowed, FromPyObject,
    buffer::{Element, PyBuffer},
    exceptions::{PyOverflowError, PyTypeError, PyValueError},
    prelude::*,
    types::PyList,
};

/// Token ids, each in [0, 2^32).
pub struct Tokens(pub Vec<u32>);

/// 64-bit block hashes. Negative integers are read in two's complement, as SGLang's events carry them.
pub struct Hashes(pub Vec<u64>);

/// One block hash; see [`Hashes`].
pub struct Hash(pub u64);

/// The largest of token ids; 0 of none.
#[pyfunction]
pub fn largest_token(tokens: Tokens) -> u32 {
    tokens.0.into_iter().max().unwrap_or(0)
}

impl<'py> FromPyObject<'_, 'py> for Tokens {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyList>() {
            return each(&object, token).map(Tokens);
        }
        if let Some(tokens) = buffer::<u32>(&object)? {
            return Ok(Tokens(tokens));
        }
        if let Some(tokens) = buffer::<i64>(&object)? {
            return narrow(&tokens, |token| token as u64);
        }
        if let Some(tokens) = buffer::<i32>(&object)? {
            return narrow(&tokens, |token| token as u64);
        }
        if let Some(tokens) = buffer::<u64>(&object)? {
            return narrow(&tokens, |token| token);
        }
        each(&object, token).map(Tokens)
    }
}

impl<'py> FromPyObject<'_, 'py> for Hashes {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if object.is_instance_of::<PyList>() {
            return each(&object, hash).map(Hashes);
        }
        if let Some(hashes) = buffer::<u64>(&object)? {
            return Ok(Hashes(hashes));
        }
        if let Some(hashes) = buffer::<i64>(&object)? {
            return Ok(Hashes(hashes.into_iter().map(|hash| hash as u64).collect()));
        }
        each(&object, hash).map(Hashes)
    }
}

impl<'py> FromPyObject<'_, 'py> for Hash {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        hash(&object).map(Hash)
    }
}

/// The object's items where it is a one-dimensional buffer of `T`.
fn buffer<T: Element>(object: &Bound<'_, PyAny>) -> PyResult<Option<Vec<T>>> {
    let Ok(buffer) = PyBuffer::<T>::get(object) else {
        return Ok(None);
    };
    if buffer.dimensions() != 1 {
        return Err(PyValueError::new_err("expected an array of one dimension"));
    }
    buffer.to_vec(object.py()).map(Some)
}

fn each<T>(
    object: &Bound<'_, PyAny>,
    item: fn(&Bound<'_, PyAny>) -> PyResult<T>,
) -> PyResult<Vec<T>> {
    let mut items = Vec::with_capacity(object.len().unwrap_or(0));
    for each in object.try_iter()? {
        items.push(item(&each?)?);
    }
    Ok(items)
}

/// Token ids of another integer type, given how it widens: a negative id sets high bits, too.
fn narrow<T: Copy>(tokens: &[T], widen: impl Fn(T) -> u64) -> PyResult<Tokens> {
    // One check for all, so that both loops are vectorized.
    let bits = tokens.iter().fold(0, |bits, &token| bits | widen(token));
    if bits > u64::from(u32::MAX) {
        return Err(token_out_of_range());
    }
    Ok(Tokens(
        tokens.iter().map(|&token| widen(token) as u32).collect(),
    ))
}

fn token(item: &Bound<'_, PyAny>) -> PyResult<u32> {
    item.extract::<u32>()
        .map_err(|error| overflow_or(error, item, token_out_of_range, "token ids are integers"))
}

fn hash(item: &Bound<'_, PyAny>) -> PyResult<u64> {
    item.extract::<u64>()
        .or_else(|_| item.extract::<i64>().map(|hash| hash as u64))
        .map_err(|error| {
            let range = || PyValueError::new_err("block hashes are integers of 64 bits");
            overflow_or(error, item, range, "block hashes are integers")
        })
}

fn token_out_of_range() -> PyErr {
    PyValueError::new_err("token ids are integers in [0, 2**32)")
}

fn overflow_or(
    error: PyErr,
    item: &Bound<'_, PyAny>,
    out_of_range: impl Fn() -> PyErr,
    wrong_type: &'static str,
) -> PyErr {
    if error.is_instance_of::<PyOverflowError>(item.py()) {
        out_of_range()
    } else {
        PyTypeError::new_err(wrong_type)
    }
}
