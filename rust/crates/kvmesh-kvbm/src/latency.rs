//! How long things take: a histogram that costs an addition, so that it is always kept.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds in seconds; what takes longer is counted behind the last.
pub const BOUNDS_S: [f64; 11] = [
    0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0,
];

/// Times of one operation, since the start. Threads may record at once.
#[derive(Debug, Default)]
pub struct Latency {
    counts: [AtomicU64; BOUNDS_S.len() + 1],
    micros: AtomicU64,
}

/// What a [`Latency`] has recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Observed {
    /// How many took at most each of [`BOUNDS_S`] and more than the one before; the last: more than all.
    pub counts: [u64; BOUNDS_S.len() + 1],
    /// Their times together.
    pub time: Duration,
}

impl Latency {
    /// It took so long, once.
    pub fn record(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = BOUNDS_S.partition_point(|&bound| bound < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        (self.micros).fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// What was recorded so far.
    pub fn observed(&self) -> Observed {
        Observed {
            counts: (self.counts.each_ref()).map(|count| count.load(Ordering::Relaxed)),
            time: Duration::from_micros(self.micros.load(Ordering::Relaxed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_under_the_first_bound_that_is_not_below_it() {
        let latency = Latency::default();
        for micros in [50, 100, 101, 2_000_000, 11_000_000] {
            latency.record(Duration::from_micros(micros));
        }
        let observed = latency.observed();
        let mut counts = [0; BOUNDS_S.len() + 1];
        (counts[0], counts[1], counts[9], counts[11]) = (2, 1, 1, 1);
        assert_eq!(observed.counts, counts);
        assert_eq!(observed.time, Duration::from_micros(13_000_251));
    }
}
