//! The environment that chat templates are written for: jinja2 as `transformers` sets it up
//! (`utils/chat_template_utils.py`).

use std::fmt;

use jiff::{Zoned, fmt::strtime};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, Value,
    syntax::SyntaxConfig,
    value::{ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::json::tojson;

/// What a template itself raises; travels as an error's source.
#[derive(Debug)]
pub struct Refusal(pub String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// An environment without templates.
pub fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    // Only delimiters can be wrong, and these are jinja's own.
    env.set_syntax(syntax.build().unwrap_or_default());
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let refusal = Refusal(message.to_string());
    Err(Error::new(ErrorKind::InvalidOperation, refusal.0.clone()).with_source(refusal))
}

/// The local time now, in `strftime`'s notation.
fn strftime_now(format: &str) -> Result<String, Error> {
    strtime::format(format, &Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// Python's methods: minijinja-contrib's, and those that templates use beyond them.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str()) {
        match name {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "partition" => {
                let (by,): (&str,) = from_args(args)?;
                return Ok(match text.split_once(by) {
                    Some((before, after)) => texts([before, by, after]),
                    None => texts([text, "", ""]),
                });
            }
            "rpartition" => {
                let (by,): (&str,) = from_args(args)?;
                return Ok(match text.rsplit_once(by) {
                    Some((before, after)) => texts([before, by, after]),
                    None => texts(["", "", text]),
                });
            }
            "rsplit" => {
                let (by, most): (&str, Option<usize>) = from_args(args)?;
                let parts = most.map_or(usize::MAX, |most| most.saturating_add(1));
                let mut pieces: Vec<&str> = text.rsplitn(parts, by).collect();
                pieces.reverse();
                return Ok(texts(pieces));
            }
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    texts.into_iter().map(str::to_owned).collect()
}
