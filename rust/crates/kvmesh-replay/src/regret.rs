//! What other policies would have done, summed up.

use serde::Serialize;

use crate::line::{ShadowLine, Winner};

/// One policy against what was chosen. Milliseconds; means over all decisions.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Tally {
    /// The policy.
    pub policy: String,
    /// Decisions it was asked for.
    pub decisions: u64,
    /// Of these, those in which it would have chosen otherwise.
    pub differ: u64,
    /// Of these, those in which that was predicted to cost less.
    pub better: u64,
    /// Predicted cost of what was chosen, and of its own choice.
    pub chosen_cost_ms: f64,
    /// Of its own choice.
    pub cost_ms: f64,
    /// Predicted time to the first token of what was chosen.
    pub chosen_ttft_ms: f64,
    /// Of its own choice.
    pub ttft_ms: f64,
    /// Cost that its choices would have saved, less than 0 where they would have cost more.
    pub regret_ms: f64,
    /// The 95th percentile of what one choice would have saved.
    pub regret_p95_ms: f64,
    #[serde(skip)]
    regrets: Vec<f64>,
}

impl Tally {
    pub(crate) fn new(policy: String) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, winner: &Winner, shadow: &ShadowLine) {
        self.decisions += 1;
        if (shadow.prefill, shadow.decode) != (winner.prefill, winner.decode) {
            self.differ += 1;
            self.better += u64::from(shadow.regret > 0.0);
        }
        self.chosen_cost_ms += shadow.live_cost;
        self.cost_ms += shadow.cost;
        self.chosen_ttft_ms += shadow.live_ttft;
        self.ttft_ms += shadow.ttft;
        self.regrets.push(shadow.regret);
    }

    /// Turns sums into means.
    pub(crate) fn finish(mut self) -> Self {
        let count = self.decisions.max(1) as f64;
        self.regret_ms = self.regrets.iter().sum::<f64>() / count;
        self.regrets.sort_unstable_by(f64::total_cmp);
        let at = (0.95 * self.regrets.len() as f64).ceil() as usize;
        self.regret_p95_ms = self
            .regrets
            .get(at.saturating_sub(1))
            .copied()
            .unwrap_or(0.0);
        for sum in [
            &mut self.chosen_cost_ms,
            &mut self.cost_ms,
            &mut self.chosen_ttft_ms,
            &mut self.ttft_ms,
        ] {
            *sum /= count;
        }
        self
    }
}
