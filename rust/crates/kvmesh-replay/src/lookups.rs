//! Look-ups noted, and given again.
//!
//! What a prefix index answered is an input as any other. Most look-ups are repetitions, for requests that wait; only an
//! answer that is not the last one for its prompt is written, with its number within the call.

use std::collections::VecDeque;

use kvmesh_select::{Found, Lookup, WorkerId};
use rustc_hash::FxHashMap;

/// Prompts whose last answers are remembered. At the limit all are forgotten, so that a replay forgets the same.
const MEMORY: usize = 8_192;

/// An answer as it is written: by worker, depths by tier.
pub type Answered = Vec<(WorkerId, [u32; 4])>;

/// By a chain's last block and length.
type Key = (u64, usize);

fn key(blocks: &[u64]) -> Key {
    (blocks.last().copied().unwrap_or_default(), blocks.len())
}

/// The last answers, and those of the call under way that were news.
#[derive(Default)]
pub struct Memo {
    known: FxHashMap<Key, Answered>,
    number: u32,
    news: Vec<(u32, Answered)>,
}

impl Memo {
    /// Forgets everything: a snapshot begins.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The news of the call that is over.
    pub fn take(&mut self) -> Vec<(u32, Answered)> {
        self.number = 0;
        std::mem::take(&mut self.news)
    }

    fn learn(&mut self, key: Key, answer: Answered) {
        if self.known.len() >= MEMORY {
            self.known.clear();
        }
        self.known.insert(key, answer);
    }
}

/// A look-up whose answers are noted.
pub struct Noting<'a, L> {
    pub inner: &'a mut L,
    /// None: nobody wants to know.
    pub memo: Option<&'a mut Memo>,
}

impl<L: Lookup> Lookup for Noting<'_, L> {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        let before = found.len();
        self.inner.matches(blocks, found);
        let Some(memo) = &mut self.memo else {
            return;
        };
        let answer: Answered = found[before..]
            .iter()
            .map(|one| (one.worker, one.depths))
            .collect();
        let key = key(blocks);
        if memo.known.get(&key) != Some(&answer) {
            memo.news.push((memo.number, answer.clone()));
            memo.learn(key, answer);
        }
        memo.number += 1;
    }

    fn again(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        self.inner.again(blocks, found);
    }
}

/// Gives answers again that were noted.
#[derive(Default)]
pub struct Recorded {
    memo: Memo,
    news: VecDeque<(u32, Answered)>,
    /// Prompts were looked up of which the log knows nothing.
    pub lost: bool,
}

impl Recorded {
    /// A call begins, in which these were news.
    pub fn begin(&mut self, news: Vec<(u32, Answered)>) {
        self.news = news.into();
        self.memo.number = 0;
    }

    fn give(&self, key: Key, found: &mut Vec<Found>) -> bool {
        let answer = self.memo.known.get(&key);
        let one = |&(worker, depths): &(WorkerId, [u32; 4])| Found { worker, depths };
        found.extend(answer.into_iter().flatten().map(one));
        answer.is_some()
    }
}

impl Lookup for Recorded {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        let key = key(blocks);
        let number = self.memo.number;
        if self.news.front().is_some_and(|(at, _)| *at == number) {
            if let Some((_, answer)) = self.news.pop_front() {
                self.memo.learn(key, answer);
            }
        }
        self.lost |= !self.give(key, found);
        self.memo.number += 1;
    }

    fn again(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        self.give(key(blocks), found);
    }
}
