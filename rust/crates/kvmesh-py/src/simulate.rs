//! The simulator's command line for Python.

use std::{
    cell::{Cell, RefCell},
    ffi::OsString,
    time::{Duration, Instant},
};

use pyo3::prelude::*;

/// How often Python is asked for signals.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// simulate(words: list[str]) -> int
/// --
///
/// Runs `kvmesh simulate` with these words and returns its exit status. It prints to the process' stdout and stderr, blocks
/// until it is done, and lets other threads run meanwhile. What a signal's handler raises ends it, and is raised.
#[pyfunction]
pub fn simulate(py: Python<'_>, words: Vec<OsString>) -> PyResult<u8> {
    let (status, raised) = py.detach(|| {
        let asked = Cell::new(Instant::now());
        let raised = RefCell::new(None);
        let stopped = || {
            if raised.borrow().is_none() && asked.get().elapsed() >= ASK_EVERY {
                asked.set(Instant::now());
                *raised.borrow_mut() = Python::attach(|py| py.check_signals()).err();
            }
            raised.borrow().is_some()
        };
        let status = kvmesh_sim::command::main(words, &stopped);
        (status, raised.into_inner())
    });
    match raised {
        Some(error) => Err(error),
        None => Ok(status),
    }
}
