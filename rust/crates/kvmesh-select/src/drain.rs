//! How fast waiting requests leave.

/// Milliseconds over which the rate is averaged.
const WINDOW_MS: f64 = 10_000.0;
/// Milliseconds of waiting before the rate is believed.
const ENOUGH_MS: f64 = 1_000.0;

/// Tokens released per millisecond of those in which requests waited; the past fades.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Drain {
    tokens: f64,
    ms: f64,
    at: f64,
}

impl Drain {
    /// It is `now`; since the last call requests were `waiting`, or not.
    pub fn advance(&mut self, now: f64, waiting: bool) {
        let passed = now - self.at;
        self.at = now;
        if waiting && passed > 0.0 {
            let keep = (-passed / WINDOW_MS).exp();
            self.tokens *= keep;
            self.ms = self.ms * keep + WINDOW_MS * (1.0 - keep);
        }
    }

    /// A request with this many tokens was released.
    pub fn left(&mut self, tokens: u64) {
        self.tokens += tokens as f64;
    }

    /// Tokens a millisecond; None before it is known.
    pub fn rate(&self) -> Option<f64> {
        (self.ms >= ENOUGH_MS).then(|| self.tokens / self.ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_time_in_which_requests_wait() {
        let mut drain = Drain::default();
        drain.advance(5_000.0, false);
        assert_eq!(drain.rate(), None);
        for step in 1..=400 {
            drain.advance(5_000.0 + f64::from(step) * 100.0, true);
            drain.left(300);
        }
        let rate = drain.rate().unwrap();
        assert!((rate - 3.0).abs() < 0.05, "{rate}");
        // An idle hour says nothing about it.
        drain.advance(3_600_000.0, false);
        assert_eq!(drain.rate(), Some(rate));
        // A minute in which nothing leaves does.
        drain.advance(3_660_000.0, true);
        assert!(drain.rate().unwrap() < 0.05);
    }
}
