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
    );
    (
        prop::sample::select(FrameKind::ALL.to_vec()),
        any::<bool>(),
        any::<bool>(),
        numbers,
    )
        .prop_map(
            |(kind, non_finite, counted, (bucket, epoch, step, update, body))| FrameHeader {
                kind,
                flags: FrameFlags {
                    non_finite,
                    counted,
                },
                bucket: BucketId(bucket),
                epoch: Epoch(epoch),
                step: Step(step),
                update,
                body_bytes: if non_finite { 0 } else { body },
            },
        )
}

fn any_control() -> impl Strategy<Value = Control> {
    let text = "[a-zäλ ]{0,40}";
    let hello = (
        text,
        any::<[u8; 16]>(),
        any::<Option<u16>>(),
        any::<Option<u16>>(),
        any::<u64>(),
        0usize..20,
    )
        .prop_map(|(job, incarnation, rank, world, step, tensors)| {
            let Control::Hello(mut hello) = hello() else {
                unreachable!()
            };
            *hello = Hello {
                job,
                incarnation,
                rank: rank.map(Rank),
                world,
                start_step: Step(step),
                ..*hello
            };
            hello.plan.tensors = vec![hello.plan.tensors[0].clone(); tensors];
            Control::Hello(hello)
        });
    let refused = (prop::sample::select(RefusalCode::ALL.to_vec()), text)
        .prop_map(|(code, detail)| Control::Refused { code, detail });
    let membership = (
        any::<u32>(),
        prop::collection::btree_set(any::<u16>(), 0..50),
        text,
    )
        .prop_map(|(epoch, members, reason)| Control::Membership {
            epoch: Epoch(epoch),
            members: members.into_iter().map(Rank).collect(),
            reason,
        });
    let waiting =
        any::<(u16, u16)>().prop_map(|(joined, world)| Control::Waiting { joined, world });
    prop_oneof![hello, refused, membership, waiting, Just(Control::Leave)]
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
