//! What a match answers, as a dict.

use kvmesh_index::{Match, Matches};
use pyo3::{
    prelude::*,
    types::{PyDict, PyInt, PyTuple},
};

/// The last answer. The next one mostly names the same engines; then copying its dict and replacing what differs
/// takes a fraction of the time of a new dict.
#[derive(Default)]
pub struct Answer {
    last: Vec<Match>,
    /// Memory for the next.
    found: Vec<Match>,
    /// The last one's engines.
    keys: Vec<Py<PyInt>>,
    dict: Option<Py<PyDict>>,
}

impl Answer {
    /// Makes it the answer `matches`; returns that as a dict of the caller's own.
    pub fn update<'py>(
        &mut self,
        py: Python<'py>,
        matches: &Matches,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.found.clear();
        matches.iter().for_each(|found| self.found.push(found));
        let is_known = self.found.len() == self.last.len()
            && self
                .found
                .iter()
                .zip(&self.last)
                .fold(true, |same, (one, other)| {
                    same & (one.engine == other.engine)
                });
        if !is_known {
            let key = |found: &Match| found.engine.get().into_pyobject(py).map(Bound::unbind);
            let keys = self.found.iter().map(key);
            self.keys = keys.collect::<Result<_, _>>()?;
            self.dict = None;
        }
        let dict = self.dict.get_or_insert_with(|| PyDict::new(py).unbind());
        let dict = dict.bind(py);
        // Engines that see a common start and no more are many, and their tuples equal.
        let mut tuple: Option<([u32; 4], Bound<'py, PyTuple>)> = None;
        for (at, (found, key)) in self.found.iter().zip(&self.keys).enumerate() {
            if is_known && self.last[at].depths == found.depths {
                continue;
            }
            let value = match tuple.take() {
                Some((depths, tuple)) if depths == found.depths => tuple,
                _ => PyTuple::new(py, found.depths)?,
            };
            dict.set_item(key.bind(py), &value)?;
            tuple = Some((found.depths, value));
        }
        std::mem::swap(&mut self.last, &mut self.found);
        dict.copy()
    }
}
