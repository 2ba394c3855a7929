//! Block hashes and the seeds of their chains.

use std::sync::{Mutex, PoisonError};

use kvmesh_core::Digest;
use numpy::{IntoPyArray, PyArray1};
use pyo3::{prelude::*, types::PyBytes};

use crate::{error::to_py, integers::Tokens};

/// The 64-bit hashes of every whole page of a prompt, SGLang's page hash chain.
///
/// tokens: ids in [0, 2**32), as a list, a NumPy array of 32- or 64-bit integers or another buffer of such.
/// page_size: tokens in a page. Tokens after the last whole page are ignored.
/// namespace: the digest of 32 bytes that seeds the first page (see event_namespace_seed); empty for none.
///
/// Returns a uint64 array. Releases the GIL. Raises ValueError for a token out of range, a
/// page_size below 1 or a namespace of another length, TypeError for tokens that are not integers.
#[pyfunction]
#[pyo3(signature = (tokens, page_size, namespace = &b""[..]), text_signature = "(tokens, page_size, namespace=b'')")]
pub fn hash_tokens<'py>(
    py: Python<'py>,
    tokens: Tokens,
    page_size: usize,
    namespace: &[u8],
) -> PyResult<Bound<'py, PyArray1<u64>>> {
    let hashes = py.detach(|| {
        let seed = Digest::from_namespace(namespace)?;
        let hashes = kvmesh_core::hash_tokens(&tokens.0, page_size, seed)?;
        Ok(hashes.into_iter().map(|hash| hash.0).collect::<Vec<u64>>())
    });
    hashes.map(|hashes| hashes.into_pyarray(py)).map_err(to_py)
}

/// The hashes of a conversation that grows: each token is hashed once.
///
/// page_size and namespace are as for hash_tokens. Not to be extended by two threads at once: the
/// second one waits.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct HashChain(Mutex<kvmesh_core::HashChain>);

#[pymethods]
impl HashChain {
    #[new]
    #[pyo3(signature = (page_size, namespace = &b""[..]), text_signature = "(page_size, namespace=b'')")]
    fn new(page_size: usize, namespace: &[u8]) -> PyResult<Self> {
        let seed = Digest::from_namespace(namespace).map_err(to_py)?;
        let chain = kvmesh_core::HashChain::new(page_size, seed).map_err(to_py)?;
        Ok(Self(Mutex::new(chain)))
    }

    /// Append tokens; returns the hashes of the pages they completed, as a uint64 array. The tokens of a page
    /// that is not whole yet are kept. Releases the GIL. Raises as hash_tokens does, and then appends nothing.
    fn extend<'py>(&self, py: Python<'py>, tokens: Tokens) -> Bound<'py, PyArray1<u64>> {
        let hashes = py.detach(|| {
            let mut chain = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let hashes = chain.extend(&tokens.0);
            hashes.into_iter().map(|hash| hash.0).collect::<Vec<u64>>()
        });
        hashes.into_pyarray(py)
    }

    /// Tokens so far.
    fn __len__(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).len())
    }
}

/// The seed of storage keys (KVBM's digests) for a LoRA adapter and a cache salt: 32 bytes, or
/// empty without either. An empty string is not the same as None.
#[pyfunction]
#[pyo3(signature = (extra_key = None, cache_salt = None))]
pub fn namespace_seed<'py>(
    py: Python<'py>,
    extra_key: Option<&str>,
    cache_salt: Option<&str>,
) -> Bound<'py, PyBytes> {
    seed_bytes(py, kvmesh_core::namespace_seed(extra_key, cache_salt))
}

/// The seed of the hashes in an engine's KV events for a cache salt: 32 bytes, or empty without
/// one. SGLang seeds its events and its storage keys differently; see namespace_seed.
#[pyfunction]
#[pyo3(signature = (cache_salt = None))]
pub fn event_namespace_seed<'py>(py: Python<'py>, cache_salt: Option<&str>) -> Bound<'py, PyBytes> {
    seed_bytes(py, kvmesh_core::event_namespace_seed(cache_salt))
}

fn seed_bytes(py: Python<'_>, seed: Option<Digest>) -> Bound<'_, PyBytes> {
    PyBytes::new(py, seed.as_ref().map_or(&[], |digest| digest.as_bytes()))
}
