//! The prompts placed on one worker and not yet computed, in order, and when they will be.

use std::collections::VecDeque;

use crate::rates::Work;

/// A prompt in the queue.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Waiting {
    /// Its lease.
    pub lease: u64,
    /// What is to be computed.
    pub work: Work,
    /// Milliseconds this was predicted to take when it was placed.
    pub ms: f64,
    /// Tokens onboarded from host, nvme and network.
    pub onboard: [u32; 3],
    /// When it was placed.
    pub placed: f64,
    /// Milliseconds from then until it would be computed, as predicted; None where another router predicted it.
    pub expected: Option<f64>,
}

/// First come, first served, as engines do it.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Queue {
    waiting: VecDeque<Waiting>,
    /// When the worker turned to the head.
    since: f64,
    total_ms: f64,
}

impl Queue {
    /// When the worker turned to the first of them.
    pub fn since(&self) -> f64 {
        self.since
    }

    /// Adds a prompt at the end.
    pub fn push(&mut self, now: f64, entry: Waiting) {
        if self.waiting.is_empty() {
            self.since = now;
        }
        self.total_ms += entry.ms;
        self.waiting.push_back(entry);
    }

    /// Takes a prompt out because it is computed; the worker turns to the next now.
    pub fn computed(&mut self, now: f64, lease: u64) -> Option<Waiting> {
        let at = self.waiting.iter().position(|entry| entry.lease == lease)?;
        self.since = now;
        self.take(at)
    }

    /// Takes a prompt out because it is given up.
    pub fn withdraw(&mut self, now: f64, lease: u64) -> Option<Waiting> {
        let at = self.waiting.iter().position(|entry| entry.lease == lease)?;
        if at == 0 {
            self.since = now;
        }
        self.take(at)
    }

    fn take(&mut self, at: usize) -> Option<Waiting> {
        let entry = self.waiting.remove(at);
        // Summed anew, so that rounding does not build up.
        self.total_ms = self.waiting.iter().map(|entry| entry.ms).sum();
        entry
    }

    /// Milliseconds that computing all of them was predicted to take, when they were placed.
    pub fn predicted_ms(&self) -> f64 {
        self.total_ms
    }

    /// Milliseconds until all of them are computed, as predicted.
    ///
    /// A head that takes longer than predicted is expected to take as long again as it is late: the longer
    /// something has lasted, the longer it will last (a Pareto tail of index 2, "Lindy's law").
    pub fn backlog_ms(&self, now: f64) -> f64 {
        let Some(head) = self.waiting.front() else {
            return 0.0;
        };
        let left = head.ms - (now - self.since);
        self.total_ms - head.ms + left.abs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(lease: u64, ms: f64) -> Waiting {
        Waiting {
            lease,
            work: Work::default(),
            ms,
            onboard: [0; 3],
            placed: 0.0,
            expected: Some(ms),
        }
    }

    #[test]
    fn the_backlog_shrinks_with_time_and_grows_with_lateness() {
        let mut queue = Queue::default();
        assert_eq!(queue.backlog_ms(0.0), 0.0);
        queue.push(100.0, entry(1, 50.0));
        queue.push(110.0, entry(2, 30.0));
        assert_eq!(queue.backlog_ms(100.0), 80.0);
        assert_eq!(queue.backlog_ms(140.0), 40.0);
        assert_eq!(queue.backlog_ms(150.0), 30.0);
        assert_eq!(queue.backlog_ms(400.0), 280.0);
        assert!(queue.computed(400.0, 1).is_some());
        assert_eq!(queue.backlog_ms(410.0), 20.0);
        assert!(queue.computed(410.0, 1).is_none());
        assert!(queue.withdraw(410.0, 2).is_some());
        assert_eq!(queue.backlog_ms(420.0), 0.0);
    }
}
