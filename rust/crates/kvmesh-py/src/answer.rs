//! What a match answers, as a dict.

use kvmesh_index::Matches;
use pyo3::{
    prelude::*,
    types::{PyDict, PyTuple},
};

/// The last answer. The next one mostly names the same engines; then copying its dict and replacing what differs
/// takes a fraction of the time of a new dict.
#[derive(Default)]
pub struct Answer {
    engines: Vec<u32>,
    depths: Vec<[u32; 4]>,
    dict: Option<Py<PyDict>>,
}

impl Answer {
    /// Makes it the answer `matches`; returns that as a dict of the caller's own.
    pub fn update<'py>(
        &mut self,
        py: Python<'py>,
        matches: &Matches,
    ) -> PyResult<Bound<'py, PyDict>> {
        let engines = || matches.iter().map(|found| found.engine.get());
        if !engines().eq(self.engines.iter().copied()) {
            self.dict = None;
            self.engines.clear();
            self.engines.extend(engines());
            self.depths.clear();
            self.depths.resize(self.engines.len(), [u32::MAX; 4]);
        }
        let dict = self.dict.get_or_insert_with(|| PyDict::new(py).unbind());
        let dict = dict.bind(py);
        // Engines that see a common start and no more are many, and their tuples equal.
        let mut last: Option<([u32; 4], Bound<'py, PyTuple>)> = None;
        for (old, found) in self.depths.iter_mut().zip(matches.iter()) {
            if *old == found.depths {
                continue;
            }
            let tuple = match last.take() {
                Some((depths, tuple)) if depths == found.depths => tuple,
                _ => PyTuple::new(py, found.depths)?,
            };
            dict.set_item(found.engine.get(), &tuple)?;
            *old = found.depths;
            last = Some((found.depths, tuple));
        }
        dict.copy()
    }
}
