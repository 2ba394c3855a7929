//! A policy whose judgement is Python's.

use kvmesh_select::{Candidate, Policy, Request};
use pyo3::{prelude::*, types::PyList};
use rand::RngCore;

pub struct External {
    judge: Py<PyAny>,
    partners: bool,
}

impl External {
    pub fn new(judge: Py<PyAny>, partners: bool) -> Self {
        Self { judge, partners }
    }

    fn ask(
        &self,
        py: Python<'_>,
        request: &Request,
        candidates: &[Candidate],
    ) -> PyResult<Vec<f64>> {
        let about = (
            request.prompt_tokens,
            request.session,
            request.tenant,
            request.priority,
        );
        let tuple = |one: &Candidate| {
            (
                one.prefill.raw(),
                one.decode.raw(),
                one.requests,
                one.cached,
                one.terms.values(),
            )
        };
        let candidates = PyList::new(py, candidates.iter().map(tuple))?;
        self.judge
            .call1(py, (about, candidates, self.partners))?
            .extract(py)
    }
}

impl Policy for External {
    fn costs(
        &mut self,
        request: &Request,
        candidates: &[Candidate],
        _: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        let asked = Python::attach(|py| {
            self.ask(py, request, candidates)
                .map_err(|error| error.write_unraisable(py, Some(self.judge.bind(py))))
        });
        match asked {
            Ok(answer)
                if answer.len() == candidates.len()
                    && answer.iter().all(|cost| cost.is_finite()) =>
            {
                costs.extend(answer);
            }
            // A request must not suffer from it.
            _ => costs.extend(candidates.iter().map(|one| one.terms.total())),
        }
    }
}

/// What judges placements, and what judges decode partners.
pub fn judges(py: Python<'_>, judge: &Py<PyAny>) -> (Box<dyn Policy>, Box<dyn Policy>) {
    (
        Box::new(External::new(judge.clone_ref(py), false)),
        Box::new(External::new(judge.clone_ref(py), true)),
    )
}
