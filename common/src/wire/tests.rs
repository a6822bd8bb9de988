#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::config::AlgorithmConfig;
use crate::config::algorithm::ValueType;
use crate::plan::{DType, TensorSpec};

/// Bytes of an annotated dump: `#` starts a comment, all else is hexadecimal.
fn dump(text: &str) -> Vec<u8> {
    let digits: String = text
        .lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(str::chars)
        .filter(|c| !c.is_whitespace())
        .collect();
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
        .collect()
}

fn header() -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Selection,
        flags: FrameFlags {
            non_finite: false,
            counted: true,
            ..FrameFlags::default()
        },
        bucket: BucketId(0x0102),
        epoch: Epoch(3),
        step: Step(0x0a0b_0c0d),
        update: 7,
        body_bytes: 0x1000,
        roster_bytes: 6,
        lead: 2,
    }
}

pub(super) fn hello() -> Control {
    Control::Hello(Box::new(Hello {
        protocol: PROTOCOL_VERSION,
        job: "demo".into(),
        incarnation: *b"0123456789abcdef",
        shard: 1,
        host: "h".into(),
        intent: Intent::Join {
            rank: Some(Rank(2)),
            world: None,
            start_step: Step(5),
            when: JoinWhen::Any,
        },
        plan: PlanSpec {
            trainer: "lr=01".into(),
            algorithm: AlgorithmConfig {
                density: 0.2,
                energy: 0.75,
                eta: 0.1,
                feedback_decay: 1.0,
                sketch_rank: 4,
                dense_below_elements: 1024,
                wire_up: ValueType::Int4,
                wire_down: ValueType::Int4,
                wire_sketch: ValueType::Bf16,
                wire_dense: ValueType::F32,
                wire_warmup: ValueType::Int8,
                quant_block: 64,
                warmup_updates: 20,
                bucket_bytes: 25 << 20,
                ..AlgorithmConfig::default()
            },
            shards: 2,
            tensors: vec![TensorSpec {
                name: "w".into(),
                shape: vec![2, 3],
                dtype: DType::Bf16,
                density: Some(0.5),
            }],
        },
    }))
}

#[test]
fn header_bytes() {
    let bytes = dump(
        "02                 # kind: Selection
         02                 # flags: counted
         02 01              # bucket 0x0102
         03 00 00 00        # epoch 3
         0d 0c 0b 0a 00 00 00 00 # step
         07 00 00 00 00 00 00 00 # update
         00 10 00 00        # body bytes
         06 00              # roster bytes
         02 00              # lead",
    );
    assert_eq!(header().encode().as_slice(), bytes);
    assert_eq!(FrameHeader::decode(&header().encode()), Ok(header()));
}

#[test]
fn hello_bytes() {
    let bytes = dump(
        "01                 # tag: Hello
         02 00              # protocol 2
         04 00 00 00 64656d6f # job \"demo\"
         30313233 34353637 38396162 63646566 # incarnation
         01 00              # shard 1
         01 00 00 00 68     # host \"h\"
         00                 # intent: join
         01 02 00           # rank 2
         00                 # world: absent
         05 00 00 00 00 00 00 00 # start step
         01                 # when: any
         # the plan's algorithm
         01 01 00           # arc, ef14, first_gradient
         cd cc cc 3d        # eta 0.1
         00 00 80 3f        # feedback_decay 1
         cd cc 4c 3e        # density 0.2
         00 00 40 3f        # energy 0.75
         04 00              # sketch_rank 4
         00 00              # rademacher, per-tensor
         00 00 00 00        # block_width 0
         00 04 00 00        # dense_below_elements 1024
         04 04 01 00 03     # wire up int4, down int4, sketch bf16, dense f32, warm-up int8
         40 00 00 00        # quant_block 64
         14 00 00 00 00 00 00 00 # warmup_updates 20
         00 00 00 00 00 00 00 00 # ramp_updates
         00 00 00 00 00 00 00 00 # seed
         00 00 90 01        # bucket_bytes 25 MiB
         05 00 00 00 6c723d3031 # trainer \"lr=01\"
         02 00              # shards 2
         01 00 00 00        # one tensor
         01 00 00 00 77     # name \"w\"
         02 00 00 00        # two dimensions
         02 00 00 00 00 00 00 00
         03 00 00 00 00 00 00 00
         01                 # bf16
         01 00 00 00 3f     # density 0.5",
    );
    assert_eq!(hello().encode(), bytes);
    assert_eq!(Control::decode(&bytes), Ok(hello()));
}

fn place() -> Place {
    Place {
        run: RunId(*b"0123456789abcdef"),
        rank: Rank(2),
        epoch: Epoch(1),
        next_rank: 4,
        members: vec![Rank(0), Rank(2)],
    }
}

#[test]
fn a_members_hello_bytes() {
    let Control::Hello(mut hello) = hello() else {
        unreachable!()
    };
    hello.intent = Intent::Member {
        place: place(),
        step: Step(5),
        waited: true,
    };
    let bytes = Control::Hello(hello.clone()).encode();
    let intent = dump(
        "01                 # intent: member
         30313233343536373839616263646566 # run
         02 00              # rank
         01 00 00 00        # epoch
         04 00              # next rank
         02 00 00 00 00 00 02 00 # members 0 and 2
         05 00 00 00 00 00 00 00 # step
         01                 # waited",
    );
    let start = 1 + 2 + 8 + 16 + 2 + 5;
    assert_eq!(bytes[start..start + intent.len()], intent);
    assert_eq!(Control::decode(&bytes), Ok(Control::Hello(hello)));
}

#[test]
fn other_control_bytes() {
    let cases = [
        (
            Control::Welcome(Welcome {
                shard_incarnation: 9,
                retell: true,
                place: place(),
                step: Step(5),
                snapshot: false,
            }),
            "02 0900000000000000 01 # incarnation, retell
             30313233343536373839616263646566 0200 01000000 0400 02000000 0000 0200 # place
             0500000000000000 00 # step, snapshot",
        ),
        (
            Control::Waiting {
                joined: 1,
                world: 4,
            },
            "03 0100 0400",
        ),
        (
            Control::Refused {
                code: RefusalCode::Rank,
                detail: "é".into(),
            },
            "04 0400 02000000 c3a9",
        ),
        (
            Control::Membership {
                epoch: Epoch(2),
                next_rank: 4,
                members: vec![Rank(0), Rank(3)],
                away: vec![Rank(3)],
                reason: "x".into(),
            },
            "05 02000000 0400 02000000 0000 0300 01000000 0300 01000000 78",
        ),
        (Control::Retelling { frames: 3 }, "08 03000000"),
        (Control::Away, "09"),
        (Control::Ready { step: Step(7) }, "0a 0700000000000000"),
        (
            Control::Digest {
                step: Step(7),
                digest: [0xab; 32],
            },
            "0b 0700000000000000 abababababababababababababababababababababababababababababababab",
        ),
        (
            Control::DigestsDiffer {
                step: Step(7),
                ranks: vec![Rank(1)],
            },
            "0c 0700000000000000 01000000 0100",
        ),
        (Control::Donate, "0d"),
        (Control::Donated { step: Step(7) }, "0e 0700000000000000"),
        (Control::Donating { step: Step(7) }, "0f 0700000000000000"),
        (Control::Leave, "06"),
        (
            Control::Report {
                step: Step(1),
                loss: 1.0,
                step_seconds: 0.5,
                wait_seconds: 0.25,
                bytes_sent: 2,
                bytes_received: 3,
                bytes_dense_equivalent: 4,
                captured_energy: 0.75,
                residual_ratio: 2.0,
            },
            "07 0100000000000000 0000803f 0000003f 0000803e 0200000000000000 0300000000000000 0400000000000000 0000403f 00000040",
        ),
    ];
    for (message, text) in cases {
        assert_eq!(message.encode(), dump(text), "{message:?}");
        assert_eq!(Control::decode(&dump(text)), Ok(message));
    }
}

#[test]
fn selection_bytes() {
    let cases: [(usize, &[u32], &str); 7] = [
        (12, &[0, 3, 11], "00 0908          # bitmap: rows 0, 3 | 11"),
        (
            1000,
            &[5, 6, 300],
            "01 03 05 00 a502 # deltas: 3 rows, 5, +0, +293",
        ),
        (1000, &[], "01 00            # deltas: none"),
        (8, &[], "00 00            # equal sizes: bitmap"),
        (16, &[9], "00 0002          # equal sizes: bitmap"),
        (17, &[9], "01 01 09"),
        (1, &[0], "00 01"),
    ];
    for (rows, selected, text) in cases {
        assert_eq!(
            encode_selection(rows, selected),
            dump(text),
            "{rows} {selected:?}"
        );
        assert_eq!(
            decode_selection(&mut dump(text).as_slice(), rows).unwrap(),
            selected
        );
    }
}

#[test]
fn selections_that_are_not_canonical_are_refused() {
    let refused = |rows, text| decode_selection(&mut dump(text).as_slice(), rows).unwrap_err();
    let rule = |error| match error {
        WireError::Invalid { rule, .. } => rule,
        other => panic!("{other:?}"),
    };
    assert!(rule(refused(12, "00 0918")).contains("bits past the last row"));
    assert!(rule(refused(17, "00 000200")).contains("bitmap is used only"));
    assert!(rule(refused(16, "01 01 09")).contains("deltas are used only"));
    assert!(rule(refused(1000, "01 01 8500")).contains("shortest"));
    assert!(rule(refused(1000, "01 01 8080808080")).contains("five bytes"));
    assert_eq!(
        refused(1000, "01 01 ffffffff7f"),
        WireError::TooLong {
            what: "selection",
            value: 0x7_ffff_ffff,
            limit: 0xffff_ffff
        }
    );
    assert_eq!(
        refused(1000, "01 01 e807"),
        WireError::TooLong {
            what: "selected row",
            value: 1000,
            limit: 999
        }
    );
    assert_eq!(
        decode_selection(&mut dump("01 01 e707").as_slice(), 1000),
        Ok(vec![999])
    );
    assert_eq!(
        refused(1000, "01 02 e707 00"),
        WireError::TooLong {
            what: "selected row",
            value: 1000,
            limit: 999
        }
    );
    assert_eq!(
        refused(1000, "01 e907"),
        WireError::TooLong {
            what: "selected rows",
            value: 1001,
            limit: 1000
        }
    );
    assert_eq!(
        refused(1000, "01 e807"),
        WireError::Truncated {
            what: "selection",
            needed: 1000,
            left: 0
        }
    );
    assert_eq!(
        refused(8, "02"),
        WireError::Unknown {
            what: "selection form",
            value: 2
        }
    );
}

#[test]
fn headers_that_break_a_rule_are_refused() {
    let changed = |at: usize, value: u8| {
        let mut bytes = header().encode();
        bytes[at] = value;
        FrameHeader::decode(&bytes)
    };
    assert_eq!(
        changed(0, 0),
        Err(WireError::Unknown {
            what: "frame kind",
            value: 0
        })
    );
    assert!(changed(0, 12).is_ok());
    for value in [11, 13] {
        assert_eq!(
            changed(0, value),
            Err(WireError::Unknown {
                what: "frame kind",
                value: u64::from(value)
            })
        );
    }
    assert_eq!(
        changed(1, 16),
        Err(WireError::Unknown {
            what: "frame flags",
            value: 16
        })
    );
    for flags in [1, 4] {
        assert_eq!(
            changed(1, flags),
            Err(WireError::Invalid {
                what: "body bytes",
                rule: "a non-finite or absent frame has no body"
            })
        );
    }
    assert!(changed(29, 0x0f).is_ok());
    assert_eq!(
        changed(29, 0x10),
        Err(WireError::Invalid {
            what: "roster bytes",
            rule: "the roster is a part of the body"
        })
    );
    let sized = |body_bytes| {
        FrameHeader::decode(
            &FrameHeader {
                body_bytes,
                ..header()
            }
            .encode(),
        )
    };
    assert!(sized(MAX_BODY_BYTES as u32).is_ok());
    assert_eq!(
        sized(MAX_BODY_BYTES as u32 + 1).unwrap_err().blame(),
        Blame::Peer
    );
}

#[test]
fn control_limits_hold_on_both_sides() {
    let Control::Hello(base) = hello() else {
        unreachable!()
    };
    let sent = |change: &dyn Fn(&mut Hello)| {
        let mut hello = base.clone();
        change(&mut hello);
        Control::decode(&Control::Hello(hello).encode())
    };
    let too_long = |what, limit: usize| {
        Err(WireError::TooLong {
            what,
            value: limit as u64 + 1,
            limit: limit as u64,
        })
    };
    assert!(sent(&|h| h.job = "j".repeat(MAX_JOB_BYTES)).is_ok());
    assert_eq!(
        sent(&|h| h.job = "j".repeat(MAX_JOB_BYTES + 1)),
        too_long("job name", MAX_JOB_BYTES)
    );
    assert!(sent(&|h| h.plan.tensors[0].name = "n".repeat(MAX_NAME_BYTES)).is_ok());
    assert_eq!(
        sent(&|h| h.plan.tensors[0].name = "n".repeat(MAX_NAME_BYTES + 1)),
        too_long("tensor name", MAX_NAME_BYTES)
    );
    assert!(sent(&|h| h.plan.tensors[0].shape = vec![1; MAX_DIMENSIONS]).is_ok());
    assert_eq!(
        sent(&|h| h.plan.tensors[0].shape = vec![1; MAX_DIMENSIONS + 1]),
        too_long("tensor dimensions", MAX_DIMENSIONS)
    );
    assert!(sent(&|h| h.plan.tensors = vec![base.plan.tensors[0].clone(); MAX_TENSORS]).is_ok());
    assert_eq!(
        sent(&|h| h.plan.tensors = vec![base.plan.tensors[0].clone(); MAX_TENSORS + 1]),
        too_long("tensors", MAX_TENSORS)
    );
    let members = |count: u16| {
        let members = (0..count).map(Rank).collect();
        Control::decode(
            &Control::Membership {
                epoch: Epoch(1),
                next_rank: 0,
                members,
                away: Vec::new(),
                reason: String::new(),
            }
            .encode(),
        )
    };
    assert!(members(MAX_WORLD as u16).is_ok());
    assert_eq!(
        members(MAX_WORLD as u16 + 1),
        too_long("members", MAX_WORLD)
    );
    assert!(matches!(
        Control::decode(&vec![6; MAX_CONTROL_BYTES]),
        Err(WireError::Trailing { .. })
    ));
    assert_eq!(
        Control::decode(&vec![6; MAX_CONTROL_BYTES + 1]),
        too_long("control message", MAX_CONTROL_BYTES)
    );
}

#[test]
fn texts_for_people_are_cut_at_a_character() {
    let detail = format!("{}é{}", "x".repeat(MAX_DETAIL_BYTES - 1), "y".repeat(10));
    let sent = Control::Refused {
        code: RefusalCode::Plan,
        detail,
    };
    let Ok(Control::Refused { detail, .. }) = Control::decode(&sent.encode()) else {
        panic!("refused")
    };
    assert_eq!(detail, "x".repeat(MAX_DETAIL_BYTES - 1));
}

#[test]
fn control_messages_that_break_a_rule_are_refused() {
    let refused = |text| Control::decode(&dump(text)).unwrap_err();
    assert_eq!(
        refused("10"),
        WireError::Unknown {
            what: "control tag",
            value: 16
        }
    );
    assert_eq!(
        refused("06 00"),
        WireError::Trailing {
            what: "control message",
            bytes: 1
        }
    );
    assert_eq!(
        refused("04 0c00 00000000"),
        WireError::Unknown {
            what: "refusal code",
            value: 12
        }
    );
    assert_eq!(
        refused("04 0100 01000000 ff"),
        WireError::NotUtf8 { what: "detail" }
    );
    assert_eq!(
        refused("05 00000000 0000 02000000 0100 0100 00000000 00000000"),
        WireError::Invalid {
            what: "members",
            rule: "ranks must ascend"
        }
    );
    // A count that the message cannot hold is refused before anything of its size is allocated.
    assert_eq!(
        refused("05 00000000 0000 00100000"),
        WireError::Truncated {
            what: "members",
            needed: 8192,
            left: 0
        }
    );
}

#[test]
fn messages_cut_at_any_byte_are_refused() {
    let whole = hello().encode();
    for end in 0..whole.len() {
        let error = Control::decode(&whole[..end]).unwrap_err();
        assert!(
            matches!(error, WireError::Truncated { .. }),
            "{end}: {error:?}"
        );
    }
    let whole = encode_selection(1000, &[5, 6, 300]);
    for end in 0..whole.len() {
        let mut rest = &whole[..end];
        assert!(decode_selection(&mut rest, 1000).is_err());
        assert_eq!(rest.len(), end, "a refused selection is left where it was");
    }
}
