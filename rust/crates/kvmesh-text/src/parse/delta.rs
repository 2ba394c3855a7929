//! What one step adds to an answer.

/// A piece of a tool call. `id` and `name` come with the first piece of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCallDelta {
    /// The call's place among the answer's calls, from 0.
    pub index: u32,
    /// Unique among all calls of all answers.
    pub id: Option<String>,
    /// The function to call.
    pub name: Option<String>,
    /// A piece of the arguments' JSON, as the model wrote it.
    pub arguments: String,
}

/// What one step adds to an answer; any part may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// The answer's text.
    pub content: String,
    /// What the model thought before.
    pub reasoning: String,
    /// In order; of each call at most one piece.
    pub tool_calls: Vec<ToolCallDelta>,
}

impl Delta {
    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.content.is_empty() && self.reasoning.is_empty() && self.tool_calls.is_empty()
    }
}

/// How ids of calls are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CallIds {
    /// `call_` and 24 hexadecimal digits.
    #[default]
    OpenAi,
    /// Nine letters and digits, which Mistral's templates insist on.
    Mistral,
}

impl CallIds {
    fn make(self) -> String {
        let mut random = [0; 12];
        // The system's source fails on no system that runs this; ids need not be secret.
        let _ = getrandom::fill(&mut random);
        match self {
            Self::OpenAi => {
                let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("call_{digits}")
            }
            Self::Mistral => random[..9]
                .iter()
                .map(|byte| char::from_digit(u32::from(byte % 36), 36).unwrap_or('0'))
                .collect(),
        }
    }
}

/// Writes text and calls into [`Delta`]s. Whitespace around calls belongs to the format, not to the content, so the
/// content's last whitespace is held back until it is known what follows.
#[derive(Default)]
pub struct Emitter {
    ids: CallIds,
    calls: u32,
    whitespace: String,
}

impl Emitter {
    /// Ids of calls will be `ids`.
    pub fn new(ids: CallIds) -> Self {
        Self {
            ids,
            ..Self::default()
        }
    }

    /// Calls begun so far.
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// Adds text.
    pub fn content(&mut self, text: &str, out: &mut Delta) {
        let shown = text.trim_end();
        if !shown.is_empty() {
            out.content.push_str(&self.whitespace);
            out.content.push_str(shown);
            self.whitespace.clear();
        }
        self.whitespace.push_str(&text[shown.len()..]);
    }

    /// Begins a call; its arguments follow.
    pub fn call(&mut self, id: Option<String>, name: String, out: &mut Delta) {
        self.whitespace.clear();
        out.tool_calls.push(ToolCallDelta {
            index: self.calls,
            id: Some(id.unwrap_or_else(|| self.ids.make())),
            name: Some(name),
            arguments: String::new(),
        });
        self.calls += 1;
    }

    /// Adds to the arguments of the call begun last.
    pub fn arguments(&mut self, piece: &str, out: &mut Delta) {
        if piece.is_empty() {
            return;
        }
        let index = self.calls.saturating_sub(1);
        match out.tool_calls.last_mut() {
            Some(call) if call.index == index => call.arguments.push_str(piece),
            _ => out.tool_calls.push(ToolCallDelta {
                index,
                arguments: piece.to_owned(),
                ..ToolCallDelta::default()
            }),
        }
    }

    /// The text has ended. Whitespace at the end stays where there was no call.
    pub fn finish(&mut self, out: &mut Delta) {
        if self.calls == 0 {
            out.content.push_str(&self.whitespace);
        }
        self.whitespace.clear();
    }
}
