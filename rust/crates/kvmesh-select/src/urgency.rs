//! Which of the requests that plans hold are planned first.
//!
//! A plan weighs by waiting: in it an urgent request would stand behind equal ones that have waited longer. So each class
//! is planned for itself, the most urgent first, and the next takes free workers that those before it leave. Who has let
//! [`Admission::aging`] others pass is as urgent as can be, so that no class waits for ever.

use smallvec::SmallVec;

use crate::{
    admission::Admission,
    held::{Held, Waitlist},
};

/// Requests of one class: how urgent it is, and where they are in the waitlist, in order of arrival.
pub type Class = (i32, Vec<usize>);

impl Held {
    fn urgency(&self, aging: u32) -> i32 {
        let (least, most) = Admission::PRIORITIES;
        match self.passed >= aging.max(1) {
            true => i32::MAX,
            false => self.request.priority.clamp(least, most),
        }
    }
}

impl Waitlist {
    /// The classes of those held, the most urgent first.
    pub fn classes(&self, aging: u32) -> SmallVec<[Class; 1]> {
        let mut classes: SmallVec<[Class; 1]> = SmallVec::new();
        for at in 0..self.len() {
            let urgency = self.get(at).urgency(aging);
            match classes.iter_mut().find(|class| class.0 == urgency) {
                Some(class) => class.1.push(at),
                None => classes.push((urgency, vec![at])),
            }
        }
        classes.sort_by_key(|class| std::cmp::Reverse(class.0));
        classes
    }

    /// How urgent the most urgent is, and where the first of them; None where nothing is held.
    pub fn first(&self, aging: u32) -> Option<(i32, usize)> {
        let all = (0..self.len()).map(|at| (self.get(at).urgency(aging), at));
        all.reduce(|first, next| if next.0 > first.0 { next } else { first })
    }

    /// So many requests of a class were placed: less urgent ones have let them pass.
    pub fn let_pass(&mut self, urgency: i32, placed: u32, aging: u32) {
        for at in 0..self.len() {
            let held = self.get_mut(at);
            if held.urgency(aging) < urgency {
                held.passed = held.passed.saturating_add(placed);
            }
        }
    }
}
