//! The two names of a block: its whole digest and the 64 bits of it that the index uses.

use std::fmt;

use crate::{Error, Result};

/// A block's SHA-256 page hash. KVBM's key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; Digest::LEN]);

impl Digest {
    /// Bytes in a digest.
    pub const LEN: usize = 32;

    /// Wraps the bytes of a SHA-256 digest.
    pub const fn new(bytes: [u8; Digest::LEN]) -> Self {
        Self(bytes)
    }

    /// Reads an optional digest: empty bytes are none.
    ///
    /// Fails with `InvalidArgument` for any length but 0 and 32.
    pub fn from_namespace(bytes: &[u8]) -> Result<Option<Self>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        match bytes.try_into() {
            Ok(digest) => Ok(Some(Self(digest))),
            Err(_) => Err(
                Error::invalid("namespace must be empty or a digest of 32 bytes")
                    .with_context("bytes", bytes.len()),
            ),
        }
    }

    /// The digest's bytes.
    pub const fn as_bytes(&self) -> &[u8; Digest::LEN] {
        &self.0
    }

    /// The name the index and KV events use: the first 8 bytes, big-endian.
    pub fn block_hash(&self) -> BlockHash {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        BlockHash(u64::from_be_bytes(first))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The first 64 bits of a block's [`Digest`], big-endian.
///
/// SGLang's events carry the same bits as a signed integer; cast with `as u64`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(transparent)]
pub struct BlockHash(pub u64);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({:016x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_hash_is_the_start_of_the_digest() {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&[0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10]);
        let digest = Digest::new(bytes);
        assert_eq!(digest.block_hash(), BlockHash(0xfedc_ba98_7654_3210));
        assert!(digest.to_string().starts_with("fedcba9876543210"));
    }

    #[test]
    fn a_namespace_is_nothing_or_a_whole_digest() {
        assert_eq!(Digest::from_namespace(b"").unwrap(), None);
        assert_eq!(
            Digest::from_namespace(&[7; 32]).unwrap(),
            Some(Digest::new([7; 32]))
        );
        for wrong in [1, 31, 33] {
            assert!(Digest::from_namespace(&vec![0; wrong]).is_err());
        }
    }
}
