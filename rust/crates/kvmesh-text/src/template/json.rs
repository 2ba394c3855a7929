//! `tojson` as `transformers` gives it to templates: Python's `json.dumps` with `ensure_ascii=False` by default.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args},
};

/// The filter; its parameters are `json.dumps`'s, in the order in which `transformers` takes them.
pub fn tojson(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    type Positional = (
        Option<bool>,
        Option<Value>,
        Option<Value>,
        Option<bool>,
        Kwargs,
    );
    let args = args.into_values();
    let (ensure_ascii, indent, separators, sort_keys, named): Positional = from_args(&args)?;
    let ensure_ascii = match ensure_ascii {
        Some(given) => Some(given),
        None => named.get("ensure_ascii")?,
    };
    let indent = match indent {
        Some(given) => Some(given),
        None => named.get::<Option<Value>>("indent")?,
    };
    let separators = match separators {
        Some(given) => Some(given),
        None => named.get::<Option<Value>>("separators")?,
    };
    let sort_keys = match sort_keys {
        Some(given) => Some(given),
        None => named.get("sort_keys")?,
    };
    named.assert_all_used()?;
    let indent = indent.filter(|indent| !indent.is_none());
    let (item, key) = match separators.filter(|pair| !pair.is_none()) {
        Some(pair) => (
            pair.get_item_by_index(0)?.to_string(),
            pair.get_item_by_index(1)?.to_string(),
        ),
        None => (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ),
    };
    let mut writer = Writer {
        out: String::new(),
        ensure_ascii: ensure_ascii.unwrap_or(false),
        indent: indent.map(unit).transpose()?,
        item,
        key,
        sort_keys: sort_keys.unwrap_or(false),
    };
    writer.value(value, 0)?;
    Ok(Value::from(writer.out))
}

/// One level of indentation: so many spaces, or the string itself.
fn unit(indent: Value) -> Result<String, Error> {
    match indent.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Ok(" ".repeat(i64::try_from(indent)?.clamp(0, 64) as usize)),
    }
}

struct Writer {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container('[', ']', depth, items.len(), |writer, at| {
                    writer.value(&items[at], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for name in value.try_iter()? {
                    entries.push((key(&name)?, value.get_item(&name)?));
                }
                if self.sort_keys {
                    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.container('{', '}', depth, entries.len(), |writer, at| {
                    let (name, value) = &entries[at];
                    writer.string(name);
                    let separator = std::mem::take(&mut writer.key);
                    writer.out.push_str(&separator);
                    writer.key = separator;
                    writer.value(value, depth + 1)
                })?;
            }
            kind => return Err(unserializable(&kind.to_string())),
        }
        Ok(())
    }

    fn container(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        count: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for at in 0..count {
            if at > 0 {
                self.out.push_str(&self.item);
            }
            self.new_line(depth + 1);
            write(self, at)?;
        }
        if count > 0 {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(unit) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(unit);
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A key as Python writes it: numbers, booleans and None become strings.
fn key(name: &Value) -> Result<String, Error> {
    match name.kind() {
        ValueKind::String => Ok(name.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(name.is_true().to_string()),
        ValueKind::Number => number(name),
        kind => Err(unserializable(&kind.to_string())),
    }
}

/// Python's shortest form: an exponent, of two digits at least, below 1e-4 and from 1e16 on.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let float = f64::try_from(value.clone())?;
    if float.is_nan() {
        return Ok("NaN".to_owned());
    }
    if float.is_infinite() {
        return Ok(if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned());
    }
    // Rust's debug form has the same borders.
    let text = format!("{float:?}");
    Ok(match text.split_once('e') {
        Some((mantissa, exponent)) => {
            let (sign, digits) = match exponent.strip_prefix('-') {
                Some(digits) => ('-', digits),
                None => ('+', exponent),
            };
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        None => text,
    })
}

fn unserializable(what: &str) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("a value of type {what} is not JSON serializable"),
    )
}
