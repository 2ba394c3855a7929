//! From costs to one winner: near ties by chance, or all by softmax.

use rand::{Rng, RngCore};

/// Costs this close to the lowest are equal: `absolute`, and `relative` to the lowest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Margin {
    /// In the policy's unit.
    pub absolute: f64,
    /// A share of the lowest cost.
    pub relative: f64,
}

/// The winner's position. With a `temperature` above 0, chance decides with the odds
/// `exp(-(cost - lowest) / ((highest - lowest) * temperature))`; else it decides between near ties.
///
/// `costs` must not be empty. Costs that are not finite never win, unless none is.
pub fn choose(costs: &[f64], margin: Margin, temperature: f64, chance: &mut dyn RngCore) -> usize {
    let finite = || costs.iter().copied().filter(|cost| cost.is_finite());
    let lowest = finite().fold(f64::INFINITY, f64::min);
    if !lowest.is_finite() {
        return chance.random_range(0..costs.len());
    }
    let highest = finite().fold(lowest, f64::max);
    if temperature > 0.0 && highest > lowest {
        return soften(costs, lowest, (highest - lowest) * temperature, chance);
    }
    let limit = lowest + margin.absolute + margin.relative * lowest.abs();
    let near = costs.iter().filter(|cost| **cost <= limit).count();
    let pick = if near > 1 {
        chance.random_range(0..near)
    } else {
        0
    };
    let mut ties = costs.iter().enumerate().filter(|(_, cost)| **cost <= limit);
    ties.nth(pick).map_or(0, |(at, _)| at)
}

fn soften(costs: &[f64], lowest: f64, scale: f64, chance: &mut dyn RngCore) -> usize {
    let odds = |cost: f64| {
        if cost.is_finite() {
            (-(cost - lowest) / scale).exp()
        } else {
            0.0
        }
    };
    let mut left =
        chance.random_range(0.0..1.0) * costs.iter().map(|&cost| odds(cost)).sum::<f64>();
    let mut last = 0;
    for (at, &cost) in costs.iter().enumerate() {
        let share = odds(cost);
        if share > 0.0 {
            if left < share {
                return at;
            }
            (left, last) = (left - share, at);
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

    use super::*;

    const EXACT: Margin = Margin {
        absolute: 0.0,
        relative: 0.0,
    };

    fn shares(costs: &[f64], margin: Margin, temperature: f64) -> Vec<f64> {
        let mut chance = ChaCha8Rng::seed_from_u64(1);
        let mut won = vec![0.0; costs.len()];
        for _ in 0..10_000 {
            won[choose(costs, margin, temperature, &mut chance)] += 1e-4;
        }
        won
    }

    #[test]
    fn the_lowest_wins_and_ties_share() {
        assert_eq!(shares(&[3.0, 1.0, 2.0], EXACT, 0.0)[1].round(), 1.0);
        let tied = shares(
            &[1.0, 9.0, 1.0, 1.05],
            Margin {
                absolute: 0.1,
                relative: 0.0,
            },
            0.0,
        );
        assert_eq!(tied[1], 0.0);
        for at in [0, 2, 3] {
            assert!((tied[at] - 1.0 / 3.0).abs() < 0.03);
        }
    }

    #[test]
    fn temperature_softens() {
        let odds = [1.0, (-1.0_f64).exp(), (-2.0_f64).exp()];
        let total: f64 = odds.iter().sum();
        let won = shares(&[10.0, 15.0, 20.0], EXACT, 0.5);
        for at in 0..3 {
            assert!((won[at] - odds[at] / total).abs() < 0.02);
        }
        // All equal: nothing to soften.
        assert!((shares(&[7.0, 7.0], EXACT, 1.0)[0] - 0.5).abs() < 0.03);
    }

    #[test]
    fn what_is_not_finite_does_not_win() {
        assert_eq!(
            shares(&[f64::INFINITY, 1.0, f64::NAN], EXACT, 0.0)[1].round(),
            1.0
        );
        assert_eq!(shares(&[f64::INFINITY, 1.0, 2.0], EXACT, 1.0)[0], 0.0);
    }
}
