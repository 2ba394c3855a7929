//! SGLang's page hash chain.
//!
//! A page's digest is SHA-256 over its parent's digest (32 bytes; absent for a chain without a
//! seed) and its tokens as little-endian `u32`. Reference: SGLang 0.5.23, `mem_cache/utils.py`
//! (`get_hash_str`, `hash_str_to_int64`).

use sha2::{
    compress256,
    digest::{consts::U64, generic_array::GenericArray},
};

#[cfg(target_arch = "x86_64")]
use crate::sha_x86::Sha;
use crate::{BlockHash, Digest, Error, Result};

/// SHA-256's initial state (FIPS 180-4, 5.3.3).
const INITIAL: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const BLOCK_BYTES: usize = 64;
const WORD_BYTES: usize = 4;
const BLOCK_WORDS: usize = BLOCK_BYTES / WORD_BYTES;
const DIGEST_WORDS: usize = Digest::LEN / WORD_BYTES;

/// Calls `each` with the digest of every whole page of `tokens`, in order.
///
/// `parent` is the digest of the page before the first, or the namespace's seed, or `None`.
/// Tokens after the last whole page are ignored. Fails with `InvalidArgument` when `page_size` is 0.
pub fn hash_pages(
    tokens: &[u32],
    page_size: usize,
    parent: Option<Digest>,
    each: impl FnMut(Digest),
) -> Result<()> {
    check_page_size(page_size)?;
    hash_whole_pages(tokens, page_size, parent, each);
    Ok(())
}

fn hash_whole_pages(
    tokens: &[u32],
    page_size: usize,
    mut parent: Option<Digest>,
    mut each: impl FnMut(Digest),
) {
    let mut pages = tokens.chunks_exact(page_size);
    if parent.is_none() {
        if let Some(first) = pages.next() {
            let digest = PageMessage::new(0, page_size).digest(None, first);
            each(digest);
            parent = Some(digest);
        }
    }
    if let Some(parent) = parent {
        let message = PageMessage::new(DIGEST_WORDS, page_size);
        #[cfg(target_arch = "x86_64")]
        if let Some(sha) = Sha::detect() {
            return hash_in_registers(sha, parent, message, pages, each);
        }
        hash_in_memory(parent, message, pages, each);
    }
}

/// Calls `each` with the digests of pages behind `parent`.
fn hash_in_memory<'a>(
    mut parent: Digest,
    mut message: PageMessage,
    pages: impl Iterator<Item = &'a [u32]>,
    mut each: impl FnMut(Digest),
) {
    for page in pages {
        parent = message.digest(Some(&parent), page);
        each(parent);
    }
}

/// The same with the processor's own instructions.
#[cfg(target_arch = "x86_64")]
fn hash_in_registers<'a>(
    sha: Sha,
    parent: Digest,
    message: PageMessage,
    pages: impl Iterator<Item = &'a [u32]>,
    each: impl FnMut(Digest),
) {
    let PageMessage {
        mut blocks,
        parent_words,
    } = message;
    let write = |page: &[u32], blocks: &mut [Block]| write(blocks, parent_words, page);
    sha.chain(&INITIAL, &parent, pages, write, &mut blocks, each);
}

/// The index hashes of every whole page of `tokens`; see [`hash_pages`].
pub fn hash_tokens(
    tokens: &[u32],
    page_size: usize,
    parent: Option<Digest>,
) -> Result<Vec<BlockHash>> {
    let mut hashes = Vec::with_capacity(tokens.len().checked_div(page_size).unwrap_or(0));
    hash_pages(tokens, page_size, parent, |digest| {
        hashes.push(digest.block_hash())
    })?;
    Ok(hashes)
}

/// The hashes of a conversation that grows: each token is hashed once.
pub struct HashChain {
    page_size: usize,
    parent: Option<Digest>,
    /// The tokens behind the last whole page.
    rest: Vec<u32>,
    pages: usize,
}

impl HashChain {
    /// An empty conversation; `seed` is its namespace's. Fails with `InvalidArgument` when `page_size` is 0.
    pub fn new(page_size: usize, seed: Option<Digest>) -> Result<Self> {
        check_page_size(page_size)?;
        Ok(Self {
            page_size,
            parent: seed,
            rest: Vec::new(),
            pages: 0,
        })
    }

    /// Appends tokens; the hashes of the pages they completed.
    pub fn extend(&mut self, tokens: &[u32]) -> Vec<BlockHash> {
        let missing = self.page_size - self.rest.len();
        if tokens.len() < missing {
            self.rest.extend_from_slice(tokens);
            return Vec::new();
        }
        let mut hashes = Vec::with_capacity((self.rest.len() + tokens.len()) / self.page_size);
        let mut tokens = tokens;
        if !self.rest.is_empty() {
            let (end, whole) = tokens.split_at(missing);
            self.rest.extend_from_slice(end);
            let page = std::mem::take(&mut self.rest);
            self.hash(&page, &mut hashes);
            tokens = whole;
        }
        let whole = tokens.len() - tokens.len() % self.page_size;
        self.hash(&tokens[..whole], &mut hashes);
        self.rest.extend_from_slice(&tokens[whole..]);
        self.pages += hashes.len();
        hashes
    }

    fn hash(&mut self, pages: &[u32], into: &mut Vec<BlockHash>) {
        let start = self.parent;
        hash_whole_pages(pages, self.page_size, start, |digest| {
            into.push(digest.block_hash());
            self.parent = Some(digest);
        });
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.pages * self.page_size + self.rest.len()
    }

    /// Whether there are no tokens yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn check_page_size(page_size: usize) -> Result<()> {
    if page_size == 0 {
        return Err(Error::invalid("page_size must be at least 1"));
    }
    Ok(())
}

/// 64 bytes, for which SHA-256 works at once.
pub type Block = GenericArray<u8, U64>;

/// Writes a page's tokens into a message from its word `word` on.
#[inline]
fn write(blocks: &mut [Block], mut word: usize, mut page: &[u32]) {
    while !page.is_empty() {
        let start = word % BLOCK_WORDS;
        let (here, rest) = page.split_at(page.len().min(BLOCK_WORDS - start));
        let block = &mut blocks[word / BLOCK_WORDS][start * WORD_BYTES..];
        for (bytes, token) in block.chunks_exact_mut(WORD_BYTES).zip(here) {
            bytes.copy_from_slice(&token.to_le_bytes());
        }
        word += here.len();
        page = rest;
    }
}

/// The padded SHA-256 message of one page. All pages of a chain have the same length, so the
/// padding is laid out once and only parent and tokens are written for each.
struct PageMessage {
    blocks: Vec<Block>,
    parent_words: usize,
}

impl PageMessage {
    fn new(parent_words: usize, page_size: usize) -> Self {
        let bytes = (parent_words + page_size) * WORD_BYTES;
        // One byte of mark and eight of length follow the message.
        let mut blocks = vec![GenericArray::default(); (bytes + 9).div_ceil(BLOCK_BYTES)];
        blocks[bytes / BLOCK_BYTES][bytes % BLOCK_BYTES] = 0x80;
        let bits = (bytes as u64) * 8;
        if let Some(last) = blocks.last_mut() {
            last[BLOCK_BYTES - 8..].copy_from_slice(&bits.to_be_bytes());
        }
        Self {
            blocks,
            parent_words,
        }
    }

    fn digest(&mut self, parent: Option<&Digest>, page: &[u32]) -> Digest {
        if let Some(parent) = parent {
            self.blocks[0][..Digest::LEN].copy_from_slice(parent.as_bytes());
        }
        write(&mut self.blocks, self.parent_words, page);
        let mut state = INITIAL;
        compress256(&mut state, &self.blocks);
        let mut digest = [0; Digest::LEN];
        for (bytes, word) in digest.chunks_exact_mut(WORD_BYTES).zip(state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        Digest::new(digest)
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn registers_and_memory_agree() {
        let Some(sha) = Sha::detect() else { return };
        let tokens: Vec<u32> = (1..=2_000)
            .map(|n: u32| n.wrapping_mul(0x9e37_79b9))
            .collect();
        let parent = Digest::new(std::array::from_fn(|at| at as u8 * 7));
        for page_size in 1..=80 {
            let pages = || tokens.chunks_exact(page_size);
            let message = || PageMessage::new(DIGEST_WORDS, page_size);
            let (mut one, mut other) = (Vec::new(), Vec::new());
            hash_in_registers(sha, parent, message(), pages(), |digest| one.push(digest));
            hash_in_memory(parent, message(), pages(), |digest| other.push(digest));
            assert_eq!(one, other, "pages of {page_size}");
        }
    }
}
