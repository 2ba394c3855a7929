//! Plans are those of the plain algorithm: every place tried, every sequence walked from its beginning.

use kvmesh_select::plan::{Entry, Own, Plan, Table};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Problem {
    entries: Vec<Vec<Entry>>,
    waited: Vec<f64>,
    passes: Vec<Own>,
    /// Of each request, its blocks.
    chains: Vec<Vec<u8>>,
    backlogs: Vec<f64>,
}

const BLOCK: u32 = 16;

impl Table for Problem {
    fn entry(&self, item: usize, column: usize) -> &Entry {
        &self.entries[item][column]
    }

    fn waited(&self, item: usize) -> f64 {
        self.waited[item]
    }

    fn own(&self, item: usize, column: usize, cached: u32) -> Own {
        let whole = self.entries[item][column].own;
        let left = self.chains[item].len() as u32 - cached;
        Own {
            ms: self.passes[column].ms + (whole.ms - self.passes[column].ms) * 0.5,
            tokens: left * BLOCK + 1,
        }
    }

    fn pass(&self, column: usize) -> Own {
        self.passes[column]
    }

    fn shared(&self, a: usize, b: usize) -> u32 {
        let pairs = self.chains[a].iter().zip(&self.chains[b]);
        pairs.take_while(|(a, b)| a == b).count() as u32
    }
}

/// What `plan.rs` says of a sequence's cost, and how many its first pass holds.
fn walk(table: &Problem, column: usize, sequence: &[usize], tail: f64, fresh: f64) -> (f64, usize) {
    let waits = |pass: &[usize], end: f64| -> f64 {
        let wait = |&item: &usize| {
            let first = table.waited(item) + end + table.entry(item, column).extra_ms;
            first + first * first / tail
        };
        pass.iter().map(wait).sum()
    };
    let pass = table.pass(column);
    let (mut end, mut cost) = (table.backlogs[column], 0.0);
    let (mut begin, mut tokens, mut first_pass) = (0, 0, 0);
    for (at, &item) in sequence.iter().enumerate() {
        let entry = table.entry(item, column);
        let before = sequence[..at].iter();
        let own = match before.map(|&other| table.shared(item, other)).max() {
            Some(ahead) if ahead > entry.cached => table.own(item, column, ahead),
            _ => entry.own,
        };
        let extra = (own.ms - pass.ms).max(0.0);
        let saved = (own.ms - extra) * (sequence.len() - at) as f64;
        let joins =
            at > 0 && tokens + own.tokens <= pass.tokens && extra * (at - begin) as f64 <= saved;
        if joins {
            end += extra;
            tokens += own.tokens;
        } else {
            cost += waits(&sequence[begin..at], end);
            end += own.ms;
            (begin, tokens) = (at, own.tokens % pass.tokens);
        }
        if begin == 0 {
            first_pass = at + 1;
        }
        let spent = if joins { extra } else { own.ms };
        cost += entry.aside_ms + spent * (entry.share + fresh * begin as f64);
    }
    (cost + waits(&sequence[begin..], end), first_pass)
}

fn plain(table: &Problem, tail: f64, fresh: f64) -> Vec<Vec<usize>> {
    let columns = table.backlogs.len();
    let mut sequences = vec![Vec::new(); columns];
    let mut costs = vec![0.0; columns];
    let insert = |sequences: &mut Vec<Vec<usize>>, costs: &mut Vec<f64>, item: usize| {
        let mut best = (f64::INFINITY, 0, 0);
        for column in (0..columns).filter(|&one| table.entry(item, one).own.ms.is_finite()) {
            for at in 0..=sequences[column].len() {
                let mut trial = sequences[column].clone();
                trial.insert(at, item);
                let added = walk(table, column, &trial, tail, fresh).0 - costs[column];
                if added < best.0 {
                    best = (added, column, at);
                }
            }
        }
        let (added, column, at) = best;
        if added.is_finite() {
            sequences[column].insert(at, item);
            costs[column] += added;
        }
    };
    let shortest = |item: &usize| {
        let all = table.entries[*item].iter().map(|entry| entry.own.ms);
        all.fold(f64::INFINITY, f64::min)
    };
    let mut order: Vec<usize> = (0..table.waited.len()).collect();
    order.sort_by(|a, b| shortest(a).total_cmp(&shortest(b)));
    for &item in &order {
        insert(&mut sequences, &mut costs, item);
    }
    for _ in 0..3 {
        for &item in &order {
            let held = |sequence: &Vec<usize>| sequence.iter().position(|&one| one == item);
            let mut all = sequences.iter().enumerate();
            let place = all.find_map(|(column, sequence)| Some((column, held(sequence)?)));
            if let Some((column, at)) = place {
                sequences[column].remove(at);
                costs[column] = walk(table, column, &sequences[column], tail, fresh).0;
            }
            insert(&mut sequences, &mut costs, item);
        }
    }
    let first = |(column, sequence): (usize, &Vec<usize>)| {
        sequence[..walk(table, column, sequence, tail, fresh).1].to_vec()
    };
    sequences.iter().enumerate().map(first).collect()
}

fn problems() -> impl Strategy<Value = Problem> {
    (1..14usize, 1..5usize).prop_flat_map(|(items, columns)| {
        let own = (0..3u32, 1.0..200.0, 1..900u32, any::<bool>(), 0..12u32);
        let entry = (own, 0.0..40.0, 0.0..40.0, 0.0..3.0);
        let entry = entry.prop_map(
            |((cached, ms, tokens, equal, never), extra, aside, share)| Entry {
                cached,
                own: Own {
                    // Some may not go there; and equal ones are frequent.
                    ms: match (never, equal) {
                        (0, _) => f64::INFINITY,
                        (_, true) => 25.0,
                        (_, false) => ms,
                    },
                    tokens,
                },
                extra_ms: extra,
                aside_ms: aside,
                share,
            },
        );
        let entries = prop::collection::vec(prop::collection::vec(entry, columns), items);
        let waited = prop::collection::vec(0.0..500.0, items);
        let pass = (0.0..30.0, 64..2048u32).prop_map(|(ms, tokens)| Own { ms, tokens });
        let passes = prop::collection::vec(pass, columns);
        let chains = prop::collection::vec(prop::collection::vec(0..2u8, 3..6), items);
        let backlogs = prop::collection::vec(0.0..100.0, columns);
        (entries, waited, passes, chains, backlogs).prop_map(
            |(entries, waited, passes, chains, backlogs)| Problem {
                entries,
                waited,
                passes,
                chains,
                backlogs,
            },
        )
    })
}

proptest! {
    #[test]
    fn a_plan_is_the_plain_algorithms(problem in problems(), tail in 10.0..2000.0, fresh in 0.0..1.0) {
        let items = problem.waited.len();
        let plan = Plan::make(&problem, items, &problem.backlogs, tail, fresh);
        prop_assert_eq!(plan, plain(&problem, tail, fresh));
    }
}
