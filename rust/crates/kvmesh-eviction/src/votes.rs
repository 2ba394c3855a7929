//! How much each expert's word counts: weights that follow what their caches have hit.
//!
//! Exponential weights over discounted hits (N. Littlestone and M. Warmuth, "The weighted majority algorithm", 1994).
//! Hits come by chains, and one chain may be most of what an expert is ahead: so a lead is measured in its own
//! deviation, the root of the sum of squares of what the rounds differed by.

use crate::commitment::{Commitment, Round};

pub(crate) const EXPERTS: usize = 3;
const SETS: usize = 1 << EXPERTS;

/// Who holds a block: bit e for expert e.
pub(crate) type Holders = u8;

/// A lead of one deviation counts e to this power.
const DECISION: f64 = 2.0;
/// Deviations that an expert stays behind at most: however long another one was ahead, it may be caught up with soon
/// after the traffic has changed.
const FARTHEST: f64 = 2.0;
/// A leader's odds, against all of the others together.
const LEADS: f64 = 4.0;
/// Differing rounds at which what was seen counts as much as that nothing was: a lead of few rounds is no proof.
const DOUBT: f64 = 8.0;

/// The weights of the experts, which sum up to 1, and of all sets of them.
#[derive(Debug)]
pub(crate) struct Votes {
    /// Hits so far; the past is discounted, here and below.
    scores: [f64; EXPERTS],
    /// Of each round, the most that experts differed by, squared.
    squares: f64,
    /// Rounds in which they differed.
    rounds: f64,
    commitment: Commitment,
    weights: [f64; SETS],
    order: [Holders; SETS],
}

impl Default for Votes {
    fn default() -> Self {
        let mut votes = Self {
            scores: [0.0; EXPERTS],
            squares: 0.0,
            rounds: 0.0,
            commitment: Commitment::default(),
            weights: [0.0; SETS],
            order: std::array::from_fn(|holders| holders as Holders),
        };
        votes.weigh();
        votes
    }
}

impl Votes {
    /// Takes in one round; what came before counts `fade` times as much.
    pub(crate) fn count(&mut self, round: &Round, fade: f64) {
        let hits = round.hits;
        let most = hits.iter().copied().fold(0.0, f64::max);
        let least = hits.iter().copied().fold(f64::INFINITY, f64::min);
        for (score, hits) in self.scores.iter_mut().zip(hits) {
            *score = *score * fade + hits;
        }
        let differ = most - least;
        self.squares = self.squares * fade + differ * differ;
        self.rounds = self.rounds * fade + f64::from(u8::from(differ > 0.0));
        let deviation = self.deviation();
        self.commitment.count(round, fade, deviation);
        let limit = self.best() - FARTHEST * deviation;
        for score in &mut self.scores {
            *score = score.max(limit);
        }
        self.weigh();
    }

    fn best(&self) -> f64 {
        self.scores.into_iter().fold(0.0, f64::max)
    }

    /// Of a lead, in hits; 0 before experts differed.
    fn deviation(&self) -> f64 {
        if self.rounds > 0.0 {
            (self.squares * (self.rounds + DOUBT) / self.rounds).sqrt()
        } else {
            0.0
        }
    }

    fn weigh(&mut self) {
        let deviation = self.deviation();
        // Small where they differed long ago.
        let scale = if deviation > 1e-6 {
            DECISION / deviation
        } else {
            0.0
        };
        let best = self.best();
        let mut odds = self.scores.map(|score| ((score - best) * scale).exp());
        if let Some(leader) = self.commitment.leader() {
            odds[leader] += LEADS * odds.iter().sum::<f64>();
        }
        let all: f64 = odds.iter().sum();
        for (holders, weight) in self.weights.iter_mut().enumerate() {
            let holds = |&expert: &usize| holders >> expert & 1 == 1;
            let odds: f64 = (0..EXPERTS).filter(holds).map(|expert| odds[expert]).sum();
            *weight = odds / all;
        }
        let weights = &self.weights;
        let weight = |holders: &Holders| weights[usize::from(*holders)];
        self.order
            .sort_by(|a, b| weight(a).total_cmp(&weight(b)).then(a.cmp(b)));
    }

    /// What the word of these together counts, from 0 to 1.
    pub(crate) fn weight(&self, holders: Holders) -> f64 {
        self.weights[usize::from(holders)]
    }

    /// All sets of experts, those with the least weight first.
    pub(crate) fn order(&self) -> &[Holders; SETS] {
        &self.order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FADE: f64 = 0.999;

    /// The real cache misses nothing, so that the vote decides.
    fn round(hits: [f64; EXPERTS]) -> Round {
        Round {
            hits,
            real: hits.iter().sum(),
            ..Round::default()
        }
    }

    fn after(rounds: impl IntoIterator<Item = [f64; EXPERTS]>) -> Votes {
        let mut votes = Votes::default();
        for hits in rounds {
            votes.count(&round(hits), FADE);
        }
        votes
    }

    #[test]
    fn all_count_alike_until_they_differ() {
        for votes in [after([]), after([[7.0; EXPERTS]; 50])] {
            for expert in 0..EXPERTS {
                assert!((votes.weight(1 << expert) - 1.0 / 3.0).abs() < 1e-12);
            }
            assert_eq!(votes.order()[0], 0);
            assert_eq!(votes.order()[SETS - 1], 0b111);
        }
    }

    #[test]
    fn two_outvote_one_that_had_luck_once() {
        let votes = after([[0.0, 90.0, 0.0]]);
        assert!(votes.weight(0b101) > votes.weight(0b010));
        assert!(votes.weight(0b010) > votes.weight(0b001));
    }

    #[test]
    fn who_is_ahead_again_and_again_decides_alone() {
        let votes = after([[0.0, 1.0, 0.0]; 40]);
        assert!(votes.weight(0b010) > 0.9, "{votes:?}");
        // However many hits a round is.
        let long = after([[0.0, 90.0, 0.0]; 40]);
        assert!((votes.weight(0b010) - long.weight(0b010)).abs() < 1e-9);
    }

    #[test]
    fn who_was_ahead_for_long_is_overtaken_soon() {
        let mut votes = after([[0.0, 1.0, 0.0]; 5_000]);
        let mut rounds = 0;
        while votes.weight(0b100) < 0.5 {
            votes.count(&round([0.0, 0.0, 1.0]), FADE);
            rounds += 1;
        }
        assert!(rounds < 200, "{rounds}");
    }

    #[test]
    fn who_was_ahead_long_ago_is_forgotten() {
        let mut votes = after([[0.0, 30.0, 0.0]; 100]);
        votes.count(&round([0.0; EXPERTS]), 1e-300);
        assert!((votes.weight(0b010) - 1.0 / 3.0).abs() < 1e-6);
    }

    #[test]
    fn who_is_followed_decides_alone() {
        let mut votes = Votes::default();
        for number in 0..100 {
            let ahead = number / 10 % 2;
            let mut hits = [0.0; EXPERTS];
            hits[ahead] = 6.0;
            let behind = Round {
                uses: 10.0,
                hits,
                real: 1.0,
                missing: [1_000; EXPERTS],
            };
            votes.count(&behind, FADE);
        }
        assert!(votes.weight(0b001) > 0.5, "{votes:?}");
    }
}
