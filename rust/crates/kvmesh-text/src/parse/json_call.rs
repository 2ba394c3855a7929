//! A call as a JSON object: `{"name": ..., "arguments": {...}}` with keys in any order, `parameters` for `arguments`,
//! and, as OpenAI's API has it, perhaps within `{"function": ...}`.

use super::{
    body::{Body, Rules, Step},
    delta::{Delta, Emitter},
    json_value::{Part, ValueEnd},
};

/// One object. The call is begun once its name and the start of its arguments are known, in either order.
pub struct JsonCall {
    rules: Rules,
    at: At,
    /// Objects open around the current one.
    nested: usize,
    /// The current key or value, where it is read whole.
    text: String,
    end: ValueEnd,
    name: Option<String>,
    arguments: bool,
    /// Arguments that came before the name.
    early: String,
    begun: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Open,
    /// Before a key, a comma or the end of the object.
    Key,
    InKey,
    Colon,
    Value,
    InValue(Use),
}

/// What a value is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Name,
    /// A list or object, passed on as it comes.
    Arguments,
    /// Anything else in the arguments' place: JSON within a string, or null.
    OddArguments,
    Nothing,
}

impl JsonCall {
    /// Before the first byte.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            at: At::Open,
            nested: 0,
            text: String::new(),
            end: ValueEnd::default(),
            name: None,
            arguments: false,
            early: String::new(),
            begun: false,
        }
    }

    fn begin_if_known(&mut self, emitter: &mut Emitter, out: &mut Delta) {
        if let (Some(name), true, false) = (&self.name, self.arguments, self.begun) {
            self.begun = true;
            emitter.call(None, name.clone(), out);
            emitter.arguments(&std::mem::take(&mut self.early), out);
        }
    }

    fn argument(&mut self, piece: &str, emitter: &mut Emitter, out: &mut Delta) {
        if self.begun {
            emitter.arguments(piece, out);
        } else {
            self.early.push_str(piece);
        }
    }

    /// A value begins with `byte`; the key is in `text`.
    fn value_begins(&mut self, byte: u8, emitter: &mut Emitter, out: &mut Delta) {
        let key = std::mem::take(&mut self.text);
        self.at = match (key.as_str(), byte) {
            ("function" | "tool_call", b'{') => {
                self.nested += 1;
                self.at = At::Open;
                return;
            }
            ("name", _) if self.name.is_none() => At::InValue(Use::Name),
            ("arguments" | "parameters", _) if !self.arguments => {
                self.arguments = true;
                self.begin_if_known(emitter, out);
                At::InValue(match byte {
                    b'{' | b'[' => Use::Arguments,
                    _ => Use::OddArguments,
                })
            }
            _ => At::InValue(Use::Nothing),
        };
        self.end = ValueEnd::default();
    }

    /// A value has ended; false when it shows that this is no call.
    fn value_ends(&mut self, purpose: Use, emitter: &mut Emitter, out: &mut Delta) -> bool {
        self.at = At::Key;
        let text = std::mem::take(&mut self.text);
        match purpose {
            Use::Name => match serde_json::from_str::<String>(&text) {
                Ok(name) if self.rules.allow(&name) => {
                    self.name = Some(name);
                    self.begin_if_known(emitter, out);
                }
                _ => return false,
            },
            Use::OddArguments => {
                let arguments = match serde_json::from_str(&text) {
                    Ok(serde_json::Value::String(inner)) => inner,
                    Ok(serde_json::Value::Null) => "{}".to_owned(),
                    _ => text,
                };
                self.argument(&arguments, emitter, out);
            }
            Use::Arguments | Use::Nothing => {}
        }
        true
    }

    /// The outermost object has ended; false when it was no call.
    fn object_ends(&mut self, emitter: &mut Emitter, out: &mut Delta) -> bool {
        if self.begun {
            return true;
        }
        if self.name.is_none() || !self.rules.name_suffices {
            return false;
        }
        self.arguments = true;
        self.early = "{}".to_owned();
        self.begin_if_known(emitter, out);
        true
    }
}

impl Body for JsonCall {
    fn feed(&mut self, input: &str, emitter: &mut Emitter, out: &mut Delta) -> Step {
        let bytes = input.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            let byte = bytes[at];
            match (self.at, byte) {
                (At::InValue(purpose), _) => {
                    let from = at;
                    let mut ended = false;
                    while at < bytes.len() && !ended {
                        match self.end.next(bytes[at]) {
                            Part::Inside => at += 1,
                            Part::Last => {
                                at += 1;
                                ended = true;
                            }
                            Part::Behind => ended = true,
                        }
                    }
                    let piece = &input[from..at];
                    match purpose {
                        Use::Arguments => self.argument(piece, emitter, out),
                        Use::Name | Use::OddArguments => self.text.push_str(piece),
                        Use::Nothing => {}
                    }
                    if ended && !self.value_ends(purpose, emitter, out) {
                        return Step::Failed(at);
                    }
                    continue;
                }
                (At::InKey, _) => {
                    // Names of keys that matter hold neither quotes nor escapes; others need not be read right.
                    let length = input[at..].find('"');
                    let end = length.map_or(bytes.len(), |length| at + length);
                    self.text.push_str(&input[at..end]);
                    at = end;
                    if length.is_some() {
                        at += 1;
                        if self.text.ends_with('\\') {
                            self.text.push('"');
                        } else {
                            self.at = At::Colon;
                        }
                    }
                    continue;
                }
                (_, b' ' | b'\t' | b'\n' | b'\r') => {}
                (At::Value, _) => {
                    self.value_begins(byte, emitter, out);
                    continue;
                }
                (At::Open, b'{') => self.at = At::Key,
                (At::Key, b'"') => self.at = At::InKey,
                (At::Key, b',') => {}
                (At::Colon, b':') => self.at = At::Value,
                (At::Key, b'}') if self.nested > 0 => self.nested -= 1,
                (At::Key, b'}') => {
                    return if self.object_ends(emitter, out) {
                        Step::Done(at + 1)
                    } else {
                        Step::Failed(at + 1)
                    };
                }
                // Other text ends a call that has been shown, and shows that there is none before.
                _ if self.begun => return Step::Done(at),
                _ => return Step::Failed(at),
            }
            at += 1;
        }
        Step::More
    }
}
