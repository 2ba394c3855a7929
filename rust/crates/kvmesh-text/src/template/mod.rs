//! Chat templates: a conversation as the text a model was trained on, the same text that `transformers` renders.

mod environment;
mod files;
mod generation;
mod json;

use std::{collections::BTreeMap, path::Path};

use kvmesh_core::{Error, Result};
use minijinja::{Environment, Value};

use environment::{Refusal, environment};
pub use files::TemplateFiles;

/// Marks the end of what is to be continued; the space shows whether the template trims. As in `transformers`.
const CONTINUE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// What is to be rendered. Byte slices hold JSON.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conversation<'a> {
    /// A list of messages (objects), as templates take them.
    pub messages: &'a [u8],
    /// A list of tools (objects), or none.
    pub tools: Option<&'a [u8]>,
    /// More variables of the template, an object; those that this struct sets cannot be set. May be empty.
    pub args: &'a [u8],
    /// End with the start of the assistant's answer.
    pub add_generation_prompt: bool,
    /// End inside the last message, which the answer continues; no generation prompt is added then.
    pub continue_final_message: bool,
}

/// The chat templates of one model, compiled.
pub struct ChatTemplates {
    env: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    /// Why a template is not in `env`, by name.
    broken: BTreeMap<String, String>,
    sources: BTreeMap<String, String>,
}

impl ChatTemplates {
    /// Reads and compiles what the checkpoint's directory holds; a broken template is an error of its use.
    pub fn load(directory: &Path) -> Result<Self> {
        files::read(directory).map(Self::new)
    }

    /// Compiles templates.
    pub fn new(files: TemplateFiles) -> Self {
        let mut env = environment();
        let mut broken = BTreeMap::new();
        for (name, source) in &files.sources {
            let source = generation::without_generation_tags(source).into_owned();
            if let Err(error) = env.add_template_owned(name.clone(), source) {
                broken.insert(name.clone(), error.to_string());
            }
        }
        Self {
            env,
            special_tokens: files.special_tokens,
            broken,
            sources: files.sources,
        }
    }

    /// Whether there is any template.
    pub fn any(&self) -> bool {
        !self.sources.is_empty()
    }

    /// The source of the template that conversations with or without tools are rendered by.
    pub fn source(&self, tools: bool) -> Option<&str> {
        Some(&self.sources[self.choose(tools)?])
    }

    /// The text of a conversation. InvalidArgument where the input is not what [`Conversation`] says, where the
    /// template refuses it (with the template's words), and where there is no template.
    pub fn render(&self, conversation: &Conversation) -> Result<String> {
        let tools = conversation
            .tools
            .map(|tools| list(tools, "tools"))
            .transpose()?;
        let Some(name) = self.choose(tools.is_some()) else {
            return Err(Error::invalid("the model has no chat template"));
        };
        if let Some(why) = self.broken.get(name) {
            return Err(Error::invalid(format!("the template is broken: {why}")));
        }
        let mut messages = list(conversation.messages, "messages")?;
        if conversation.continue_final_message {
            messages = mark_end(&messages)?;
        }
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, token) in &self.special_tokens {
            context.insert(name, Value::from(token.as_str()));
        }
        let args: BTreeMap<String, Value> = match conversation.args {
            b"" => BTreeMap::new(),
            args => serde_json::from_slice(args).map_err(|error| {
                Error::invalid(format!("template arguments must be a JSON object: {error}"))
            })?,
        };
        for (name, value) in &args {
            context.insert(name, value.clone());
        }
        context.insert("messages", messages);
        context.insert("tools", tools.unwrap_or_else(|| Value::from(())));
        context
            .entry("documents")
            .or_insert_with(|| Value::from(()));
        let prompt = conversation.add_generation_prompt && !conversation.continue_final_message;
        context.insert("add_generation_prompt", Value::from(prompt));
        let text = self
            .env
            .get_template(name)
            .and_then(|template| template.render(Value::from_pairs(context)))
            .map_err(|error| Error::invalid(reason(&error)))?;
        if conversation.continue_final_message {
            return cut_at_mark(text);
        }
        Ok(text)
    }

    fn choose(&self, tools: bool) -> Option<&str> {
        let has = |name: &&str| self.sources.contains_key(*name);
        Some("tool_use")
            .filter(|_| tools)
            .filter(has)
            .or(Some("default").filter(has))
            .or(self.sources.keys().next().map(String::as_str))
    }
}

/// The template's own words where it refused, the engine's otherwise.
fn reason(error: &minijinja::Error) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(each) = cause {
        if let Some(refusal) = each.downcast_ref::<Refusal>() {
            return refusal.0.clone();
        }
        cause = each.source();
    }
    error.to_string()
}

fn list(json: &[u8], what: &str) -> Result<Value> {
    serde_json::from_slice::<Vec<Value>>(json)
        .map(Value::from)
        .map_err(|error| Error::invalid(format!("{what} must be a JSON list: {error}")))
}

/// The messages with [`CONTINUE_MARK`] behind the last text of the last one.
fn mark_end(messages: &Value) -> Result<Value> {
    let nothing = || Error::invalid("the final message has no text to continue");
    let mut all: Vec<Value> = messages.try_iter().map_err(|_| nothing())?.collect();
    let last = all.pop().ok_or_else(nothing)?;
    let content = last.get_attr("content").unwrap_or_default();
    let marked = if let Some(text) = content.as_str() {
        Value::from(format!("{text}{CONTINUE_MARK}"))
    } else {
        let mut parts: Vec<Value> = content.try_iter().map_err(|_| nothing())?.collect();
        let with_text = |part: &Value| part.get_attr("text").unwrap_or_default().as_str().is_some();
        let at = parts.iter().rposition(with_text).ok_or_else(nothing)?;
        let text = parts[at].get_attr("text").unwrap_or_default();
        parts[at] = with_entry(&parts[at], "text", format!("{text}{CONTINUE_MARK}").into());
        Value::from(parts)
    };
    all.push(with_entry(&last, "content", marked));
    Ok(Value::from(all))
}

fn with_entry(map: &Value, name: &str, value: Value) -> Value {
    let keys = map.try_iter().into_iter().flatten();
    Value::from_pairs(keys.map(|key| {
        let value = match key.as_str() {
            Some(key) if key == name => value.clone(),
            _ => map.get_item(&key).unwrap_or_default(),
        };
        (key, value)
    }))
}

fn cut_at_mark(mut text: String) -> Result<String> {
    let Some(at) = text.rfind(CONTINUE_MARK.trim_end()) else {
        return Err(Error::invalid(
            "the template leaves the final message out, or changes it; it cannot be continued",
        ));
    };
    let spaces_kept = text[at..].starts_with(CONTINUE_MARK);
    text.truncate(at);
    if !spaces_kept {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}
