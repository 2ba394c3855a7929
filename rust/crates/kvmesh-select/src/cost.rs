//! What a placement costs, from what is known of a worker.

use crate::{
    rates::{ClassRates, Work},
    slots::Slots,
    types::Terms,
    worker::Worker,
};

/// What a millisecond, or a block, is worth to others. All are ratios of milliseconds, so none depends on the hardware.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Prices {
    /// Of a millisecond of prefill to requests that will come meanwhile.
    pub work: f64,
    /// Of a millisecond that one stream's next token comes later.
    pub stream: f64,
    /// The same of a request that waits there and will stream by then. Streams met under way are mostly long ones,
    /// for which a pause weighs little; among those about to begin are the short ones (the inspection paradox).
    pub fresh: f64,
    /// Of a millisecond between the tokens of a request, or of one that it joins.
    pub token: f64,
    /// Of a millisecond expected to be spent on computing an evicted block again.
    pub evict: f64,
}

impl Default for Prices {
    /// Found by simulation of several kinds of traffic, which want different ones: between them.
    fn default() -> Self {
        Self {
            work: 0.25,
            stream: 0.15,
            fresh: 0.3,
            token: 20.0,
            evict: 3.0,
        }
    }
}

/// The part of a request's prompt that one worker has cached, in tokens by tier, and the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cached {
    /// Each without those of faster tiers.
    pub tokens: [u32; 4],
    /// To be computed, at least 1.
    pub uncached: u32,
}

impl Cached {
    /// From leading blocks seen on the device, down to host, to nvme, and in any tier. An engine always
    /// computes the last token.
    pub fn of(depths: [u32; 4], prompt_tokens: u32, block_tokens: u32) -> Self {
        let most = prompt_tokens.saturating_sub(1) / block_tokens * block_tokens;
        let mut tokens = [0; 4];
        let mut seen = 0;
        for (tier, depth) in depths.into_iter().enumerate() {
            let reach = depth.saturating_mul(block_tokens).min(most);
            tokens[tier] = reach.saturating_sub(seen);
            seen = seen.max(reach);
        }
        Self {
            tokens,
            uncached: prompt_tokens.max(1) - seen,
        }
    }

    /// Cached in any tier.
    pub fn total(&self) -> u32 {
        self.tokens.iter().sum()
    }
}

/// A worker and what surrounds it at the moment of a decision.
pub struct Seat<'a> {
    pub worker: &'a Worker,
    pub rates: &'a ClassRates,
    pub slots: Slots,
    /// Milliseconds until the prompts placed before are computed.
    pub backlog_ms: f64,
    /// What streams there take of each pass.
    pub step_ms: f64,
}

impl<'a> Seat<'a> {
    pub fn new(now: f64, worker: &'a Worker, rates: &'a ClassRates, slots: Slots) -> Self {
        let share = slots.distinct_blocks() as f64 / f64::from(worker.blocks);
        let step_ms = if slots.streams > 0 {
            worker.slower * rates.decode_ms(slots.streams, share.min(1.0))
        } else {
            0.0
        };
        Self {
            backlog_ms: worker.queue.backlog_ms(now),
            worker,
            rates,
            slots,
            step_ms,
        }
    }

    /// Computing `uncached` tokens behind `before` cached ones, once it is their turn.
    pub fn own_ms(&self, work: &Work, alone_ms: f64) -> f64 {
        self.worker.slower * alone_ms + work.passes() * self.step_ms
    }

    /// A pass with a prompt in it, whatever it computes.
    pub fn pass_ms(&self) -> f64 {
        self.worker.slower * self.rates.prefill_pass_ms() + self.step_ms
    }

    /// Until a prompt placed now has its turn: those ahead of it, or the rest of a pass that streams are in.
    pub fn queue_ms(&self) -> f64 {
        self.backlog_ms.max(0.5 * self.step_ms)
    }

    /// What generating here costs: the time between the request's own tokens; what it adds to that of each other request
    /// here; and, where blocks of requests' own do not fit, those of others that have to be computed again.
    ///
    /// `more_blocks` are in use with it that were not before: a prefix that others hold is in use already. Of its own are
    /// `own_blocks`, which are not cached here: a prefix that many share fills the pool once, not with each.
    pub fn decode_cost(
        &self,
        prices: &Prices,
        (more_blocks, own_blocks): (u32, u32),
        block_tokens: u32,
    ) -> f64 {
        let step = |requests: u32, blocks: u64| {
            let share = blocks as f64 / f64::from(self.worker.blocks);
            self.rates.decode_ms(requests, share.min(1.0))
        };
        let (others, blocks) = (self.slots.requests, self.slots.distinct_blocks());
        let with = step(others + 1, blocks + u64::from(more_blocks));
        let added = f64::from(others) * (with - step(others, blocks));
        let own = self.slots.own_blocks + u64::from(own_blocks);
        let over = own.saturating_sub(u64::from(self.worker.blocks)) as f64;
        let again = over * f64::from(block_tokens) * self.rates.prefill_token_ms();
        self.worker.slower * (prices.token * (with + added) + again)
    }
}

/// Sums up a placement: `own_ms` to compute its prompt; `rest` to onboard, to transfer, for its decode half, and for
/// what it evicts.
pub fn terms(seat: &Seat<'_>, prices: &Prices, own_ms: f64, rest: [f64; 4]) -> Terms {
    let [onboard, transfer, decode, evict] = rest;
    let streams = seat.slots.streams;
    let fresh = seat.slots.requests - streams;
    Terms {
        queue: seat.queue_ms(),
        prefill: own_ms,
        onboard,
        transfer,
        work: prices.work * own_ms,
        streams: own_ms * (prices.stream * f64::from(streams) + prices.fresh * f64::from(fresh)),
        decode,
        evict,
    }
}
