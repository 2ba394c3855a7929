//! Made-up prompts.

/// A block's hash, from a prompt and the block's position in it.
pub fn block(prompt: u64, at: u64) -> u64 {
    ((prompt << 32) | at).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
