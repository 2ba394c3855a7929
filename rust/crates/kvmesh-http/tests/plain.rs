//! What is read as a plain request, and what is left to those who know more.

use kvmesh_http::{Bounds, Endpoint, PlainRequest, Prompt, Read, Role, Stop};
use proptest::prelude::*;

const BOUNDS: Bounds = Bounds {
    header_bytes: 1_000,
    body_bytes: 10_000,
};
const BODY: &str = r#"{"model":"m","prompt":[1,2,3],"max_tokens":4}"#;

fn request(path: &str, headers: &str, body: &str) -> String {
    let size = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: here\r\n{headers}Content-Length: {size}\r\n\r\n{body}")
}

fn completion(body: &str) -> String {
    request("/v1/completions", "", body)
}

fn chat(body: &str) -> String {
    request("/v1/chat/completions", "", body)
}

fn read(text: &str) -> Option<PlainRequest<'_>> {
    plain(text.as_bytes())
}

fn plain(bytes: &[u8]) -> Option<PlainRequest<'_>> {
    match kvmesh_http::read(bytes, BOUNDS) {
        Read::Plain(request) => Some(*request),
        _ => None,
    }
}

#[test]
fn a_completion_is_read() {
    let body = r#" {"model": "m\u00e9", "prompt": "Say \"so\"", "max_tokens": 16, "temperature": 0, "top_p": 0.5,
        "top_k": -1, "frequency_penalty": -2, "presence_penalty": 2.0, "seed": -7, "ignore_eos": true, "n": 1,
        "stop": ["a", "b"], "stream": true, "stream_options": {"include_usage": true}, "user": null} "#;
    let text = completion(body);
    let PlainRequest { head, body } = read(&text).expect("plain");
    assert_eq!(head.endpoint, Endpoint::Completions);
    let headers: Vec<_> = head.headers.iter().map(|(name, _)| *name).collect();
    assert_eq!(headers, ["Host", "Content-Length"]);
    assert_eq!(body.model, "mé");
    assert!(matches!(&body.prompt, Some(Prompt::String(text)) if text == r#"Say "so""#));
    assert!(matches!(&body.stop, Some(Stop::List(stops)) if stops == &["a", "b"]));
    assert_eq!(
        (body.max_tokens, body.temperature, body.top_p),
        (Some(16), Some(0.0), Some(0.5))
    );
    assert_eq!(
        (body.top_k, body.seed, body.user),
        (Some(-1), Some(-7), None)
    );
    assert_eq!(
        body.stream_options
            .and_then(|options| options.include_usage),
        Some(true)
    );
}

#[test]
fn token_ids_are_read() {
    let text = completion(BODY);
    let found = read(&text).expect("plain");
    assert!(matches!(&found.body.prompt, Some(Prompt::List(tokens)) if tokens == &[1, 2, 3]));
}

#[test]
fn a_chat_is_read() {
    let text = chat(
        r#"{"model":"m","messages":[{"role":"system","content":"Be\n"},{"content":"Hi","role":"user"}]}"#,
    );
    let found = read(&text).expect("plain");
    let said = found.body.messages.expect("messages");
    assert_eq!(found.head.endpoint, Endpoint::Chat);
    assert_eq!(
        said.iter()
            .map(|message| message.role.name())
            .collect::<Vec<_>>(),
        ["system", "user"]
    );
    assert!(matches!(said[1].role, Role::User));
    assert_eq!((&*said[0].content, &*said[1].content), ("Be\n", "Hi"));
}

#[test]
fn other_heads_are_left_alone() {
    for text in [
        request("/v1/embeddings", "", BODY),
        request("/v1/completions?a=b", "", BODY),
        request("/v1/completions/", "", BODY),
        request("/v1/completions", "Content-Length: 45\r\n", BODY),
        request("/v1/completions", "Transfer-Encoding: chunked\r\n", BODY),
        request("/v1/completions", "content-encoding: gzip\r\n", BODY),
        request("/v1/completions", "content-type: text/plain\r\n", BODY),
        request("/v1/completions", "EXPECT: 100-continue\r\n", BODY),
        request("/v1/completions", "Connection: close\r\n", BODY),
        request(
            "/v1/completions",
            "Connection: keep-alive, Upgrade\r\nUpgrade: h2c\r\n",
            BODY,
        ),
        request(
            "/v1/completions",
            &format!("x: {}\r\n", "y".repeat(1_000)),
            BODY,
        ),
        request("/v1/completions", &"x: y\r\n".repeat(100), BODY),
        completion(BODY).replace("POST", "GET"),
        completion(BODY).replace("HTTP/1.1", "HTTP/1.0"),
        completion(BODY).replace("Host: here\r\n", "Host: here\n"),
        completion(BODY).replace("Content-Length: ", "Content-Length: +"),
        completion(BODY) + "\r\n",
        completion(BODY) + &completion(BODY),
    ] {
        assert!(read(&text).is_none(), "{text}");
    }
    let (whole, long) = (
        completion(BODY),
        format!("{{\"model\":\"m\",\"prompt\":\"{}\"}}", "a".repeat(10_000)),
    );
    assert!(read(&completion(&long)).is_none());
    let head = whole.len() - BODY.len();
    for end in 0..whole.len() {
        let missing = match kvmesh_http::read(&whole.as_bytes()[..end], BOUNDS) {
            Read::Missing(bytes) => Some(bytes),
            Read::Other => None,
            Read::Plain(_) => panic!("{end} bytes are no request"),
        };
        assert_eq!(
            missing,
            (end >= head).then_some(whole.len() - end),
            "{end} bytes"
        );
    }
    for headers in [
        "Connection: Keep-Alive\r\n",
        "Content-Encoding: identity\r\n",
        "accept: */*\r\n",
    ] {
        assert!(
            read(&request("/v1/completions", headers, BODY)).is_some(),
            "{headers}"
        );
    }
}

#[test]
fn other_bodies_are_left_alone() {
    let but = |field: &str| format!(r#"{{"model":"m","prompt":"p",{field}}}"#);
    for field in [
        r#""max_tokens":0"#,
        r#""max_tokens":1.0"#,
        r#""max_tokens":2147483648"#,
        r#""max_tokens":"1""#,
        r#""max_completion_tokens":1"#,
        r#""temperature":2.1"#,
        r#""temperature":-0.1"#,
        r#""temperature":true"#,
        r#""temperature":-0"#,
        r#""temperature":-0.0"#,
        r#""temperature":1e999"#,
        r#""top_p":1.01"#,
        r#""top_k":-2"#,
        r#""frequency_penalty":2.5"#,
        r#""presence_penalty":-2.5"#,
        r#""seed":1.5"#,
        r#""seed":9223372036854775808"#,
        r#""ignore_eos":1"#,
        r#""stop":"""#,
        r#""stop":["a",""]"#,
        r#""stop":["a",1]"#,
        r#""stream":0"#,
        r#""stream_options":{}"#,
        r#""stream":false,"stream_options":{}"#,
        r#""stream":true,"stream_options":{"other":1}"#,
        r#""n":2"#,
        r#""messages":[]"#,
        r#""logprobs":1"#,
        r#""unknown":null"#,
        r#""model":"n""#,
    ] {
        assert!(read(&completion(&but(field))).is_none(), "{field}");
    }
    for body in [
        "",
        "[]",
        "{}",
        r#"{"model":"m"}"#,
        r#"{"model":"","prompt":"p"}"#,
        r#"{"model":"m","prompt":""}"#,
        r#"{"model":"m","prompt":[]}"#,
        r#"{"model":"m","prompt":["p"]}"#,
        r#"{"model":"m","prompt":[[1]]}"#,
        r#"{"model":"m","prompt":[-1]}"#,
        r#"{"model":"m","prompt":[1.0]}"#,
        r#"{"model":"m","prompt":[4294967296]}"#,
        r#"{"model":"m","prompt":"p"} x"#,
        r#"{"model":"m","prompt":"\ud800"}"#,
        r#"{"model":"m","prompt":"p","prompt":"q"}"#,
    ] {
        assert!(read(&completion(body)).is_none(), "{body}");
    }
    for messages in [
        "[]",
        r#"[{"role":"user"}]"#,
        r#"[{"role":"tool","content":"x"}]"#,
        r#"[{"role":"user","content":[{"type":"text","text":"x"}]}]"#,
        r#"[{"role":"user","content":null}]"#,
        r#"[{"role":"user","content":"x","name":"n"}]"#,
    ] {
        let body = format!(r#"{{"model":"m","messages":{messages}}}"#);
        assert!(read(&chat(&body)).is_none(), "{messages}");
    }
    let both = r#"{"model":"m","prompt":"p","messages":[{"role":"user","content":"x"}]}"#;
    assert!(read(&chat(both)).is_none());
}

#[test]
fn bytes_that_are_no_text_are_left_alone() {
    let text = completion(r#"{"model":"m","prompt":"?"}"#);
    let mut bytes = text.into_bytes();
    let place = bytes
        .iter()
        .rposition(|&byte| byte == b'?')
        .expect("the prompt");
    bytes[place] = 0xff;
    assert!(plain(&bytes).is_none());
}

proptest! {
    #[test]
    fn no_bytes_break_it(changes in proptest::collection::vec((0..130_usize, any::<u8>()), 0..4)) {
        let mut bytes = completion(BODY).into_bytes();
        for (place, byte) in changes {
            let place = place % bytes.len();
            bytes[place] = byte;
        }
        if let Some(found) = plain(&bytes) {
            prop_assert!(!found.body.model.is_empty());
            prop_assert!(found.body.prompt.is_some());
        }
    }
}
