//! Token ids to text, a few at a time, with the text of a full decode.

use std::sync::Arc;

use crate::vocabulary::{Decoding, Vocabulary};

/// An unfinished character at the end decodes to this.
const CUT: char = char::REPLACEMENT_CHARACTER;
/// Bytes of one run of byte tokens that are held back until the run is seen whole: one bad byte makes all of it
/// U+FFFD. A longer run is let go as far as it is good.
const LONGEST_RUN: usize = 256;
/// More U+FFFD at the end than this are no open end but garbage, which need not wait.
const LONGEST_OPEN_END: usize = 64;
/// Tokens decoded again with every step, beyond which the window moves on.
const WINDOW: usize = 16;

/// Decodes one output. What [`feed`](Self::feed) and [`flush`](Self::flush) add makes the decoding of all ids at
/// once, and no piece shows half a character that a later one completes.
pub struct Detokenizer {
    vocabulary: Arc<Vocabulary>,
    skip_special: bool,
    /// Special tokens that have text all the same.
    keep: Vec<u32>,
    state: State,
}

enum State {
    /// The bytes of an unfinished character.
    ByteLevel(Vec<u8>),
    ByteFallback(Run),
    Neighbours(Window),
}

impl Detokenizer {
    /// `skip_special`: special tokens have no text, but those in `keep`.
    pub fn new(vocabulary: Arc<Vocabulary>, skip_special: bool, keep: Vec<u32>) -> Self {
        let state = match vocabulary.decoding() {
            Decoding::ByteLevel => State::ByteLevel(Vec::new()),
            Decoding::ByteFallback { strip } => State::ByteFallback(Run {
                strip,
                ..Run::default()
            }),
            Decoding::Neighbours => State::Neighbours(Window::default()),
        };
        Self {
            vocabulary,
            skip_special,
            keep,
            state,
        }
    }

    /// Adds the text that this id makes certain; may be none.
    pub fn feed(&mut self, id: u32, out: &mut String) {
        let vocabulary = &*self.vocabulary;
        let skipped = self.skip_special && vocabulary.is_special(id) && !self.keep.contains(&id);
        if skipped || !vocabulary.knows(id) {
            return;
        }
        match &mut self.state {
            State::ByteLevel(open) => {
                let bytes = vocabulary.table_bytes(id);
                if open.is_empty() {
                    if let Ok(text) = std::str::from_utf8(bytes) {
                        out.push_str(text);
                        return;
                    }
                }
                open.extend_from_slice(bytes);
                drain_lossy(open, out);
            }
            State::ByteFallback(run) if vocabulary.is_byte(id) => {
                run.byte(vocabulary.table_bytes(id)[0], out);
            }
            State::ByteFallback(run) => {
                run.end(out);
                // Bytes of a token, which is a text.
                run.push(&String::from_utf8_lossy(vocabulary.table_bytes(id)), out);
            }
            State::Neighbours(window) => window.feed(vocabulary, id, out),
        }
    }

    /// Adds the rest, once no more ids come; an unfinished character is U+FFFD.
    pub fn flush(&mut self, out: &mut String) {
        match &mut self.state {
            State::ByteLevel(open) => {
                if !open.is_empty() {
                    out.push(CUT);
                    open.clear();
                }
            }
            State::ByteFallback(run) => run.end(out),
            State::Neighbours(window) => {
                let text = window.decode(&self.vocabulary);
                out.push_str(text.get(window.sent..).unwrap_or_default());
                *window = Window::default();
            }
        }
    }
}

/// Moves what is certain from `open` to `out`, as `String::from_utf8_lossy` reads it.
fn drain_lossy(open: &mut Vec<u8>, out: &mut String) {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&open[at..]) {
            Ok(text) => {
                out.push_str(text);
                open.clear();
                return;
            }
            Err(error) => {
                let good = at + error.valid_up_to();
                out.push_str(std::str::from_utf8(&open[at..good]).unwrap_or_default());
                let Some(bad) = error.error_len() else {
                    open.drain(..good);
                    return;
                };
                out.push(CUT);
                at = good + bad;
            }
        }
    }
}

/// Byte tokens that stand together. They are text when all of them together are UTF-8, and U+FFFD each when not.
#[derive(Default)]
struct Run {
    bytes: Vec<u8>,
    /// The run has a bad byte; what it held is out.
    bad: bool,
    /// Spaces at the very start still to be left out.
    strip: usize,
}

impl Run {
    fn byte(&mut self, byte: u8, out: &mut String) {
        if self.bad {
            return self.push("\u{FFFD}", out);
        }
        self.bytes.push(byte);
        let (good, hopeless) = match std::str::from_utf8(&self.bytes) {
            Ok(_) => (self.bytes.len(), false),
            Err(error) => (error.valid_up_to(), error.error_len().is_some()),
        };
        if hopeless {
            self.give_up(out);
            self.bad = true;
        } else if self.bytes.len() > LONGEST_RUN {
            let text: Vec<u8> = self.bytes.drain(..good).collect();
            self.push(&String::from_utf8_lossy(&text), out);
        }
    }

    fn end(&mut self, out: &mut String) {
        match String::from_utf8(std::mem::take(&mut self.bytes)) {
            Ok(text) => self.push(&text, out),
            Err(error) => {
                self.bytes = error.into_bytes();
                self.give_up(out);
            }
        }
        self.bad = false;
    }

    fn give_up(&mut self, out: &mut String) {
        let count = std::mem::take(&mut self.bytes).len();
        self.push(&"\u{FFFD}".repeat(count), out);
    }

    fn push(&mut self, mut text: &str, out: &mut String) {
        while self.strip > 0 && !text.is_empty() {
            match text.strip_prefix(' ') {
                Some(rest) => {
                    text = rest;
                    self.strip -= 1;
                }
                None => self.strip = 0,
            }
        }
        out.push_str(text);
    }
}

/// The last ids, decoded together, as far back as matters for the text of the next.
#[derive(Default)]
struct Window {
    ids: Vec<u32>,
    /// Bytes of the window's text already returned.
    sent: usize,
    /// Ids at the window's start whose text ended with a whole character when they were its end.
    clean: usize,
}

impl Window {
    fn feed(&mut self, vocabulary: &Vocabulary, id: u32, out: &mut String) {
        let before = self.clean;
        self.ids.push(id);
        let text = self.decode(vocabulary);
        let mut end = text.len();
        if text.ends_with(CUT) {
            let whole = text.trim_end_matches(CUT).len();
            let open = (end - whole) / CUT.len_utf8();
            // Beyond the longest open end, only the last character, up to three bytes of it, may still be completed.
            let held = if open <= LONGEST_OPEN_END { open } else { 3 };
            end -= held * CUT.len_utf8();
        } else {
            self.clean = self.ids.len();
        }
        if self.sent < end {
            out.push_str(text.get(self.sent..end).unwrap_or_default());
            self.sent = end;
        }
        if before > 0 && self.clean == self.ids.len() && self.clean > WINDOW {
            // Those left stay as the context of what follows.
            self.ids.drain(..before);
            self.clean = self.ids.len();
            self.sent = self.decode(vocabulary).len();
        }
    }

    /// Special tokens that are to have no text are not among the ids.
    fn decode(&self, vocabulary: &Vocabulary) -> String {
        vocabulary
            .tokenizer()
            .decode(&self.ids, false)
            .unwrap_or_default()
    }
}
