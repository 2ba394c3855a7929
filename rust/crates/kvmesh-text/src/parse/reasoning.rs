//! Reasoning apart from the answer: `<think>` and its kin, at the start of the text only.

use kvmesh_core::{Error, Result};

use super::markers::open_end;

/// How a model marks its reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasoningFormat {
    /// Its name in configurations.
    pub name: &'static str,
    /// What reasoning begins with.
    pub start: &'static str,
    /// What it ends with.
    pub end: &'static str,
    /// The prompt already holds the start, unless the caller knows better.
    pub starts_inside: bool,
}

const fn format(
    name: &'static str,
    start: &'static str,
    end: &'static str,
    inside: bool,
) -> ReasoningFormat {
    ReasoningFormat {
        name,
        start,
        end,
        starts_inside: inside,
    }
}

/// All formats; those found in templates come first among equals.
const FORMATS: [ReasoningFormat; 8] = [
    format("think", "<think>", "</think>", false),
    format("deepseek-r1", "<think>", "</think>", true),
    format("deepseek-v3", "<think>", "</think>", false),
    format("qwen3", "<think>", "</think>", false),
    format("qwen3-thinking", "<think>", "</think>", true),
    format("glm45", "<think>", "</think>", false),
    format("kimi", "◁think▷", "◁/think▷", false),
    format("mistral", "[THINK]", "[/THINK]", false),
];

impl ReasoningFormat {
    /// The names of all formats.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FORMATS.into_iter().map(|format| format.name)
    }

    /// The format of this name.
    pub fn named(name: &str) -> Option<Self> {
        FORMATS.into_iter().find(|format| format.name == name)
    }

    /// As [`named`](Self::named); InvalidArgument for no known name.
    pub fn parse(name: &str) -> Result<Self> {
        Self::named(name)
            .ok_or_else(|| Error::invalid("no such reasoning format").with_context("name", name))
    }

    /// The format that a chat template speaks of.
    pub fn of_template(source: &str) -> Option<Self> {
        FORMATS
            .into_iter()
            .find(|format| source.contains(format.start) || source.contains(format.end))
    }

    /// Whether a prompt ends within reasoning, so that the answer begins with it; `None` where it ends with neither
    /// mark.
    pub fn opened_by(&self, prompt: &str) -> Option<bool> {
        let prompt = prompt.trim_end();
        let closed = || prompt.ends_with(self.end).then_some(false);
        prompt.ends_with(self.start).then_some(true).or_else(closed)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before any text; reasoning begins only with its start.
    Start,
    /// Before any text of reasoning, which may yet begin with its start.
    Opened,
    /// Behind the start, before any text of reasoning.
    Lead,
    Inside,
    /// Behind the end, before any text of the answer.
    Between,
    Answer,
}

/// Splits one text. Whitespace around the reasoning is left out.
pub struct Reasoning {
    format: ReasoningFormat,
    at: At,
    held: String,
}

impl Reasoning {
    /// `inside`: the text begins with reasoning.
    pub fn new(format: ReasoningFormat, inside: bool) -> Self {
        Self {
            format,
            at: if inside { At::Opened } else { At::Start },
            held: String::new(),
        }
    }

    /// Whether reasoning has begun and not ended.
    pub fn is_inside(&self) -> bool {
        matches!(self.at, At::Opened | At::Lead | At::Inside)
    }

    /// Whether it is not known yet if the text begins with reasoning.
    pub fn is_open(&self) -> bool {
        self.at == At::Start
    }

    /// Adds what is certain to `reasoning` and `answer`.
    pub fn feed(&mut self, text: &str, reasoning: &mut String, answer: &mut String) {
        if self.at == At::Answer {
            answer.push_str(text);
            return;
        }
        self.held.push_str(text);
        while self.step(reasoning, answer) {}
    }

    /// Goes on to the next state with what is held; false when that takes more text.
    fn step(&mut self, reasoning: &mut String, answer: &mut String) -> bool {
        match self.at {
            At::Start | At::Opened => {
                let begun = self.held.trim_start();
                if let Some(rest) = begun.strip_prefix(self.format.start) {
                    self.held = rest.to_owned();
                    self.at = At::Lead;
                } else if self.format.start.starts_with(begun) {
                    return false;
                } else if self.at == At::Opened {
                    self.at = At::Lead;
                } else {
                    self.at = At::Answer;
                }
            }
            At::Lead | At::Between => {
                self.held = self.held.trim_start().to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.at = match self.at {
                    At::Lead => At::Inside,
                    _ => At::Answer,
                };
            }
            At::Inside => {
                let end = self.held.find(self.format.end);
                let certain = end
                    .unwrap_or_else(|| self.held.len() - open_end(&self.held, &[self.format.end]));
                let shown = self.held[..certain].trim_end().len();
                reasoning.push_str(&self.held[..shown]);
                match end {
                    Some(end) => self.held.drain(..end + self.format.end.len()),
                    None => self.held.drain(..shown),
                };
                if end.is_none() {
                    return false;
                }
                self.at = At::Between;
            }
            At::Answer => {
                answer.push_str(&std::mem::take(&mut self.held));
                return false;
            }
        }
        true
    }

    /// The text has ended.
    pub fn finish(&mut self, reasoning: &mut String, answer: &mut String) {
        let held = std::mem::take(&mut self.held);
        match self.at {
            At::Start | At::Answer => answer.push_str(&held),
            At::Opened | At::Lead => reasoning.push_str(held.trim()),
            At::Inside => reasoning.push_str(held.trim_end()),
            At::Between => {}
        }
    }
}
