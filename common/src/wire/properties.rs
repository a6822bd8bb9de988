#![allow(clippy::unwrap_used, reason = "tests")]

use super::tests::hello;
use super::*;
use proptest::prelude::*;

fn any_selection() -> impl Strategy<Value = (usize, Vec<u32>)> {
    (1usize..5000).prop_flat_map(|rows| {
        let most = rows.min(600);
        (
            Just(rows),
            prop::collection::btree_set(0..rows as u32, 0..=most)
                .prop_map(|s| s.into_iter().collect()),
        )
    })
}

fn any_header() -> impl Strategy<Value = FrameHeader> {
    let numbers = (
        any::<u16>(),
        any::<u32>(),
        any::<u64>(),
        any::<u64>(),
        0..=MAX_BODY_BYTES as u32,
        any::<(u16, u16)>(),
    );
    let flags = any::<[bool; 4]>();
    (
        prop::sample::select(FrameKind::ALL.to_vec()),
        flags,
        numbers,
    )
        .prop_map(
            |(kind, flags, (bucket, epoch, step, update, body, (roster, lead)))| {
                let [non_finite, counted, absent, held] = flags;
                let body_bytes = if non_finite || absent { 0 } else { body };
                FrameHeader {
                    kind,
                    flags: FrameFlags {
                        non_finite,
                        counted,
                        absent,
                        held,
                    },
                    bucket: BucketId(bucket),
                    epoch: Epoch(epoch),
                    step: Step(step),
                    update,
                    body_bytes,
                    roster_bytes: roster.min(body_bytes.min(0xffff) as u16),
                    lead,
                }
            },
        )
}

fn any_ranks() -> impl Strategy<Value = Vec<Rank>> {
    prop::collection::btree_set(any::<u16>(), 0..50)
        .prop_map(|ranks| ranks.into_iter().map(Rank).collect())
}

fn any_place() -> impl Strategy<Value = Place> {
    (any::<([u8; 16], u16, u32, u16)>(), any_ranks()).prop_map(
        |((run, rank, epoch, next_rank), members)| Place {
            run: RunId(run),
            rank: Rank(rank),
            epoch: Epoch(epoch),
            next_rank,
            members,
        },
    )
}

fn any_intent() -> impl Strategy<Value = Intent> {
    let when = prop_oneof![
        Just(JoinWhen::Start),
        Just(JoinWhen::Any),
        Just(JoinWhen::Running)
    ];
    let join =
        (any::<(Option<u16>, Option<u16>, u64)>(), when).prop_map(|((rank, world, step), when)| {
            Intent::Join {
                rank: rank.map(Rank),
                world,
                start_step: Step(step),
                when,
            }
        });
    let member =
        (any_place(), any::<(u64, bool)>()).prop_map(|(place, (step, waited))| Intent::Member {
            place,
            step: Step(step),
            waited,
        });
    prop_oneof![join, member]
}

fn any_progress() -> impl Strategy<Value = Control> {
    prop_oneof![
        any::<u32>().prop_map(|frames| Control::Retelling { frames }),
        any::<u64>().prop_map(|step| Control::Ready { step: Step(step) }),
        any::<u64>().prop_map(|step| Control::Donated { step: Step(step) }),
        any::<u64>().prop_map(|step| Control::Donating { step: Step(step) }),
        any::<(u64, [u8; 32])>().prop_map(|(step, digest)| Control::Digest {
            step: Step(step),
            digest
        }),
        (any::<u64>(), any_ranks()).prop_map(|(step, ranks)| Control::DigestsDiffer {
            step: Step(step),
            ranks
        }),
        Just(Control::Away),
        Just(Control::Donate),
        Just(Control::Leave),
    ]
}

fn any_control() -> impl Strategy<Value = Control> {
    let text = "[a-zäλ ]{0,40}";
    let hello = (text, any::<[u8; 16]>(), any_intent(), 0usize..20).prop_map(
        |(job, incarnation, intent, tensors)| {
            let Control::Hello(mut hello) = hello() else {
                unreachable!()
            };
            *hello = Hello {
                job,
                incarnation,
                intent,
                ..*hello
            };
            hello.plan.tensors = vec![hello.plan.tensors[0].clone(); tensors];
            Control::Hello(hello)
        },
    );
    let refused = (prop::sample::select(RefusalCode::ALL.to_vec()), text)
        .prop_map(|(code, detail)| Control::Refused { code, detail });
    let membership = (any::<(u32, u16)>(), any_ranks(), any_ranks(), text).prop_map(
        |((epoch, next_rank), members, away, reason)| Control::Membership {
            epoch: Epoch(epoch),
            next_rank,
            members,
            away,
            reason,
        },
    );
    let welcome = (any::<(u64, bool, u64, bool)>(), any_place()).prop_map(
        |((shard_incarnation, retell, step, snapshot), place)| {
            Control::Welcome(Welcome {
                shard_incarnation,
                retell,
                place,
                step: Step(step),
                snapshot,
            })
        },
    );
    let waiting =
        any::<(u16, u16)>().prop_map(|(joined, world)| Control::Waiting { joined, world });
    prop_oneof![hello, welcome, refused, membership, waiting, any_progress()]
}

proptest! {
    #[test]
    fn headers_come_back(header in any_header()) {
        prop_assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn accepted_headers_have_one_encoding(bytes in any::<[u8; HEADER_BYTES]>()) {
        if let Ok(header) = FrameHeader::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    #[test]
    fn controls_come_back_and_end_where_they_end(message in any_control()) {
        let mut bytes = message.encode();
        prop_assert_eq!(Control::decode(&bytes), Ok(message));
        bytes.push(0);
        prop_assert!(Control::decode(&bytes).is_err());
    }

    #[test]
    fn selections_come_back((rows, selected) in any_selection(), tail in prop::collection::vec(any::<u8>(), 0..4)) {
        let mut bytes = encode_selection(rows, &selected);
        prop_assert!(bytes.len() <= selection_limit(rows));
        bytes.extend(&tail);
        let mut rest = bytes.as_slice();
        prop_assert_eq!(decode_selection(&mut rest, rows).unwrap(), selected);
        prop_assert_eq!(rest, tail.as_slice());
    }

    #[test]
    fn accepted_selections_have_one_encoding(rows in 1usize..200, bytes in prop::collection::vec(any::<u8>(), 0..40), form in 0u8..2) {
        let bytes: Vec<u8> = core::iter::once(form).chain(bytes).collect();
        let mut rest = bytes.as_slice();
        if let Ok(selected) = decode_selection(&mut rest, rows) {
            let used = bytes.len() - rest.len();
            prop_assert_eq!(encode_selection(rows, &selected), &bytes[..used]);
        }
    }
}
