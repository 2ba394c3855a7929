//! Whoever looks on while a simulation runs.

/// Told now and then how far a run is; may end it.
pub trait Watch {
    /// So many of all requests have ended; false ends the run.
    fn goes_on(&mut self, ended: usize, of: usize) -> bool;
}

/// Nobody looks.
pub struct Unwatched;

impl Watch for Unwatched {
    fn goes_on(&mut self, _: usize, _: usize) -> bool {
        true
    }
}
