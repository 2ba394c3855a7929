//! The selector's workers: who they are, what they have cached, and what was learned of them.

use crate::{
    fit::Quality,
    rates::{ClassRates, Law},
    selector::Selector,
    slots::Slots,
    types::{WorkerId, WorkerSpec},
    worker::Worker,
};

impl Selector {
    /// Adds a worker. What is held may go there at once: [`Selector::wakes_at`] says so.
    pub fn add_worker(&mut self, spec: &WorkerSpec) -> WorkerId {
        let vacant = self.workers.iter().position(Option::is_none);
        let index = vacant.unwrap_or(self.workers.len());
        let id = WorkerId {
            index: index as u32,
            life: self.lives,
        };
        self.lives += 1;
        self.evictions_changed += 1;
        let next = self.rates.len();
        let class = *self.classes.entry(spec.class.clone()).or_insert(next);
        if class == next {
            self.rates.push(ClassRates::default());
        }
        self.rates[class].probe(&spec.probe, spec.pass_tokens.max(1));
        let worker = Worker::new(id, class, spec);
        match vacant {
            Some(_) => self.workers[index] = Some(worker),
            None => self.workers.push(Some(worker)),
        }
        self.leases.admit(id);
        self.plan_anew();
        id
    }

    /// Forgets a worker. Leases on it live on, without weight; what is held is placed elsewhere, at once where there is
    /// room: [`Selector::wakes_at`] says so.
    pub fn remove_worker(&mut self, id: WorkerId) {
        if self.worker(id).is_some() {
            self.workers[id.index as usize] = None;
            self.evictions_changed += 1;
            self.leases.forget(id);
            self.speculation.forget(id);
            for worker in self.workers.iter_mut().flatten() {
                worker.links.forget(id);
            }
            self.plan_anew();
        }
    }

    /// What live leases take of a worker.
    pub fn slots(&self, id: WorkerId) -> Slots {
        self.leases.slots(id)
    }

    /// What is known of each hardware class: its name, its workers now, its laws.
    pub fn rates(&self) -> Vec<(&str, usize, [Law; 4])> {
        let mut classes: Vec<_> = self.classes.iter().collect();
        classes.sort_by_key(|&(_, &class)| class);
        let count = |class: usize| {
            let workers = self.workers.iter().flatten();
            workers.filter(|worker| worker.class == class).count()
        };
        classes
            .into_iter()
            .map(|(name, class)| (name.as_str(), count(*class), self.rates[*class].laws()))
            .collect()
    }

    /// A worker's device has these blocks now.
    pub fn stored(&mut self, id: WorkerId, hashes: &[u64]) {
        if let Some(worker) = self.worker_mut(id) {
            worker.residency.stored(hashes.len());
            self.speculation.stored(id, hashes);
        }
    }

    /// A worker's device no longer has these blocks.
    pub fn removed(&mut self, now: f64, id: WorkerId, hashes: &[u64]) {
        if let Some(worker) = self.worker_mut(id) {
            worker.residency.removed(now, hashes.len());
            self.evictions_changed += 1;
            self.returns.removed(hashes);
            self.speculation.removed(id, hashes);
        }
    }

    /// A worker's device has nothing any more, or nothing is known of it.
    pub fn cleared(&mut self, id: WorkerId) {
        if let Some(worker) = self.worker_mut(id) {
            worker.residency.cleared();
            self.speculation.forget(id);
        }
    }

    /// The factor by which a worker is slower than its class, as far as that is believed, and how well it has held; None for
    /// an unknown worker.
    pub fn pace(&self, id: WorkerId) -> Option<(f64, Quality)> {
        self.worker(id)
            .map(|worker| (worker.slower, worker.pace.quality()))
    }

    /// The links by which a decode worker has received KV, in the order of their prefill workers: the other end, the factor
    /// by which transfers take longer there than its class takes, as far as that is believed, and how well it has held.
    pub fn links(&self, id: WorkerId) -> Vec<(WorkerId, f64, Quality)> {
        let known = self.worker(id).map(|worker| worker.links.known());
        let mut links: Vec<_> = known.into_iter().flatten().collect();
        links.sort_unstable_by_key(|&(from, ..)| from);
        links
    }

    /// For simulations of bad measurements: durations that this worker's reports imply are misread by a factor.
    pub fn misread(&mut self, id: WorkerId, factor: f64) {
        if let Some(worker) = self.worker_mut(id) {
            worker.misread = factor;
        }
    }

    pub(crate) fn worker(&self, id: WorkerId) -> Option<&Worker> {
        let worker = self.workers.get(id.index as usize)?.as_ref()?;
        (worker.id == id).then_some(worker)
    }

    pub(crate) fn worker_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        let worker = self.workers.get_mut(id.index as usize)?.as_mut()?;
        (worker.id == id).then_some(worker)
    }
}
