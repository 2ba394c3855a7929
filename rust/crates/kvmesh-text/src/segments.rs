//! A growing conversation is not tokenized again: what stands between its added tokens is remembered.
//!
//! A tokenizer cuts a text at its added tokens, such as the marks of turns, before it looks at anything else, and
//! makes tokens of each piece by itself. So a text's tokens are those of its pieces, wherever a piece stands.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use kvmesh_core::{Error, Result};
use quick_cache::{Equivalent, Weighter, sync::Cache};
use tokenizers::Tokenizer;

use crate::model::Encoded;

/// Bytes of texts and tokens that are remembered.
const CAPACITY: u64 = 64 << 20;
/// Bytes; shorter pieces are tokenized sooner than found.
const SHORTEST: usize = 32;
/// Bytes that an entry costs beside its text and tokens.
const OVERHEAD: u64 = 96;
/// Of a pre-tokenizer to which the start of the whole text is not like the start of any other piece.
const DEPENDS_ON_PLACE: &str = r#""prepend_scheme":"first""#;

/// The pieces that a tokenizer has met. Shared by threads.
pub struct Segments {
    added: AhoCorasick,
    /// By the matcher's patterns.
    ids: Vec<u32>,
    met: Cache<Piece, Arc<[u32]>, Bytes>,
}

/// What is met in one scope is not known in another, not even by the time it takes.
#[derive(PartialEq, Eq, Hash)]
struct Piece {
    scope: Box<str>,
    text: Box<str>,
}

#[derive(Hash)]
struct Look<'a> {
    scope: &'a str,
    text: &'a str,
}

impl Equivalent<Piece> for Look<'_> {
    fn equivalent(&self, piece: &Piece) -> bool {
        *self.scope == *piece.scope && *self.text == *piece.text
    }
}

#[derive(Clone)]
struct Bytes;

impl Weighter<Piece, Arc<[u32]>> for Bytes {
    fn weight(&self, piece: &Piece, tokens: &Arc<[u32]>) -> u64 {
        OVERHEAD + (piece.scope.len() + piece.text.len() + 4 * tokens.len()) as u64
    }
}

impl Segments {
    /// `None` for a tokenizer whose pieces depend on each other, or that has no added tokens to cut at.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let pre = serde_json::to_string(&tokenizer.get_pre_tokenizer()).ok()?;
        if pre.contains(DEPENDS_ON_PLACE) {
            return None;
        }
        let mut texts = Vec::new();
        let mut ids = Vec::new();
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            // Those are looked for within the pieces.
            if token.normalized || token.content.is_empty() {
                continue;
            }
            if token.lstrip || token.rstrip || token.single_word {
                return None;
            }
            texts.push(token.content);
            ids.push(id);
        }
        if texts.is_empty() {
            return None;
        }
        let added = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(&texts)
            .ok()?;
        let met = Cache::with_weighter(4_096, CAPACITY, Bytes);
        Some(Self { added, ids, met })
    }

    /// The tokens of `text`, without those of a post-processor. Stops once there are more than `limit`.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        scope: &str,
        limit: usize,
    ) -> Result<Encoded> {
        let mut tokens = Vec::with_capacity((text.len() / 3).min(limit));
        let mut start = 0;
        for found in self.added.find_iter(text) {
            self.add(tokenizer, &text[start..found.start()], scope, &mut tokens)?;
            tokens.push(self.ids[found.pattern().as_usize()]);
            start = found.end();
            if tokens.len() > limit {
                return Ok(Encoded::Beyond(tokens.len()));
            }
        }
        self.add(tokenizer, &text[start..], scope, &mut tokens)?;
        Ok(Encoded::Tokens(tokens))
    }

    fn add(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        scope: &str,
        tokens: &mut Vec<u32>,
    ) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let long = text.len() >= SHORTEST;
        if long && let Some(met) = self.met.get(&Look { scope, text }) {
            tokens.extend_from_slice(&met);
            return Ok(());
        }
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|error| Error::invalid(error.to_string()))?;
        tokens.extend_from_slice(encoding.get_ids());
        if long {
            let piece = Piece {
                scope: scope.into(),
                text: text.into(),
            };
            self.met.insert(piece, encoding.get_ids().into());
        }
        Ok(())
    }
}
