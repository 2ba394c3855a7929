//! How slow the links are by which a decode worker receives KV, beside what its class takes of a transfer.

use rustc_hash::FxHashMap;

use crate::{fit::Quality, pace::Pace, types::WorkerId};

/// A link that counts as slow is used less, and so little is heard of it: it is thought a little better of each time nothing
/// was for so long.
const SILENT_MS: f64 = 10_000.0;

/// One link.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Link {
    pace: Pace,
    /// When that was last learned or faded.
    paced: f64,
}

impl Link {
    /// Observations of no difference that it starts with, and keeps: so many that no single transfer makes a link count as
    /// slow or fast.
    const PRIOR: f64 = 5.0;
}

/// The links of one decode worker, by the prefill worker at the other end.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Links {
    of: FxHashMap<WorkerId, Link>,
    /// Of them, those that count as slower or faster than others. Mostly none, and then nothing is looked up.
    uneven: u32,
}

impl Links {
    /// The factor on a transfer from a prefill worker, as far as it is believed.
    pub fn factor(&self, from: WorkerId) -> f64 {
        match self.uneven {
            0 => 1.0,
            _ => self.of.get(&from).map_or(1.0, |link| link.pace.factor()),
        }
    }

    /// Whether any of them counts as slower or faster than others.
    pub fn are_uneven(&self) -> bool {
        self.uneven > 0
    }

    /// Learns that a transfer took `actual` ms that was expected to take `expected`, were all links alike.
    pub fn observe(&mut self, now: f64, from: WorkerId, expected: f64, actual: f64) {
        let link = self.of.entry(from).or_insert_with(|| Link {
            pace: Pace::shrunk(Link::PRIOR),
            paced: now,
        });
        link.pace.observe(expected, actual);
        link.paced = now;
        self.count();
    }

    /// Forgets a little of those of which nothing was heard.
    pub fn fade(&mut self, now: f64) {
        if self.uneven == 0 {
            return;
        }
        let silent = |link: &&mut Link| now - link.paced >= SILENT_MS;
        for link in self.of.values_mut().filter(silent) {
            link.pace.fade();
            link.paced = now;
        }
        self.count();
    }

    /// A prefill worker has left.
    pub fn forget(&mut self, from: WorkerId) {
        if self.of.remove(&from).is_some() {
            self.count();
        }
    }

    /// Each prefill worker, the factor, and how well it has held.
    pub fn known(&self) -> impl Iterator<Item = (WorkerId, f64, Quality)> {
        let link =
            |(&from, link): (&WorkerId, &Link)| (from, link.pace.factor(), link.pace.quality());
        self.of.iter().map(link)
    }

    fn count(&mut self) {
        let uneven = self.of.values().filter(|link| link.pace.factor() != 1.0);
        self.uneven = uneven.count() as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: [WorkerId; 2] = [
        WorkerId { index: 0, life: 0 },
        WorkerId { index: 1, life: 1 },
    ];

    #[test]
    fn one_transfer_proves_nothing_and_many_do() {
        let mut links = Links::default();
        links.observe(0.0, FROM[0], 10.0, 1e6);
        assert!(!links.are_uneven());
        assert_eq!(links.factor(FROM[0]), 1.0);
        for _ in 0..20 {
            links.observe(0.0, FROM[0], 10.0, 50.0);
            links.observe(0.0, FROM[1], 10.0, 13.0);
        }
        let slow = links.factor(FROM[0]);
        assert!((2.0..5.0).contains(&slow), "{slow}: shrunk");
        assert_eq!(links.factor(FROM[1]), 1.0, "a small difference is noise");
        assert_eq!(links.known().count(), 2);
    }

    #[test]
    fn a_link_of_which_nothing_is_heard_is_tried_again() {
        let mut links = Links::default();
        for _ in 0..20 {
            links.observe(0.0, FROM[0], 10.0, 50.0);
        }
        links.fade(SILENT_MS - 1.0);
        let slow = links.factor(FROM[0]);
        for turn in 1..=20 {
            links.fade(f64::from(turn) * SILENT_MS);
        }
        assert!(slow > 2.0 && links.factor(FROM[0]) == 1.0);
        links.observe(0.0, FROM[0], 10.0, 50.0);
        links.forget(FROM[0]);
        assert_eq!(links.known().count(), 0);
    }
}
