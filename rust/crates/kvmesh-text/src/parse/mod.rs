//! What a model's text holds besides the answer: reasoning and tool calls, found as the text comes.

mod body;
mod delta;
mod header_call;
mod json_call;
mod json_value;
mod markers;
mod python_call;
mod python_literal;
mod reasoning;
mod tools;

pub use delta::{Delta, ToolCallDelta};
pub use reasoning::{Reasoning, ReasoningFormat};
pub use tools::{ToolCalls, ToolFormat};
