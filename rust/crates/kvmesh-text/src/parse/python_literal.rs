//! Python literals as JSON: strings, numbers, `True`, `False`, `None`, lists, tuples and dicts.

/// Deeper ones are no arguments.
const DEEPEST: usize = 64;

/// Reads literals off the start of a text. `None` wherever the text is something else.
pub struct Literals<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Literals<'a> {
    /// At the start of `text`.
    pub fn new(text: &'a str) -> Self {
        Self {
            rest: text,
            depth: 0,
        }
    }

    /// Whether nothing but whitespace is left.
    pub fn at_end(&mut self) -> bool {
        self.rest = self.rest.trim_start();
        self.rest.is_empty()
    }

    /// Takes one character, and whitespace before it.
    pub fn token(&mut self, c: char) -> Option<()> {
        self.rest = self.rest.trim_start().strip_prefix(c)?;
        Some(())
    }

    /// Takes a name, and whitespace before it.
    pub fn identifier(&mut self) -> Option<&'a str> {
        self.rest = self.rest.trim_start();
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let end = self.rest.find(|c| !word(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        name.starts_with(|c: char| c.is_alphabetic() || c == '_')
            .then_some(name)
    }

    /// Takes a value and adds its JSON to `json`.
    pub fn value(&mut self, json: &mut String) -> Option<()> {
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            '\'' | '"' => {
                let mut text = self.string()?;
                // Strings that stand together are one.
                loop {
                    self.rest = self.rest.trim_start();
                    if !self.rest.starts_with(['\'', '"']) {
                        break;
                    }
                    text += &self.string()?;
                }
                json.push_str(&serde_json::to_string(&text).ok()?);
            }
            '[' => self.sequence('[', ']', json)?,
            '(' => self.sequence('(', ')', json)?,
            '{' => self.dict(json)?,
            c if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => {
                json.push_str(&self.number()?)
            }
            _ => json.push_str(match self.identifier()? {
                "True" | "true" => "true",
                "False" | "false" => "false",
                "None" | "null" => "null",
                _ => return None,
            }),
        }
        Some(())
    }

    fn sequence(&mut self, open: char, close: char, json: &mut String) -> Option<()> {
        self.token(open)?;
        json.push('[');
        self.items(close, json, Self::value)?;
        json.push(']');
        Some(())
    }

    fn dict(&mut self, json: &mut String) -> Option<()> {
        self.token('{')?;
        json.push('{');
        self.items('}', json, |literals, json| {
            let mut key = String::new();
            literals.value(&mut key)?;
            // JSON's keys are strings.
            if !key.starts_with('"') {
                key = format!("\"{key}\"");
            }
            literals.token(':')?;
            json.push_str(&key);
            json.push_str(": ");
            literals.value(json)
        })?;
        json.push('}');
        Some(())
    }

    fn items(
        &mut self,
        close: char,
        json: &mut String,
        item: impl Fn(&mut Self, &mut String) -> Option<()>,
    ) -> Option<()> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        let mut first = true;
        while self.token(close).is_none() {
            if !first {
                self.token(',')?;
                if self.token(close).is_some() {
                    break;
                }
                json.push_str(", ");
            }
            first = false;
            item(self, json)?;
        }
        self.depth -= 1;
        Some(())
    }

    fn number(&mut self) -> Option<String> {
        let part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.' | '_');
        let end = self.rest.find(|c| !part(c)).unwrap_or(self.rest.len());
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        let text = text.trim_start_matches('+').replace('_', "");
        // What JSON writes the same way stays as it is.
        if serde_json::from_str::<serde_json::Number>(&text).is_ok() {
            return Some(text);
        }
        let float: f64 = text.parse().ok()?;
        serde_json::Number::from_f64(float).map(|number| number.to_string())
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.rest.chars().next()?;
        let mut chars = self.rest.char_indices().skip(1);
        let mut text = String::new();
        loop {
            let (at, c) = chars.next()?;
            match c {
                c if c == quote => {
                    self.rest = &self.rest[at + 1..];
                    return Some(text);
                }
                '\\' => match chars.next()?.1 {
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    'r' => text.push('\r'),
                    '\n' => {}
                    c @ ('\\' | '\'' | '"') => text.push(c),
                    kind @ ('x' | 'u' | 'U') => {
                        let count = match kind {
                            'x' => 2,
                            'u' => 4,
                            _ => 8,
                        };
                        let digits: String = chars.by_ref().take(count).map(|(_, c)| c).collect();
                        let code = u32::from_str_radix(&digits, 16).ok()?;
                        text.push(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
                    }
                    c => {
                        // Python keeps what it does not know.
                        text.push('\\');
                        text.push(c);
                    }
                },
                c => text.push(c),
            }
        }
    }
}
