//! Which blocks are worth a write: disks wear by the byte.
//!
//! The day's bytes fill a bucket evenly; while it is full, all but the blocks that will hardly return are written, and
//! the emptier it is, the likelier a block's return must be.

/// Blocks less likely to return within a day are never written.
const LEAST_CHANCE: f64 = 0.02;
/// Of blocks nothing is known of.
const UNKNOWN: f64 = 0.5;
const DAY: f64 = 86_400.0;
/// Part of the day's bytes the bucket holds: a night's savings may be spent in a burst.
const BURST: f64 = 0.5;

/// The answer to a wish to write a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Write,
    Unlikely,
    OverBudget,
}

/// What may still be written.
#[derive(Debug)]
pub(super) struct Admission {
    bytes_per_day: Option<f64>,
    left: f64,
    asked: f64,
}

impl Admission {
    /// A full bucket, at time 0.
    pub(super) fn new(bytes_per_day: Option<u64>) -> Self {
        let bytes_per_day = bytes_per_day.map(|bytes| bytes as f64);
        Self {
            bytes_per_day,
            left: bytes_per_day.unwrap_or(0.0) * BURST,
            asked: 0.0,
        }
    }

    /// Whether to write so many bytes of a block with this chance to return, at `now` seconds, which never decreases.
    pub(super) fn ask(&mut self, bytes: u64, chance: Option<f64>, now: f64) -> Verdict {
        let chance = chance.unwrap_or(UNKNOWN);
        if chance < LEAST_CHANCE {
            return Verdict::Unlikely;
        }
        let Some(rate) = self.bytes_per_day else {
            return Verdict::Write;
        };
        let full = rate * BURST;
        self.left = (self.left + rate * (now - self.asked) / DAY).min(full);
        self.asked = now;
        // Half full: half of what is as likely as not may pass.
        let wanted = (1.0 - self.left / full).powi(2);
        if self.left < bytes as f64 || chance < wanted {
            return Verdict::OverBudget;
        }
        self.left -= bytes as f64;
        Verdict::Write
    }

    /// So many bytes are written without asking.
    pub(super) fn spend(&mut self, bytes: u64) {
        self.left -= bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn without_a_budget_only_what_hardly_returns_is_refused() {
        let mut admission = Admission::new(None);
        for chance in [None, Some(0.03), Some(1.0)] {
            assert_eq!(admission.ask(1 << 40, chance, 0.0), Verdict::Write);
        }
        assert_eq!(admission.ask(1, Some(0.01), 0.0), Verdict::Unlikely);
    }

    #[test]
    fn no_more_is_written_than_the_days_bytes_and_one_burst() {
        let day = 1000 * MIB;
        let mut admission = Admission::new(Some(day));
        let mut written = 0;
        for second in 0..3 * 86_400 {
            if admission.ask(MIB, Some(0.9), f64::from(second)) == Verdict::Write {
                written += MIB;
            }
        }
        assert!(written <= 3 * day + day / 2, "{written}");
        assert!(written >= 3 * day, "what may be written is: {written}");
    }

    #[test]
    fn the_likelier_block_is_written_longer() {
        let admitted = |chance| {
            let mut admission = Admission::new(Some(1000 * MIB));
            (0..1000)
                .filter(|_| admission.ask(MIB, Some(chance), 0.0) == Verdict::Write)
                .count()
        };
        assert!(admitted(0.05) < admitted(0.3));
        assert!(admitted(0.3) < admitted(0.9));
        assert_eq!(admitted(1.0), 500);
    }
}
