//! Chat templates without a checkpoint. That they render as `transformers` does is shown in Python, beside it.

use kvmesh_text::{ChatTemplates, Conversation, TemplateFiles};

fn render(source: &str, conversation: &Conversation) -> Result<String, String> {
    let mut files = TemplateFiles::default();
    files
        .sources
        .insert("default".to_owned(), source.to_owned());
    files
        .special_tokens
        .insert("eos_token".to_owned(), "</s>".to_owned());
    ChatTemplates::new(files)
        .render(conversation)
        .map_err(|error| error.to_string())
}

fn one(messages: &str) -> Conversation<'_> {
    Conversation {
        messages: messages.as_bytes(),
        args: br#"{"extra": {"b": [1, 1e16, true], "a": "\u00e9"}}"#,
        add_generation_prompt: true,
        ..Conversation::default()
    }
}

#[test]
fn json_as_python_writes_it() {
    let cases = [
        ("{{ extra|tojson }}", r#"{"b": [1, 1e+16, true], "a": "é"}"#),
        (
            "{{ extra|tojson(sort_keys=true, ensure_ascii=true) }}",
            r#"{"a": "\u00e9", "b": [1, 1e+16, true]}"#,
        ),
        (
            "{{ extra.b|tojson(indent=2) }}",
            "[\n  1,\n  1e+16,\n  true\n]",
        ),
        (
            "{{ extra.b|tojson(separators=(',', ':')) }}",
            "[1,1e+16,true]",
        ),
        ("{{ {}|tojson(indent=4) }}{{ []|tojson }}", "{}[]"),
    ];
    for (source, expected) in cases {
        assert_eq!(
            render(source, &one("[]")),
            Ok(expected.to_owned()),
            "{source}"
        );
    }
    assert!(render("{{ nothing|tojson }}", &one("[]")).is_err());
    assert!(render("{{ extra|tojson(no_such=1) }}", &one("[]")).is_err());
}

#[test]
fn what_transformers_offers() {
    let source = "{% for m in messages %}\n    {% generation %}\n{{ m.content }}{{ eos_token }}\n    {% endgeneration %}\n{% endfor %}\n{{ 'a-b'.partition('-')|join }}{{ 'x.py'.removesuffix('.py') }}{{ 'a b c'.rsplit(' ', 1)[0] }}{{ strftime_now('%Y')|length }}{{ add_generation_prompt }}\n";
    assert_eq!(
        render(source, &one(r#"[{"content": "<hi>"}]"#)),
        Ok("<hi></s>\na-bxa b4True".to_owned())
    );
}

#[test]
fn refusals_are_the_templates_own_words() {
    let source =
        "{% macro no() %}{{ raise_exception('only ' ~ messages|length) }}{% endmacro %}{{ no() }}";
    assert_eq!(render(source, &one("[1, 2]")), Err("only 2".to_owned()));
    assert!(
        render("{% if %}", &one("[]")).is_err_and(|why| why.starts_with("the template is broken"))
    );
    assert!(render("{{ 1 / 0 }}{{ a.b }}", &one("[]")).is_err());
}

#[test]
fn continued_messages() {
    let at = |source: &str, messages: &str| {
        let mut conversation = one(messages);
        conversation.continue_final_message = true;
        render(source, &conversation)
    };
    let message = r#"[{"content": "One, "}]"#;
    let kept = "{{ messages[-1].content }}</s>{{ add_generation_prompt }}";
    let trimmed = "{{ messages[-1].content|trim }}</s>";
    assert_eq!(at(kept, message), Ok("One, ".to_owned()));
    assert_eq!(at(trimmed, message), Ok("One,".to_owned()));
    assert!(at("nothing", message).is_err());
    assert!(at(kept, "[]").is_err());
    assert!(at(kept, r#"[{"role": "assistant"}]"#).is_err());
}
