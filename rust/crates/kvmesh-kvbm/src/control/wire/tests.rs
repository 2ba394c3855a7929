//! Frames, whole and damaged.

use super::*;

fn namespace() -> Namespace {
    Namespace {
        model: "m".into(),
        revision: "r".into(),
        dtype: "bf16".into(),
        layout: "nhd".into(),
        rank: 1,
        ranks: 2,
        segments: vec![6144, 6144],
    }
}

fn through(mut frame: &[u8]) -> Request {
    let mut body = Vec::new();
    assert!(read_frame(&mut frame, &mut body).unwrap());
    Request::decode(&body).unwrap()
}

#[test]
fn requests_survive_the_wire() {
    let chain = vec![Digest::new([1; 32]), Digest::new([2; 32])];
    assert_eq!(
        through(&Request::hello(9, &namespace())),
        Request::Hello {
            engine: 9,
            namespace: namespace()
        }
    );
    assert_eq!(
        through(&Request::lookup(&chain, 250)),
        Request::Lookup {
            per_block_us: 250,
            chain: chain.clone()
        }
    );
    for (tenant, parent) in [("", None), ("acme", Some(Digest::new([3; 32])))] {
        assert_eq!(
            through(&Request::reserve(tenant, parent.as_ref(), &chain)),
            Request::Reserve {
                tenant: tenant.into(),
                parent,
                chain: chain.clone()
            }
        );
    }
    assert_eq!(
        through(&Request::register(&[5, 6])),
        Request::Register { slots: vec![5, 6] }
    );
    assert_eq!(through(&Request::lease(&chain)), Request::Lease { chain });
    for hints in [
        Hints::default(),
        Hints {
            session: Some(9),
            returns: Some(false),
            tool_call: true,
            returns_in: Some(2.5),
        },
    ] {
        let blocks = vec![Digest::new([1; 32])];
        assert_eq!(
            through(&Request::hint(&blocks, &hints)),
            Request::Hint { blocks, hints }
        );
    }
    assert_eq!(
        through(&Request::release(7, &[0])),
        Request::Release {
            lease: 7,
            corrupt: vec![0]
        }
    );
}

#[test]
fn responses_survive_the_wire() {
    for response in [
        Response::Welcome { version: 1 },
        Response::Found {
            blocks: 3,
            coming: true,
        },
        Response::Rooms {
            slots: vec![0, PRESENT, FULL],
        },
        Response::Registered { blocks: 2 },
        Response::Leased {
            lease: 4,
            slots: vec![4096],
            coming: vec![0],
            origins: Origins {
                nvme: 1,
                network: 2,
            },
        },
        Response::Hinted,
        Response::Released,
        Response::Refused {
            reason: "no".into(),
        },
    ] {
        assert_eq!(Response::decode(&response.encode()[4..]).unwrap(), response);
    }
}

#[test]
fn broken_messages_are_errors_not_panics() {
    let good = Request::hello(9, &namespace());
    for length in 0..good.len() - 4 {
        assert!(Request::decode(&good[4..4 + length]).is_err());
    }
    let mut counted = Request::lookup(&[Digest::new([1; 32])], 0);
    counted[9..13].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(Request::decode(&counted[4..]).is_err());
    assert!(read_frame(&mut &u32::MAX.to_le_bytes()[..], &mut Vec::new()).is_err());
}
