//! A model's text: its tokenizer, its chat templates, and the formats they show.

use std::{path::Path, sync::Arc};

use kvmesh_core::{Error, ErrorKind, Result};
use tokenizers::Tokenizer;

use crate::{
    detokenizer::Detokenizer,
    fewest::Fewest,
    parse::{ReasoningFormat, ToolFormat},
    segments::Segments,
    template::{ChatTemplates, Conversation},
    vocabulary::Vocabulary,
};

/// Tokens at a prompt's end that may hold the start of reasoning.
const PROMPT_TAIL: usize = 16;
/// Bytes that most texts have of each token: with fewer, finding out that a text is too long repays nothing.
const USUAL: usize = 4;

/// What a text became.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// Its token ids.
    Tokens(Vec<u32>),
    /// Nothing: it has at least so many tokens, more than were allowed.
    Beyond(usize),
}

/// What a checkpoint's tokenizer files say. Immutable; shared by threads.
pub struct TextModel {
    vocabulary: Arc<Vocabulary>,
    segments: Option<Segments>,
    fewest: Option<Fewest>,
    templates: ChatTemplates,
    tool_format: Option<&'static ToolFormat>,
    reasoning_format: Option<ReasoningFormat>,
}

impl TextModel {
    /// Reads `tokenizer.json` and the files of [`ChatTemplates::load`]; takes up to seconds.
    ///
    /// NotFound without a `tokenizer.json`, InvalidArgument for files that cannot be read.
    pub fn load(directory: &Path) -> Result<Self> {
        let file = directory.join("tokenizer.json");
        let here = |error: Error| error.with_context("file", file.display());
        if !file.is_file() {
            return Err(here(Error::new(
                ErrorKind::NotFound,
                "there is no tokenizer.json",
            )));
        }
        let mut tokenizer =
            Tokenizer::from_file(&file).map_err(|error| here(Error::invalid(error.to_string())))?;
        // Some files carry what their training wanted; a prompt is what it is.
        tokenizer
            .with_truncation(None)
            .map_err(|error| here(Error::invalid(error.to_string())))?;
        tokenizer.with_padding(None);
        let vocabulary = Vocabulary::new(tokenizer).map_err(here)?;
        let templates = ChatTemplates::load(directory)?;
        let source = templates.source(true).unwrap_or_default();
        Ok(Self {
            tool_format: ToolFormat::of_template(source),
            reasoning_format: ReasoningFormat::of_template(source),
            segments: Segments::of(vocabulary.tokenizer()),
            fewest: Fewest::of(&vocabulary),
            vocabulary: Arc::new(vocabulary),
            templates,
        })
    }

    /// The vocabulary.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// The chat templates; there may be none.
    pub fn templates(&self) -> &ChatTemplates {
        &self.templates
    }

    /// The format of tool calls that the template shows.
    pub fn tool_format(&self) -> Option<&'static ToolFormat> {
        self.tool_format
    }

    /// The format of reasoning that the template shows.
    pub fn reasoning_format(&self) -> Option<ReasoningFormat> {
        self.reasoning_format
    }

    /// Token ids of a text. `add_special_tokens`: with those that the model wants around a plain prompt. A text that is
    /// certain to have more than `limit` tokens before it is tokenized is not; one with somewhat more may be.
    pub fn encode(&self, text: &str, add_special_tokens: bool, limit: usize) -> Result<Encoded> {
        if let Some(count) = self.beyond(text, limit) {
            return Ok(Encoded::Beyond(count));
        }
        let encoding = self
            .vocabulary
            .tokenizer()
            .encode_fast(text, add_special_tokens)
            .map_err(|error| Error::invalid(error.to_string()))?;
        Ok(Encoded::Tokens(encoding.get_ids().to_vec()))
    }

    /// Token ids of a conversation. The template has written the special tokens. What the conversation shares with
    /// earlier ones of the same `scope` is not tokenized again, where the tokenizer allows it. `limit` is as for
    /// [`Self::encode`].
    pub fn encode_chat(
        &self,
        conversation: &Conversation,
        scope: &str,
        limit: usize,
    ) -> Result<Encoded> {
        let text = self.templates.render(conversation)?;
        let Some(segments) = &self.segments else {
            return self.encode(&text, false, limit);
        };
        match self.beyond(&text, limit) {
            Some(count) => Ok(Encoded::Beyond(count)),
            None => segments.encode(self.vocabulary.tokenizer(), &text, scope, limit),
        }
    }

    fn beyond(&self, text: &str, limit: usize) -> Option<usize> {
        if text.len() / USUAL <= limit {
            return None;
        }
        self.fewest.as_ref()?.beyond(text, limit)
    }

    /// The text of all of an output's ids at once.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut detokenizer =
            Detokenizer::new(Arc::clone(&self.vocabulary), skip_special, Vec::new());
        let mut text = String::new();
        for &id in ids {
            detokenizer.feed(id, &mut text);
        }
        detokenizer.flush(&mut text);
        text
    }

    /// Whether a prompt ends within reasoning of a format, so that its answer begins there; its last tokens are enough.
    /// `None` where it does not say: it ends with neither mark.
    pub fn opens_reasoning(&self, prompt: &[u32], format: ReasoningFormat) -> Option<bool> {
        let tail = &prompt[prompt.len().saturating_sub(PROMPT_TAIL)..];
        format.opened_by(&self.decode(tail, false))
    }
}
