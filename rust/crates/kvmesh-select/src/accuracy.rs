//! How well predictions hold.

/// How far predicted times to the first token were off, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Errors {
    /// Prompts computed.
    pub count: u64,
    /// Sum of actual minus predicted milliseconds from placement to computed prompt.
    pub bias_ms: f64,
    /// Sum of their absolute values.
    pub absolute_ms: f64,
    /// Sum of the actual milliseconds.
    pub actual_ms: f64,
}

impl Errors {
    /// Of what a prompt takes, how much predictions are off by on average.
    pub fn share(&self) -> f64 {
        if self.actual_ms > 0.0 {
            self.absolute_ms / self.actual_ms
        } else {
            0.0
        }
    }
}
