//! One answer: token ids in, what a client sees out.

use kvmesh_core::Result;

use crate::{
    detokenizer::Detokenizer,
    model::TextModel,
    parse::{Delta, Reasoning, ReasoningFormat, ToolCalls, ToolFormat},
    stop::StopStrings,
};

/// How an answer's text is read.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// The text ends before the one of these that is complete first.
    pub stops: Vec<String>,
    /// A [`ToolFormat`] by name; `None`: calls are text.
    pub tool_format: Option<String>,
    /// The functions that can be called; a call of another is text. Empty means any.
    pub tool_names: Vec<String>,
    /// A [`ReasoningFormat`] by name; `None`: reasoning is text.
    pub reasoning_format: Option<String>,
    /// Whether the answer begins within reasoning; `None`: as the format's name says.
    pub in_reasoning: Option<bool>,
    /// Special tokens have no text, but those that mark calls and reasoning of the formats above.
    pub skip_special: bool,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            stops: Vec::new(),
            tool_format: None,
            tool_names: Vec::new(),
            reasoning_format: None,
            in_reasoning: None,
            skip_special: true,
        }
    }
}

/// Reads one answer. What [`feed`](Self::feed) and [`flush`](Self::flush) give adds up to the same however the ids
/// are cut.
pub struct TextStream {
    detokenizer: Detokenizer,
    stops: StopStrings,
    reasoning: Option<Reasoning>,
    tools: Option<ToolCalls>,
    tokens: usize,
    reasoning_tokens: usize,
    /// Tokens before it is known whether they are reasoning.
    undecided: usize,
}

impl TextStream {
    /// InvalidArgument for a format of no known name.
    pub fn new(model: &TextModel, options: &StreamOptions) -> Result<Self> {
        let tools = options
            .tool_format
            .as_deref()
            .map(ToolFormat::parse)
            .transpose()?;
        let reasoning = options
            .reasoning_format
            .as_deref()
            .map(ReasoningFormat::parse)
            .transpose()?;
        let vocabulary = model.vocabulary();
        let marks = tools.into_iter().flat_map(ToolFormat::markers);
        let marks = marks.chain(reasoning.into_iter().flat_map(|f| [f.start, f.end]));
        let keep = marks
            .filter_map(|mark| vocabulary.tokenizer().token_to_id(mark))
            .filter(|&id| vocabulary.is_special(id))
            .collect();
        Ok(Self {
            detokenizer: Detokenizer::new(vocabulary.clone(), options.skip_special, keep),
            stops: StopStrings::new(options.stops.iter().cloned()),
            reasoning: reasoning.map(|format| {
                Reasoning::new(format, options.in_reasoning.unwrap_or(format.starts_inside))
            }),
            tools: tools.map(|format| ToolCalls::new(format, &options.tool_names)),
            tokens: 0,
            reasoning_tokens: 0,
            undecided: 0,
        })
    }

    /// What these ids make certain. Behind a stop string nothing more is.
    pub fn feed(&mut self, ids: &[u32]) -> Delta {
        let mut delta = Delta::default();
        let mut text = String::new();
        let mut shown = String::new();
        for &id in ids {
            if self.stops.matched().is_some() {
                break;
            }
            self.tokens += 1;
            text.clear();
            self.detokenizer.feed(id, &mut text);
            if self.stops.is_empty() {
                std::mem::swap(&mut text, &mut shown);
            } else {
                shown.clear();
                self.stops.feed(&text, &mut shown);
            }
            self.read(&shown, &mut delta);
        }
        delta
    }

    /// The rest, once no more ids come, also after a stop string.
    pub fn flush(&mut self) -> Delta {
        let mut delta = Delta::default();
        let mut shown = String::new();
        if self.stops.matched().is_none() {
            let mut text = String::new();
            self.detokenizer.flush(&mut text);
            self.stops.feed(&text, &mut shown);
            self.stops.flush(&mut shown);
        }
        let mut answer = shown;
        if let Some(reasoning) = &mut self.reasoning {
            let text = std::mem::take(&mut answer);
            reasoning.feed(&text, &mut delta.reasoning, &mut answer);
            reasoning.finish(&mut delta.reasoning, &mut answer);
        }
        match &mut self.tools {
            Some(tools) => {
                tools.feed(&answer, &mut delta);
                tools.finish(&mut delta);
            }
            None => delta.content.push_str(&answer),
        }
        delta
    }

    /// The stop string that ended the answer.
    pub fn matched(&self) -> Option<&str> {
        self.stops.matched()
    }

    /// Ids read so far, up to the one that completed a stop string.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many of them were reasoning, its marks included.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    /// One token's text.
    fn read(&mut self, text: &str, delta: &mut Delta) {
        let Some(reasoning) = &mut self.reasoning else {
            return self.answer(text, delta);
        };
        let was_inside = reasoning.is_inside();
        let mut answer = String::new();
        reasoning.feed(text, &mut delta.reasoning, &mut answer);
        if reasoning.is_open() {
            self.undecided += 1;
        } else if reasoning.is_inside() || was_inside {
            self.reasoning_tokens += 1 + std::mem::take(&mut self.undecided);
        }
        self.answer(&answer, delta);
    }

    fn answer(&mut self, text: &str, delta: &mut Delta) {
        match &mut self.tools {
            Some(tools) => tools.feed(text, delta),
            None => delta.content.push_str(text),
        }
    }
}
