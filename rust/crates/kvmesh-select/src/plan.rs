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

/// A request's place in a sequence.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    item: usize,
    /// The most leading blocks that it shares with one before it.
    ahead: u32,
    /// What it has to compute behind those.
    own: Own,
}

/// How far a sequence was walked, and what that costs.
#[derive(Clone, Copy, Debug)]
struct Walk {
    /// When the pass under way ends.
    end_ms: f64,
    /// Without the times to the first token in that pass.
    cost: f64,
    /// The place in the sequence where that pass begins, and its tokens.
    begin: usize,
    tokens: u32,
    /// Requests in the first pass.
    first_pass: usize,
}

/// Sequences of requests, one a worker.
pub struct Plan<'a, T> {
    table: &'a T,
    /// Milliseconds until each worker has computed what it has.
    backlogs: &'a [f64],
    tail_ms: f64,
    /// What a request costs one that is planned before it and streams by then, for each millisecond it is computed.
    fresh: f64,
    sequences: Vec<Vec<Turn>>,
    costs: Vec<f64>,
    waited: Vec<f64>,
    /// Item by item: what each costs alone on each worker. Most workers of a large cluster are empty in a plan.
    alone: Vec<f64>,
    trial: Vec<Turn>,
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
            waited: (0..items).map(|item| table.waited(item)).collect(),
            alone: Vec::with_capacity(items * backlogs.len()),
            trial: Vec::new(),
        };
        for item in 0..items {
            for (column, &backlog) in backlogs.iter().enumerate() {
                let cost = plan.cost_alone(table.entry(item, column), plan.waited[item], backlog);
                plan.alone.push(cost);
            }
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
        let first_pass = |(column, sequence): (usize, &Vec<Turn>)| {
            let first_pass = plan.walk(column, sequence).first_pass;
            let first = sequence[..first_pass].iter();
            first.map(|turn| turn.item).collect()
        };
        plan.sequences.iter().enumerate().map(first_pass).collect()
    }

    /// Takes a request out of its sequence; returns the worker and the place there.
    fn take_out(&mut self, item: usize) -> Option<(usize, usize)> {
        let mut all = self.sequences.iter().enumerate();
        let (column, at) = all.find_map(|(column, sequence)| {
            let at = sequence.iter().position(|turn| turn.item == item)?;
            Some((column, at))
        })?;
        let mut sequence = std::mem::take(&mut self.sequences[column]);
        sequence.remove(at);
        for place in at..sequence.len() {
            let turn = sequence[place];
            // Another that shares as much may be before it, too.
            if turn.ahead > 0 && self.table.shared(turn.item, item) == turn.ahead {
                sequence[place] = self.turn(column, turn.item, &sequence[..place]);
            }
        }
        self.costs[column] = self.cost(column, self.walk(column, &sequence), &sequence);
        self.sequences[column] = sequence;
        Some((column, at))
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
            if !self.sequences[column].is_empty() {
                best = self.best_place(column, item, best, &mut trial);
            } else if alone - self.costs[column] < best.0 {
                best = (alone - self.costs[column], column, 0);
            }
        }
        self.trial = trial;
        let (added, column, at) = best;
        added.is_finite().then(|| {
            let mut sequence = std::mem::take(&mut self.sequences[column]);
            sequence.insert(at, self.turn(column, item, &sequence[..at]));
            for turn in &mut sequence[at + 1..] {
                *turn = self.behind(column, turn, item);
            }
            self.sequences[column] = sequence;
            self.costs[column] += added;
            (column, at)
        })
    }

    /// The best of `best` and a request's places in a sequence that is not empty: what it adds, the worker, the place.
    ///
    /// What is before the place is walked once for all places behind it.
    fn best_place(
        &self,
        column: usize,
        item: usize,
        mut best: (f64, usize, usize),
        trial: &mut Vec<Turn>,
    ) -> (f64, usize, usize) {
        let sequence = &self.sequences[column];
        trial.clear();
        trial.push(self.turn(column, item, &[]));
        trial.extend(sequence.iter().map(|turn| self.behind(column, turn, item)));
        let mut before = self.begin(column);
        for at in 0..trial.len() {
            let limit = best.0 + self.costs[column];
            // No request's part of the cost is negative: behind here it is not better either.
            if before.cost > limit {
                break;
            }
            let mut walk = before;
            for place in at..trial.len() {
                self.step(column, trial, place, &mut walk);
                if walk.cost > limit {
                    break;
                }
            }
            if walk.cost <= limit {
                let added = self.cost(column, walk, trial) - self.costs[column];
                if added < best.0 {
                    best = (added, column, at);
                }
            }
            if let Some(&next) = sequence.get(at) {
                (trial[at], trial[at + 1]) = (next, self.behind(column, &trial[at], next.item));
                self.step(column, trial, at, &mut before);
            }
        }
        best
    }

    /// As [`Self::walk`] of one request: what most are asked for on most workers, to the last bit.
    fn cost_alone(&self, entry: &Entry, waited: f64, backlog_ms: f64) -> f64 {
        if !entry.own.ms.is_finite() {
            return f64::INFINITY;
        }
        let first = waited + (backlog_ms + entry.own.ms) + entry.extra_ms;
        entry.aside_ms + entry.own.ms * entry.share + (first + first * first / self.tail_ms)
    }

    /// A request behind others.
    fn turn(&self, column: usize, item: usize, before: &[Turn]) -> Turn {
        let shared = before
            .iter()
            .map(|other| self.table.shared(item, other.item));
        let ahead = shared.max().unwrap_or(0);
        let own = self.own(column, item, ahead);
        Turn { item, ahead, own }
    }

    /// A request behind one more.
    fn behind(&self, column: usize, turn: &Turn, other: usize) -> Turn {
        let item = turn.item;
        match self.table.shared(item, other) {
            ahead if ahead > turn.ahead => {
                let own = self.own(column, item, ahead);
                Turn { item, ahead, own }
            }
            _ => *turn,
        }
    }

    fn own(&self, column: usize, item: usize, ahead: u32) -> Own {
        let entry = self.table.entry(item, column);
        match ahead > entry.cached {
            true => self.table.own(item, column, ahead),
            false => entry.own,
        }
    }

    fn begin(&self, column: usize) -> Walk {
        Walk {
            end_ms: self.backlogs[column],
            cost: 0.0,
            begin: 0,
            tokens: 0,
            first_pass: 0,
        }
    }

    fn walk(&self, column: usize, sequence: &[Turn]) -> Walk {
        let mut walk = self.begin(column);
        for at in 0..sequence.len() {
            self.step(column, sequence, at, &mut walk);
        }
        walk
    }

    /// Walks past one request of a sequence, all before which were walked past.
    fn step(&self, column: usize, sequence: &[Turn], at: usize, walk: &mut Walk) {
        let Turn { item, own, .. } = sequence[at];
        let entry = self.table.entry(item, column);
        let pass = self.table.pass(column);
        let extra = (own.ms - pass.ms).max(0.0);
        let saved = (own.ms - extra) * (sequence.len() - at) as f64;
        let joins = at > 0
            && walk.tokens + own.tokens <= pass.tokens
            && extra * (at - walk.begin) as f64 <= saved;
        if joins {
            walk.end_ms += extra;
            walk.tokens += own.tokens;
        } else {
            walk.cost += self.waits(column, &sequence[walk.begin..at], walk.end_ms);
            walk.end_ms += own.ms;
            // A long prompt leaves room in the last of its passes only.
            (walk.begin, walk.tokens) = (at, own.tokens % pass.tokens);
        }
        if walk.begin == 0 {
            walk.first_pass = at + 1;
        }
        let spent = if joins { extra } else { own.ms };
        walk.cost += entry.aside_ms + spent * (entry.share + self.fresh * walk.begin as f64);
    }

    /// Of a sequence that was walked to its end.
    fn cost(&self, column: usize, walk: Walk, sequence: &[Turn]) -> f64 {
        walk.cost + self.waits(column, &sequence[walk.begin..], walk.end_ms)
    }

    /// The times to the first token of the requests in a pass that ends then.
    fn waits(&self, column: usize, pass: &[Turn], end_ms: f64) -> f64 {
        let wait = |turn: &Turn| {
            let extra_ms = self.table.entry(turn.item, column).extra_ms;
            let first = self.waited[turn.item] + end_ms + extra_ms;
            first + first * first / self.tail_ms
        };
        pass.iter().map(wait).sum()
    }
}
