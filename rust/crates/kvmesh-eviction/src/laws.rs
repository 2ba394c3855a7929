//! When blocks of a class return: learned from samples, and what keeping one of some age is worth.
//!
//! A sample is a block's use and, if it came, its next use. Per class and bin of age the samples give a hazard: returns
//! a second at risk. Where they are few, the hazard is drawn towards that of all classes of the same group, that
//! towards the hazard of all classes, and that towards [`SCALE_FREE`] / age, by which the older of two blocks is always
//! worth less: LRU.
//!
//! The worth of keeping a block of age a is its Gittins index: the best, over all ages s at which one might give up, of
//! P(it returns before s) / E(seconds it is held until it returns or s), given that it has not returned by a.
//! J. Gittins, "Bandit processes and dynamic allocation indices" (J. R. Statist. Soc. B, 1979).

use crate::Key;

/// Samples kept: the last ones.
const SAMPLES: usize = 16_384;
/// New samples after which the laws are computed anew, at most; at first after as many as there are.
const PERIOD: u64 = 1024;
const FIRST_PERIOD: u64 = 32;
/// Bins of age: up to 2^FIRST seconds, then two an octave, for eight days.
const BINS: usize = 48;
const FIRST: f64 = -4.0;
const BINS_PER_OCTAVE: f64 = 2.0;
/// Returns a second at risk times age, where nothing is known.
const SCALE_FREE: f64 = 0.2;
/// Blocks' worth of samples at which what was seen counts as much as what was assumed.
const TRUST: f64 = 32.0;

type PerBin = [f64; BINS];

/// Names a sample for as long as it is kept. They come round after 2^32; the owner tells the new one from the old.
pub(super) type SampleId = u32;

#[derive(Debug, Clone, Copy)]
struct Sample {
    /// The block that is watched.
    owner: Key,
    class: u32,
    /// Blocks it stands for.
    weight: u32,
    from: f64,
    /// The age at which it returned.
    returned: Option<f64>,
}

/// Sums over samples.
#[derive(Debug, Clone)]
struct Seen {
    returned: PerBin,
    /// Weight times seconds in the bin.
    at_risk: PerBin,
}

/// The laws of some classes. Class c is of group c % `groups`.
#[derive(Debug)]
pub(super) struct Laws {
    groups: usize,
    samples: Vec<Sample>,
    /// Samples taken so far.
    taken: u64,
    learn_at: u64,
    /// Where each bin begins.
    starts: PerBin,
    /// Per class the worth at the start of each bin.
    worth: Vec<PerBin>,
    /// Per class the returns a second at risk in each bin.
    hazards: Vec<PerBin>,
}

impl Laws {
    pub(super) fn new(classes: usize, groups: usize) -> Self {
        let starts = std::array::from_fn(|bin| match bin {
            0 => 0.0,
            _ => f64::exp2(FIRST + (bin - 1) as f64 / BINS_PER_OCTAVE),
        });
        let mut laws = Self {
            groups,
            samples: Vec::new(),
            taken: 0,
            learn_at: FIRST_PERIOD,
            starts,
            worth: Vec::new(),
            hazards: Vec::new(),
        };
        laws.hazards = vec![laws.assumed(); classes];
        laws.worth = vec![laws.worth_of(&laws.assumed()); classes];
        laws
    }

    /// Takes a sample: one use of a block.
    pub(super) fn open(&mut self, owner: Key, class: usize, now: f64) -> SampleId {
        if self.taken >= self.learn_at {
            self.learn(now);
            self.learn_at = self.taken + self.taken.min(PERIOD);
        }
        let sample = Sample {
            owner,
            class: class as u32,
            weight: 1,
            from: now,
            returned: None,
        };
        let id = self.taken as SampleId;
        match self.samples.get_mut(id as usize % SAMPLES) {
            Some(oldest) => *oldest = sample,
            None => self.samples.push(sample),
        }
        self.taken += 1;
        id
    }

    /// The last sample stands for one more block, and watches that one if it is `chosen` for its new weight.
    pub(super) fn widen(
        &mut self,
        owner: Key,
        chosen: impl FnOnce(u32) -> bool,
    ) -> Option<SampleId> {
        let id = self.taken.checked_sub(1)? as SampleId;
        let sample = &mut self.samples[id as usize % SAMPLES];
        sample.weight += 1;
        chosen(sample.weight).then(|| {
            sample.owner = owner;
            id
        })
    }

    /// The block is used again. Nothing happens where the sample is not of its last use.
    pub(super) fn close(&mut self, id: SampleId, owner: Key, now: f64) {
        let kept = (self.taken as SampleId).wrapping_sub(id) <= SAMPLES as SampleId;
        if let Some(sample) = self.samples.get_mut(id as usize % SAMPLES)
            && kept
            && sample.owner == owner
            && sample.returned.is_none()
        {
            sample.returned = Some(now - sample.from);
        }
    }

    /// The worth of keeping a block of the class, unused for `age` seconds: between those at the ends of the age's bin.
    pub(super) fn worth(&self, class: usize, age: f64) -> f64 {
        let worth = &self.worth[class];
        let place = self.place(age);
        let bin = place as usize;
        let next = worth[(bin + 1).min(BINS - 1)];
        worth[bin] + (next - worth[bin]) * (place - bin as f64)
    }

    /// P(a block of the class returns within `seconds`), given that it has not for `age` seconds.
    pub(super) fn chance(&self, class: usize, age: f64, seconds: f64) -> f64 {
        let (from, to) = (age.max(0.0), age.max(0.0) + seconds);
        let expected: f64 = (0..BINS)
            .map(|bin| {
                let start = self.starts[bin];
                let end = self.starts.get(bin + 1).copied().unwrap_or(f64::INFINITY);
                (to.min(end) - from.max(start)).max(0.0) * self.hazards[class][bin]
            })
            .sum();
        1.0 - (-expected).exp()
    }

    fn learn(&mut self, now: f64) {
        let mut classes = vec![None; self.worth.len()];
        for sample in &self.samples {
            let seen = classes[sample.class as usize].get_or_insert_with(Seen::nothing);
            let weight = f64::from(sample.weight);
            let age = sample.returned.unwrap_or(now - sample.from);
            let last = self.place(age) as usize;
            // In bins of a width: all of those before the last, a part of it. Summed from the right below.
            let part = (age - self.starts[last]) / self.width(last);
            seen.at_risk[last] += weight * part;
            if last > 0 {
                seen.at_risk[last - 1] += weight * (1.0 - part);
            }
            if sample.returned.is_some() {
                seen.returned[last] += weight;
            }
        }
        let mut groups = vec![Seen::nothing(); self.groups];
        let mut all = Seen::nothing();
        for (class, seen) in classes.iter_mut().enumerate() {
            if let Some(seen) = seen {
                for bin in (0..BINS - 1).rev() {
                    seen.at_risk[bin] += seen.at_risk[bin + 1];
                }
                for bin in 0..BINS {
                    seen.at_risk[bin] *= self.width(bin);
                }
                groups[class % self.groups].add(seen);
                all.add(seen);
            }
        }
        let common = self.hazard(&all, &self.assumed());
        let groups: Vec<PerBin> = (groups.iter())
            .map(|seen| self.hazard(seen, &common))
            .collect();
        let unseen: Vec<PerBin> = groups.iter().map(|hazard| self.worth_of(hazard)).collect();
        for (class, seen) in classes.iter().enumerate() {
            let group = class % self.groups;
            (self.hazards[class], self.worth[class]) = match seen {
                Some(seen) => {
                    let hazard = self.hazard(seen, &groups[group]);
                    (hazard, self.worth_of(&hazard))
                }
                None => (groups[group], unseen[group]),
            };
        }
    }

    /// Returns a second in each bin, where `assumed` counts as much as [`TRUST`] blocks.
    fn hazard(&self, seen: &Seen, assumed: &PerBin) -> PerBin {
        std::array::from_fn(|bin| {
            let trust = TRUST * self.width(bin);
            (seen.returned[bin] + trust * assumed[bin]) / (seen.at_risk[bin] + trust)
        })
    }

    fn assumed(&self) -> PerBin {
        std::array::from_fn(|bin| SCALE_FREE / (self.starts[bin] + self.width(bin)))
    }

    /// The index at the start of every bin, right to left: a bin is held together with those after it for as long as
    /// that raises its ratio.
    fn worth_of(&self, hazard: &PerBin) -> PerBin {
        // Runs of bins that are held or given up as one: P(return), E(seconds), P(no return).
        let mut runs: Vec<(f64, f64, f64)> = Vec::with_capacity(BINS);
        let mut worth = [0.0; BINS];
        for bin in (0..BINS).rev() {
            let stays = (-hazard[bin] * self.width(bin)).exp();
            let mut run = (1.0 - stays, (1.0 - stays) / hazard[bin], stays);
            while let Some(&next) = runs.last()
                && next.0 * run.1 > run.0 * next.1
            {
                run = (
                    run.0 + run.2 * next.0,
                    run.1 + run.2 * next.1,
                    run.2 * next.2,
                );
                runs.pop();
            }
            runs.push(run);
            worth[bin] = run.0 / run.1;
        }
        worth
    }

    /// The bin of an age and, after the point, how far into it on the logarithmic scale; the first bin has no inside.
    fn place(&self, age: f64) -> f64 {
        let place = (age.max(f64::MIN_POSITIVE).log2() - FIRST) * BINS_PER_OCTAVE + 1.0;
        if place < 1.0 {
            0.0
        } else {
            place.min((BINS - 1) as f64)
        }
    }

    fn width(&self, bin: usize) -> f64 {
        match bin {
            0 => self.starts[1],
            _ => self.starts[bin] * (f64::exp2(1.0 / BINS_PER_OCTAVE) - 1.0),
        }
    }
}

impl Seen {
    fn nothing() -> Self {
        Self {
            returned: [0.0; BINS],
            at_risk: [0.0; BINS],
        }
    }

    fn add(&mut self, other: &Self) {
        for bin in 0..BINS {
            self.returned[bin] += other.returned[bin];
            self.at_risk[bin] += other.at_risk[bin];
        }
    }
}
