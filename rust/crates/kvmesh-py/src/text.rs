//! `TextModel` and `TextStream`: the text of requests and answers.

use std::{path::PathBuf, sync::Arc};

use kvmesh_text::{
    Conversation, Delta, Encoded, ReasoningFormat, StreamOptions, TextModel, TextStream,
};
use pyo3::{
    exceptions::PyOverflowError,
    prelude::*,
    types::{PyBytes, PyTuple},
};

use crate::{error::to_py, integers::Tokens};

/// What a checkpoint's tokenizer files say: tokens, chat templates, the formats of tool calls and reasoning.
///
/// Immutable; any thread may use it. Methods that may take long release the GIL.
#[pyclass(name = "TextModel", module = "kvmesh.core", frozen)]
pub struct PyTextModel(Arc<TextModel>);

#[pymethods]
impl PyTextModel {
    /// Read the files of a directory; takes up to seconds. Raises KeyError without a `tokenizer.json`, ValueError for
    /// files that cannot be read.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let model = py.detach(|| TextModel::load(&path)).map_err(to_py)?;
        Ok(Self(Arc::new(model)))
    }

    /// Whether conversations can be rendered.
    #[getter]
    fn has_chat_template(&self) -> bool {
        self.0.templates().any()
    }

    /// The name of the tool-call format that the chat template shows.
    #[getter]
    fn tool_format(&self) -> Option<&'static str> {
        self.0.tool_format().map(|format| format.name())
    }

    /// The name of the reasoning format that the chat template shows.
    #[getter]
    fn reasoning_format(&self) -> Option<&'static str> {
        self.0.reasoning_format().map(|format| format.name)
    }

    /// One more than the largest token id.
    #[getter]
    fn vocab_size(&self) -> u32 {
        self.0.vocabulary().size()
    }

    /// The text of a conversation, by the chat template. `messages_json`, `tools_json`: JSON lists of objects as
    /// templates take them; `args_json`: a JSON object of further variables, or None. Raises ValueError, with the
    /// template's own words where it refuses the conversation.
    #[allow(clippy::too_many_arguments, reason = "mostly optional in Python")]
    #[pyo3(signature = (messages_json, tools_json=None, args_json=None, add_generation_prompt=true, continue_final_message=false))]
    fn render(
        &self,
        py: Python<'_>,
        messages_json: &[u8],
        tools_json: Option<&[u8]>,
        args_json: Option<&[u8]>,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> PyResult<String> {
        let conversation = Conversation {
            messages: messages_json,
            tools: tools_json,
            args: args_json.unwrap_or_default(),
            add_generation_prompt,
            continue_final_message,
        };
        py.detach(|| self.0.templates().render(&conversation))
            .map_err(to_py)
    }

    /// Token ids of a text. `add_special_tokens`: with those that the model wants around a plain prompt. Raises
    /// OverflowError, with a number of tokens that it has at least, for a text that is seen to have more than `limit`
    /// before all of it is tokenized.
    #[pyo3(signature = (text, add_special_tokens=false, limit=None))]
    fn encode(
        &self,
        py: Python<'_>,
        text: &str,
        add_special_tokens: bool,
        limit: Option<usize>,
    ) -> PyResult<Vec<u32>> {
        let limit = limit.unwrap_or(usize::MAX);
        tokens(py.detach(|| self.0.encode(text, add_special_tokens, limit)))
    }

    /// Token ids of what `render` gives. What it shares with earlier ones of the same scope is not tokenized again.
    /// `limit` is as for `encode`.
    #[allow(clippy::too_many_arguments, reason = "mostly optional in Python")]
    #[pyo3(signature = (messages_json, tools_json=None, args_json=None, add_generation_prompt=true, continue_final_message=false, scope="", limit=None))]
    fn encode_chat(
        &self,
        py: Python<'_>,
        messages_json: &[u8],
        tools_json: Option<&[u8]>,
        args_json: Option<&[u8]>,
        add_generation_prompt: bool,
        continue_final_message: bool,
        scope: &str,
        limit: Option<usize>,
    ) -> PyResult<Vec<u32>> {
        let conversation = Conversation {
            messages: messages_json,
            tools: tools_json,
            args: args_json.unwrap_or_default(),
            add_generation_prompt,
            continue_final_message,
        };
        let limit = limit.unwrap_or(usize::MAX);
        tokens(py.detach(|| self.0.encode_chat(&conversation, scope, limit)))
    }

    /// The text of all of an output's ids at once. Unknown ids have none.
    #[pyo3(signature = (token_ids, skip_special=true))]
    fn decode(&self, py: Python<'_>, token_ids: Tokens, skip_special: bool) -> String {
        py.detach(|| self.0.decode(&token_ids.0, skip_special))
    }

    /// One token's text and bytes, by itself: the bytes may be part of a character, which the text shows as U+FFFD.
    /// Empty for an unknown id.
    fn token<'py>(&self, py: Python<'py>, token_id: u32) -> PyResult<Bound<'py, PyTuple>> {
        let bytes = self.0.vocabulary().token_bytes(token_id);
        let text = String::from_utf8_lossy(&bytes);
        (text, PyBytes::new(py, &bytes)).into_pyobject(py)
    }

    /// The id of a token by its text in the vocabulary ("<|im_end|>"), or None.
    fn token_id(&self, token: &str) -> Option<u32> {
        self.0.vocabulary().tokenizer().token_to_id(token)
    }

    /// Whether the token is special: part of the protocol, not of the text.
    fn is_special(&self, token_id: u32) -> bool {
        self.0.vocabulary().is_special(token_id)
    }

    /// Whether a prompt ends within reasoning of a format (None: `reasoning_format`), so that its answer begins there;
    /// its last 16 tokens are enough. None where it ends with neither mark. Raises ValueError for a format of no known
    /// name.
    #[pyo3(signature = (token_ids, reasoning_format=None))]
    fn opens_reasoning(
        &self,
        token_ids: Tokens,
        reasoning_format: Option<&str>,
    ) -> PyResult<Option<bool>> {
        let format = match reasoning_format {
            Some(name) => Some(ReasoningFormat::parse(name).map_err(to_py)?),
            None => self.0.reasoning_format(),
        };
        Ok(format.and_then(|format| self.0.opens_reasoning(&token_ids.0, format)))
    }
}

/// What one step adds to an answer; any part may be empty.
#[pyclass(name = "TextDelta", module = "kvmesh.core", frozen, get_all)]
pub struct PyTextDelta {
    /// The answer's text.
    content: String,
    /// What the model thought before.
    reasoning: String,
    /// Pieces of tool calls: (index, id, name, piece of the arguments' JSON). `id` and `name` come with a call's first
    /// piece and are None after it.
    tool_calls: Vec<(u32, Option<String>, Option<String>, String)>,
}

fn tokens(encoded: kvmesh_core::Result<Encoded>) -> PyResult<Vec<u32>> {
    match encoded.map_err(to_py)? {
        Encoded::Tokens(tokens) => Ok(tokens),
        Encoded::Beyond(least) => Err(PyOverflowError::new_err(least)),
    }
}

impl From<Delta> for PyTextDelta {
    fn from(delta: Delta) -> Self {
        let calls = delta.tool_calls.into_iter();
        Self {
            content: delta.content,
            reasoning: delta.reasoning,
            tool_calls: calls
                .map(|call| (call.index, call.id, call.name, call.arguments))
                .collect(),
        }
    }
}

#[pymethods]
impl PyTextDelta {
    fn __bool__(&self) -> bool {
        !(self.content.is_empty() && self.reasoning.is_empty() && self.tool_calls.is_empty())
    }
}

/// Reads one answer: token ids in, what a client sees out. It adds up to the same however the ids are cut.
#[pyclass(name = "TextStream", module = "kvmesh.core")]
pub struct PyTextStream(TextStream);

#[pymethods]
impl PyTextStream {
    /// `stops`: the text ends before the one that is complete first. `tool_format`, `reasoning_format`: names, or None
    /// where calls or reasoning are to be text. `tool_names`: the functions there are; a call of another is text;
    /// empty means any. `in_reasoning`: whether the answer begins within reasoning (`TextModel.opens_reasoning`); None
    /// means as the format's name says. `skip_special`: special tokens have no text, but those that mark calls and
    /// reasoning. Raises ValueError for a format of no known name.
    #[new]
    #[allow(clippy::too_many_arguments, reason = "mostly optional in Python")]
    #[pyo3(signature = (model, stops=None, tool_format=None, tool_names=None, reasoning_format=None, in_reasoning=None, skip_special=true))]
    fn new(
        model: &PyTextModel,
        stops: Option<Vec<String>>,
        tool_format: Option<String>,
        tool_names: Option<Vec<String>>,
        reasoning_format: Option<String>,
        in_reasoning: Option<bool>,
        skip_special: bool,
    ) -> PyResult<Self> {
        let options = StreamOptions {
            stops: stops.unwrap_or_default(),
            tool_format,
            tool_names: tool_names.unwrap_or_default(),
            reasoning_format,
            in_reasoning,
            skip_special,
        };
        TextStream::new(&model.0, &options).map(Self).map_err(to_py)
    }

    /// What these ids make certain. Behind a stop string nothing more is.
    fn feed(&mut self, token_ids: Tokens) -> PyTextDelta {
        self.0.feed(&token_ids.0).into()
    }

    /// The rest, once no more ids come, also after a stop string.
    fn flush(&mut self) -> PyTextDelta {
        self.0.flush().into()
    }

    /// The stop string that ended the answer, or None.
    #[getter]
    fn matched(&self) -> Option<&str> {
        self.0.matched()
    }

    /// Ids read so far, up to the one that completed a stop string.
    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens()
    }

    /// How many of them were reasoning, its marks included.
    #[getter]
    fn reasoning_tokens(&self) -> usize {
        self.0.reasoning_tokens()
    }
}
