//! The fewest tokens that a text can have, by the vocabulary alone: what is far too long need not be tokenized to be refused.
//!
//! Where a tokenizer loses nothing, a text's tokens stand side by side and are the whole text. So no tokenizer needs fewer
//! than it takes to cover the text with tokens, each where it fits, even if they overlap.

use std::borrow::Cow;

use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};
use unicode_normalization_alignments::UnicodeNormalization;

use crate::vocabulary::{Decoding, Vocabulary};

/// Bytes of a token that say how long it may be; shorter ones are taken to fit everywhere.
const BEGINNING: usize = 4;
/// Of the table's size: entries that share a place are taken for the longest of them.
const BITS: u32 = 18;

/// Counts by one vocabulary. Shared by threads.
pub struct Fewest {
    /// Bytes of the longest token with a beginning, by the beginning's hash.
    longest: Box<[u16]>,
    /// The text is composed (NFC) before it becomes tokens.
    composed: bool,
    /// `▁` is the space.
    spaced: bool,
    /// Bytes that there is a token for; others of a text are left out of its tokens.
    known: [bool; 256],
}

impl Fewest {
    /// `None` for a tokenizer that may lose some of a text, or make one token of any number of bytes.
    pub fn of(vocabulary: &Vocabulary) -> Option<Self> {
        let tokenizer = vocabulary.tokenizer();
        let spaced = match vocabulary.decoding() {
            Decoding::ByteLevel => false,
            Decoding::ByteFallback { .. } => true,
            Decoding::Neighbours => return None,
        };
        let composed = keeps_text(tokenizer, spaced)?;
        let mut fewest = Self {
            longest: vec![BEGINNING as u16 - 1; 1 << BITS].into(),
            composed,
            spaced,
            known: [false; 256],
        };
        for id in 0..vocabulary.size() {
            if let [byte] = *vocabulary.table_bytes(id)
                && (!spaced || vocabulary.is_byte(id))
            {
                fewest.known[usize::from(byte)] = true;
            }
        }
        // Of letters, one token may stand for any number of unknown ones.
        if spaced && fewest.known.contains(&false) {
            return None;
        }
        for id in 0..vocabulary.size() {
            fewest.add(vocabulary.table_bytes(id))?;
        }
        for added in tokenizer.get_added_tokens_decoder().values() {
            // It takes as much space as there is.
            if added.lstrip || added.rstrip {
                return None;
            }
            fewest.add(added.content.as_bytes())?;
        }
        Some(fewest)
    }

    /// A number of tokens more than `limit` that the text has at least; `None` where that is not certain.
    pub fn beyond(&self, text: &str, limit: usize) -> Option<usize> {
        if self.composed && !text.is_ascii() {
            let composed: String = text.nfc().map(|(letter, _)| letter).collect();
            return self.count(&self.kept(composed.as_bytes()), limit);
        }
        if self.spaced && text.contains('▁') {
            return self.count(text.replace('▁', " ").as_bytes(), limit);
        }
        self.count(&self.kept(text.as_bytes()), limit)
    }

    fn kept<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        let known = |byte: &u8| self.known[usize::from(*byte)];
        if text.iter().all(known) {
            return text.into();
        }
        text.iter().copied().filter(|byte| known(byte)).collect()
    }

    fn count(&self, text: &[u8], limit: usize) -> Option<usize> {
        // So many cover the text up to `covered`; one more, begun by now, up to `next` at most.
        let (mut count, mut covered, mut next) = (0, 0, 0);
        for at in 0..text.len() {
            next = next.max(at + self.longest_at(&text[at..]));
            if at == covered {
                count += 1;
                covered = next;
                if count > limit {
                    return Some(count);
                }
            }
        }
        None
    }

    fn longest_at(&self, text: &[u8]) -> usize {
        match text.first_chunk() {
            Some(&beginning) => usize::from(self.longest[place(beginning)]),
            None => BEGINNING,
        }
    }

    fn add(&mut self, token: &[u8]) -> Option<()> {
        // A piece's first space may be the tokenizer's own.
        let bare = token.strip_prefix(b" ").unwrap_or(token);
        for token in [token, bare].map(|token| self.kept(token).into_owned()) {
            if let Some(&beginning) = token.first_chunk() {
                let longest = &mut self.longest[place(beginning)];
                *longest = (*longest).max(token.len().try_into().ok()?);
            }
        }
        Some(())
    }
}

fn place(beginning: [u8; BEGINNING]) -> usize {
    (u32::from_le_bytes(beginning).wrapping_mul(0x9E37_79B1) >> (32 - BITS)) as usize
}

/// Whether a tokenizer composes what it is given, and else only cuts it up. `None`: it does more.
fn keeps_text(tokenizer: &Tokenizer, spaced: bool) -> Option<bool> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else {
        return None;
    };
    let affix = |affix: &Option<String>| affix.as_ref().is_some_and(|affix| !affix.is_empty());
    if affix(&model.continuing_subword_prefix) || affix(&model.end_of_word_suffix) {
        return None;
    }
    if spaced && !model.byte_fallback {
        return None;
    }
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
    let pre_tokenizer = serde_json::to_value(tokenizer.get_pre_tokenizer()).ok()?;
    let mut composed = false;
    for step in steps(&normalizer, "normalizers") {
        match step["type"].as_str()? {
            "NFC" if !spaced => composed = true,
            "Prepend" if spaced && step["prepend"] == "▁" => {}
            "Replace" if spaced && step["pattern"]["String"] == " " && step["content"] == "▁" => {
            }
            _ => return None,
        }
    }
    for step in steps(&pre_tokenizer, "pretokenizers") {
        match step["type"].as_str()? {
            "ByteLevel" if !spaced => {}
            "Metaspace" if spaced => {}
            "Digits" => {}
            "Split" | "Punctuation" if step["behavior"] != "Removed" => {}
            _ => return None,
        }
    }
    // Bytes become letters in the pre-tokenizer, or the vocabulary is not of bytes.
    let byte_level = steps(&pre_tokenizer, "pretokenizers")
        .iter()
        .any(|step| step["type"] == "ByteLevel");
    (spaced || byte_level).then_some(composed)
}

fn steps<'a>(whole: &'a Value, name: &str) -> &'a [Value] {
    match whole {
        Value::Null => &[],
        Value::Object(fields) if whole["type"] == "Sequence" => fields
            .get(name)
            .and_then(Value::as_array)
            .map_or(&[], Vec::as_slice),
        _ => std::slice::from_ref(whole),
    }
}
