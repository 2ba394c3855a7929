//! The contract of one call as a format writes it, between markers that are not its concern.

use std::sync::Arc;

use super::delta::{Delta, Emitter};

/// What became of a body's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// All of it was taken, and more is needed.
    More,
    /// The call ended; so many bytes of the input belong to it.
    Done(usize),
    /// This is no call, as so many bytes of the input show.
    Failed(usize),
}

/// Reads one call from a text that comes in pieces. What it emits depends on the text alone, not on the pieces.
pub trait Body: Send + Sync {
    /// The next piece. Nothing follows `Done` and `Failed`.
    fn feed(&mut self, input: &str, emitter: &mut Emitter, out: &mut Delta) -> Step;
}

/// What counts as a call.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The functions there are; empty means any name.
    pub names: Arc<[String]>,
    /// A name alone makes a call without arguments. Where it does not, an object without arguments is text.
    pub name_suffices: bool,
}

impl Rules {
    /// Whether a function of this name can be called.
    pub fn allow(&self, name: &str) -> bool {
        !name.is_empty() && (self.names.is_empty() || self.names.iter().any(|each| each == name))
    }
}
