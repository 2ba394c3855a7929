//! What objects are called and what is in them.
//!
//! `kv1/<namespace>/<first byte>/<digest>.<parent>`: a namespace by the SHA-256 of its fields, so that no other
//! revision, dtype, layout or rank is ever looked at; a block by its whole digest, which has the tenant's salt in it, in
//! base64, since names are short in some services. Listing alone tells all there is to know of blocks: the parent is in the name. `kv1/<namespace>/fields`
//! has the fields themselves, and proves its own name.
//!
//! An object is a block's header at rest and its segments, without a slot's padding: every byte of it is checked.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use kvmesh_core::{BlockHash, Digest};
use sha2::{Digest as _, Sha256};

use crate::image::{AT_REST, Layout};
use crate::namespace::Namespace;

/// All objects of this form are below it.
pub(super) const ROOT: &str = "kv1/";
const FIELDS: &str = "fields";
const NO_PARENT: &str = "none";
/// Bytes of the hash that names a namespace.
const NAMED_BY: usize = 16;

/// A namespace, as objects' names have it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct NamespaceName(String);

impl NamespaceName {
    pub(super) fn of(namespace: &Namespace) -> Self {
        Self::of_bytes(&namespace.to_bytes())
    }

    fn of_bytes(fields: &[u8]) -> Self {
        let hash = Sha256::digest(fields);
        let hex = |name: String, byte: &u8| name + &format!("{byte:02x}");
        Self(hash[..NAMED_BY].iter().fold(String::new(), hex))
    }

    /// The object with its fields.
    pub(super) fn fields(&self) -> String {
        format!("{ROOT}{}/{FIELDS}", self.0)
    }

    /// The fields, if these bytes are those of this namespace.
    pub(super) fn decode(&self, fields: &[u8]) -> Option<Namespace> {
        (Self::of_bytes(fields) == *self).then(|| Namespace::from_bytes(fields))?
    }

    /// The object with a block.
    pub(super) fn block(&self, digest: &Digest, parent: Option<&Digest>) -> String {
        let name = |digest: &Digest| BASE64_URL_SAFE_NO_PAD.encode(digest.as_bytes());
        let (first, parent) = (digest.as_bytes()[0], parent.map_or(NO_PARENT.into(), name));
        format!("{ROOT}{}/{first:02x}/{}.{parent}", self.0, name(digest))
    }

    /// What the names of blocks begin with whose digest begins with this, and of some few others.
    pub(super) fn beginning(&self, hash: BlockHash) -> String {
        let bytes = hash.0.to_be_bytes();
        let name = BASE64_URL_SAFE_NO_PAD.encode(bytes);
        // The last digit has bits of what comes behind.
        format!("{ROOT}{}/{:02x}/{}", self.0, bytes[0], &name[..10])
    }
}

/// What an object's name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Named {
    Fields(NamespaceName),
    Block {
        namespace: NamespaceName,
        digest: Digest,
        parent: Option<Digest>,
    },
}

/// Reads a name; None for objects that are nobody's here.
pub(super) fn read_name(path: &str) -> Option<Named> {
    let (namespace, rest) = path.strip_prefix(ROOT)?.split_once('/')?;
    let digit = |byte: u8| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase();
    let named = |hex: &str| hex.len() == 2 * NAMED_BY && hex.bytes().all(digit);
    let namespace = named(namespace).then(|| NamespaceName(namespace.into()))?;
    if rest == FIELDS {
        return Some(Named::Fields(namespace));
    }
    let (_, name) = rest.split_once('/')?;
    let (digest, parent) = name.split_once('.')?;
    let parent = match parent {
        NO_PARENT => None,
        parent => Some(read_digest(parent)?),
    };
    let digest = read_digest(digest)?;
    (namespace.block(&digest, parent.as_ref()) == path).then_some(Named::Block {
        namespace,
        digest,
        parent,
    })
}

/// The object of a block with these segments.
pub(crate) fn pack(
    layout: &Layout,
    digest: &Digest,
    checksums: &[u64],
    segments: &[&[u8]],
) -> Vec<u8> {
    let mut body = layout.encode_header(digest, checksums);
    body[..8].copy_from_slice(&AT_REST.to_le_bytes());
    body.reserve_exact(segments.iter().map(|bytes| bytes.len()).sum());
    segments
        .iter()
        .for_each(|bytes| body.extend_from_slice(bytes));
    body
}

/// The parts of a valid object: its header and each segment, in order. The checksums are not looked at.
pub(crate) fn parts<'a>(body: &'a [u8], layout: &Layout) -> Option<(&'a [u8], Vec<&'a [u8]>)> {
    let segments = layout.segments();
    let bytes = segments.iter().map(|segment| segment.bytes).sum::<usize>();
    if body.len() != layout.header_bytes() + bytes || body[..8] != AT_REST.to_le_bytes() {
        return None;
    }
    let (header, mut rest) = body.split_at(layout.header_bytes());
    let mut parts = Vec::with_capacity(segments.len());
    for segment in segments {
        let (this, next) = rest.split_at(segment.bytes);
        parts.push(this);
        rest = next;
    }
    Some((header, parts))
}

fn read_digest(text: &str) -> Option<Digest> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
    Some(Digest::new(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(revision: &str) -> Namespace {
        Namespace {
            model: "org/model".into(),
            revision: revision.into(),
            dtype: "bf16".into(),
            layout: "nhd".into(),
            rank: 0,
            ranks: 1,
            segments: vec![100, 7],
        }
    }

    #[test]
    fn names_are_read_as_they_were_written() {
        let name = NamespaceName::of(&namespace("1"));
        let (digest, parent) = (Digest::new([7; 32]), Digest::new([0xAB; 32]));
        for parent in [None, Some(parent)] {
            let path = name.block(&digest, parent.as_ref());
            assert!(path.starts_with(&name.beginning(digest.block_hash())));
            let read = Named::Block {
                namespace: name.clone(),
                digest,
                parent,
            };
            assert_eq!(read_name(&path), Some(read));
            for end in 0..path.len() {
                assert_eq!(read_name(&path[..end]), None, "{}", &path[..end]);
            }
            assert_eq!(read_name(&path.to_uppercase()), None);
        }
        assert_eq!(read_name(&name.fields()), Some(Named::Fields(name)));
        for other in [
            "",
            "kv1/",
            "kv1/x/fields",
            "kv0/y",
            "else/kv1/fields",
            ".writing/x",
        ] {
            assert_eq!(read_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_namespace_proves_its_name() {
        let (one, two) = (namespace("1"), namespace("2"));
        let name = NamespaceName::of(&one);
        assert_ne!(name, NamespaceName::of(&two));
        assert_eq!(name.decode(&one.to_bytes()), Some(one));
        assert_eq!(name.decode(&two.to_bytes()), None);
    }
}
