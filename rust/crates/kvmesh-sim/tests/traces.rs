//! The formats that traces come in, and sessions whose requests wait for each other.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

use kvmesh_select::Config;
use kvmesh_sim::{
    cluster::{Cluster, Outcomes},
    formats,
    job::Shape,
    mesh::Mesh,
    timing::Timing,
    trace::{Trace, mix},
};

fn run(trace: &Trace) -> Outcomes {
    let cluster = Cluster {
        aggregated: 2,
        prefill: 0,
        decode: 0,
        shape: Shape {
            blocks: 1000,
            block_tokens: 16,
            pass_tokens: 2048,
            max_running: 64,
        },
        timing: Timing::default(),
        store: None,
        event_lag_ms: 0.0,
        slowdowns: Vec::new(),
    };
    let mut mesh = Mesh::new(&cluster, Config::default(), trace.requests.len(), 0.0, 1).unwrap();
    cluster.run(trace, &mut mesh, 1).unwrap()
}

#[test]
fn mooncake_has_one_id_a_block() {
    let line =
        r#"{"timestamp": 27000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}"#;
    let trace = formats::lines(line, 512).unwrap();
    let request = &trace.requests[0];
    assert_eq!((request.arrival_ms, request.output), (27_000.0, 5));
    assert_eq!(
        request.chain.as_ref(),
        [mix(7), mix(8)],
        "the last block is not full"
    );
}

#[test]
fn azure_goes_on_over_midnight_and_month() {
    let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-30 23:59:59.5,374,44\n\
                2023-12-01 00:00:00.75,10,1\n2024-03-01 00:00:00,1,1\n";
    let trace = formats::azure(text).unwrap();
    let times: Vec<f64> = trace.requests.iter().map(|r| r.arrival_ms).collect();
    assert_eq!(times[..2], [0.0, 1_250.0]);
    // December, January, and February of a leap year.
    assert_eq!(times[2], f64::from((31 + 31 + 29) * 86_400) * 1e3 + 500.0);
    // Newer traces name their zone.
    let zoned =
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n";
    assert_eq!(formats::azure(zoned).unwrap().requests[0].prompt, 2162);
}

#[test]
fn records_of_aiperf_are_requests_again() {
    let text = r#"{"metadata": {"request_start_ns": 1759813207532900363, "conversation_id": "a", "turn_index": 0}, "metrics": {"input_sequence_length": {"value": 550, "unit": "tokens"}, "time_to_first_token": {"value": 255.9, "unit": "ms"}, "request_latency": {"value": 297.5, "unit": "ms"}, "output_sequence_length": {"value": 9, "unit": "tokens"}}, "error": null}
{"metadata": {"request_start_ns": 1759813207632900363, "conversation_id": "b"}, "metrics": {"error_isl": {"value": 550, "unit": "tokens"}}, "error": {"code": 499}}
{"metadata": {"request_start_ns": 1759813208532900363, "conversation_id": "b"}, "metrics": {"input_sequence_length": {"value": 10, "unit": "tokens"}, "output_sequence_length": {"value": 1, "unit": "tokens"}}, "error": null}
"#;
    let trace = formats::lines(text, 16).unwrap();
    assert_eq!(trace.requests.len(), 2, "what failed says nothing");
    assert_eq!(
        (trace.requests[0].prompt, trace.requests[0].output),
        (550, 9)
    );
    assert!((trace.requests[1].arrival_ms - 1_000.0).abs() < 0.01);
    assert_ne!(trace.requests[0].session, trace.requests[1].session);
}

#[test]
fn equal_tokens_are_equal_prefixes() {
    let line = |ids: &[u32]| {
        format!(
            r#"{{"input_toks": {}, "output_toks": 3, "arrival_time_ns": 5000000, "input_tok_ids": {ids:?}}}"#,
            ids.len()
        )
    };
    let (a, b) = (Vec::from_iter(0..40), Vec::from_iter((0..16).chain(50..74)));
    let trace = formats::lines(&format!("{}\n{}", line(&a), line(&b)), 16).unwrap();
    let [one, two] = &trace.requests[..] else {
        panic!("two requests")
    };
    assert_eq!((one.chain.len(), two.chain.len()), (2, 2));
    assert_eq!(one.chain[0], two.chain[0]);
    assert_ne!(one.chain[1], two.chain[1]);
}

#[test]
fn turns_wait_for_each_other() {
    let text = r#"{"session_id": "a", "timestamp": 100, "input_length": 320, "output_length": 40}
{"session_id": "b", "timestamp": 120, "input_length": 64, "output_length": 2}
{"session_id": "a", "delay": 500, "input_length": 100, "output_length": 10}
{"session_id": "a", "delay": 0, "input_length": 10, "output_length": 1}
"#;
    for (spread, rate) in [(0.0, 1.0), (400.0, 2.0)] {
        let mut trace = formats::lines(text, 16).unwrap();
        trace.reshape(spread, rate, 1);
        let turns: Vec<usize> = (0..4)
            .filter(|&at| trace.requests[at].prompt != 64)
            .collect();
        let prompts: Vec<u32> = turns.iter().map(|&at| trace.requests[at].prompt).collect();
        assert_eq!(
            prompts,
            [320, 460, 480],
            "a turn's prompt holds the turns before"
        );
        let outcomes = run(&trace);
        let life = |turn: usize| outcomes.timelines[turns[turn]];
        assert!((life(1).arrived - life(0).ended - 500.0).abs() < 1e-6);
        assert!((life(2).arrived - life(1).ended).abs() < 1e-6);
        assert_eq!(life(1).cached, 320, "the first turn's prompt is cached");
    }
}
