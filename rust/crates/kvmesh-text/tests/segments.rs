//! Pieces that are remembered make the tokens that the whole text makes.

use kvmesh_text::{Encoded, Segments};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

/// A tokenizer of single bytes and a few merges, with marks as models have them.
fn tokenizer(changes: &[(&str, Value)], token: Value) -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255_u32 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(byte));
    }
    for text in [
        "a", "b", "e", "Ġ", "▁", "Ġa", "▁a", "ab", "be", "abe", "Ã", "©", "Ã©",
    ] {
        let id = vocab.len();
        vocab.insert(text.to_owned(), json!(id));
    }
    let mark = |id: u32, content: &str, changes: &Value| {
        let mut mark = json!({"id": id, "content": content, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false});
        for (name, value) in changes.as_object().into_iter().flatten() {
            mark[name] = value.clone();
        }
        mark
    };
    let plain = json!({});
    let mut whole = json!({
        "version": "1.0",
        "added_tokens": [
            mark(300, "<|a|>", &plain),
            // One that another begins.
            mark(301, "<|a|>>", &plain),
            mark(302, "</a>", &json!({"special": false})),
            // Looked for within the pieces.
            mark(303, "Be", &json!({"special": false, "normalized": true})),
            mark(304, "<|b|>", &token),
        ],
        "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": null, "truncation": null, "padding": null,
        "model": {"type": "BPE", "vocab": vocab, "byte_fallback": true,
            "merges": [["Ġ", "a"], ["▁", "a"], ["a", "b"], ["b", "e"], ["a", "be"], ["Ã", "©"]]},
    });
    for (name, value) in changes {
        whole[name] = value.clone();
    }
    serde_json::from_value(whole).expect("a tokenizer")
}

fn tokenizers() -> Vec<Tokenizer> {
    let metaspace =
        |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme});
    let spaced = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": false});
    vec![
        tokenizer(&[], json!({})),
        tokenizer(&[("normalizer", json!({"type": "Lowercase"}))], json!({})),
        tokenizer(&[("normalizer", json!({"type": "NFD"}))], json!({})),
        tokenizer(&[("pre_tokenizer", spaced)], json!({})),
        tokenizer(&[("pre_tokenizer", metaspace("always"))], json!({})),
        tokenizer(
            &[
                ("normalizer", json!({"type": "Prepend", "prepend": "▁"})),
                ("pre_tokenizer", Value::Null),
            ],
            json!({}),
        ),
    ]
}

fn text() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "<|a|>",
        "<|a|>>",
        ">",
        "</a>",
        "<|",
        "|>",
        "<|b|>",
        " ",
        "  ",
        "\n",
        "a",
        "abe",
        "Be",
        "be",
        "é",
        "e\u{301}",
        "🗼",
        " a be abe, Be é and a longer piece that is worth remembering.",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn tokens_are_those_of_the_whole_text(texts in prop::collection::vec(text(), 1..4)) {
        for tokenizer in tokenizers() {
            let segments = Segments::of(&tokenizer).expect("pieces that stand by themselves");
            // Each text again, and longer, as a conversation grows.
            let mut grown = String::new();
            for text in &texts {
                grown += text;
                for scope in ["", "", "tenant:x"] {
                    let whole = tokenizer.encode_fast(grown.as_str(), false).expect("tokens");
                    let pieces = segments.encode(&tokenizer, &grown, scope, usize::MAX).expect("tokens");
                    let count = whole.get_ids().len();
                    prop_assert_eq!(pieces, Encoded::Tokens(whole.get_ids().to_vec()), "{:?}", grown);
                    // Where it is cut short it says no more than there are.
                    for limit in [0, count / 2, count] {
                        match segments.encode(&tokenizer, &grown, scope, limit).expect("tokens") {
                            Encoded::Tokens(tokens) => prop_assert_eq!(tokens.len(), count),
                            Encoded::Beyond(least) => prop_assert!(limit < least && least <= count),
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn where_pieces_depend_on_each_other_nothing_is_remembered() {
    let first = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"});
    let refused = [
        tokenizer(&[("pre_tokenizer", first.clone())], json!({})),
        tokenizer(
            &[(
                "pre_tokenizer",
                json!({"type": "Sequence", "pretokenizers": [first]}),
            )],
            json!({}),
        ),
        tokenizer(&[], json!({"lstrip": true})),
        tokenizer(&[], json!({"rstrip": true})),
        tokenizer(&[], json!({"single_word": true})),
        tokenizer(&[("added_tokens", json!([]))], json!({})),
    ];
    assert!(
        refused
            .iter()
            .all(|tokenizer| Segments::of(tokenizer).is_none())
    );
}
