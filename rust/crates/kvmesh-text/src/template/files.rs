//! The chat templates and special tokens that a checkpoint's files hold.

use std::{collections::BTreeMap, fs, io, path::Path};

use kvmesh_core::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

/// What templates are rendered from, before any is compiled.
#[derive(Default)]
pub struct TemplateFiles {
    /// Sources by name; the only one, or the one for all cases without their own, is "default".
    pub sources: BTreeMap<String, String>,
    /// Texts of special tokens by their names ("bos_token"), which templates use as variables.
    pub special_tokens: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Many(Vec<Named>),
}

/// Reads `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`, `chat_template.json` and
/// `additional_chat_templates/`, as far as they are there; the `.jinja` files come before the others.
///
/// InvalidArgument for a file that cannot be read.
pub fn read(directory: &Path) -> Result<TemplateFiles> {
    let mut files = TemplateFiles::default();
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
        let Some(config) = json(&directory.join(name))? else {
            continue;
        };
        files.special_tokens.extend(special_tokens(&config));
    }
    for name in ["chat_template.json", "tokenizer_config.json"] {
        let config = json(&directory.join(name))?.unwrap_or_default();
        match config.get("chat_template").filter(|value| !value.is_null()) {
            None => {}
            Some(value) => match serde_json::from_value(value.clone()) {
                Ok(Templates::One(source)) => {
                    files.sources.insert("default".to_owned(), source);
                }
                Ok(Templates::Many(many)) => files
                    .sources
                    .extend(many.into_iter().map(|each| (each.name, each.template))),
                Err(_) => {
                    return Err(Error::invalid(
                        "chat_template must be a text or a list of named texts",
                    )
                    .with_context("file", name));
                }
            },
        }
    }
    if let Some(source) = text(&directory.join("chat_template.jinja"))? {
        files.sources.insert("default".to_owned(), source);
    }
    if let Ok(entries) = fs::read_dir(directory.join("additional_chat_templates")) {
        for entry in entries.flatten() {
            let path = entry.path();
            let name = path.file_stem().and_then(|stem| stem.to_str());
            if let (Some(name), Some("jinja")) = (name, path.extension().and_then(|e| e.to_str())) {
                if let Some(source) = text(&path)? {
                    files.sources.insert(name.to_owned(), source);
                }
            }
        }
    }
    Ok(files)
}

/// `*_token` fields: a text, or an object whose `content` is one.
fn special_tokens(config: &Map<String, Value>) -> impl Iterator<Item = (String, String)> + '_ {
    let own = config
        .iter()
        .filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_"));
    let extra = ["extra_special_tokens", "model_specific_special_tokens"]
        .into_iter()
        .filter_map(|name| config.get(name)?.as_object())
        .flatten();
    own.chain(extra).filter_map(|(name, value)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        Some((name.clone(), text.to_owned()))
    })
}

fn json(path: &Path) -> Result<Option<Map<String, Value>>> {
    let Some(text) = text(path)? else {
        return Ok(None);
    };
    serde_json::from_str(&text).map(Some).map_err(|error| {
        Error::invalid(format!("not a JSON object: {error}")).with_context("file", path.display())
    })
}

fn text(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::invalid(error.to_string()).with_context("file", path.display())),
    }
}
