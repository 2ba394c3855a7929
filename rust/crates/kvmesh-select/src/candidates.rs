//! The placements a request could have, and what each would take and cost.

use smallvec::SmallVec;

use crate::{
    cost::{Cached, Seat, terms},
    policy::PolicyName,
    rates::Work,
    scratch::Scratch,
    selector::{Context, Selector},
    types::{Candidate, Found, Request, Role, Terms, WorkerId},
    worker::Worker,
};

/// The decode worker that any prefill worker of a pool would be paired with.
struct Partner {
    pool: u32,
    half: Candidate,
    /// The factor of its best link, which its transfer is counted by.
    link: f64,
}

type Partners = SmallVec<[Partner; 1]>;

/// What is the same for all workers in one decision.
struct Common {
    new_blocks: u32,
    /// Chance that an evicted block is asked for again, times its price.
    evict: f64,
    /// Mean evictions of a worker.
    evictions: f64,
}

impl Selector {
    /// Fills the scratch with a request's candidates and their terms; none when nothing can take it.
    ///
    /// But for uneven links a decode partner's cost does not depend on the prefill worker, so the policy chooses it first, by
    /// its best link, and every prefill worker is paired with it: the cost of a decision grows with the workers, not with
    /// the pairs.
    pub(crate) fn candidates(
        &mut self,
        request: &Request,
        policy: PolicyName,
        context: &mut Context<'_>,
    ) {
        self.find(request, context);
        let common = self.common(request, context.now);
        let mut partners: Partners = SmallVec::new();
        self.scratch.rejected.clear();
        let mut workers = self.workers.iter().flatten();
        self.scratch.uneven =
            policy == PolicyName::Kv && workers.any(|worker| worker.links.are_uneven());
        for pool in self.pools(request) {
            self.partners(request, pool, &common, context.now);
            let at = self.choose(request, policy, true, context);
            let half = self.scratch.partners[at];
            let link = self.scratch.links[at];
            partners.push(Partner { pool, half, link });
            self.reject(pool, at);
        }
        self.rate(request, &common, &partners, context.now);
    }

    /// Pools that have a decode worker for a request.
    fn pools(&self, request: &Request) -> SmallVec<[u32; 1]> {
        let mut pools = SmallVec::new();
        for worker in self.workers.iter().flatten() {
            if worker.role == Role::Decode && !pools.contains(&worker.pool) && worker.takes(request)
            {
                pools.push(worker.pool);
            }
        }
        pools
    }

    fn common(&mut self, request: &Request, now: f64) -> Common {
        let evict = self.config.prices.evict * self.returns.chance();
        // The requests of one plan see the same.
        if evict > 0.0 && self.scratch.evictions_of != Some((now, self.evictions_changed)) {
            let rate = |worker: &Option<Worker>| match worker {
                Some(worker) => worker.residency.rate(now),
                None => 0.0,
            };
            self.scratch.evictions_of = Some((now, self.evictions_changed));
            self.scratch.evictions.clear();
            self.scratch.evictions.extend(self.workers.iter().map(rate));
            let evictions: f64 = self.scratch.evictions.iter().sum();
            let workers = self.workers.iter().flatten();
            self.scratch.mean_evictions = evictions / workers.count().max(1) as f64;
        }
        Common {
            new_blocks: request.prompt_tokens.div_ceil(self.config.block_tokens),
            evict,
            evictions: self.scratch.mean_evictions,
        }
    }

    /// Leading blocks by worker and tier: what the index says, and what placements will have brought.
    pub(crate) fn find(&mut self, request: &Request, context: &mut Context<'_>) {
        let Scratch { found, depths, .. } = &mut self.scratch;
        depths.clear();
        depths.resize(self.workers.len(), [0; 4]);
        found.clear();
        if request.blocks.is_empty() {
            return;
        }
        context.lookup.matches(&request.blocks, found);
        for Found {
            worker,
            depths: seen,
        } in found.drain(..)
        {
            let known = self
                .workers
                .get(worker.index as usize)
                .and_then(Option::as_ref);
            if known.is_some_and(|known| known.id == worker) {
                depths[worker.index as usize] = seen;
            }
        }
        self.speculation.matches(&request.blocks, |worker, depth| {
            for tier in &mut depths[worker.index as usize] {
                *tier = (*tier).max(depth);
            }
        });
    }

    fn partners(&mut self, request: &Request, pool: u32, common: &Common, now: f64) {
        let (prices, block_tokens) = (&self.config.prices, self.config.block_tokens);
        self.scratch.partners.clear();
        self.scratch.links.clear();
        // What comes from elsewhere is not cached here.
        let blocks = (common.new_blocks, common.new_blocks);
        for worker in self.workers.iter().flatten() {
            if worker.role != Role::Decode || worker.pool != pool || !worker.takes(request) {
                continue;
            }
            let rates = &self.rates[worker.class];
            let seat = Seat::new(now, worker, rates, self.leases.slots(worker.id));
            let link = self.best_link(worker, request);
            self.scratch.links.push(link);
            self.scratch.partners.push(Candidate {
                prefill: worker.id,
                decode: worker.id,
                key: worker.key,
                requests: seat.slots.requests,
                cached: [0; 4],
                terms: Terms {
                    transfer: link * worker.slower * rates.transfer_ms(request.prompt_tokens),
                    decode: seat.decode_cost(prices, blocks, block_tokens),
                    ..Terms::default()
                },
            });
        }
    }

    /// The factor of the fastest link to a decode worker that a request could take.
    fn best_link(&self, decode: &Worker, request: &Request) -> f64 {
        if !decode.links.are_uneven() {
            return 1.0;
        }
        let workers = self.workers.iter().flatten();
        let prefills = workers
            .filter(|one| one.role == Role::Prefill && one.pool == decode.pool)
            .filter(|one| one.takes(request));
        let best = prefills.map(|one| decode.links.factor(one.id));
        best.reduce(f64::min).unwrap_or(1.0)
    }

    fn rate(&mut self, request: &Request, common: &Common, partners: &Partners, now: f64) {
        let Scratch {
            depths,
            evictions,
            candidates,
            ..
        } = &mut self.scratch;
        let (prices, block_tokens) = (&self.config.prices, self.config.block_tokens);
        candidates.clear();
        // Most workers have nothing of a prompt cached: their work is the same.
        let mut last: Option<(usize, u32, Cached, Work, f64)> = None;
        for worker in self.workers.iter().flatten() {
            if worker.role == Role::Decode || !worker.takes(request) {
                continue;
            }
            let rates = &self.rates[worker.class];
            let seat = Seat::new(now, worker, rates, self.leases.slots(worker.id));
            let depth = depths[worker.id.index as usize];
            let (cached, work, alone) = match last {
                Some((class, pass, cached, work, ms))
                    if depth == [0; 4] && class == worker.class && pass == worker.pass_tokens =>
                {
                    (cached, work, ms)
                }
                _ => {
                    let cached = Cached::of(depth, request.prompt_tokens, block_tokens);
                    let work = Work::of(cached.uncached, cached.total(), worker.pass_tokens);
                    let ms = rates.prefill_ms(&work);
                    if depth == [0; 4] {
                        last = Some((worker.class, worker.pass_tokens, cached, work, ms));
                    }
                    (cached, work, ms)
                }
            };
            let fresh = common.new_blocks - cached.tokens[0] / block_tokens;
            let (decode, transfer, decode_cost): (WorkerId, f64, f64) =
                if worker.role == Role::Prefill {
                    let Some(Partner { half, link, .. }) =
                        partners.iter().find(|one| one.pool == worker.pool)
                    else {
                        continue;
                    };
                    let decode = self.workers[half.decode.index as usize].as_ref();
                    let slower = decode.map_or(1.0, |one| one.links.factor(worker.id) / link);
                    let transfer = slower * half.terms.transfer;
                    (half.decode, transfer, half.terms.decode)
                } else {
                    let known = (depth[0] as usize).min(request.blocks.len());
                    let held = self.leases.held(worker.id, &request.blocks[..known]);
                    let blocks = (common.new_blocks.saturating_sub(held), fresh);
                    let cost = seat.decode_cost(prices, blocks, block_tokens);
                    (worker.id, 0.0, cost)
                };
            let onboarded = [cached.tokens[1], cached.tokens[2], cached.tokens[3]];
            let onboard = if onboarded == [0; 3] {
                0.0
            } else {
                worker.slower * rates.onboard_ms(onboarded)
            };
            let evict = if common.evict > 0.0 {
                let evicted =
                    worker
                        .residency
                        .evicted_by(fresh, seat.slots.distinct_blocks(), worker.blocks);
                // Faster turnover than elsewhere: what is evicted is younger, and likelier to be asked for again.
                let here = evictions[worker.id.index as usize];
                let younger = (here / common.evictions.max(1.0)).min(4.0);
                common.evict
                    * younger
                    * evicted
                    * f64::from(block_tokens)
                    * rates.prefill_token_ms()
            } else {
                0.0
            };
            let own = seat.own_ms(&work, alone);
            candidates.push(Candidate {
                prefill: worker.id,
                decode,
                key: worker.key,
                requests: seat.slots.requests,
                cached: cached.tokens,
                terms: terms(&seat, prices, own, [onboard, transfer, decode_cost, evict]),
            });
        }
    }

    /// Whether a worker, or a pair, is left for a request.
    pub(crate) fn can_place(&self, request: &Request) -> bool {
        let pools = self.pools(request);
        let mut workers = self.workers.iter().flatten();
        workers.any(|worker| {
            let able = match worker.role {
                Role::Aggregated => true,
                Role::Prefill => pools.contains(&worker.pool),
                Role::Decode => false,
            };
            able && worker.takes(request)
        })
    }

    /// Counts what of a prompt has to be computed although it was cached before; `cached` blocks are there.
    pub(crate) fn note_misses(&mut self, request: &Request, cached: u32) {
        let whole = request.blocks.len();
        self.returns
            .missed(&request.blocks[(cached as usize).min(whole)..]);
    }
}
