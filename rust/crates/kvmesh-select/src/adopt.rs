//! Leases that another replica of the router gave out.
//!
//! They take slots, wait in queues and are speculated on as if they had been placed here, so that replicas that hear of each
//! other's placements decide alike. Reports and ends go the same way for all leases.

use crate::{
    cost::Seat,
    queue::Waiting,
    rates::Work,
    selector::{Context, Selector},
    slots::Progress,
    types::WorkerId,
};

/// A lease, as the replica that gave it out tells of it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Adopted {
    /// Its name there and here.
    pub lease: u64,
    /// Computes the prompt.
    pub prefill: WorkerId,
    /// Generates.
    pub decode: WorkerId,
    /// Prompt tokens in all.
    pub prompt_tokens: u32,
    /// Of them cached where the prompt is computed, by tier.
    pub cached: [u32; 4],
    /// Hashes of the prompt's whole blocks; none once it is computed.
    #[serde(with = "crate::saved::hashes")]
    pub blocks: Box<[u64]>,
    /// The prompt is computed.
    pub prefilled: bool,
    /// Tokens generated.
    pub output_tokens: u32,
}

impl Selector {
    /// Takes a lease over as if it had been placed here now; false when it is held already.
    pub fn adopt(&mut self, adopted: Adopted, context: &mut Context<'_>) -> bool {
        let (now, lease) = (context.now, adopted.lease);
        if lease == 0 || self.leases.get(lease).is_some() {
            return false;
        }
        let prompt = adopted.prompt_tokens.max(1);
        // What a faulty peer says must not underflow anything.
        let cached = adopted
            .cached
            .iter()
            .fold(0_u32, |sum, &n| sum.saturating_add(n));
        let cached = cached.min(prompt - 1);
        let uncached = prompt - cached;
        let workers = (adopted.prefill, adopted.decode);
        let tokens = (adopted.prompt_tokens, uncached);
        self.leases
            .take(now, lease, 0, workers, tokens, &adopted.blocks);
        if adopted.prefilled {
            let progress = Progress {
                prefilled: true,
                output_tokens: adopted.output_tokens,
            };
            // When its stream began is not known, so that it teaches nothing.
            self.leases.progress(now, lease, progress);
            return true;
        }
        self.enqueue(now, &adopted, cached, uncached);
        let known = (cached / self.config.block_tokens) as usize;
        self.returns
            .missed(&adopted.blocks[known.min(adopted.blocks.len())..]);
        // It may have been here before, and its blocks with it.
        self.speculation.withdraw(lease);
        self.speculation.add(lease, adopted.prefill, adopted.blocks);
        true
    }

    fn enqueue(&mut self, now: f64, adopted: &Adopted, cached: u32, uncached: u32) {
        let Some(worker) = self.worker(adopted.prefill) else {
            return;
        };
        let [_, host, nvme, network] = adopted.cached;
        let onboard = [host, nvme, network];
        let work = Work::of(uncached, cached, worker.pass_tokens);
        let rates = &self.rates[worker.class];
        let seat = Seat::new(now, worker, rates, self.leases.slots(worker.id));
        let ms =
            seat.own_ms(&work, rates.prefill_ms(&work)) + worker.slower * rates.onboard_ms(onboard);
        let entry = Waiting {
            lease: adopted.lease,
            work,
            ms,
            onboard,
            placed: now,
            expected: None,
        };
        if let Some(worker) = self.worker_mut(adopted.prefill) {
            worker.queue.push(now, entry);
        }
    }
}
