//! Both ends in one process: what is sent arrives, in order, and every way a stream can end is told.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc::{Receiver, channel},
    },
    time::Duration,
};

use bytes::Bytes;
use kvmesh_streams::{End, Event, Listen, Method, StreamId, Streams};

const METHOD: &str = "/test.Service/Talk";
const UNARY: &str = "/test.Service/Ask";

/// One end, polled by a thread of its own as a loop would.
struct Side {
    streams: Arc<Streams>,
    events: Receiver<Event>,
    paused: Arc<AtomicBool>,
}

impl Side {
    fn new() -> Self {
        let streams = Arc::new(Streams::new().expect("descriptors"));
        let paused = Arc::<AtomicBool>::default();
        let (happened, events) = channel();
        let (polled, pause) = (Arc::downgrade(&streams), Arc::clone(&paused));
        std::thread::spawn(move || {
            while let Some(streams) = polled.upgrade() {
                if !pause.load(SeqCst) {
                    for event in streams.poll() {
                        let _ = happened.send(event);
                    }
                }
                drop(streams);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Self {
            streams,
            events,
            paused,
        }
    }

    fn next(&mut self) -> Event {
        let within = Duration::from_secs(20);
        self.events.recv_timeout(within).expect("something happens")
    }

    fn message(&mut self) -> Bytes {
        match self.next() {
            Event::Message(_, message) => message,
            other => panic!("{other:?} instead of a message"),
        }
    }

    fn end(&mut self) -> End {
        loop {
            if let Event::Closed(_, end) = self.next() {
                return end;
            }
        }
    }
}

struct Pair {
    server: Side,
    served: StreamId,
    client: Side,
    opened: StreamId,
}

fn listen(server: &Streams) -> u16 {
    let listen = Listen {
        methods: HashMap::from([
            (METHOD.to_owned(), Method::Stream),
            (UNARY.to_owned(), Method::Unary),
        ]),
        others: "/nowhere".into(),
    };
    server.listen("127.0.0.1", 0, listen).expect("a port")
}

fn pair() -> Pair {
    let (mut server, client) = (Side::new(), Side::new());
    let port = listen(&server.streams);
    let opened = client
        .streams
        .open(&format!("127.0.0.1:{port}"), METHOD)
        .expect("a path");
    let Event::Opened(served, method) = server.next() else {
        panic!("not opened");
    };
    assert_eq!(method, METHOD);
    Pair {
        server,
        served,
        client,
        opened,
    }
}

#[test]
fn messages_arrive_in_order_both_ways() {
    let mut pair = pair();
    for number in 0..1000u32 {
        let message = Bytes::copy_from_slice(&number.to_le_bytes());
        pair.client.streams.send(pair.opened, message.clone());
        pair.server.streams.send(pair.served, message);
    }
    for number in 0..1000u32 {
        let expected = number.to_le_bytes();
        for side in [&mut pair.server, &mut pair.client] {
            loop {
                match side.next() {
                    Event::Message(_, message) => break assert_eq!(message[..], expected),
                    Event::Writable(_) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[test]
fn an_empty_message_is_a_message() {
    let mut pair = pair();
    pair.client.streams.send(pair.opened, Bytes::new());
    assert!(pair.server.message().is_empty());
}

#[test]
fn both_sides_end_in_order() {
    let mut pair = pair();
    pair.client.streams.send(pair.opened, Bytes::from("last"));
    pair.client.streams.end(pair.opened);
    assert_eq!(pair.server.message(), "last");
    assert!(matches!(pair.server.next(), Event::HalfClosed(stream) if stream == pair.served));
    pair.server.streams.send(pair.served, Bytes::from("answer"));
    pair.server.streams.end(pair.served);
    assert_eq!(pair.client.message(), "answer");
    assert_eq!(pair.client.end().code, 0);
    assert_eq!(pair.server.end().code, 0);
}

#[test]
fn a_status_arrives_with_its_details() {
    let mut pair = pair();
    let details = vec![
        ("why-bin".to_owned(), vec![0, 255, 7]),
        ("no key".to_owned(), vec![1]),
    ];
    pair.server.streams.send(pair.served, Bytes::from("before"));
    pair.server
        .streams
        .fail(pair.served, 8, "too much", &details);
    assert_eq!(pair.client.message(), "before");
    let end = pair.client.end();
    assert_eq!((end.code, end.message.as_str()), (8, "too much"));
    assert_eq!(end.details, [("why-bin".to_owned(), vec![0, 255, 7])]);
}

#[test]
fn a_caller_that_cancels_is_noticed() {
    let mut pair = pair();
    pair.client.streams.cancel(pair.opened);
    assert_eq!(pair.server.end().code, 1);
    // What is sent now goes nowhere, and does no harm.
    assert!(pair.server.streams.send(pair.served, Bytes::from("late")));
    assert!(pair.client.events.try_recv().is_err());
}

#[test]
fn a_server_that_goes_is_noticed() {
    let mut pair = pair();
    pair.server.streams.close();
    assert_eq!(pair.client.end().code, 14);
}

/// A unary call that has reached its server.
fn called() -> Pair {
    let (mut server, client) = (Side::new(), Side::new());
    let port = listen(&server.streams);
    let opened = client.streams.open(&format!("127.0.0.1:{port}"), UNARY);
    let opened = opened.expect("a path");
    client.streams.send(opened, Bytes::from("question"));
    let Event::Called {
        stream: served,
        method,
        traceparent,
        message,
    } = server.next()
    else {
        panic!("not called");
    };
    assert_eq!((method.as_str(), &message[..]), (UNARY, &b"question"[..]));
    assert_eq!(traceparent, "");
    Pair {
        server,
        served,
        client,
        opened,
    }
}

#[test]
fn a_unary_call_is_answered_with_one_message() {
    let mut pair = called();
    let streams = &pair.server.streams;
    assert!(streams.send(pair.served, Bytes::from("answer")));
    streams.end(pair.served);
    assert_eq!(pair.client.message(), "answer");
    assert_eq!(pair.client.end().code, 0);
    assert_eq!(pair.server.end().code, 0);
}

#[test]
fn a_unary_call_fails_whatever_was_sent_before() {
    let mut pair = called();
    let details = vec![("why-bin".to_owned(), vec![0, 255, 7])];
    let streams = &pair.server.streams;
    streams.send(pair.served, Bytes::from("answer"));
    streams.fail(pair.served, 8, "too much", &details);
    let Event::Closed(_, end) = pair.client.next() else {
        panic!("not closed");
    };
    assert_eq!((end.code, end.message.as_str()), (8, "too much"));
    assert_eq!(end.details, details);
    assert_eq!(pair.server.end().code, 0);
}

#[test]
fn a_unary_call_without_an_answer_is_an_internal_error() {
    let mut pair = called();
    pair.server.streams.end(pair.served);
    assert_eq!(pair.client.end().code, 13);
}

#[test]
fn a_unary_call_without_a_message_reaches_nobody() {
    let (server, mut client) = (Side::new(), Side::new());
    let port = listen(&server.streams);
    let opened = client.streams.open(&format!("127.0.0.1:{port}"), UNARY);
    client.streams.end(opened.expect("a path"));
    assert_eq!(client.end().code, 13);
    assert!(server.events.try_recv().is_err());
}

#[test]
fn a_caller_that_cancels_its_unary_call_is_noticed() {
    let mut pair = called();
    pair.client.streams.cancel(pair.opened);
    assert_eq!(pair.server.end().code, 1);
    assert!(pair.server.streams.send(pair.served, Bytes::from("late")));
    assert!(pair.client.events.try_recv().is_err());
}

#[test]
fn a_reader_that_is_behind_holds_the_sender_back() {
    let mut pair = pair();
    let message = Bytes::from(vec![1u8; 1 << 20]);
    pair.client.paused.store(true, SeqCst);
    // HTTP/2's windows and the sockets hold a few, then nothing moves.
    let mut sent = 1;
    while pair.server.streams.send(pair.served, message.clone()) {
        sent += 1;
        assert!(sent < 200, "nothing held back");
        std::thread::sleep(Duration::from_millis(2));
    }
    pair.client.paused.store(false, SeqCst);
    for _ in 0..sent {
        assert_eq!(pair.client.message().len(), message.len());
    }
    assert!(matches!(pair.server.next(), Event::Writable(stream) if stream == pair.served));
}

#[test]
fn more_than_one_poll_takes_in_arrives() {
    let mut pair = pair();
    let message = Bytes::from(vec![1u8; 8 << 20]);
    for _ in 0..4 {
        pair.server.streams.send(pair.served, message.clone());
    }
    for _ in 0..4 {
        assert_eq!(pair.client.message().len(), message.len());
    }
}

#[test]
fn a_host_may_be_a_name() {
    let (mut server, client) = (Side::new(), Side::new());
    let port = listen(&server.streams);
    let opened = client.streams.open(&format!("localhost:{port}"), METHOD);
    opened.expect("a path");
    assert!(matches!(server.next(), Event::Opened(..)));
}

#[test]
fn nobody_there_is_unavailable() {
    let mut client = Side::new();
    client.streams.open("127.0.0.1:1", METHOD).expect("a path");
    let end = client.end();
    assert_eq!(end.code, 14);
    assert!(end.message.contains("refused"), "{}", end.message);
    assert!(client.streams.open("127.0.0.1:1", "no path").is_err());
}

#[test]
fn other_methods_are_the_other_servers() {
    let (server, mut client) = (Side::new(), Side::new());
    let port = listen(&server.streams);
    let address = format!("127.0.0.1:{port}");
    client
        .streams
        .open(&address, "/test.Service/Other")
        .expect("a path");
    let end = client.end();
    assert_eq!(end.code, 14, "there is no other server: {}", end.message);
}

#[test]
fn a_taken_port_is_refused() {
    let (one, other) = (Side::new(), Side::new());
    let port = listen(&one.streams);
    let listen = Listen {
        methods: HashMap::new(),
        others: "/nowhere".into(),
    };
    assert!(other.streams.listen("127.0.0.1", port, listen).is_err());
}
