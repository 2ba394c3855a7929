//! When the vote costs more than it is worth: then one expert is followed, and left only for what repays the move.
//!
//! The vote changes its mind for free, the cache does not: what the new favourite holds and the cache does not is missed
//! once. Where experts are ahead in turn, as on chains used in one order and then in the other, the cache so ends below
//! each of them. Whether it does is seen: its own hits are counted beside theirs. That a move must be repaid by what the
//! expert was ahead is the rule of metrical task systems (A. Borodin, N. Linial, M. Saks, J. ACM 1992).

use crate::votes::EXPERTS;

/// Deviations of what the cache is behind an expert that are not chance.
const BEHIND: f64 = 2.0;

/// What happened in one operation, in blocks.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Round {
    pub(crate) uses: f64,
    /// What each expert hit.
    pub(crate) hits: [f64; EXPERTS],
    /// What the real cache hit.
    pub(crate) real: f64,
    /// Of what each expert holds now, what the real cache does not.
    pub(crate) missing: [usize; EXPERTS],
}

/// Whom the cache follows, if it does not follow the vote. Sums are discounted.
#[derive(Debug, Default)]
pub(crate) struct Commitment {
    uses: f64,
    hits: [f64; EXPERTS],
    real: f64,
    /// What the expert and the cache differed by, squared.
    squares: [f64; EXPERTS],
    leader: Option<usize>,
}

impl Commitment {
    /// Takes in one round; what came before counts `fade` times as much. `chance`: hits that one expert may be ahead of
    /// another by luck.
    pub(crate) fn count(&mut self, round: &Round, fade: f64, chance: f64) {
        self.uses = self.uses * fade + round.uses;
        self.real = self.real * fade + round.real;
        for (expert, hits) in round.hits.into_iter().enumerate() {
            let differ = hits - round.real;
            self.hits[expert] = self.hits[expert] * fade + hits;
            self.squares[expert] = self.squares[expert] * fade + differ * differ;
        }
        let best = (1..EXPERTS).fold(0, |best, expert| {
            if self.hits[expert] > self.hits[best] {
                expert
            } else {
                best
            }
        });
        let behind = self.hits[best] - self.real;
        self.leader = match self.leader {
            // It has made up for what the vote had lost.
            Some(_) if behind < 0.0 => None,
            Some(leader) => {
                let ahead = self.hits[best] - self.hits[leader];
                let cost = self.cost(best, round.missing[best]);
                Some(if ahead > cost + chance { best } else { leader })
            }
            None => (behind > BEHIND * self.squares[best].sqrt()).then_some(best),
        };
    }

    /// The hits that a move to an expert costs. In a cache every use of a block is followed by a hit or by its eviction,
    /// so of the blocks that wait in it about its hit rate will be hit.
    fn cost(&self, expert: usize, missing: usize) -> f64 {
        missing as f64 * self.hits[expert] / self.uses.max(1.0)
    }

    /// The expert to follow alone. None: the vote decides.
    pub(crate) fn leader(&self) -> Option<usize> {
        self.leader
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FADE: f64 = 0.999;

    fn round(hits: [f64; EXPERTS], real: f64, missing: usize) -> Round {
        Round {
            uses: 10.0,
            hits,
            real,
            missing: [missing; EXPERTS],
        }
    }

    fn after(rounds: impl IntoIterator<Item = Round>) -> Commitment {
        let mut commitment = Commitment::default();
        for round in rounds {
            commitment.count(&round, FADE, 5.0);
        }
        commitment
    }

    #[test]
    fn the_vote_decides_while_it_is_not_behind() {
        assert_eq!(after([]).leader(), None);
        let level = vec![round([3.0, 5.0, 4.0], 5.0, 100); 500];
        assert_eq!(after(level).leader(), None);
        // Behind once, by much: may be chance.
        assert_eq!(after([round([90.0, 0.0, 0.0], 0.0, 100)]).leader(), None);
    }

    #[test]
    fn the_best_expert_is_followed_once_the_vote_is_behind() {
        let turns = (0..100).map(|number| match number / 10 % 2 {
            0 => round([6.0, 0.0, 0.0], 1.0, 100),
            _ => round([0.0, 7.0, 0.0], 1.0, 100),
        });
        assert_eq!(after(turns).leader(), Some(1));
    }

    #[test]
    fn the_leader_is_left_only_for_what_repays_the_move() {
        let first = || vec![round([0.0, 7.0, 0.0], 0.0, 0); 20];
        let then = |missing, rounds| vec![round([0.0, 0.0, 7.0], 0.0, missing); rounds];
        let leader =
            |missing, rounds| after(first().into_iter().chain(then(missing, rounds))).leader();
        assert_eq!(leader(0, 15), Some(1));
        assert_eq!(leader(0, 30), Some(2));
        assert_eq!(leader(1_000, 30), Some(1));
        assert_eq!(leader(1_000, 200), Some(2));
    }

    #[test]
    fn the_vote_decides_again_once_its_loss_is_made_up_for() {
        let mut commitment = after(vec![round([0.0, 7.0, 0.0], 0.0, 0); 20]);
        assert_eq!(commitment.leader(), Some(1));
        for _ in 0..400 {
            commitment.count(&round([0.0, 7.0, 0.0], 8.0, 0), FADE, 5.0);
        }
        assert_eq!(commitment.leader(), None);
    }
}
