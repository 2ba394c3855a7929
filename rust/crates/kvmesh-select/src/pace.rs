//! How fast one worker is beside others of its class.

use crate::fit::Quality;

/// One observation says no more than this: a factor of 8.
const LOUDEST: f64 = 2.08;

/// By how much something took longer than expected, as a logarithm; both more than 0.
fn log_ratio(expected: f64, actual: f64) -> f64 {
    (actual / expected).ln().clamp(-LOUDEST, LOUDEST)
}

/// Streams that ran side by side, on a worker that does nothing else. One hiccup slows them all, and one slow reader only
/// its own: all of a second are one observation, the geometric mean of what they took against what was expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SideBySide {
    since: f64,
    sum: f64,
    count: f64,
}

impl SideBySide {
    /// Milliseconds that make up one observation.
    const TOGETHER_MS: f64 = 1_000.0;

    /// Takes one in that was expected to take `expected` ms and took `actual`. After a second, the factor of all since then.
    pub fn observe(&mut self, now: f64, expected: f64, actual: f64) -> Option<f64> {
        if expected > 0.0 && actual > 0.0 && actual.is_finite() {
            self.sum += log_ratio(expected, actual);
            self.count += 1.0;
        }
        if now - self.since < Self::TOGETHER_MS || self.count == 0.0 {
            return None;
        }
        let mean = self.sum / self.count;
        *self = Self {
            since: now,
            ..Self::default()
        };
        Some(mean.exp())
    }
}

/// How much slower one worker is than its class.
///
/// Small differences between equal workers do harm: requests whose prefix is cached nowhere all go to the one that
/// seems fastest. So a worker's own mean log ratio, shrunk towards 0 as with some ([`Pace::PRIOR`]) observations of
/// no difference, counts not at all below [`Pace::IGNORED`], fully above [`Pace::BELIEVED`], and in part between
/// (firm thresholding: Gao and Bruce, "WaveShrink with firm shrinkage", 1997).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Pace {
    prior: f64,
    sum: f64,
    weight: f64,
    quality: Quality,
}

impl Default for Pace {
    fn default() -> Self {
        Self::shrunk(Self::PRIOR)
    }
}

impl Pace {
    /// Discount of the past by each observation.
    pub const KEEP: f64 = 0.9;
    /// Observations of no difference that it starts with, and keeps.
    pub const PRIOR: f64 = 2.0;
    /// Log ratio below which a difference is noise: a factor of 1.5.
    pub const IGNORED: f64 = 0.405;
    /// Log ratio above which a difference is real: a factor of 2.
    pub const BELIEVED: f64 = 0.693;

    /// One that starts with so many observations of no difference.
    pub fn shrunk(prior: f64) -> Self {
        Self {
            prior,
            sum: 0.0,
            weight: 0.0,
            quality: Quality::default(),
        }
    }

    /// Learns that work expected to take `expected` ms took `actual`.
    pub fn observe(&mut self, expected: f64, actual: f64) {
        if expected > 0.0 && actual > 0.0 && actual.is_finite() {
            let ratio = log_ratio(expected, actual);
            let error = (ratio.exp() / self.factor() - 1.0).abs();
            self.quality.observe(error);
            self.take(ratio);
        }
    }

    /// Forgets a little for want of news, so that a worker that was slow once is tried again.
    pub fn fade(&mut self) {
        self.take(0.0);
    }

    fn take(&mut self, ratio: f64) {
        self.sum = self.sum * Self::KEEP + ratio;
        self.weight = self.weight * Self::KEEP + 1.0;
    }

    /// How well its factor on its class' predictions has held.
    pub fn quality(&self) -> Quality {
        self.quality
    }

    /// The factor on its class' durations.
    pub fn factor(&self) -> f64 {
        let mean = self.sum / (self.weight + self.prior);
        let size = mean.abs();
        if size <= Self::IGNORED {
            return 1.0;
        }
        let part = (size - Self::IGNORED) / (Self::BELIEVED - Self::IGNORED);
        (mean * part.min(1.0)).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_ignores_small_differences_and_believes_large_ones() {
        for (ratio, low, high) in [(1.3, 1.0, 1.0), (0.7, 1.0, 1.0), (5.0, 3.5, 5.0)] {
            let mut pace = Pace::default();
            for _ in 0..50 {
                pace.observe(100.0, 100.0 * ratio);
            }
            let factor = pace.factor();
            assert!((low..=high).contains(&factor), "{ratio}: {factor}");
        }
        let mut pace = Pace::default();
        pace.observe(100.0, 500.0);
        assert!(pace.factor() < 2.0, "one observation proves nothing");
        for _ in 0..4 {
            pace.observe(100.0, 500.0);
        }
        assert!(pace.factor() > 2.5);
    }

    #[test]
    fn a_pace_fades() {
        let mut pace = Pace::default();
        for _ in 0..50 {
            pace.observe(100.0, 500.0);
        }
        let seen = pace.quality();
        for _ in 0..12 {
            pace.fade();
        }
        assert_eq!(pace.factor(), 1.0);
        assert_eq!(pace.quality(), seen, "no news is no observation");
    }

    #[test]
    fn what_ran_side_by_side_is_one_observation() {
        let mut steps = SideBySide::default();
        assert_eq!(steps.observe(5_000.0, 10.0, 10.0), Some(1.0));
        // Nine as expected, and one whose reader fell asleep.
        for at in 0..9 {
            assert_eq!(steps.observe(5_100.0 + f64::from(at), 10.0, 10.0), None);
        }
        let factor = steps.observe(6_000.0, 10.0, 60_000.0).unwrap_or_default();
        assert!((1.2..1.3).contains(&factor), "{factor}");
        // What cannot be says nothing.
        assert_eq!(steps.observe(8_000.0, 10.0, 0.0), None);
        let slow = steps.observe(8_000.0, 10.0, 50.0).unwrap_or_default();
        assert!((slow - 5.0).abs() < 1e-9, "{slow}");
    }
}
