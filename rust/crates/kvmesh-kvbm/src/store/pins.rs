//! Blocks kept for tenants: each pin has a receipt, a deadline and its share of the tenant's bytes.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::block::Lease;

/// A pin, as its owner sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pinned {
    /// Names the pin.
    pub receipt: u64,
    /// Blocks kept.
    pub blocks: usize,
    /// Bytes of the tenant's budget they take.
    pub bytes: u64,
}

/// Why blocks are not pinned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// None of them is in a tier.
    #[error("none of these blocks is in the store")]
    Absent,
    /// They are more than the tenant may keep.
    #[error("tenant {tenant:?} has {pinned} of {budget} bytes pinned; {wanted} more do not fit")]
    OverBudget {
        /// Whose budget.
        tenant: String,
        /// Bytes pinned now.
        pinned: u64,
        /// Bytes it may pin.
        budget: u64,
        /// Bytes of this pin.
        wanted: u64,
    },
}

/// All pins of a store. Deadlines are looked at whenever anything is asked of them or about to be stored: nothing is short before.
pub(super) struct Pins {
    budget: u64,
    pins: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    next: u64,
    by_receipt: FxHashMap<u64, Pin>,
}

struct Pin {
    tenant: String,
    bytes: u64,
    until: Option<Instant>,
    _leases: Vec<Lease>,
}

impl Held {
    /// Takes out what is over; the caller drops it.
    fn expire(&mut self, now: Instant) -> Vec<Pin> {
        let over = |pin: &Pin| pin.until.is_some_and(|until| until <= now);
        let receipts: Vec<u64> = (self.by_receipt.iter())
            .filter(|(_, pin)| over(pin))
            .map(|(&receipt, _)| receipt)
            .collect();
        (receipts.iter())
            .filter_map(|receipt| self.by_receipt.remove(receipt))
            .collect()
    }
}

impl Pins {
    pub(super) fn new(budget: u64) -> Self {
        Self {
            budget,
            pins: Mutex::default(),
        }
    }

    /// Keeps leases of so many bytes each for a tenant.
    pub(super) fn pin(
        &self,
        tenant: &str,
        leases: Vec<(u64, Lease)>,
        time: Duration,
    ) -> Result<Pinned, PinError> {
        if leases.is_empty() {
            return Err(PinError::Absent);
        }
        let now = Instant::now();
        let mut held = self.pins.lock();
        let expired = held.expire(now);
        let of_tenant = held.by_receipt.values().filter(|pin| pin.tenant == tenant);
        let pinned: u64 = of_tenant.map(|pin| pin.bytes).sum();
        let bytes = leases.iter().map(|(bytes, _)| bytes).sum();
        let answer = if pinned + bytes > self.budget {
            Err(PinError::OverBudget {
                tenant: tenant.into(),
                pinned,
                budget: self.budget,
                wanted: bytes,
            })
        } else {
            held.next += 1;
            let leases: Vec<Lease> = leases.into_iter().map(|(_, lease)| lease).collect();
            let pinned = Pinned {
                receipt: held.next,
                blocks: leases.iter().map(|lease| lease.slots().len()).sum(),
                bytes,
            };
            let pin = Pin {
                tenant: tenant.into(),
                bytes,
                until: now.checked_add(time),
                _leases: leases,
            };
            held.by_receipt.insert(pinned.receipt, pin);
            Ok(pinned)
        };
        drop(held);
        drop(expired);
        answer
    }

    /// Ends those whose time is over.
    pub(super) fn expire(&self) {
        let mut held = self.pins.lock();
        if !held.by_receipt.is_empty() {
            let expired = held.expire(Instant::now());
            drop(held);
            drop(expired);
        }
    }

    pub(super) fn release(&self, receipt: u64) -> bool {
        let (released, expired) = {
            let mut held = self.pins.lock();
            let expired = held.expire(Instant::now());
            (held.by_receipt.remove(&receipt), expired)
        };
        drop(expired);
        released.is_some()
    }

    pub(super) fn held(&self) -> (usize, u64) {
        let mut held = self.pins.lock();
        let expired = held.expire(Instant::now());
        let bytes = held.by_receipt.values().map(|pin| pin.bytes).sum();
        let count = held.by_receipt.len();
        drop(held);
        drop(expired);
        (count, bytes)
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut self.pins.lock().by_receipt);
        drop(all);
    }
}
