//! One engine: continuous batching with chunked prefill over a paged prefix cache.
//!
//! A pass gives every stream one token and fills what is left of its token budget with prompts, first come
//! first served. As in vLLM, blocks are taken chunk by chunk and can be shared from the moment a pass takes
//! them in; when they run out the stream that joined last is put back and computed again. Passes without
//! prompts are all alike until a stream ends or needs a block, and are simulated as one stretch.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

use crate::{
    cache::{BlockId, Cache},
    job::{Job, Outcome, Shape},
    store::Below,
    timing::Timing,
};

struct Live {
    job: Job,
    /// Tokens whose KV is there.
    computed: u32,
    /// Tokens to compute before generating: the prompt, and after a preemption the output so far.
    target: u32,
    generated: u32,
    blocks: Vec<BlockId>,
    /// The pass after which the first token of this stay was there, and what had been generated then.
    joined: (u64, u32),
    admission: u64,
    first_done: bool,
    streaming: bool,
}

struct Stretch {
    start: f64,
    pass_ms: f64,
    passes: u64,
}

/// One engine. The cluster calls `start` when it is idle, and `finish` when the time it returned is there.
pub struct Engine {
    shape: Shape,
    timing: Timing,
    /// Passes take this many times as long.
    pub slowdown: f64,
    cache: Cache,
    live: Vec<Option<Live>>,
    vacant: Vec<usize>,
    waiting: VecDeque<Live>,
    partial: Option<usize>,
    /// Prompts that the pass under way completes.
    completing: Vec<usize>,
    streams: usize,
    /// When streams need attention: (pass, slot, admission).
    due: BinaryHeap<Reverse<(u64, usize, u64)>>,
    passes: u64,
    admissions: u64,
    stretch: Option<Stretch>,
    outcomes: Vec<Outcome>,
    evicted: Vec<u64>,
    /// Tokens that the next pass brings up from host, nvme and network.
    onboarding: [u32; 3],
    busy_ms: f64,
}

impl Engine {
    /// An idle engine.
    pub fn new(shape: Shape, timing: Timing) -> Self {
        Self {
            shape,
            timing,
            slowdown: 1.0,
            cache: Cache::new(shape.blocks),
            live: Vec::new(),
            vacant: Vec::new(),
            waiting: VecDeque::new(),
            partial: None,
            completing: Vec::new(),
            streams: 0,
            due: BinaryHeap::new(),
            passes: 0,
            admissions: 0,
            stretch: None,
            outcomes: Vec::new(),
            evicted: Vec::new(),
            onboarding: [0; 3],
            busy_ms: 0.0,
        }
    }

    /// Milliseconds spent in passes.
    pub fn busy_ms(&self) -> f64 {
        self.busy_ms
    }

    /// Whether a pass is under way.
    pub fn busy(&self) -> bool {
        self.stretch.is_some()
    }

    /// Queues a prompt.
    pub fn submit(&mut self, job: Job) {
        let target = job.prompt;
        self.waiting.push_back(Live {
            job,
            computed: 0,
            target,
            generated: 0,
            blocks: Vec::new(),
            joined: (0, 0),
            admission: 0,
            first_done: false,
            streaming: false,
        });
    }

    /// Takes blocks for a prompt that another engine computed; None when they do not fit now.
    pub fn reserve(&mut self, job: &Job) -> Option<usize> {
        let needed = job.prompt.div_ceil(self.shape.block_tokens);
        if self.live.len() - self.vacant.len() >= self.shape.max_running
            || self.cache.available() <= needed
        {
            return None;
        }
        let mut live = Live {
            job: job.clone(),
            computed: job.prompt,
            target: job.prompt,
            generated: 0,
            blocks: Vec::with_capacity(needed as usize),
            joined: (0, 0),
            admission: 0,
            first_done: true,
            streaming: false,
        };
        for _ in 0..needed {
            live.blocks.extend(self.cache.allocate(&mut self.evicted));
        }
        self.report_evicted();
        Some(self.admit(live))
    }

    /// The prompt's KV has arrived: generate from the next pass on. The first token is there already.
    pub fn join(&mut self, slot: usize) {
        // A stretch under way was planned without this stream; it joins with the pass that ends it.
        let pass = self.passes + self.stretch.as_ref().map_or(0, |stretch| stretch.passes);
        self.begin_stream(slot, pass);
    }

    /// Ends the stay of a prompt that was computed for another engine.
    pub fn release(&mut self, slot: usize) {
        self.remove(slot);
    }

    /// Begins the next pass, or stretch of passes, if there is anything to do; when it ends. What the device lacks of
    /// a prompt is looked for in what is `below`.
    pub fn start(&mut self, now: f64, jitter: f64, below: Below<'_>) -> Option<f64> {
        debug_assert!(self.stretch.is_none());
        let pieces = self.take_prompts(below);
        let streams = self.streams > 0;
        if pieces.is_empty() && !streams {
            return None;
        }
        let onboarding = std::mem::take(&mut self.onboarding);
        let onboard_ms = self.timing.onboard_ms(onboarding);
        let mut pass_ms = self.timing.prefill_ms(&pieces).max(onboard_ms);
        let mut passes = 1;
        if streams {
            let share = f64::from(self.cache.used()) / f64::from(self.shape.blocks);
            pass_ms += self.timing.decode_ms(self.streams, share);
        }
        if pieces.is_empty() {
            while let Some(&Reverse((pass, slot, admission))) = self.due.peek() {
                if self.is_current(slot, admission) {
                    passes = (pass - self.passes).max(1);
                    break;
                }
                self.due.pop();
            }
        }
        pass_ms *= self.slowdown * (1.0 + self.timing.noise * jitter);
        self.stretch = Some(Stretch {
            start: now,
            pass_ms,
            passes,
        });
        Some(now + pass_ms * passes as f64)
    }

    /// Cuts a stretch short after the pass now under way, so that new work can join; when that ends.
    pub fn interrupt(&mut self, now: f64) -> Option<f64> {
        let stretch = self.stretch.as_mut().filter(|stretch| stretch.passes > 1)?;
        let gone = ((now - stretch.start) / stretch.pass_ms).ceil().max(1.0) as u64;
        if gone >= stretch.passes {
            return None;
        }
        stretch.passes = gone;
        Some(stretch.start + stretch.pass_ms * gone as f64)
    }

    /// Ends the pass or stretch under way; what it brought about goes to `into`.
    pub fn finish(&mut self, into: &mut Vec<Outcome>) {
        let Some(stretch) = self.stretch.take() else {
            return;
        };
        self.passes += stretch.passes;
        self.busy_ms += stretch.pass_ms * stretch.passes as f64;
        for slot in std::mem::take(&mut self.completing) {
            self.complete(slot);
        }
        self.advance();
        into.append(&mut self.outcomes);
    }

    /// What happened outside a pass.
    pub fn take_outcomes(&mut self, into: &mut Vec<Outcome>) {
        into.append(&mut self.outcomes);
    }

    // -- prompts --

    /// Fills a pass with prompts; (tokens, tokens before them) of each piece.
    fn take_prompts(&mut self, below: Below<'_>) -> Vec<(u32, u32)> {
        let mut pieces = Vec::new();
        let mut budget = self.shape.pass_tokens.saturating_sub(self.streams as u32);
        while budget > 0 {
            let slot = match self.partial {
                Some(slot) => slot,
                None => match self.admit_waiting(budget, below) {
                    Some(slot) => slot,
                    None => break,
                },
            };
            let Some((count, before)) = self.take_chunk(slot, budget) else {
                break;
            };
            budget -= count;
            pieces.push((count, before));
        }
        self.report_evicted();
        pieces
    }

    fn admit_waiting(&mut self, budget: u32, below: Below<'_>) -> Option<usize> {
        let size = self.shape.block_tokens;
        let head = self.waiting.front()?;
        if self.live.len() - self.vacant.len() >= self.shape.max_running {
            return None;
        }
        // At least one token is computed, for its logits.
        let whole = ((head.target - 1) / size) as usize;
        let known = &head.job.chain[..whole.min(head.job.chain.len())];
        let cached = self.cache.matched(known);
        let below = below.leading(&known[cached..]);
        let found = cached + below.iter().sum::<u32>() as usize;
        let first = (head.target - found as u32 * size).min(budget);
        // Of the cached blocks some may be idle and count as available until they are taken.
        if self.cache.available() < found as u32 + first.div_ceil(size) {
            return None;
        }
        let mut live = self.waiting.pop_front()?;
        for &hash in &live.job.chain[..cached] {
            live.blocks.extend(self.cache.acquire(hash));
        }
        for &hash in &live.job.chain[cached..found] {
            if let Some(block) = self.cache.allocate(&mut self.evicted) {
                self.cache.name(block, hash);
                live.blocks.push(block);
            }
        }
        if found > cached {
            self.outcomes.push(Outcome::Stored {
                chain: live.job.chain.clone(),
                from: cached,
                to: found,
            });
            for (tokens, blocks) in self.onboarding.iter_mut().zip(below) {
                *tokens += blocks * size;
            }
        }
        live.computed = found as u32 * size;
        if !live.first_done {
            self.outcomes.push(Outcome::Admitted {
                request: live.job.request,
                cached: live.computed,
                onboarded: (found - cached) as u32 * size,
            });
        }
        let slot = self.admit(live);
        self.partial = Some(slot);
        Some(slot)
    }

    /// Takes the next chunk of a prompt into the pass; None when there are no blocks for it.
    fn take_chunk(&mut self, slot: usize, budget: u32) -> Option<(u32, u32)> {
        let size = self.shape.block_tokens;
        let (mut count, before, held) = {
            let live = self.live[slot].as_ref()?;
            let rest = live.target - live.computed;
            (rest.min(budget), live.computed, live.blocks.len() as u32)
        };
        let room = (held + self.cache.available()) * size - before;
        count = count.min(room);
        if count == 0 {
            return None;
        }
        let live = self.live[slot].as_mut()?;
        let needed = (before + count).div_ceil(size);
        while (live.blocks.len() as u32) < needed {
            live.blocks.extend(self.cache.allocate(&mut self.evicted));
        }
        live.computed += count;
        let from = (before / size) as usize;
        let to = ((live.computed / size) as usize).min(live.job.chain.len());
        for at in from..to {
            self.cache.name(live.blocks[at], live.job.chain[at]);
        }
        if to > from {
            self.outcomes.push(Outcome::Stored {
                chain: live.job.chain.clone(),
                from,
                to,
            });
        }
        if live.computed == live.target {
            self.partial = None;
            self.completing.push(slot);
        }
        Some((count, before))
    }

    fn complete(&mut self, slot: usize) {
        let Some(live) = self.live[slot].as_mut() else {
            return;
        };
        let request = live.job.request;
        if !live.first_done {
            live.first_done = true;
            self.outcomes.push(Outcome::Prefilled { request, slot });
        }
        if !live.job.prefill_only {
            self.begin_stream(slot, self.passes);
        }
    }

    // -- streams --

    /// A pass that computes a prompt gives its next token too.
    fn begin_stream(&mut self, slot: usize, pass: u64) {
        let Some(live) = self.live[slot].as_mut() else {
            return;
        };
        live.streaming = true;
        live.generated += 1;
        live.joined = (pass, live.generated);
        self.streams += 1;
        self.attend(slot, pass);
    }

    /// Handles every stream that ends or needs a block now.
    fn advance(&mut self) {
        while let Some(&Reverse((pass, slot, admission))) = self.due.peek() {
            if pass > self.passes {
                break;
            }
            self.due.pop();
            if self.is_current(slot, admission) {
                self.attend(slot, self.passes);
            }
        }
        self.report_evicted();
    }

    /// Brings a stream up to `pass`, and says when it is to be looked at again.
    fn attend(&mut self, slot: usize, pass: u64) {
        let size = self.shape.block_tokens;
        let Some(live) = self.live[slot].as_mut() else {
            return;
        };
        live.generated = live.joined.1 + (pass - live.joined.0) as u32;
        if live.generated >= live.job.output {
            self.outcomes.push(Outcome::Finished {
                request: live.job.request,
            });
            self.streams -= 1;
            self.remove(slot);
            return;
        }
        let held = live.blocks.len() as u32 * size;
        if live.job.prompt + live.generated > held {
            match self.cache.allocate(&mut self.evicted) {
                Some(block) => live.blocks.push(block),
                None => {
                    self.preempt();
                    if self.live[slot].is_some() {
                        self.attend(slot, pass);
                    }
                    return;
                }
            }
        }
        let Some(live) = self.live[slot].as_ref() else {
            return;
        };
        let held = live.blocks.len() as u32 * size;
        let end = live.job.output - live.generated;
        let crossing = held + 1 - live.job.prompt - live.generated;
        let next = pass + u64::from(end.min(crossing));
        self.due.push(Reverse((next, slot, live.admission)));
    }

    /// Puts the stream that joined last back into the queue.
    fn preempt(&mut self) {
        let last = (0..self.live.len())
            .filter(|&slot| self.live[slot].as_ref().is_some_and(|live| live.streaming))
            .max_by_key(|&slot| self.live[slot].as_ref().map(|live| live.admission));
        let Some((slot, mut live)) = last.and_then(|slot| Some((slot, self.live[slot].take()?)))
        else {
            return;
        };
        live.generated = live.joined.1 + (self.passes - live.joined.0.min(self.passes)) as u32;
        self.vacant.push(slot);
        self.streams -= 1;
        self.give_back(&live);
        live.blocks.clear();
        live.streaming = false;
        live.target = live.job.prompt + live.generated;
        live.computed = 0;
        self.waiting.push_front(live);
    }

    // -- slots --

    fn admit(&mut self, mut live: Live) -> usize {
        self.admissions += 1;
        live.admission = self.admissions;
        if let Some(slot) = self.vacant.pop() {
            self.live[slot] = Some(live);
            slot
        } else {
            self.live.push(Some(live));
            self.live.len() - 1
        }
    }

    fn remove(&mut self, slot: usize) {
        if let Some(live) = self.live[slot].take() {
            self.vacant.push(slot);
            self.give_back(&live);
        }
    }

    fn give_back(&mut self, live: &Live) {
        let full = ((live.job.prompt + live.generated) / self.shape.block_tokens) as usize;
        for (at, &block) in live.blocks.iter().enumerate().rev() {
            self.cache.release(block, at < full);
        }
    }

    fn is_current(&self, slot: usize, admission: u64) -> bool {
        let live = self.live.get(slot).and_then(Option::as_ref);
        live.is_some_and(|live| live.admission == admission)
    }

    fn report_evicted(&mut self) {
        if !self.evicted.is_empty() {
            let gone = std::mem::take(&mut self.evicted);
            self.outcomes.push(Outcome::Removed(gone));
        }
    }
}
