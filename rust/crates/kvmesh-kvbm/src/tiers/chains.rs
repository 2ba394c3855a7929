//! A tier's content as changes: the longest chains its blocks make.

use std::hash::Hash;

use kvmesh_core::BlockHash;
use rustc_hash::FxHashMap;

use crate::journal::Change;

/// The blocks, each with its parent if it has one, as `Stored` changes.
pub(super) fn chains_of<K: Copy + Eq + Hash>(
    blocks: FxHashMap<K, Option<K>>,
    name: impl Fn(&K) -> BlockHash,
) -> Vec<Change> {
    let mut heads = Vec::new();
    let mut children: FxHashMap<K, Vec<K>> = FxHashMap::default();
    for (&key, &parent) in &blocks {
        match parent.filter(|parent| blocks.contains_key(parent)) {
            Some(parent) => children.entry(parent).or_default().push(key),
            None => heads.push((parent, key)),
        }
    }
    let mut chains = Vec::new();
    while let Some((parent, mut key)) = heads.pop() {
        let mut hashes = vec![name(&key)];
        while let Some(mut next) = children.remove(&key) {
            let Some(longest) = next.pop() else { break };
            heads.extend(next.into_iter().map(|branch| (Some(key), branch)));
            key = longest;
            hashes.push(name(&key));
        }
        chains.push(Change::Stored {
            parent: parent.as_ref().map(&name),
            hashes,
        });
    }
    chains
}
