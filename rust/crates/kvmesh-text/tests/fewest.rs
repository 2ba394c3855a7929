//! What is said of a text before it is tokenized is true of its tokens.

use kvmesh_text::{Fewest, Vocabulary};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// The letters that bytes are written as, by byte.
fn letters() -> Vec<char> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut others = 256..;
    (0..=255_u32)
        .map(|byte| {
            if printable(&byte) {
                byte
            } else {
                others.next().expect("a letter")
            }
        })
        .map(|code| char::from_u32(code).expect("a letter"))
        .collect()
}

fn merged(vocab: &mut serde_json::Map<String, Value>, pairs: &[(&str, &str)]) -> Value {
    for (left, right) in pairs {
        let id = vocab.len();
        vocab.entry(format!("{left}{right}")).or_insert(json!(id));
    }
    json!(pairs)
}

fn byte_level(changes: &[(&str, Value)], mark: Value) -> Value {
    let mut vocab: serde_json::Map<_, _> = letters()
        .into_iter()
        .enumerate()
        .map(|(id, letter)| (letter.to_string(), json!(id)))
        .collect();
    let merges = merged(
        &mut vocab,
        &[
            ("a", "b"),
            ("ab", "ab"),
            ("abab", "abab"),
            ("Ġ", "abab"),
            ("Ġ", "Ġ"),
            ("ĠĠ", "ĠĠ"),
            ("Ã", "©"),
        ],
    );
    let mut token = json!({"id": 500, "content": "<|mark|>", "special": true, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false});
    for (name, value) in mark.as_object().into_iter().flatten() {
        token[name] = value.clone();
    }
    let mut whole = json!({
        "version": "1.0", "added_tokens": [token], "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "truncation": null, "padding": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    });
    for (name, value) in changes {
        whole[name] = value.clone();
    }
    whole
}

/// Without tokens of these letters: their bytes are left out of what a text becomes.
fn lacking(mut whole: Value, letters: &[&str]) -> Value {
    let vocab = whole["model"]["vocab"]
        .as_object_mut()
        .expect("a vocabulary");
    for letter in letters {
        vocab.remove(*letter).expect("a letter");
    }
    whole
}

fn sentence_piece(known_bytes: u32) -> Value {
    let mut vocab: serde_json::Map<_, _> = (0..known_bytes)
        .map(|byte| (format!("<0x{byte:02X}>"), json!(byte)))
        .collect();
    for text in ["a", "b", "▁", "é", "<unk>"] {
        let id = vocab.len();
        vocab.insert(text.to_owned(), json!(id));
    }
    let merges = merged(
        &mut vocab,
        &[
            ("a", "b"),
            ("ab", "ab"),
            ("▁", "abab"),
            ("▁", "▁"),
            ("▁▁", "▁▁"),
            ("▁▁▁▁", "abab"),
        ],
    );
    json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": null, "post_processor": null,
        "truncation": null, "padding": null,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": true, "fuse_unk": true,
            "unk_token": "<unk>"},
    })
}

fn vocabulary(whole: Value) -> Vocabulary {
    let tokenizer: Tokenizer = serde_json::from_value(whole).expect("a tokenizer");
    Vocabulary::new(tokenizer).expect("a vocabulary")
}

fn text() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "ab",
        "abab",
        "abababab",
        " ",
        "    ",
        "\n",
        "é",
        "e\u{301}",
        "🗼",
        "▁",
        "한",
        "\u{1112}\u{1161}",
        "<|mark|>",
        "<|mark|>\u{338}",
        " abab",
        "0123",
        "...",
    ]);
    prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_text_has_fewer_tokens(text in text()) {
        let spaced = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false});
        let tokenizers = [
            byte_level(&[], json!({})),
            byte_level(&[("normalizer", Value::Null), ("pre_tokenizer", spaced)], json!({})),
            lacking(byte_level(&[], json!({})), &["ð", "Ċ", "."]),
            sentence_piece(256),
        ];
        for vocabulary in tokenizers.map(vocabulary) {
            let fewest = Fewest::of(&vocabulary).expect("a tokenizer that loses nothing");
            let encoding = vocabulary.tokenizer().encode_fast(text.as_str(), false).expect("tokens");
            let count = encoding.get_ids().len();
            prop_assert_eq!(fewest.beyond(&text, count), None, "{:?} has {} tokens", text, count);
            if let Some(least) = fewest.beyond(&text, count / 2) {
                prop_assert!(count / 2 < least && least <= count);
            }
        }
    }
}

#[test]
fn a_text_that_is_far_too_long_is_known_by_its_beginning() {
    for whole in [byte_level(&[], json!({})), sentence_piece(256)] {
        let fewest = Fewest::of(&vocabulary(whole)).expect("a tokenizer that loses nothing");
        // No token is longer than nine bytes.
        assert_eq!(fewest.beyond(&"abab ".repeat(1_000), 400), Some(401));
        assert_eq!(fewest.beyond(&"abab ".repeat(1_000), 5_000), None);
    }
}

#[test]
fn a_tokenizer_that_may_lose_text_says_nothing() {
    let removed = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
    let refused = [
        byte_level(&[("pre_tokenizer", removed)], json!({})),
        byte_level(&[("pre_tokenizer", Value::Null)], json!({})),
        byte_level(&[("normalizer", json!({"type": "Lowercase"}))], json!({})),
        byte_level(&[], json!({"lstrip": true})),
        byte_level(&[], json!({"rstrip": true})),
        // Any number of letters without a token is one token.
        sentence_piece(255),
    ];
    for whole in refused {
        assert!(Fewest::of(&vocabulary(whole)).is_none());
    }
}
