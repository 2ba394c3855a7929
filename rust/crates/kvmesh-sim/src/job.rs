//! What goes into an engine and what comes out.

use std::rc::Rc;

use serde::{Deserialize, Serialize};

/// An engine's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Blocks in the pool.
    pub blocks: u32,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Tokens in a pass.
    pub pass_tokens: u32,
    /// Requests admitted at once.
    pub max_running: usize,
}

/// A request as an engine sees it.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its position in the trace.
    pub request: usize,
    /// Prompt tokens.
    pub prompt: u32,
    /// Tokens to generate, at least 1.
    pub output: u32,
    /// Hashes of the prompt's whole blocks.
    pub chain: Rc<[u64]>,
    /// Whether another engine generates.
    pub prefill_only: bool,
}

/// What a pass brought about.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A prompt was admitted.
    Admitted {
        /// Its position in the trace.
        request: usize,
        /// Tokens found cached, in any tier.
        cached: u32,
        /// Of them, those brought up from below the device.
        onboarded: u32,
    },
    /// A prompt has been computed.
    Prefilled {
        /// Its position in the trace.
        request: usize,
        /// Where its blocks are until `release`, if another engine generates.
        slot: usize,
    },
    /// The last token is out.
    Finished {
        /// The request's position in the trace.
        request: usize,
    },
    /// Blocks `from..to` of a chain are cached.
    Stored {
        /// A prompt's blocks.
        chain: Rc<[u64]>,
        /// The first that is new.
        from: usize,
        /// Behind the last.
        to: usize,
    },
    /// Blocks are gone.
    Removed(Vec<u64>),
}
