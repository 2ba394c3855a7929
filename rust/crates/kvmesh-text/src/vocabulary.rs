//! What every token id stands for: its bytes, where a decoder makes text of tokens one by one.

use kvmesh_core::{Error, Result};
use serde_json::Value;
use tokenizers::{DecoderWrapper, Tokenizer};

/// Beyond this an id is a mistake in a file, not a vocabulary.
const MOST_IDS: u32 = 1 << 24;

const KNOWN: u8 = 1;
const SPECIAL: u8 = 2;
const BYTE: u8 = 4;

/// How the texts of tokens make a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoding {
    /// Tokens are bytes, which together are UTF-8 (GPT-2 and after).
    ByteLevel,
    /// Tokens are texts, some of them single bytes of a character without a token of its own (SentencePiece). So
    /// many spaces at the very start are left out.
    ByteFallback {
        /// The most spaces left out.
        strip: usize,
    },
    /// A token's text depends on its neighbours in other ways; only the tokenizer's own decoder knows.
    Neighbours,
}

/// A tokenizer with a table of its tokens.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    decoding: Decoding,
    /// By id, where the token's bytes begin; one more than there are ids. Empty for [`Decoding::Neighbours`].
    offsets: Vec<u32>,
    bytes: Vec<u8>,
    /// By id.
    flags: Vec<u8>,
}

impl Vocabulary {
    /// InvalidArgument for a tokenizer whose ids are out of all proportion.
    pub fn new(tokenizer: Tokenizer) -> Result<Self> {
        let decoding = decoding(tokenizer.get_decoder());
        let size = tokenizer
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id.saturating_add(1));
        if size > MOST_IDS {
            return Err(Error::invalid("a token id is too large").with_context("limit", MOST_IDS));
        }
        let mut vocabulary = Self {
            tokenizer,
            decoding,
            offsets: Vec::new(),
            bytes: Vec::new(),
            flags: Vec::with_capacity(size as usize),
        };
        vocabulary.fill(size);
        Ok(vocabulary)
    }

    fn fill(&mut self, size: u32) {
        let table = self.decoding != Decoding::Neighbours;
        let alphabet = byte_alphabet();
        if table {
            self.offsets.reserve(size as usize + 1);
            self.offsets.push(0);
        }
        for id in 0..size {
            let mut flags = 0;
            if let Some(token) = self.tokenizer.id_to_token(id) {
                flags |= KNOWN;
                if self
                    .tokenizer
                    .get_added_vocabulary()
                    .is_special_token(&token)
                {
                    flags |= SPECIAL;
                }
                match self.decoding {
                    Decoding::ByteLevel => {
                        let before = self.bytes.len();
                        for c in token.chars() {
                            match alphabet.get(c as usize).copied().flatten() {
                                Some(byte) => self.bytes.push(byte),
                                // Not of the alphabet: an added token, which is text.
                                None => {
                                    self.bytes.truncate(before);
                                    self.bytes.extend(token.as_bytes());
                                    break;
                                }
                            }
                        }
                    }
                    Decoding::ByteFallback { .. } => match fallback_byte(&token) {
                        Some(byte) => {
                            flags |= BYTE;
                            self.bytes.push(byte);
                        }
                        None => self.bytes.extend(token.replace('▁', " ").as_bytes()),
                    },
                    Decoding::Neighbours => {}
                }
            }
            self.flags.push(flags);
            if table {
                self.offsets.push(self.bytes.len() as u32);
            }
        }
    }

    /// The tokenizer itself.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How tokens become text.
    pub fn decoding(&self) -> Decoding {
        self.decoding
    }

    /// One more than the largest id.
    pub fn size(&self) -> u32 {
        self.flags.len() as u32
    }

    /// Whether there is such a token.
    pub fn knows(&self, id: u32) -> bool {
        self.has(id, KNOWN)
    }

    /// Whether the token is special: part of the protocol, not of the text.
    pub fn is_special(&self, id: u32) -> bool {
        self.has(id, SPECIAL)
    }

    /// Whether the token is one byte of a character; only with [`Decoding::ByteFallback`].
    pub fn is_byte(&self, id: u32) -> bool {
        self.has(id, BYTE)
    }

    /// The token's bytes; none for an unknown one and none with [`Decoding::Neighbours`].
    pub fn table_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.offsets.get(id), self.offsets.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// The token by itself: bytes that may be part of a character only. Empty for an unknown one.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.decoding {
            Decoding::Neighbours => self
                .tokenizer
                .decode(&[id], false)
                .unwrap_or_default()
                .into_bytes(),
            _ => self.table_bytes(id).to_vec(),
        }
    }

    fn has(&self, id: u32, flag: u8) -> bool {
        self.flags
            .get(id as usize)
            .is_some_and(|flags| flags & flag != 0)
    }
}

fn decoding(decoder: Option<&DecoderWrapper>) -> Decoding {
    if let Some(DecoderWrapper::ByteLevel(_)) = decoder {
        return Decoding::ByteLevel;
    }
    // The fields of a sequence are private, its JSON is not.
    let json = serde_json::to_value(decoder).unwrap_or_default();
    byte_fallback(&json).unwrap_or(Decoding::Neighbours)
}

/// Recognizes what SentencePiece models are converted to: spaces, bytes, and perhaps no first space.
fn byte_fallback(decoder: &Value) -> Option<Decoding> {
    let steps = decoder.get("decoders")?.as_array()?;
    let kind = |at: usize| steps.get(at)?.get("type")?.as_str();
    let replace = steps.first()?;
    let spaces =
        kind(0)? == "Replace" && replace["pattern"]["String"] == "▁" && replace["content"] == " ";
    if !spaces || kind(1)? != "ByteFallback" || kind(2)? != "Fuse" {
        return None;
    }
    match steps.get(3) {
        None => Some(Decoding::ByteFallback { strip: 0 }),
        Some(strip) if steps.len() == 4 && kind(3)? == "Strip" => {
            if strip["content"] != " " || strip["stop"] != 0 {
                return None;
            }
            let strip = strip["start"].as_u64()? as usize;
            Some(Decoding::ByteFallback { strip })
        }
        Some(_) => None,
    }
}

/// `<0x41>` as its byte.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// The bytes that characters stand for in byte-level vocabularies, by code point (`bytes_to_unicode` of GPT-2's
/// encoder.py): printable Latin-1 is itself, the other bytes are the characters from U+0100 on, in order.
fn byte_alphabet() -> [Option<u8>; 512] {
    let mut alphabet = [None; 512];
    let mut next = 256;
    for byte in 0..=255_u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let at = if printable { byte as usize } else { next };
        if !printable {
            next += 1;
        }
        alphabet[at] = Some(byte);
    }
    alphabet
}
