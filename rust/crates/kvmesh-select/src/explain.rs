//! What a placement carries for those who ask why it was made: candidates that it was chosen from, and their costs.

use crate::{
    scratch::Scratch,
    selector::Selector,
    types::{Candidate, Request, WorkerId},
};

/// Candidates and the policy's cost of each, the lowest first.
#[derive(Default)]
pub struct Weighed {
    pub candidates: Vec<Candidate>,
    pub costs: Vec<f64>,
}

impl Weighed {
    /// With the winner in it, which is not always among the cheapest: a plan looks further, and chance may decide.
    pub fn with(mut self, winner: &Candidate, cost: f64) -> Self {
        let here = self.candidates.iter().any(|one| one.is_as(winner));
        if let (false, Some(candidate), Some(last)) =
            (here, self.candidates.last_mut(), self.costs.last_mut())
        {
            (*candidate, *last) = (*winner, cost);
        }
        self
    }
}

/// A decode worker that prefill workers of its pool could have been paired with, and were not.
pub struct Rejected {
    pub pool: u32,
    pub decode: WorkerId,
    pub transfer: f64,
    /// The factor of the link that this was counted by.
    pub link: f64,
    pub decode_cost: f64,
    /// What it costs over the one that was chosen, as the policy judged.
    pub more: f64,
}

/// The cheapest of what it is offered.
struct Cheapest<T> {
    most: usize,
    /// Ascending.
    kept: Vec<(f64, T)>,
}

impl<T> Cheapest<T> {
    fn new(most: usize) -> Self {
        let kept = Vec::new();
        Self { most, kept }
    }

    /// Keeps something, unless it has enough that cost no more; whether it did.
    fn offer(&mut self, cost: f64, what: T) -> bool {
        let full = self.kept.len() >= self.most;
        if full && (self.kept.last()).is_none_or(|(last, _)| last.total_cmp(&cost).is_le()) {
            return false;
        }
        if full {
            self.kept.pop();
        }
        let at = self
            .kept
            .partition_point(|(other, _)| other.total_cmp(&cost).is_le());
        self.kept.insert(at, (cost, what));
        true
    }
}

impl Selector {
    /// Notes the decode workers in the scratch that were not chosen for a pool, and what they cost over the one that was.
    pub(crate) fn reject(&mut self, pool: u32, chosen: usize) {
        let Scratch {
            partners,
            links,
            costs,
            rejected,
            ..
        } = &mut self.scratch;
        let least = costs[chosen];
        let others = partners.iter().zip(costs.iter()).enumerate();
        rejected.extend(
            others
                .filter(|&(at, _)| at != chosen)
                .map(|(at, (partner, &cost))| Rejected {
                    pool,
                    decode: partner.decode,
                    transfer: partner.terms.transfer,
                    link: links[at],
                    decode_cost: partner.terms.decode,
                    // The difference of two infinities is no number.
                    more: if cost == least { 0.0 } else { cost - least },
                }),
        );
    }

    /// What the placement of a request carries of the candidates and costs in the scratch: all where it asks, else the
    /// cheapest.
    pub(crate) fn weighed(&self, request: &Request) -> Weighed {
        match request.explain {
            true => self.cheapest(usize::MAX),
            false => self.cheapest(self.config.explained),
        }
    }

    /// The same for a request of a plan, which has no costs of its own.
    pub(crate) fn weighed_planned(&mut self, request: &Request) -> Weighed {
        let Scratch {
            candidates, costs, ..
        } = &mut self.scratch;
        costs.clear();
        costs.extend(candidates.iter().map(|one| one.terms.total()));
        self.weighed(request)
    }

    /// The `most` cheapest candidates in the scratch, pairs with rejected decode workers among them.
    pub(crate) fn cheapest(&self, most: usize) -> Weighed {
        let Scratch {
            candidates,
            costs,
            rejected,
            uneven,
            ..
        } = &self.scratch;
        if most == 0 {
            return Weighed::default();
        }
        let mut partners = Cheapest::new(most);
        for one in rejected {
            partners.offer(one.more, one);
        }
        let mut best = Cheapest::new(most);
        for (candidate, &cost) in candidates.iter().zip(costs) {
            best.offer(cost, (candidate, None));
            let pool = self.pool_of(candidate);
            if *uneven {
                for other in rejected.iter().filter(|one| Some(one.pool) == pool) {
                    let cost = self.paired(candidate, other).terms.total();
                    best.offer(cost, (candidate, Some(other)));
                }
                continue;
            }
            let others = partners.kept.iter().filter(|one| Some(one.1.pool) == pool);
            // The next ones cost no less.
            others
                .take_while(|&&(more, other)| best.offer(cost + more, (candidate, Some(other))))
                .for_each(drop);
        }
        let pair = |(candidate, other): (&Candidate, Option<&Rejected>)| match other {
            None => *candidate,
            Some(other) => self.paired(candidate, other),
        };
        let (costs, candidates) = best
            .kept
            .into_iter()
            .map(|(cost, of)| (cost, pair(of)))
            .unzip();
        Weighed { candidates, costs }
    }

    /// Where the prefill worker of a pair finds others to be paired with.
    fn pool_of(&self, candidate: &Candidate) -> Option<u32> {
        let split = candidate.prefill != candidate.decode;
        Some(self.worker(candidate.prefill).filter(|_| split)?.pool)
    }

    /// A candidate's prefill worker with another decode worker.
    fn paired(&self, candidate: &Candidate, other: &Rejected) -> Candidate {
        let mut pair = *candidate;
        pair.decode = other.decode;
        pair.terms.decode = other.decode_cost;
        let decode = self.worker(other.decode);
        let slower = decode.map_or(1.0, |one| one.links.factor(pair.prefill) / other.link);
        pair.terms.transfer = slower * other.transfer;
        pair
    }
}
