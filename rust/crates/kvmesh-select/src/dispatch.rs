//! From a request's candidates to its placement: the choice, and the lease that it takes out.

use rand::{Rng, RngCore};

use crate::{
    choose::choose,
    cost::Seat,
    explain::Weighed,
    held::Held,
    policy::PolicyName,
    queue::Waiting,
    rates::Work,
    scratch::Scratch,
    selector::{Context, Selector},
    types::{Candidate, Placed, Request},
};

impl Selector {
    /// The winner's position among the candidates in the scratch, or among the decode partners there.
    pub(crate) fn choose(
        &mut self,
        request: &Request,
        policy: PolicyName,
        partners: bool,
        context: &mut Context<'_>,
    ) -> usize {
        let Scratch {
            candidates,
            partners: decodes,
            costs,
            ..
        } = &mut self.scratch;
        let candidates = if partners { decodes } else { candidates };
        let judge = self
            .policies
            .entry((policy, partners))
            .or_insert_with(|| policy.make());
        costs.clear();
        judge.costs(request, candidates, context.chance, costs);
        let at = choose(
            costs,
            judge.margin(),
            self.config.temperature,
            context.chance,
        );
        judge.placed(&candidates[at]);
        at
    }

    /// Takes a lease out for one of a request's candidates; `weighed` are those that its placement carries. It `joins` the
    /// pass of the prompt placed there before it, if so planned.
    pub(crate) fn dispatch(
        &mut self,
        held: Held,
        winner: Candidate,
        weighed: Weighed,
        joins: bool,
        context: &mut Context<'_>,
    ) {
        let Held { request, since, .. } = held;
        let shadows = self.cast_shadows(&request, &winner, context);
        let lease = self.new_lease(context.chance);
        let cached: u32 = winner.cached.iter().sum();
        let uncached = request.prompt_tokens.max(1) - cached;
        let workers = (winner.prefill, winner.decode);
        let tokens = (request.prompt_tokens, uncached);
        self.leases.take(
            context.now,
            lease,
            request.id,
            workers,
            tokens,
            &request.blocks,
        );
        self.tail.observe(winner.terms.prefill);
        let mut ms = winner.terms.prefill + winner.terms.onboard;
        if let Some(worker) = self.worker(winner.prefill).filter(|_| joins) {
            let rates = &self.rates[worker.class];
            let seat = Seat::new(context.now, worker, rates, self.leases.slots(worker.id));
            ms = (ms - seat.pass_ms()).max(0.0);
        }
        if let Some(worker) = self.worker_mut(winner.prefill) {
            let [_, host, nvme, network] = winner.cached;
            let entry = Waiting {
                lease,
                work: Work::of(uncached, cached, worker.pass_tokens),
                ms,
                onboard: [host, nvme, network],
                placed: context.now,
                expected: Some(winner.terms.queue + ms),
            };
            worker.queue.push(context.now, entry);
        }
        self.note_misses(&request, cached / self.config.block_tokens);
        self.speculation.add(lease, winner.prefill, request.blocks);
        let policy = request.policy.unwrap_or(self.config.policy);
        context.placed.push(Placed {
            request: request.id,
            lease,
            winner,
            policy,
            candidates: weighed.candidates,
            costs: weighed.costs,
            held_ms: context.now - since,
            shadows,
        });
    }

    fn new_lease(&self, chance: &mut dyn RngCore) -> u64 {
        // Random, so that a report that reaches the wrong router finds nothing there.
        loop {
            let id = chance.random();
            if id != 0 && self.leases.get(id).is_none() {
                return id;
            }
        }
    }
}
