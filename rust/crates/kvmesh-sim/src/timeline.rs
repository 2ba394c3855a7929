//! What becomes of one request.

/// One request's life; times in milliseconds since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timeline {
    /// When it came.
    pub arrived: f64,
    /// Where its prompt was computed.
    pub placed: Option<usize>,
    /// Where it was generated; the same for an aggregated worker.
    pub decoded: Option<usize>,
    /// Prompt tokens found cached there, in any tier.
    pub cached: u32,
    /// Of them, those brought up from below the device.
    pub onboarded: u32,
    /// When its first token came.
    pub first: f64,
    /// When its last token came.
    pub ended: f64,
    /// Tokens generated.
    pub output: u32,
    /// Whether the router refused it; then it has no times but the first.
    pub refused: bool,
}

impl Timeline {
    pub(crate) fn finish(&mut self, now: f64, output: u32) {
        self.ended = now;
        self.output = output;
    }

    /// Milliseconds to the first token.
    pub fn ttft(&self) -> f64 {
        self.first - self.arrived
    }

    /// Mean milliseconds between tokens; None for a single one.
    pub fn itl(&self) -> Option<f64> {
        (self.output > 1).then(|| (self.ended - self.first) / f64::from(self.output - 1))
    }
}
