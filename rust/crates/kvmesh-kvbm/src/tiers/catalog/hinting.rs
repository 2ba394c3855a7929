//! What requests say of their return, kept until their blocks are used.

use kvmesh_core::{BlockHash, Digest};

use super::super::NamespaceId;
use super::super::entry::Key;
use super::Catalog;
use crate::eviction::Hints;

/// Blocks whose hints are kept.
const HINTED: usize = 65_536;

impl Catalog {
    pub(crate) fn hint(&mut self, namespace: NamespaceId, blocks: &[BlockHash], hints: Hints) {
        for &hash in blocks {
            let name = Key::name_of(namespace, hash);
            self.hinted.take(name);
            self.hinted.put(name, hints, HINTED);
        }
    }

    /// The hints of the last block that has any.
    pub(super) fn hints_of(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Hints {
        if self.hinted.is_empty() {
            return Hints::default();
        }
        (chain.iter().rev().chain(parent))
            .find_map(|&digest| self.hinted.get(Key(namespace, digest).name()))
            .copied()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::super::super::ranking::Ranking;
    use super::*;
    use crate::eviction::{BlockId, EvictionPolicy, Policy, Use};
    use crate::journal::Journal;
    use crate::namespace::Namespace;

    /// Writes down whether each use's request will return.
    struct Recorder(Arc<Mutex<Vec<Option<bool>>>>);

    impl EvictionPolicy for Recorder {
        fn used(&mut self, _: BlockId, at: &Use) {
            self.0.lock().push(at.hints.returns);
        }
        fn admits(&mut self, at: &Use) -> bool {
            self.0.lock().push(at.hints.returns);
            false
        }
        fn offer(&mut self, _: BlockId) {}
        fn withdraw(&mut self, _: BlockId) {}
        fn removed(&mut self, _: BlockId, _: bool) {}
        fn victim(&mut self) -> Option<BlockId> {
            None
        }
    }

    #[test]
    fn hints_come_with_the_uses_of_what_they_were_said_of_and_of_what_follows_it() {
        let (journal, seen) = (Journal::default(), Arc::new(Mutex::default()));
        let mut catalog = Catalog::new(8 * 4096, Policy::Lru);
        let namespace = |model: &str| Namespace {
            model: model.into(),
            revision: String::new(),
            dtype: String::new(),
            layout: String::new(),
            rank: 0,
            ranks: 1,
            segments: vec![100],
        };
        let id = catalog.open(&namespace("m")).unwrap();
        let other = catalog.open(&namespace("other")).unwrap();
        catalog.parts[0].ranking = Ranking::new(Box::new(Recorder(seen.clone())));
        let blocks: Vec<Digest> = (0..6).map(|i| Digest::new([i; 32])).collect();
        let returns = |returns| Hints {
            returns: Some(returns),
            ..Hints::default()
        };
        let hashes: Vec<BlockHash> = blocks.iter().map(Digest::block_hash).collect();
        catalog.hint(id, &hashes[1..3], returns(true));
        catalog.hint(id, &hashes[4..5], returns(false));
        let uses = |catalog: &mut Catalog, id, parent, blocks: &[Digest]| {
            catalog.reserve(&journal, id, parent, blocks);
            std::mem::take(&mut *seen.lock())
        };
        assert_eq!(uses(&mut catalog, other, None, &blocks[..3]), [None; 3]);
        assert_eq!(uses(&mut catalog, id, None, &blocks[..1]), [None]);
        assert_eq!(
            uses(&mut catalog, id, Some(&blocks[2]), &blocks[3..4]),
            [Some(true)],
            "what follows"
        );
        // The last word on the chain is the newest: here and of what there is no room for.
        let long = uses(&mut catalog, id, None, &blocks);
        assert_eq!(long, [Some(false); 6]);
        catalog.hint(id, &hashes[4..5], returns(true));
        assert_eq!(uses(&mut catalog, id, None, &blocks), [Some(true); 6]);
    }
}
