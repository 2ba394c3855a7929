//! The page hash chain against a plain SHA-256 over the same bytes.

use kvmesh_core::{
    BlockHash, Digest, HashChain, event_namespace_seed, hash_pages, hash_tokens, namespace_seed,
};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

fn reference(tokens: &[u32], page_size: usize, mut parent: Option<Digest>) -> Vec<Digest> {
    let mut digests = Vec::new();
    for page in tokens.chunks_exact(page_size) {
        let mut sha = Sha256::new();
        if let Some(parent) = parent {
            sha.update(parent.as_bytes());
        }
        for token in page {
            sha.update(token.to_le_bytes());
        }
        let digest = Digest::new(sha.finalize().into());
        digests.push(digest);
        parent = Some(digest);
    }
    digests
}

proptest! {
    #[test]
    fn equals_plain_sha256(
        tokens in prop::collection::vec(any::<u32>(), 0..400),
        page_size in 1usize..70,
        seed in prop::option::of(any::<[u8; 32]>()),
    ) {
        let parent = seed.map(Digest::new);
        let expected = reference(&tokens, page_size, parent);
        let mut digests = Vec::new();
        hash_pages(&tokens, page_size, parent, |digest| digests.push(digest)).unwrap();
        prop_assert_eq!(&digests, &expected);
        let hashes = hash_tokens(&tokens, page_size, parent).unwrap();
        prop_assert_eq!(hashes, expected.iter().map(Digest::block_hash).collect::<Vec<BlockHash>>());
    }

    #[test]
    fn a_growing_chain_equals_the_whole(
        pieces in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..60), 0..8),
        page_size in 1usize..20,
        seed in prop::option::of(any::<[u8; 32]>()),
    ) {
        let seed = seed.map(Digest::new);
        let mut chain = HashChain::new(page_size, seed).unwrap();
        let hashes: Vec<_> = pieces.iter().flat_map(|piece| chain.extend(piece)).collect();
        let tokens = pieces.concat();
        prop_assert_eq!(chain.len(), tokens.len());
        prop_assert_eq!(hashes, hash_tokens(&tokens, page_size, seed).unwrap());
    }
}

#[test]
fn a_page_of_no_tokens_is_refused() {
    assert!(hash_tokens(&[1, 2, 3], 0, None).is_err());
}

#[test]
fn seeds_tell_absent_from_empty_and_joined() {
    assert_eq!(namespace_seed(None, None), None);
    assert_eq!(event_namespace_seed(None), None);
    let seeds = [
        namespace_seed(None, Some("")),
        namespace_seed(Some(""), None),
        namespace_seed(Some("a"), Some("bc")),
        namespace_seed(Some("ab"), Some("c")),
        event_namespace_seed(Some("")),
        event_namespace_seed(Some("bc")),
    ];
    for (i, seed) in seeds.iter().enumerate() {
        assert!(!seeds[..i].contains(seed));
    }
}
