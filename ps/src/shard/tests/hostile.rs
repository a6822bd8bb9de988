//! Whatever peers send: no panic, bounded memory, and those who keep the rules are not refused for it (I5).

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Move {
    Hello {
        session: u64,
        rank: Option<u16>,
        start: u64,
        shard: u16,
    },
    Good {
        session: u64,
        step: u64,
    },
    Frame {
        session: u64,
        kind: usize,
        bucket: u16,
        step: u64,
        update: u64,
        bytes: usize,
        non_finite: bool,
    },
    Leave(u64),
    Closed(u64),
    Violation(u64),
    Tick(u64),
}

const KINDS: [FrameKind; 8] = [
    FrameKind::Sketch,
    FrameKind::Selection,
    FrameKind::Values,
    FrameKind::Mean,
    FrameKind::Dense,
    FrameKind::DenseMean,
    FrameKind::Sparse,
    FrameKind::SparseMean,
];

fn any_move() -> impl Strategy<Value = Move> {
    let session = 0u64..6;
    prop_oneof![
        3 => (session.clone(), prop::option::of(0u16..4), prop_oneof![9 => Just(0u64), 1 => any::<u64>()], prop_oneof![9 => Just(0u16), 1 => 0u16..3])
            .prop_map(|(session, rank, start, shard)| Move::Hello { session, rank, start, shard }),
        12 => (session.clone(), 0u64..3).prop_map(|(session, step)| Move::Good { session, step }),
        3 => (session.clone(), 0usize..8, 0u16..3, prop_oneof![0u64..3, any::<u64>()], prop_oneof![0u64..3, any::<u64>()], 0usize..80, any::<bool>())
            .prop_map(|(session, kind, bucket, step, update, bytes, non_finite)| Move::Frame { session, kind, bucket, step, update, bytes, non_finite }),
        1 => session.clone().prop_map(Move::Leave),
        1 => session.clone().prop_map(Move::Closed),
        1 => session.prop_map(Move::Violation),
        1 => (0u64..40).prop_map(Move::Tick),
    ]
}

fn play(bench: &mut Bench, compressor: Compressor, a_move: &Move) {
    let spec = spec(algorithm(compressor));
    match *a_move {
        Move::Hello {
            session,
            rank,
            start,
            shard,
        } => {
            bench.hello(
                session,
                Hello {
                    rank: rank.map(Rank),
                    start_step: Step(start),
                    shard,
                    ..hello(&spec)
                },
            );
        }
        Move::Good { session, step } => {
            let shape = bench.shape(0);
            // The first frame of the phase that is open, if it is of a fixed length.
            let kind = bench.shard.status(bench.now).open_rounds.first().map_or(
                shape.phases()[0].up,
                |round| {
                    KINDS
                        .into_iter()
                        .find(|kind| format!("{kind:?}").to_lowercase() == round.gathers)
                        .unwrap()
                },
            );
            let bytes = match kind {
                FrameKind::Sketch => shape.sketch_layout().bytes,
                FrameKind::Dense => shape.dense_layout().bytes,
                _ => {
                    shape
                        .values_layout(&shape.keep(), arc_topk_common::wire::Direction::Up)
                        .bytes
                }
            };
            bench.send(session, step, kind, vec![0; bytes]);
        }
        Move::Frame {
            session,
            kind,
            bucket,
            step,
            update,
            bytes,
            non_finite,
        } => {
            let mut head = header(KINDS[kind], step, bytes);
            head.bucket = BucketId(bucket);
            head.update = update;
            head.flags.non_finite = non_finite;
            bench.frame(session, head, vec![0xff; bytes]);
        }
        Move::Leave(session) => drop(bench.handle(Event::Leave {
            session: SessionId(session),
        })),
        Move::Closed(session) => drop(bench.lose(session)),
        Move::Violation(session) => {
            bench.handle(Event::Violation {
                session: SessionId(session),
                detail: "x".to_owned(),
            });
        }
        Move::Tick(seconds) => {
            bench.now += Duration::from_secs(seconds);
            bench.handle(Event::Tick);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_is_survived_with_bounded_memory(
        moves in prop::collection::vec(any_move(), 1..120),
        compressor in prop::sample::select(vec![Compressor::Arc, Compressor::Randk, Compressor::Topk, Compressor::Dense]),
        world in 1u16..4,
        min_workers in 1u16..3,
    ) {
        let plan = Plan::build(spec(algorithm(compressor))).unwrap();
        let config = ShardConfig { min_workers: min_workers.min(world), ..config(world) };
        let mut bench = Bench { shard: Shard::new(config), now: Duration::ZERO, plan };
        for a_move in &moves {
            play(&mut bench, compressor, a_move);
            let status = bench.shard.status(bench.now);
            prop_assert!(status.members.len() <= usize::from(world));
            prop_assert!(status.open_rounds.len() <= bench.shard.open_rounds_limit());
            prop_assert!(status.journal.len() <= 40);
            // Nothing waits that could go on.
            prop_assert!(status.open_rounds.iter().all(|round| !round.missing.is_empty()));
        }
    }
}
