//! Requests held back for a joint plan.

use std::cell::RefCell;

use rustc_hash::FxHashMap;

use crate::{
    admission::Reason,
    plan::{Entry, Own, Table},
    types::Request,
};

/// A held request.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Held {
    pub request: Request,
    pub since: f64,
    /// Since when plans count it as waiting. Of one that was in line: since it was released, as the line has counted what
    /// was before and who waited longest is not who is next.
    pub counted: f64,
    /// When it is refused, should it not have been placed; and why.
    pub latest: f64,
    pub why: Reason,
    /// Placements of more urgent ones that it let pass.
    pub passed: u32,
}

/// Requests in order of arrival, and how many leading blocks each two share.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Waitlist {
    held: Vec<Held>,
    /// Row by row as `held`, each as long as there were requests when it was added: [a][b] with b < a.
    shared: Vec<Vec<u32>>,
}

impl Waitlist {
    pub fn len(&self) -> usize {
        self.held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub fn get(&self, at: usize) -> &Held {
        &self.held[at]
    }

    pub fn get_mut(&mut self, at: usize) -> &mut Held {
        &mut self.held[at]
    }

    pub fn push(&mut self, held: Held) {
        let mine = &held.request.blocks;
        let common = |other: &Held| {
            let pairs = mine.iter().zip(other.request.blocks.iter());
            pairs.take_while(|(a, b)| a == b).count() as u32
        };
        self.shared.push(self.held.iter().map(common).collect());
        self.held.push(held);
    }

    pub fn remove(&mut self, at: usize) -> Held {
        self.shared.remove(at);
        for row in &mut self.shared[at..] {
            row.remove(at);
        }
        self.held.remove(at)
    }

    /// Where a request with this id is.
    pub fn position(&self, id: u64) -> Option<usize> {
        self.held.iter().position(|held| held.request.id == id)
    }

    /// Prompt tokens of all.
    pub fn tokens(&self) -> u64 {
        let tokens = self
            .held
            .iter()
            .map(|held| u64::from(held.request.prompt_tokens));
        tokens.sum()
    }

    /// Where a request is whose time is over.
    pub fn late(&self, now: f64) -> Option<usize> {
        self.held.iter().position(|held| held.latest <= now)
    }

    /// When the time of the first is over; infinite when there is none.
    pub fn earliest(&self) -> f64 {
        let times = self.held.iter().map(|held| held.latest);
        times.fold(f64::INFINITY, f64::min)
    }

    pub fn shared(&self, a: usize, b: usize) -> u32 {
        self.shared[a.max(b)][a.min(b)]
    }
}

/// The waitlist against the workers that can compute prompts, for [`crate::plan`].
pub struct Sheet<'a, F> {
    pub waitlist: &'a Waitlist,
    /// Where the plan's requests are in it.
    pub items: &'a [usize],
    pub now: f64,
    pub columns: usize,
    /// Item by item.
    pub entries: Vec<Entry>,
    /// For (item, column, cached blocks).
    pub own: F,
    /// Of each column.
    pub passes: Vec<Own>,
    /// What `own` said.
    pub known: RefCell<FxHashMap<(usize, usize, u32), Own>>,
}

impl<F: Fn(usize, usize, u32) -> Own> Table for Sheet<'_, F> {
    fn entry(&self, item: usize, column: usize) -> &Entry {
        &self.entries[item * self.columns + column]
    }

    fn waited(&self, item: usize) -> f64 {
        self.now - self.waitlist.get(self.items[item]).counted
    }

    fn pass(&self, column: usize) -> Own {
        self.passes[column]
    }

    fn own(&self, item: usize, column: usize, cached: u32) -> Own {
        *self
            .known
            .borrow_mut()
            .entry((item, column, cached))
            .or_insert_with(|| (self.own)(item, column, cached))
    }

    fn shared(&self, a: usize, b: usize) -> u32 {
        self.waitlist.shared(self.items[a], self.items[b])
    }
}
