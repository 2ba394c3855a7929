//! kvmesh errors as Python exceptions.

use kvmesh_core::{Error, ErrorKind};
use pyo3::{
    PyErr,
    exceptions::{PyKeyError, PyRuntimeError, PyValueError},
};

/// `InvalidArgument` and `LimitExceeded` are a ValueError, `NotFound` a KeyError.
pub fn to_py(error: Error) -> PyErr {
    match error.kind() {
        ErrorKind::InvalidArgument | ErrorKind::LimitExceeded => {
            PyValueError::new_err(error.to_string())
        }
        ErrorKind::NotFound => PyKeyError::new_err(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    }
}
