//! Joint placement: waiting requests are put into the workers' queues as a whole, not one by one.
//!
//! A plan is, for each worker, a sequence of waiting requests. Its cost is the sum over all requests of
//! `T + T^2 / tail` and of what each costs others, `T` being the predicted time to the first token with the time
//! already waited in it; the square guards those who would wait longest. Requests are inserted where they cost least, the
//! shortest first, and then each is taken out and put back [`ROUNDS`] times, which repairs early choices
//! (insertion and reinsertion, the usual local search of scheduling). A request finds the prefixes cached that
//! others bring before it in its sequence.
//!
//! Prompts that follow each other may share a pass of the engine. That saves the pass' fixed time for the one that joins
//! and for all behind it, and lets those wait longer that are in the pass already: it joins when it saves more.

/// How often every request is taken out and inserted again at most.
const ROUNDS: usize = 3;

/// Something to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Own {
    /// Milliseconds.
    pub ms: f64,
    /// Tokens.
    pub tokens: u32,
}

/// One request on one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entry {
    /// Cached leading blocks there now.
    pub cached: u32,
    /// Computing the rest; its time is infinite where it must not go.
    pub own: Own,
    /// Milliseconds to its first token beside queue and computing.
    pub extra_ms: f64,
    /// What it costs others, beside `share`.
    pub aside_ms: f64,
    /// What it costs others, for each millisecond it is computed.
    pub share: f64,
}

/// What a plan is made of. Requests and workers are numbered from 0.
pub trait Table {
    /// A request on a worker.
    fn entry(&self, item: usize, column: usize) -> &Entry;

    /// Milliseconds a request has waited.
    fn waited(&self, item: usize) -> f64;

    /// Computing a request on a worker that has this many of its leading blocks.
    fn own(&self, item: usize, column: usize, cached: u32) -> Own;

    /// What one pass of a worker holds, and takes whatever it holds.
    fn pass(&self, column: usize) -> Own;

    /// Leading blocks that two requests share.
    fn shared(&self, a: usize, b: usize) -> u32;
}

/// Sequences of requests, one a worker.
pub struct Plan<'a, T> {
    table: &'a T,
    /// Milliseconds until each worker has computed what it has.
    backlogs: &'a [f64],
    tail_ms: f64,
    /// What a request costs one that is planned before it and streams by then, for each millisecond it is computed.
    fresh: f64,
    sequences: Vec<Vec<usize>>,
    costs: Vec<f64>,
    /// Item by item: what each costs alone on each worker. Most workers of a large cluster are empty in a plan.
    alone: Vec<f64>,
    trial: Vec<usize>,
}

impl<'a, T: Table> Plan<'a, T> {
    /// Plans all `items` of a table: for each worker, what its next pass should hold, in order.
    pub fn make(
        table: &'a T,
        items: usize,
        backlogs: &'a [f64],
        tail_ms: f64,
        fresh: f64,
    ) -> Vec<Vec<usize>> {
        let mut plan = Self {
            table,
            backlogs,
            tail_ms,
            fresh,
            sequences: vec![Vec::new(); backlogs.len()],
            costs: vec![0.0; backlogs.len()],
            alone: Vec::new(),
            trial: Vec::new(),
        };
        for item in 0..items {
            let waited = table.waited(item);
            let costs = (0..backlogs.len())
                .map(|column| plan.cost_alone(table.entry(item, column), waited, backlogs[column]));
            let costs: Vec<f64> = costs.collect();
            plan.alone.extend(costs);
        }
        let shortest = |item: usize| {
            let all = (0..backlogs.len()).map(|column| table.entry(item, column).own.ms);
            all.fold(f64::INFINITY, f64::min)
        };
        let mut order: Vec<(f64, usize)> = (0..items).map(|item| (shortest(item), item)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for &(_, item) in &order {
            plan.insert(item);
        }
        for _ in 0..ROUNDS {
            let mut moved = false;
            for &(_, item) in &order {
                let was = plan.take_out(item);
                moved |= plan.insert(item) != was;
            }
            // The next round would find everything where this one has left it.
            if !moved {
                break;
            }
        }
        let first_pass = |(column, sequence): (usize, &Vec<usize>)| match sequence.is_empty() {
            true => Vec::new(),
            false => sequence[..plan.walk(column, sequence, f64::INFINITY).1].to_vec(),
        };
        plan.sequences.iter().enumerate().map(first_pass).collect()
    }

    /// Takes a request out of its sequence; returns the worker and the place there.
    fn take_out(&mut self, item: usize) -> Option<(usize, usize)> {
        for column in 0..self.sequences.len() {
            if let Some(at) = self.sequences[column]
                .iter()
                .position(|&other| other == item)
            {
                self.sequences[column].remove(at);
                self.costs[column] = self.cost(column, &self.sequences[column]);
                return Some((column, at));
            }
        }
        None
    }

    /// Puts a request where it costs least, if it may go anywhere; returns the worker and the place there.
    fn insert(&mut self, item: usize) -> Option<(usize, usize)> {
        let mut best = (f64::INFINITY, 0, 0);
        let mut trial = std::mem::take(&mut self.trial);
        let columns = self.sequences.len();
        for column in 0..columns {
            let alone = self.alone[item * columns + column];
            if !alone.is_finite() {
                continue;
            }
            let length = self.sequences[column].len();
            if length == 0 {
                let added = alone - self.costs[column];
                if added < best.0 {
                    best = (added, column, 0);
                }
                continue;
            }
            for at in 0..=length {
                trial.clear();
                trial.extend_from_slice(&self.sequences[column]);
                trial.insert(at, item);
                let limit = best.0 + self.costs[column];
                let added = self.walk(column, &trial, limit).0 - self.costs[column];
                if added < best.0 {
                    best = (added, column, at);
                }
            }
        }
        self.trial = trial;
        let (added, column, at) = best;
        added.is_finite().then(|| {
            self.sequences[column].insert(at, item);
            self.costs[column] += added;
            (column, at)
        })
    }

    /// As [`Self::walk`] of one request: what most are asked for on most workers, to the last bit.
    fn cost_alone(&self, entry: &Entry, waited: f64, backlog_ms: f64) -> f64 {
        if !entry.own.ms.is_finite() {
            return f64::INFINITY;
        }
        let first = waited + (backlog_ms + entry.own.ms) + entry.extra_ms;
        entry.aside_ms + entry.own.ms * entry.share + (first + first * first / self.tail_ms)
    }

    fn cost(&self, column: usize, sequence: &[usize]) -> f64 {
        self.walk(column, sequence, f64::INFINITY).0
    }

    /// A sequence's cost, and how many requests its first pass holds. No request's part of the cost is negative: a
    /// walk ends where it costs more than `limit` already.
    fn walk(&self, column: usize, sequence: &[usize], limit: f64) -> (f64, usize) {
        let pass = self.table.pass(column);
        let (mut end_ms, mut cost) = (self.backlogs[column], 0.0);
        // The pass that the last request is in: where it begins in the sequence, and its tokens.
        let (mut begin, mut tokens) = (0, 0);
        let mut first_pass = 0;
        for (at, &item) in sequence.iter().enumerate() {
            let entry = self.table.entry(item, column);
            let own = self.own(column, &sequence[..at], item);
            let extra = (own.ms - pass.ms).max(0.0);
            let saved = (own.ms - extra) * (sequence.len() - at) as f64;
            let joins = at > 0
                && tokens + own.tokens <= pass.tokens
                && extra * (at - begin) as f64 <= saved;
            if joins {
                end_ms += extra;
                tokens += own.tokens;
            } else {
                cost += self.waits(column, &sequence[begin..at], end_ms);
                if cost > limit {
                    return (cost, first_pass);
                }
                end_ms += own.ms;
                // A long prompt leaves room in the last of its passes only.
                (begin, tokens) = (at, own.tokens % pass.tokens);
            }
            if begin == 0 {
                first_pass = at + 1;
            }
            let spent = if joins { extra } else { own.ms };
            cost += entry.aside_ms + spent * (entry.share + self.fresh * begin as f64);
        }
        cost += self.waits(column, &sequence[begin..], end_ms);
        (cost, first_pass)
    }

    /// What a request has to compute behind others.
    fn own(&self, column: usize, before: &[usize], item: usize) -> Own {
        let entry = self.table.entry(item, column);
        let shared = before.iter().map(|&other| self.table.shared(item, other));
        match shared.max() {
            Some(ahead) if ahead > entry.cached => self.table.own(item, column, ahead),
            _ => entry.own,
        }
    }

    /// The times to the first token of the requests in a pass that ends then.
    fn waits(&self, column: usize, pass: &[usize], end_ms: f64) -> f64 {
        let wait = |&item: &usize| {
            let first = self.table.waited(item) + end_ms + self.table.entry(item, column).extra_ms;
            first + first * first / self.tail_ms
        };
        pass.iter().map(wait).sum()
    }
}
