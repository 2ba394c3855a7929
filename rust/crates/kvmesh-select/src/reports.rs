//! What reports of progress change, and what they teach.

use crate::{
    cost::Seat,
    selector::Selector,
    slots::{Lease, Progress},
    types::{Role, WorkerId},
};

/// Fewer say little of the time between tokens.
const STREAM_TOKENS: u32 = 16;

/// How a lease fares, as its holder says.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// Whose.
    pub lease: u64,
    /// The prompt is computed.
    pub prefilled: bool,
    /// Tokens generated so far; any means that the prompt is computed.
    pub output_tokens: u32,
    /// Milliseconds of the time until the prompt was reported as computed that went into moving its KV; 0: not known.
    pub transfer_ms: f64,
    /// It is over, however its request ended.
    pub ended: bool,
}

/// A stream, or one that begins when its KV has been moved.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Stream {
    /// When it began, or the moving did.
    since: f64,
    /// What its worker had spent on prompts when it began; None while KV is moved.
    busy: Option<f64>,
    /// When its tokens were last counted, and how many there were.
    counted: (f64, u32),
}

impl Selector {
    /// Renews a lease and takes note of what it reached; whether that is more than before. None for one that is not
    /// held.
    pub(crate) fn note_progress(&mut self, now: f64, report: &Report) -> Option<bool> {
        let (lease, moved_ms) = (report.lease, report.transfer_ms);
        let progress = Progress {
            prefilled: report.prefilled,
            output_tokens: report.output_tokens,
        };
        let before = *self.leases.get(lease)?;
        let changed = self.leases.progress(now, lease, progress)?;
        let split = before.prefill != before.decode;
        let moved = split && changed.prefilled && moved_ms > 0.0;
        if changed.prefilled {
            self.computed(
                if moved { now - moved_ms } else { now },
                lease,
                before.prefill,
            );
        }
        if moved {
            self.observe_transfer(&before, moved_ms);
            self.observe_link(now, &before, moved_ms);
            self.begin_stream(now, lease, before.decode);
        } else if split && changed.prefilled && !changed.first_token {
            // The transfer begins; the stream does when it ends.
            let moving = Stream {
                since: now,
                busy: None,
                counted: (now, 0),
            };
            self.streams.insert(lease, moving);
        } else if split && changed.first_token && !changed.prefilled {
            self.transferred(now, lease, &before);
            self.begin_stream(now, lease, before.decode);
        } else if changed.prefilled {
            self.begin_stream(now, lease, before.decode);
        } else {
            let streams = self.leases.slots(before.decode).streams;
            self.count_steps(now, lease, before.decode, progress.output_tokens, streams);
        }
        Some(changed.prefilled || changed.first_token)
    }

    /// Ends a lease; false for one that is not held.
    pub(crate) fn note_end(&mut self, now: f64, lease: u64) -> bool {
        let ended = self.leases.end(lease);
        if let Some(ended) = &ended {
            self.released(now, lease, ended);
        }
        ended.is_some()
    }

    /// What a lease leaves behind: nothing. A stream of some length teaches the time between tokens.
    pub(crate) fn released(&mut self, now: f64, lease: u64, ended: &Lease) {
        if !ended.prefilled {
            self.speculation.withdraw(lease);
            if let Some(worker) = self.worker_mut(ended.prefill) {
                worker.queue.withdraw(now, lease);
            }
        }
        // It streamed until now.
        let streams = self.leases.slots(ended.decode).streams + 1;
        self.count_steps(now, lease, ended.decode, ended.output_tokens, streams);
        let tokens = ended.output_tokens.saturating_sub(1);
        if let (Some(stream), true) = (self.streams.remove(&lease), tokens >= STREAM_TOKENS) {
            if let Some(busy) = stream.busy {
                self.learn_step(now - stream.since, busy, tokens, ended.decode, streams);
            }
        }
    }

    /// A prompt has been computed.
    fn computed(&mut self, now: f64, lease: u64, id: WorkerId) {
        self.speculation.computed(now, lease);
        let slots = self.leases.slots(id);
        let worker = self
            .workers
            .get_mut(id.index as usize)
            .and_then(Option::as_mut);
        if let Some(worker) = worker.filter(|worker| worker.id == id) {
            let rates = &mut self.rates[worker.class];
            let step_ms = Seat::new(now, worker, rates, slots).step_ms / worker.slower;
            let entry = worker.computed(now, lease, step_ms, rates);
            let predicted = entry.and_then(|entry| Some((now - entry.placed, entry.expected?)));
            if let Some((actual, expected)) = predicted {
                let error = actual - expected;
                self.errors.count += 1;
                self.errors.bias_ms += error;
                self.errors.absolute_ms += error.abs();
                self.errors.actual_ms += actual;
            }
        }
    }

    fn transferred(&mut self, now: f64, lease: u64, before: &Lease) {
        let moving = self.streams.get(&lease).filter(|one| one.busy.is_none());
        if let Some(&Stream { since, .. }) = moving {
            self.observe_transfer(before, now - since);
        }
    }

    /// What a transfer took, as the engines measured it: what is found from reports has waiting in it, which is no link's.
    fn observe_link(&mut self, now: f64, before: &Lease, ms: f64) {
        let place = self.workers.get_mut(before.decode.index as usize);
        let worker = place.and_then(Option::as_mut);
        if let Some(worker) = worker.filter(|worker| worker.id == before.decode) {
            let rates = &self.rates[worker.class];
            let expected = worker.slower * rates.transfer_ms(before.prompt_tokens);
            worker.links.observe(now, before.prefill, expected, ms);
        }
    }

    fn observe_transfer(&mut self, before: &Lease, ms: f64) {
        // Whole, also over a slow link, which is an outlier among others: a class that is known badly is no link's fault.
        if let Some(class) = self.worker(before.decode).map(|worker| worker.class) {
            self.rates[class].observe_transfer(before.prompt_tokens, ms);
        }
    }

    fn begin_stream(&mut self, now: f64, lease: u64, decode: WorkerId) {
        if let Some(worker) = self.worker(decode) {
            let tokens = self.leases.get(lease).map_or(0, |one| one.output_tokens);
            let stream = Stream {
                since: now,
                busy: Some(worker.busy_ms),
                counted: (now, tokens),
            };
            self.streams.insert(lease, stream);
        }
    }

    /// A stream has reached `tokens`, of `streams` there: how fast it is tells how fast a decode worker is, long before it
    /// ends. Of an aggregated one prompts tell, and better: what they take is not mixed with anything.
    fn count_steps(&mut self, now: f64, lease: u64, decode: WorkerId, tokens: u32, streams: u32) {
        let blocks = self.leases.slots(decode).distinct_blocks();
        let worker = self
            .workers
            .get_mut(decode.index as usize)
            .and_then(Option::as_mut)
            .filter(|worker| worker.id == decode && worker.role == Role::Decode);
        let (Some(worker), Some(stream)) = (worker, self.streams.get_mut(&lease)) else {
            return;
        };
        let (since, before) = stream.counted;
        let more = tokens.saturating_sub(before);
        if stream.busy.is_none() || more < STREAM_TOKENS {
            return;
        }
        stream.counted = (now, tokens);
        let share = (blocks as f64 / f64::from(worker.blocks)).min(1.0);
        let step_ms = self.rates[worker.class].decode_ms(streams, share);
        worker.stepped(now, f64::from(more) * step_ms, now - since);
    }

    /// `spent` milliseconds, in which the worker's time on prompts rose from `busy`, went into `tokens`.
    fn learn_step(&mut self, spent: f64, busy: f64, tokens: u32, decode: WorkerId, streams: u32) {
        let slots = self.leases.slots(decode);
        if let Some(worker) = self.worker(decode) {
            let spent = worker.misread * (spent - (worker.busy_ms - busy));
            let step = spent / f64::from(tokens) / worker.slower;
            let share = (slots.distinct_blocks() as f64 / f64::from(worker.blocks)).min(1.0);
            let class = worker.class;
            self.rates[class].observe_decode(f64::from(streams), share, step);
        }
    }

    /// What has nothing to do can teach nothing.
    pub(crate) fn note_idle(&mut self, now: f64) {
        for worker in self.workers.iter_mut().flatten() {
            if self.leases.slots(worker.id).requests == 0 {
                worker.idle(now);
            }
            worker.links.fade(now);
        }
    }
}
