//! Tool calls in a text: which formats there are, and the walk from text to calls that all of them share.

use kvmesh_core::{Error, Result};

use super::{
    body::{Body, Rules, Step},
    delta::{CallIds, Delta, Emitter},
    header_call::{self, HeaderCall},
    json_call::JsonCall,
    markers::{find, may_begin, open_end},
    python_call::PythonCall,
};

/// How a model writes calls.
pub struct ToolFormat {
    /// Its names in configurations.
    pub names: &'static [&'static str],
    /// What a call begins with.
    begin: &'static [&'static str],
    /// First characters that begin a call at the very start of the text, without a mark.
    bare: &'static [char],
    /// Characters besides whitespace between that and the call.
    lead: &'static [char],
    /// Marks that are no text wherever they stand.
    ignored: &'static [&'static str],
    /// What may stand behind a call and is no text.
    behind: &'static [&'static str],
    /// Whether the next call begins with this character, without a mark.
    again: fn(char) -> bool,
    ids: CallIds,
    name_suffices: bool,
    body: fn(Rules, char) -> Box<dyn Body>,
}

const NEVER: fn(char) -> bool = |_| false;
const BRACE: fn(char) -> bool = |c| c == '{';

const PLAIN: ToolFormat = ToolFormat {
    names: &[],
    begin: &[],
    bare: &[],
    lead: &[],
    ignored: &[],
    behind: &[],
    again: NEVER,
    ids: CallIds::OpenAi,
    name_suffices: true,
    body: |rules, _| Box::new(JsonCall::new(rules)),
};

/// All formats.
static FORMATS: [ToolFormat; 7] = [
    ToolFormat {
        names: &["hermes", "qwen", "qwen25", "qwen3"],
        begin: &["<tool_call>"],
        behind: &["</tool_call>"],
        again: BRACE,
        ..PLAIN
    },
    ToolFormat {
        names: &["mistral"],
        begin: &["[TOOL_CALLS]"],
        lead: &['['],
        behind: &[",", "]"],
        again: BRACE,
        ids: CallIds::Mistral,
        body: |rules, first| match first {
            '{' => Box::new(JsonCall::new(rules)),
            _ => Box::new(HeaderCall::new(rules, header_call::mistral)),
        },
        ..PLAIN
    },
    ToolFormat {
        names: &["llama3", "llama3_json"],
        begin: &["<|python_tag|>"],
        bare: &['{'],
        behind: &[";", ","],
        again: BRACE,
        name_suffices: false,
        ..PLAIN
    },
    ToolFormat {
        names: &["pythonic", "llama4_pythonic"],
        begin: &["<|python_start|>"],
        bare: &['['],
        lead: &['['],
        behind: &[",", "]", "<|python_end|>"],
        again: |c| c.is_alphabetic() || c == '_',
        body: |rules, _| Box::new(PythonCall::new(rules)),
        ..PLAIN
    },
    ToolFormat {
        names: &["deepseek", "deepseek_v3", "deepseek_v31"],
        begin: &["<｜tool▁call▁begin｜>"],
        ignored: &["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
        behind: &["```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"],
        body: |rules, _| Box::new(HeaderCall::new(rules, header_call::deepseek)),
        ..PLAIN
    },
    ToolFormat {
        names: &["kimi_k2"],
        begin: &["<|tool_call_begin|>"],
        ignored: &["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"],
        behind: &["<|tool_call_end|>", "<|tool_calls_section_end|>"],
        body: |rules, _| Box::new(HeaderCall::new(rules, header_call::kimi)),
        ..PLAIN
    },
    // What constrained decoding yields where a call is required.
    ToolFormat {
        names: &["json"],
        bare: &['{', '['],
        lead: &['['],
        behind: &[",", ";", "]"],
        again: BRACE,
        ..PLAIN
    },
];

impl ToolFormat {
    /// The names of all formats.
    pub fn all_names() -> impl Iterator<Item = &'static str> {
        FORMATS.iter().flat_map(|format| format.names).copied()
    }

    /// The format of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        FORMATS.iter().find(|format| format.names.contains(&name))
    }

    /// As [`named`](Self::named); InvalidArgument for no known name.
    pub fn parse(name: &str) -> Result<&'static Self> {
        Self::named(name)
            .ok_or_else(|| Error::invalid("no such tool-call format").with_context("name", name))
    }

    /// The format that a chat template writes earlier calls in.
    pub fn of_template(source: &str) -> Option<&'static Self> {
        let name = if !source.contains("tools") && !source.contains("tool_calls") {
            return None;
        } else if source.contains("<tool_call>") {
            // Calls within it that are no JSON objects are other formats.
            if source.contains("<function=") || source.contains("<arg_key>") {
                return None;
            }
            "hermes"
        } else if source.contains("[TOOL_CALLS]") {
            "mistral"
        } else if source.contains("<|tool_call_begin|>") {
            "kimi_k2"
        } else if source.contains("<｜tool▁call▁begin｜>") {
            "deepseek"
        } else if source.contains("<|python_start|>") || source.contains("[func_name1(") {
            "pythonic"
        } else if source.contains("<|python_tag|>") || source.contains("\"parameters\": ") {
            "llama3_json"
        } else {
            return None;
        };
        Self::named(name)
    }

    /// The name by which it is known.
    pub fn name(&self) -> &'static str {
        self.names[0]
    }

    /// Texts that are special tokens of some vocabularies and must be seen all the same.
    pub fn markers(&self) -> impl Iterator<Item = &'static str> {
        // Marks that stand within calls belong to the headers' readers.
        const WITHIN: [&str; 4] = [
            "[ARGS]",
            "[CALL_ID]",
            "<｜tool▁sep｜>",
            "<|tool_call_argument_begin|>",
        ];
        let marks = [self.begin, self.ignored, self.behind];
        marks.into_iter().flatten().copied().chain(WITHIN)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before any text.
    Start,
    Text,
    /// Behind a mark, before the call.
    Lead,
    Call,
    Behind,
}

/// Takes the calls out of one text.
pub struct ToolCalls {
    format: &'static ToolFormat,
    rules: Rules,
    emitter: Emitter,
    at: At,
    held: String,
    body: Option<Box<dyn Body>>,
    /// What was taken since the mark, while no call has been shown since.
    unshown: String,
    calls_before: u32,
}

impl ToolCalls {
    /// `names`: the functions that can be called; a call of another is text. Empty means any.
    pub fn new(format: &'static ToolFormat, names: &[String]) -> Self {
        Self {
            format,
            rules: Rules {
                names: names.into(),
                name_suffices: format.name_suffices,
            },
            emitter: Emitter::new(format.ids),
            at: At::Start,
            held: String::new(),
            body: None,
            unshown: String::new(),
            calls_before: 0,
        }
    }

    /// Adds what is certain to `out`.
    pub fn feed(&mut self, text: &str, out: &mut Delta) {
        self.held.push_str(text);
        while !self.held.is_empty() && self.step(out) {}
    }

    /// The text has ended; what was no whole call is text.
    pub fn finish(&mut self, out: &mut Delta) {
        let held = std::mem::take(&mut self.held);
        let unshown = std::mem::take(&mut self.unshown);
        match self.at {
            At::Start | At::Text => self.emitter.content(&held, out),
            At::Lead | At::Call => {
                self.emitter.content(&unshown, out);
                self.emitter.content(&held, out);
            }
            At::Behind => {}
        }
        self.emitter.finish(out);
    }

    /// Goes on with what is held; false when that takes more text.
    fn step(&mut self, out: &mut Delta) -> bool {
        match self.at {
            At::Start => {
                let Some(first) = self.held.trim_start().chars().next() else {
                    return false;
                };
                if self.format.bare.contains(&first) {
                    let lead = self.held.len() - self.held.trim_start().len();
                    self.unshown = self.held.drain(..lead).collect();
                    self.at = At::Lead;
                } else {
                    self.at = At::Text;
                }
                true
            }
            At::Text => self.text(out),
            At::Lead => {
                let lead = |c: char| c.is_whitespace() || self.format.lead.contains(&c);
                let length = self.held.find(|c| !lead(c)).unwrap_or(self.held.len());
                self.unshown.extend(self.held.drain(..length));
                let Some(first) = self.held.chars().next() else {
                    return false;
                };
                self.body = Some((self.format.body)(self.rules.clone(), first));
                self.calls_before = self.emitter.calls();
                self.at = At::Call;
                true
            }
            At::Call => self.call(out),
            At::Behind => self.behind(),
        }
    }

    fn text(&mut self, out: &mut Delta) -> bool {
        let marks: Vec<&'static str> = [self.format.begin, self.format.ignored].concat();
        let Some((at, mark)) = find(&self.held, &marks) else {
            let safe = self.held.len() - open_end(&self.held, &marks);
            self.emitter.content(&self.held[..safe], out);
            self.held.drain(..safe);
            return false;
        };
        self.emitter.content(&self.held[..at], out);
        self.held.drain(..at + mark.len());
        if self.format.begin.contains(&mark) {
            self.unshown = mark.to_owned();
            self.at = At::Lead;
        }
        true
    }

    fn call(&mut self, out: &mut Delta) -> bool {
        let Some(body) = self.body.as_mut() else {
            self.at = At::Text;
            return true;
        };
        let step = body.feed(&self.held, &mut self.emitter, out);
        let used = match step {
            Step::More => self.held.len(),
            Step::Done(used) | Step::Failed(used) => used,
        };
        let begun = self.emitter.calls() > self.calls_before;
        if begun {
            self.unshown.clear();
            self.held.drain(..used);
        } else {
            self.unshown.extend(self.held.drain(..used));
        }
        match step {
            Step::More => return false,
            Step::Done(_) => self.at = At::Behind,
            Step::Failed(_) => {
                self.emitter
                    .content(&std::mem::take(&mut self.unshown), out);
                self.at = At::Text;
            }
        }
        true
    }

    fn behind(&mut self) -> bool {
        let rest = self.held.trim_start();
        let space = self.held.len() - rest.len();
        let behind = self.format.behind;
        let known = behind.iter().find(|mark| rest.starts_with(**mark));
        if let Some(mark) = known {
            self.held.drain(..space + mark.len());
        } else if may_begin(rest, behind) || may_begin(rest, self.format.begin) {
            // Nothing but whitespace, too.
            return false;
        } else if rest.starts_with(self.format.again) {
            self.unshown = self.held.drain(..space).collect();
            self.at = At::Lead;
        } else {
            self.at = At::Text;
        }
        true
    }
}
