//! What counts as a long time to the first token, with this model and this traffic.

/// A running 95th percentile of the milliseconds prompts take by themselves, by stochastic approximation (Robbins and
/// Monro, 1951) on a logarithmic scale.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Tail {
    ms: f64,
}

impl Default for Tail {
    fn default() -> Self {
        Self { ms: 500.0 }
    }
}

impl Tail {
    /// Part of itself that an observation can move it by.
    const STEP: f64 = 0.02;

    /// The percentile.
    pub fn ms(&self) -> f64 {
        self.ms
    }

    /// A prompt takes this long.
    pub fn observe(&mut self, ms: f64) {
        let step = if ms > self.ms { 0.95 } else { -0.05 };
        // So that an hour of short prompts does not have to be unlearned.
        self.ms = (self.ms * (1.0 + Self::STEP * step)).max(10.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_percentile() {
        let mut tail = Tail::default();
        let times = (0..20_000).map(|i| f64::from((i * 7919) % 1000) * 4.0);
        times.for_each(|ms| tail.observe(ms));
        assert!((3_600.0..4_000.0).contains(&tail.ms()), "{}", tail.ms());
    }
}
