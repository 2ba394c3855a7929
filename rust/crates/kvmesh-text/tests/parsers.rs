//! Tool calls and reasoning, cut at every place: what comes in pieces is what the whole text holds.

use kvmesh_text::{Delta, Reasoning, ReasoningFormat, ToolCalls, ToolFormat};
use proptest::prelude::*;

/// An answer put together: content, and calls as (name, arguments).
type Answer = (String, Vec<(String, String)>);

fn calls<'a>(format: &str, names: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> Answer {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut parser = ToolCalls::new(ToolFormat::named(format).expect("a format"), &names);
    let mut content = String::new();
    let mut calls: Vec<(String, String)> = Vec::new();
    let mut add = |delta: Delta| {
        content.push_str(&delta.content);
        for call in delta.tool_calls {
            if let Some(name) = call.name {
                assert_eq!(call.index as usize, calls.len());
                assert!(call.id.is_some_and(|id| !id.is_empty()));
                calls.push((name, String::new()));
            }
            calls[call.index as usize].1.push_str(&call.arguments);
        }
    };
    for piece in pieces {
        let mut delta = Delta::default();
        parser.feed(piece, &mut delta);
        add(delta);
    }
    let mut delta = Delta::default();
    parser.finish(&mut delta);
    add(delta);
    (content, calls)
}

fn reason<'a>(
    format: &str,
    inside: bool,
    pieces: impl IntoIterator<Item = &'a str>,
) -> (String, String) {
    let format = ReasoningFormat::named(format).expect("a format");
    let mut parser = Reasoning::new(format, inside);
    let (mut reasoning, mut answer) = (String::new(), String::new());
    for piece in pieces {
        parser.feed(piece, &mut reasoning, &mut answer);
    }
    parser.finish(&mut reasoning, &mut answer);
    (reasoning, answer)
}

/// The text in one piece, in single characters, and cut at every two places.
fn cuts(text: &str) -> impl Iterator<Item = Vec<&str>> {
    let borders: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    let all = borders.clone();
    let single = all
        .iter()
        .enumerate()
        .map(|(i, &at)| &text[at..all.get(i + 1).copied().unwrap_or(text.len())])
        .collect();
    let pairs = borders.clone().into_iter().flat_map(move |first| {
        let borders = borders.clone();
        let later = borders.into_iter().filter(move |second| *second >= first);
        later.map(move |second| vec![&text[..first], &text[first..second], &text[second..]])
    });
    [vec![text], single].into_iter().chain(pairs)
}

fn check(format: &str, text: &str, content: &str, expected: &[(&str, &str)]) {
    check_names(format, &[], text, content, expected);
}

fn check_names(format: &str, names: &[&str], text: &str, content: &str, expected: &[(&str, &str)]) {
    let owned = |(name, arguments): &(&str, &str)| ((*name).to_owned(), (*arguments).to_owned());
    let expected: Answer = (content.to_owned(), expected.iter().map(owned).collect());
    for pieces in cuts(text) {
        assert_eq!(
            calls(format, names, pieces.iter().copied()),
            expected,
            "{format}: {pieces:?}"
        );
    }
}

#[test]
fn hermes() {
    check(
        "hermes",
        "no calls, just text ",
        "no calls, just text ",
        &[],
    );
    check(
        "hermes",
        "Let me see.\n<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": \"}<\\\"\", \"b\": [1, {}]}}\n</tool_call>\n",
        "Let me see.",
        &[("get", "{\"a\": \"}<\\\"\", \"b\": [1, {}]}")],
    );
    check(
        "hermes",
        "<tool_call>{\"name\": \"a\", \"arguments\": {}}</tool_call>\n<tool_call>{\"arguments\": {\"é\": 2}, \"name\": \"b\"}</tool_call> done",
        " done",
        &[("a", "{}"), ("b", "{\"é\": 2}")],
    );
    // Both in one pair of marks; the end mark missing.
    check(
        "qwen",
        "<tool_call>{\"name\": \"a\", \"arguments\": {}}\n{\"name\": \"b\"}",
        "",
        &[("a", "{}"), ("b", "{}")],
    );
}

#[test]
fn what_is_no_call_is_text() {
    let text = "<tool_call>\nnot json</tool_call> and < more";
    check("hermes", text, text, &[]);
    check("hermes", "a <tool_c", "a <tool_c", &[]);
    check("hermes", "<tool_call> {\"na", "<tool_call> {\"na", &[]);
    check(
        "hermes",
        "<tool_call>{\"name\": 3}",
        "<tool_call>{\"name\": 3}",
        &[],
    );
    check(
        "llama3",
        " {\"name\": \"Bob\", \"age\": 3} ",
        " {\"name\": \"Bob\", \"age\": 3} ",
        &[],
    );
    check(
        "llama3",
        "{\"a\": {\"name\": \"x\"}}",
        "{\"a\": {\"name\": \"x\"}}",
        &[],
    );
    check("json", "[1, 2]", "[1, 2]", &[]);
    check("pythonic", "[see (a) below](b)", "[see (a) below](b)", &[]);
    check(
        "mistral",
        "[TOOL_CALLS] nothing",
        "[TOOL_CALLS] nothing",
        &[],
    );
    check_names(
        "json",
        &["known"],
        "{\"name\": \"unknown\", \"arguments\": {}}",
        "{\"name\": \"unknown\", \"arguments\": {}}",
        &[],
    );
}

#[test]
fn arguments_in_odd_places() {
    check(
        "json",
        "{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}",
        "",
        &[("f", "{\"a\": 1}")],
    );
    check(
        "json",
        "{\"name\": \"f\", \"arguments\": null}",
        "",
        &[("f", "{}")],
    );
    check(
        "llama3",
        "{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {\"x\": true}}}",
        "",
        &[("f", "{\"x\": true}")],
    );
    // Cut off within the arguments: what there is was shown.
    check(
        "hermes",
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a",
        "",
        &[("f", "{\"a")],
    );
}

#[test]
fn mistral() {
    check(
        "mistral",
        "[TOOL_CALLS] [{\"name\": \"a\", \"arguments\": {\"x\": 1}}, {\"name\": \"b\", \"arguments\": {}}]",
        "",
        &[("a", "{\"x\": 1}"), ("b", "{}")],
    );
    check(
        "mistral",
        "Sure. [TOOL_CALLS]a[ARGS]{\"x\": 1}[TOOL_CALLS]b[CALL_ID]123456789[ARGS]{}",
        "Sure.",
        &[("a", "{\"x\": 1}"), ("b", "{}")],
    );
}

#[test]
fn llama3_and_pythonic() {
    check(
        "llama3",
        "<|python_tag|>{\"name\": \"a\", \"parameters\": {\"x\": 1}}; {\"name\": \"b\", \"parameters\": {}}",
        "",
        &[("a", "{\"x\": 1}"), ("b", "{}")],
    );
    check(
        "pythonic",
        "[a.b(x='it\\'s', y=-1.5, z=[True, None, (1,)], w={'k': \"v\", 1: 2}), c()]",
        "",
        &[
            (
                "a.b",
                "{\"x\": \"it's\", \"y\": -1.5, \"z\": [true, null, [1]], \"w\": {\"k\": \"v\", \"1\": 2}}",
            ),
            ("c", "{}"),
        ],
    );
}

#[test]
fn deepseek_and_kimi() {
    check(
        "deepseek",
        "Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Well.",
        &[("f", "{\"a\": 1}"), ("g", "{}")],
    );
    check(
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        &[("f", "{\"a\": 1}")],
    );
    check(
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"a\": 1}<|tool_call_end|><|tool_calls_section_end|>",
        "",
        &[("f", "{\"a\": 1}")],
    );
}

#[test]
fn required_calls() {
    check(
        "json",
        "[{\"name\": \"a\", \"parameters\": {\"x\": [1]}}, {\"name\": \"b\", \"parameters\": {}}]",
        "",
        &[("a", "{\"x\": [1]}"), ("b", "{}")],
    );
}

#[test]
fn reasoning_is_apart() {
    let cases = [
        (
            "qwen3",
            false,
            "<think>\nhm, <b>\n\n</think>\n\nYes.",
            "hm, <b>",
            "Yes.",
        ),
        (
            "qwen3",
            false,
            "Yes. <think>no</think>",
            "",
            "Yes. <think>no</think>",
        ),
        ("qwen3", false, " <thin", "", " <thin"),
        ("qwen3", false, "\n<think>a b", "a b", ""),
        (
            "deepseek-r1",
            true,
            "hm </thin </think> Yes. ",
            "hm </thin",
            "Yes. ",
        ),
        ("deepseek-r1", true, "<think>\nhm\n</think>Yes", "hm", "Yes"),
        ("deepseek-r1", true, "only thought ", "only thought", ""),
        ("mistral", false, "[THINK]a[/THINK]b", "a", "b"),
        ("kimi", false, "◁think▷ä◁/think▷ö", "ä", "ö"),
    ];
    for (format, inside, text, reasoning, answer) in cases {
        for pieces in cuts(text) {
            assert_eq!(
                reason(format, inside, pieces.iter().copied()),
                (reasoning.to_owned(), answer.to_owned()),
                "{format}: {pieces:?}"
            );
        }
    }
}

#[test]
fn names_are_known() {
    for name in ["qwen25", "llama3_json", "deepseek_v31", "json"] {
        assert!(ToolFormat::named(name).is_some(), "{name}");
    }
    assert!(ToolFormat::named("none").is_none());
    assert!(ReasoningFormat::named("none").is_none());
}

/// What formats are made of, right and wrong.
const FRAGMENTS: [&str; 44] = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<|tool_call_begin|>",
    "functions.f:0<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "```json\n",
    "\n```",
    "{\"name\": \"f\", \"arguments\": {\"a\": 1}}",
    "{\"name\": \"f\"",
    "\"arguments\": ",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\",
    ",",
    ";",
    ":",
    " ",
    "\n",
    "f",
    "f(",
    "a='x'",
    ")",
    "é",
    "🗼",
    "<",
    "<think>",
    "</think>",
    "null",
    "1.5",
    "\"name\": \"g\"",
    "\"function\": {",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn pieces_add_up_to_the_whole(
        picks in prop::collection::vec(0..FRAGMENTS.len(), 0..14),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let text: String = picks.iter().map(|&pick| FRAGMENTS[pick]).collect();
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        at.retain(|&at| text.is_char_boundary(at));
        at.extend([0, text.len()]);
        at.sort_unstable();
        let pieces: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        for format in ["hermes", "mistral", "llama3", "pythonic", "deepseek", "kimi_k2", "json"] {
            let whole = calls(format, &[], [text.as_str()]);
            prop_assert_eq!(calls(format, &[], pieces.iter().copied()), whole, "{}", format);
        }
        for (format, inside) in [("qwen3", false), ("deepseek-r1", true)] {
            let whole = reason(format, inside, [text.as_str()]);
            prop_assert_eq!(reason(format, inside, pieces.iter().copied()), whole, "{}", format);
        }
    }

    #[test]
    fn without_marks_nothing_is_lost(text in "[a-z {}\\[\\]<>|\"\\n]{0,60}") {
        for format in ["hermes", "mistral", "deepseek", "kimi_k2"] {
            prop_assert_eq!(calls(format, &[], [text.as_str()]), (text.clone(), vec![]));
        }
    }
}
