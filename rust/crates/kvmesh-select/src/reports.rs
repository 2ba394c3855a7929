//! What reports of progress change, and what they teach.

use crate::{
    cost::Seat,
    selector::Selector,
    slots::{Lease, Progress},
    types::WorkerId,
};

/// Shorter streams say little of the time between tokens.
const STREAM_TOKENS: u32 = 16;

impl Selector {
    /// Renews a lease and takes note of what it reached; whether that is more than before. None for one that is not
    /// held. `moved_ms` of the time until its prompt was computed and reported went into moving its KV.
    pub(crate) fn note_progress(
        &mut self,
        now: f64,
        lease: u64,
        progress: Progress,
        moved_ms: f64,
    ) -> Option<bool> {
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
            self.begin_stream(now, lease, before.decode);
        } else if split && changed.prefilled && !changed.first_token {
            // The transfer begins; the stream does when it ends.
            self.streams.insert(lease, (now, f64::NAN));
        } else if split && changed.first_token && !changed.prefilled {
            self.transferred(now, lease, &before);
            self.begin_stream(now, lease, before.decode);
        } else if changed.prefilled {
            self.begin_stream(now, lease, before.decode);
        }
        Some(changed.prefilled || changed.first_token)
    }

    /// What a lease leaves behind: nothing. A stream of some length teaches the time between tokens.
    pub(crate) fn released(&mut self, now: f64, lease: u64, ended: &Lease) {
        if !ended.prefilled {
            self.speculation.withdraw(lease);
            if let Some(worker) = self.worker_mut(ended.prefill) {
                worker.queue.withdraw(now, lease);
            }
        }
        let begun = self
            .streams
            .remove(&lease)
            .filter(|(_, busy)| !busy.is_nan());
        let tokens = ended.output_tokens.saturating_sub(1);
        if let (Some((since, busy)), true) = (begun, tokens >= STREAM_TOKENS) {
            self.learn_step(now - since, busy, tokens, ended.decode);
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
        if let Some(&(since, busy)) = self.streams.get(&lease) {
            if busy.is_nan() {
                self.observe_transfer(before, now - since);
            }
        }
    }

    fn observe_transfer(&mut self, before: &Lease, ms: f64) {
        if let Some(class) = self.worker(before.decode).map(|worker| worker.class) {
            self.rates[class].observe_transfer(before.prompt_tokens, ms);
        }
    }

    fn begin_stream(&mut self, now: f64, lease: u64, decode: WorkerId) {
        if let Some(worker) = self.worker(decode) {
            let busy = worker.busy_ms;
            self.streams.insert(lease, (now, busy));
        }
    }

    /// `spent` milliseconds, in which the worker's time on prompts rose from `busy`, went into `tokens`.
    fn learn_step(&mut self, spent: f64, busy: f64, tokens: u32, decode: WorkerId) {
        let slots = self.leases.slots(decode);
        if let Some(worker) = self.worker(decode) {
            let step = (spent - (worker.busy_ms - busy)) / f64::from(tokens) / worker.slower;
            let share = (slots.blocks as f64 / f64::from(worker.blocks)).min(1.0);
            let class = worker.class;
            self.rates[class].observe_decode(f64::from(slots.streams + 1), share, step);
        }
    }
}
