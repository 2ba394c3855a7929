//! Requests that wait for capacity, and the order in which they are released.
//!
//! - **Classes** by priority: the most urgent first, but a class that let [`Admission::aging`] releases pass is next. Among
//!   such, who let most pass: a class that waits is served at least once in `aging` + [`Admission::CLASSES`] releases.
//! - **Tenants** of a class by deficit round robin (Shreedhar and Varghese, 1995) over prompt tokens: in any time in which
//!   two tenants wait, what each was released, divided by its weight, differs by no more than a quantum and the
//!   longest prompt of each, divided by its weight.
//! - **Requests** of a tenant by the time at which they must be placed, the earliest first; then in order of arrival.
//!
//! When there is no room for another, the tenant with most waiting gives up its least urgent one (longest queue
//! drop: Suter et al., 1998), so that a flood drowns nobody else.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
};

use rustc_hash::FxHashMap;

use crate::{admission::Admission, held::Held};

/// When a request must be placed, in the order of its bits, and its number of arrival.
type Turn = (u64, u64);

/// Where a request waits.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Place {
    class: Reverse<i32>,
    tenant: u64,
    turn: Turn,
}

/// What a tenant has waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
struct Load {
    requests: usize,
    tokens: u64,
}

/// A measure of what waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    Requests,
    Tokens,
}

/// A tenant in a class.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Share {
    /// Tokens it may still be released.
    deficit: f64,
    /// Whether it has had its quantum in this round.
    granted: bool,
    waiting: BTreeMap<Turn, Held>,
}

impl Share {
    fn price(&self) -> f64 {
        let head = self.waiting.first_key_value();
        head.map_or(f64::INFINITY, |(_, held)| price(held) as f64)
    }
}

#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Class {
    /// Tenants in turn; all of them, and each once.
    ring: VecDeque<u64>,
    shares: FxHashMap<u64, Share>,
    /// Releases of others since its last.
    passed: u32,
}

/// All that wait.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Line {
    classes: BTreeMap<Reverse<i32>, Class>,
    places: FxHashMap<u64, Place>,
    /// All turns, with the request's id.
    turns: BTreeSet<(Turn, u64)>,
    loads: BTreeMap<u64, Load>,
    tokens: u64,
    arrivals: u64,
}

fn price(held: &Held) -> u64 {
    u64::from(held.request.prompt_tokens.max(1))
}

fn weight(bounds: &Admission, tenant: u64) -> f64 {
    let given = bounds.weights.get(&tenant).copied().unwrap_or(1.0);
    if given.is_nan() {
        1.0
    } else {
        given.clamp(0.01, 100.0)
    }
}

impl Line {
    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Prompt tokens of all.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// When the first of them must be placed.
    pub fn earliest(&self) -> Option<f64> {
        self.turns.first().map(|((at, _), _)| f64::from_bits(*at))
    }

    /// Adds a request.
    pub fn push(&mut self, held: Held) {
        self.arrivals += 1;
        let request = &held.request;
        let (least, most) = Admission::PRIORITIES;
        let place = Place {
            class: Reverse(request.priority.clamp(least, most)),
            tenant: request.tenant,
            // Times are from 0 on, and their bits order as they do.
            turn: (held.latest.max(0.0).to_bits(), self.arrivals),
        };
        let load = self.loads.entry(place.tenant).or_default();
        load.requests += 1;
        load.tokens += price(&held);
        self.tokens += price(&held);
        self.turns.insert((place.turn, request.id));
        self.places.insert(request.id, place);
        let class = self.classes.entry(place.class).or_default();
        let share = class.shares.entry(place.tenant).or_insert_with(|| {
            class.ring.push_back(place.tenant);
            Share::default()
        });
        share.waiting.insert(place.turn, held);
    }

    /// Takes out the request whose turn it is.
    pub fn pop(&mut self, bounds: &Admission) -> Option<Held> {
        let overdue = self
            .classes
            .iter()
            .filter(|(_, class)| class.passed >= bounds.aging.max(1));
        // Of equals the most urgent, which comes first.
        let longest = overdue.min_by_key(|(_, class)| Reverse(class.passed));
        let chosen = *longest.or_else(|| self.classes.iter().next())?.0;
        let passed = self.classes.get(&chosen)?.passed;
        for (name, class) in &mut self.classes {
            class.passed = if *name == chosen { 0 } else { class.passed + 1 };
        }
        let id = self.classes.get_mut(&chosen)?.next(bounds)?;
        let held = self.remove(id)?;
        // Whose turn it is here must not be passed over again by a plan.
        Some(Held { passed, ..held })
    }

    /// Takes a request out; None if it does not wait.
    pub fn remove(&mut self, id: u64) -> Option<Held> {
        let place = self.places.remove(&id)?;
        self.turns.remove(&(place.turn, id));
        let class = self.classes.get_mut(&place.class)?;
        let share = class.shares.get_mut(&place.tenant)?;
        let held = share.waiting.remove(&place.turn)?;
        if share.waiting.is_empty() {
            class.shares.remove(&place.tenant);
            class.ring.retain(|&tenant| tenant != place.tenant);
        }
        if class.ring.is_empty() {
            self.classes.remove(&place.class);
        }
        self.tokens -= price(&held);
        if let Some(load) = self.loads.get_mut(&place.tenant) {
            load.requests -= 1;
            load.tokens -= price(&held);
            if load.requests == 0 {
                self.loads.remove(&place.tenant);
            }
        }
        Some(held)
    }

    /// Takes out a request that should have been placed by now.
    pub fn late(&mut self, now: f64) -> Option<Held> {
        let &((at, _), id) = self.turns.first()?;
        (f64::from_bits(at) <= now).then(|| self.remove(id))?
    }

    /// Takes out the request that is to go when there are too many; `newest` is the tenant of the one that came last.
    pub fn give_up(&mut self, by: Measure, newest: u64, bounds: &Admission) -> Option<Held> {
        let size = |tenant: u64, load: &Load| {
            let size = match by {
                Measure::Requests => load.requests as f64,
                Measure::Tokens => load.tokens as f64,
            };
            size / weight(bounds, tenant)
        };
        let (tenant, _) = self.loads.iter().max_by(|(a, left), (b, right)| {
            let order = size(**a, left).total_cmp(&size(**b, right));
            // Of equals the one that asked for more.
            order.then((**a == newest).cmp(&(**b == newest)))
        })?;
        let shares = self
            .classes
            .values()
            .filter_map(|class| class.shares.get(tenant));
        // Of equally large classes the last, which is the least urgent.
        let largest = shares.max_by_key(|share| share.waiting.len())?;
        let id = largest.waiting.last_key_value()?.1.request.id;
        self.remove(id)
    }
}

impl Class {
    /// The request whose turn it is, by deficit round robin; it is charged to its tenant.
    fn next(&mut self, bounds: &Admission) -> Option<u64> {
        let quantum =
            |tenant: u64| weight(bounds, tenant) * f64::from(bounds.quantum_tokens.max(1));
        loop {
            for _ in 0..=self.ring.len() {
                let &tenant = self.ring.front()?;
                let share = self.shares.get_mut(&tenant)?;
                if !share.granted {
                    share.deficit += quantum(tenant);
                    share.granted = true;
                }
                let price = share.price();
                if price <= share.deficit {
                    share.deficit -= price;
                    return share
                        .waiting
                        .first_key_value()
                        .map(|(_, held)| held.request.id);
                }
                share.granted = false;
                self.ring.rotate_left(1);
            }
            // Nobody could afford its next one: the rounds in which nobody could either are skipped.
            let rounds = self.shares.iter().map(|(&tenant, share)| {
                ((share.price() - share.deficit) / quantum(tenant)).ceil() - 1.0
            });
            let idle = rounds.fold(f64::INFINITY, f64::min).max(0.0);
            for (&tenant, share) in &mut self.shares {
                share.deficit += idle * quantum(tenant);
            }
        }
    }
}
