//! What a selector has learned, for Python.

use kvmesh_select::{Errors, Law, Selector, WorkerId, fit::Quality};

/// What is known of one law: its name, coefficients by name, observations, mean relative error.
type LawTuple = (&'static str, Vec<(&'static str, f64)>, u64, f64);
/// Of one hardware class: its name, its workers now, its laws.
pub type ClassTuple = (String, usize, Vec<LawTuple>);

pub fn rates(selector: &Selector) -> Vec<ClassTuple> {
    let law = |law: Law| {
        let quality = law.quality;
        (law.name, law.coefficients, quality.count, quality.error)
    };
    let classes = selector.rates().into_iter();
    let tuple = |(class, workers, laws): (&str, usize, [Law; 4])| {
        (class.to_owned(), workers, laws.map(law).to_vec())
    };
    classes.map(tuple).collect()
}

/// The factor by which a worker is slower than its class, observations, mean relative error.
pub fn pace(selector: &Selector, worker: u64) -> Option<(f64, u64, f64)> {
    let pace = selector.pace(WorkerId::from_raw(worker));
    pace.map(|(factor, quality)| (factor, quality.count, quality.error))
}

/// Of a decode worker's links: the prefill worker, then as of a pace.
pub fn links(selector: &Selector, worker: u64) -> Vec<(u64, f64, u64, f64)> {
    let links = selector.links(WorkerId::from_raw(worker)).into_iter();
    let tuple = |(from, factor, quality): (WorkerId, f64, Quality)| {
        (from.raw(), factor, quality.count, quality.error)
    };
    links.map(tuple).collect()
}

/// Prompts, and sums in ms: actual minus predicted, its absolute value, actual.
pub fn errors(errors: Errors) -> (u64, f64, f64, f64) {
    (
        errors.count,
        errors.bias_ms,
        errors.absolute_ms,
        errors.actual_ms,
    )
}
