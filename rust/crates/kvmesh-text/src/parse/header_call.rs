//! A call as a name before the arguments' JSON object, with a format's own marks between them.

use super::{
    body::{Body, Rules, Step},
    delta::{Delta, Emitter},
    json_value::{Part, ValueEnd},
};

/// Longer than any name with its marks; text that goes on beyond it is no call.
const LONGEST_HEADER: usize = 512;

/// A call's id, where the model gave one, and name.
pub struct Header {
    /// The model's own id.
    pub id: Option<String>,
    /// The function's name.
    pub name: String,
}

/// Reads what stands before the arguments.
pub type ReadHeader = fn(&str) -> Option<Header>;

/// One call.
pub struct HeaderCall {
    rules: Rules,
    read: ReadHeader,
    header: String,
    end: Option<ValueEnd>,
}

impl HeaderCall {
    /// Before the first byte; `read` knows the format.
    pub fn new(rules: Rules, read: ReadHeader) -> Self {
        Self {
            rules,
            read,
            header: String::new(),
            end: None,
        }
    }
}

impl Body for HeaderCall {
    fn feed(&mut self, input: &str, emitter: &mut Emitter, out: &mut Delta) -> Step {
        let mut at = 0;
        if self.end.is_none() {
            let brace = input.find('{');
            at = brace.unwrap_or(input.len());
            let room = LONGEST_HEADER.saturating_sub(self.header.len());
            if at > room {
                // Counted in whole characters, so that it does not matter how the text was cut.
                let over = input.char_indices().map(|(at, c)| at + c.len_utf8());
                return Step::Failed(over.take_while(|end| *end <= room).last().unwrap_or(0));
            }
            self.header.push_str(&input[..at]);
            if brace.is_none() {
                return Step::More;
            }
            match (self.read)(&self.header) {
                Some(header) if self.rules.allow(&header.name) => {
                    emitter.call(header.id, header.name, out);
                }
                _ => return Step::Failed(at),
            }
            self.end = Some(ValueEnd::default());
        }
        let from = at;
        let end = self.end.get_or_insert_default();
        for &byte in &input.as_bytes()[from..] {
            at += 1;
            if end.next(byte) == Part::Last {
                emitter.arguments(&input[from..at], out);
                return Step::Done(at);
            }
        }
        emitter.arguments(&input[from..], out);
        Step::More
    }
}

/// `NAME`, `NAME[ARGS]` and `NAME[CALL_ID]ID[ARGS]` (Mistral from its version 11 tokenizers on).
pub fn mistral(header: &str) -> Option<Header> {
    let header = header.trim();
    let header = header.strip_suffix("[ARGS]").unwrap_or(header);
    let (name, id) = match header.split_once("[CALL_ID]") {
        Some((name, id)) => (name, Some(id.to_owned())),
        None => (header, None),
    };
    let word = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    name.chars().all(word).then(|| Header {
        id,
        name: name.to_owned(),
    })
}

/// `function<｜tool▁sep｜>NAME` and a fence (V3, R1), and `NAME<｜tool▁sep｜>` (V3.1 and after).
pub fn deepseek(header: &str) -> Option<Header> {
    let (before, after) = header.split_once("<｜tool▁sep｜>")?;
    let after = after.trim();
    let after = after.strip_suffix("```json").unwrap_or(after).trim();
    let name = if after.is_empty() {
        before.trim()
    } else {
        after
    };
    Some(Header {
        id: None,
        name: name.to_owned(),
    })
}

/// `functions.NAME:INDEX<|tool_call_argument_begin|>`; all before the mark is the id (Kimi K2).
pub fn kimi(header: &str) -> Option<Header> {
    let (id, _) = header.split_once("<|tool_call_argument_begin|>")?;
    let id = id.trim();
    let (name, _) = id.rsplit_once(':')?;
    let name = name.strip_prefix("functions.").unwrap_or(name);
    Some(Header {
        id: Some(id.to_owned()),
        name: name.to_owned(),
    })
}
