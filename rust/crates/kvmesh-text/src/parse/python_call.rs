//! A call as Python: `name(key=value, ...)` with literals as values.

use super::{
    body::{Body, Rules, Step},
    delta::{Delta, Emitter},
    python_literal::Literals,
};

/// One call, shown when it is whole: what a literal is in JSON is known at its end.
pub struct PythonCall {
    rules: Rules,
    text: String,
    /// Open brackets; 0 within the name.
    depth: usize,
    quote: Option<char>,
    escaped: bool,
}

impl PythonCall {
    /// Before the first byte.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            text: String::new(),
            depth: 0,
            quote: None,
            escaped: false,
        }
    }

    /// Whether the call may go on with `c`.
    fn next(&mut self, c: char) -> bool {
        match (self.quote, c) {
            (Some(_), _) if self.escaped => self.escaped = false,
            (Some(_), '\\') => self.escaped = true,
            (Some(quote), _) if c == quote => self.quote = None,
            (Some(_), _) => {}
            (None, '(') => self.depth += 1,
            (None, _) if self.depth == 0 => return c.is_alphanumeric() || "_.-".contains(c),
            (None, '\'' | '"') => self.quote = Some(c),
            (None, '[' | '{') => self.depth += 1,
            (None, ')' | ']' | '}') => self.depth -= 1,
            (None, _) => {}
        }
        true
    }
}

impl Body for PythonCall {
    fn feed(&mut self, input: &str, emitter: &mut Emitter, out: &mut Delta) -> Step {
        for (at, c) in input.char_indices() {
            if !self.next(c) {
                return Step::Failed(at);
            }
            self.text.push(c);
            if c == ')' && self.depth == 0 && self.quote.is_none() {
                let end = at + 1;
                return match read(&self.text) {
                    Some((name, arguments)) if self.rules.allow(name) => {
                        emitter.call(None, name.to_owned(), out);
                        emitter.arguments(&arguments, out);
                        Step::Done(end)
                    }
                    _ => Step::Failed(end),
                };
            }
        }
        Step::More
    }
}

/// The name and the arguments' JSON.
fn read(text: &str) -> Option<(&str, String)> {
    let (name, arguments) = text.strip_suffix(')')?.split_once('(')?;
    let mut literals = Literals::new(arguments);
    let mut json = String::from("{");
    while !literals.at_end() {
        if json.len() > 1 {
            literals.token(',')?;
            json.push_str(", ");
            // A comma may stand behind the last.
            if literals.at_end() {
                json.truncate(json.len() - 2);
                break;
            }
        }
        let key = literals.identifier()?;
        literals.token('=')?;
        json.push_str(&format!("\"{key}\": "));
        literals.value(&mut json)?;
    }
    json.push('}');
    Some((name, json))
}
