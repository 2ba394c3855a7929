//! Synthetic conversations: sessions over shared system prompts, turn after turn.

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{
    Result,
    trace::{Request, Trace, mix},
};

/// What to generate. Times in milliseconds, lengths in tokens.
#[derive(Clone, Copy, Debug)]
pub struct Synthetic {
    /// Requests in all.
    pub requests: usize,
    /// Requests a second, Poisson.
    pub per_second: f64,
    /// Distinct system prompts; sessions choose the k-th with a probability falling as 1/k.
    pub systems: usize,
    /// Tokens of a system prompt.
    pub system_tokens: u32,
    /// Mean tokens a turn adds to the context, exponential.
    pub turn_tokens: f64,
    /// Mean output tokens, exponential.
    pub output_tokens: f64,
    /// Mean turns of a session, geometric.
    pub turns: f64,
    /// Tokens in a block.
    pub block_tokens: u32,
}

struct Session {
    id: u64,
    system: u64,
    tokens: u32,
}

impl Synthetic {
    /// The same requests for the same seed.
    pub fn generate(&self, seed: u64) -> Result<Trace> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut requests = Vec::with_capacity(self.requests);
        let mut sessions: Vec<Session> = Vec::new();
        let (mut now, mut next_id) = (0.0, 1);
        let weights: f64 = (1..=self.systems.max(1)).map(|k| 1.0 / k as f64).sum();
        for _ in 0..self.requests {
            now += exponential(&mut random, 1e3 / self.per_second);
            let open = random.random_range(0.0..1.0) < 1.0 / self.turns || sessions.is_empty();
            let at = if open {
                let mut left = random.random_range(0.0..weights);
                let mut system = 1;
                while system < self.systems.max(1) && left > 1.0 / system as f64 {
                    left -= 1.0 / system as f64;
                    system += 1;
                }
                sessions.push(Session {
                    id: next_id,
                    system: system as u64,
                    tokens: self.system_tokens,
                });
                next_id += 1;
                sessions.len() - 1
            } else {
                random.random_range(0..sessions.len())
            };
            let session = &mut sessions[at];
            session.tokens += exponential(&mut random, self.turn_tokens).ceil() as u32;
            let output = exponential(&mut random, self.output_tokens).ceil().max(1.0) as u32;
            requests.push(self.request(now, session, output));
            session.tokens += output;
            // As many sessions end as begin.
            if random.random_range(0.0..1.0) < 1.0 / self.turns {
                sessions.swap_remove(at);
            }
        }
        Trace::new(requests)
    }

    fn request(&self, arrival_ms: f64, session: &Session, output: u32) -> Request {
        let shared = self.system_tokens / self.block_tokens;
        let name = |block: u32| {
            let owner = if block < shared {
                session.system << 40
            } else {
                session.id << 20 | 1 << 63
            };
            mix(owner | u64::from(block))
        };
        Request {
            arrival_ms,
            prompt: session.tokens,
            output,
            chain: (0..session.tokens / self.block_tokens).map(name).collect(),
            session: session.id,
            delay_ms: None,
        }
    }
}

fn exponential(random: &mut ChaCha8Rng, mean: f64) -> f64 {
    -mean * (1.0 - random.random_range(0.0..1.0_f64)).ln()
}
