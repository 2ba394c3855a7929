//! What makes two blocks the same block.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

/// Everything a block's bytes depend on besides its tokens. Equal digests under different namespaces are different
/// blocks; namespaces are equal only when every field is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// The model's name.
    pub model: String,
    /// Identifies its weights.
    pub revision: String,
    /// Number format of the KV and of the computation that made it.
    pub dtype: String,
    /// Order and shape of the elements in a segment.
    pub layout: String,
    /// Which of `ranks` shards the blocks are.
    pub rank: u32,
    /// Shards a block is split into over parallel workers.
    pub ranks: u32,
    /// Bytes of each segment of a block, layer by layer (K then V where they are apart).
    pub segments: Vec<u32>,
}

impl Namespace {
    /// As bytes, for a record that outlives the process.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for text in [&self.model, &self.revision, &self.dtype, &self.layout] {
            bytes.extend((text.len() as u32).to_le_bytes());
            bytes.extend(text.as_bytes());
        }
        for number in [self.rank, self.ranks].iter().chain(&self.segments) {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// What `to_bytes` made; None for anything else.
    pub(crate) fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let number = |bytes: &mut &[u8]| {
            let (first, rest) = bytes.split_first_chunk::<4>()?;
            *bytes = rest;
            Some(u32::from_le_bytes(*first))
        };
        let mut texts = Vec::with_capacity(4);
        for _ in 0..4 {
            let length = number(&mut bytes)? as usize;
            let (text, rest) = bytes.split_at_checked(length)?;
            texts.push(String::from_utf8(text.to_vec()).ok()?);
            bytes = rest;
        }
        let [model, revision, dtype, layout] = <[String; 4]>::try_from(texts).ok()?;
        let (rank, ranks) = (number(&mut bytes)?, number(&mut bytes)?);
        if bytes.len() % 4 != 0 {
            return None;
        }
        let mut segments = Vec::with_capacity(bytes.len() / 4);
        while !bytes.is_empty() {
            segments.push(number(&mut bytes)?);
        }
        Some(Self {
            model,
            revision,
            dtype,
            layout,
            rank,
            ranks,
            segments,
        })
    }

    /// Stamped on every block, so that no slot can be taken for another namespace's.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = XxHash3_64::default();
        for text in [&self.model, &self.revision, &self.dtype, &self.layout] {
            hasher.write_usize(text.len());
            hasher.write(text.as_bytes());
        }
        hasher.write_u32(self.rank);
        hasher.write_u32(self.ranks);
        for segment in &self.segments {
            hasher.write_u32(*segment);
        }
        hasher.finish()
    }
}
