//! The text of requests and answers: chat templates, tokens, stop strings, reasoning and tool calls.
//!
//! A [`TextModel`] is what a checkpoint's tokenizer files say, shared by all requests; a [`TextStream`] turns the
//! token ids of one answer into what a client sees.

mod detokenizer;
mod fewest;
mod model;
mod parse;
mod segments;
mod stop;
mod stream;
mod template;
mod vocabulary;

pub use detokenizer::Detokenizer;
pub use fewest::Fewest;
pub use model::{Encoded, TextModel};
pub use parse::{Delta, Reasoning, ReasoningFormat, ToolCallDelta, ToolCalls, ToolFormat};
pub use segments::Segments;
pub use stop::StopStrings;
pub use stream::{StreamOptions, TextStream};
pub use template::{ChatTemplates, Conversation, TemplateFiles};
pub use vocabulary::{Decoding, Vocabulary};
