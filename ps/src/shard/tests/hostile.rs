//! Whatever peers send: no panic, no hang, bounded memory, and one who keeps the rules is not refused for it (I5), with
//! one exception: the first frame of a step decides its update number, so a peer that comes first with a false one has
//! the others removed. Nobody could tell which of them is right.

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
    /// A frame as the open phase asks for, this many steps after the shard's.
    Good {
        session: u64,
        ahead: u64,
    },
    /// The next frame of the worker that keeps the rules.
    Honest,
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
    Report {
        session: u64,
        step: u64,
        loss: f32,
    },
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
        3 => (session.clone(), prop::option::of(0u16..4), starts(), prop_oneof![9 => Just(0u16), 1 => 0u16..3])
            .prop_map(|(session, rank, start, shard)| Move::Hello { session, rank, start, shard }),
        12 => (session.clone(), 0u64..3).prop_map(|(session, ahead)| Move::Good { session, ahead }),
        6 => Just(Move::Honest),
        3 => (session.clone(), 0usize..8, 0u16..3, prop_oneof![0u64..3, any::<u64>()], prop_oneof![0u64..3, any::<u64>()], 0usize..80, any::<bool>())
            .prop_map(|(session, kind, bucket, step, update, bytes, non_finite)| Move::Frame { session, kind, bucket, step, update, bytes, non_finite }),
        1 => session.clone().prop_map(Move::Leave),
        1 => session.clone().prop_map(Move::Closed),
        1 => session.clone().prop_map(Move::Violation),
        1 => (session, any::<u64>(), any::<f32>()).prop_map(|(session, step, loss)| Move::Report { session, step, loss }),
        1 => (0u64..40).prop_map(Move::Tick),
    ]
}

fn starts() -> impl Strategy<Value = u64> {
    let last = LAST_START_STEP.0;
    prop_oneof![
        12 => Just(0),
        1 => Just(last),
        1 => Just(u64::MAX),
        1 => any::<u64>(),
    ]
}

/// One worker that keeps the rules, whatever the others do.
struct Honest {
    welcomed: bool,
    refused: bool,
    step: u64,
    update: u64,
    /// Kind of its next frame and the rows chosen, if it is not waiting for an answer.
    next: Option<(FrameKind, Option<Vec<Vec<u32>>>)>,
}

impl Honest {
    const SESSION: u64 = 100;

    /// Its Hello comes first: a job that others began may well have another start or plan.
    fn join(bench: &mut Bench, compressor: Compressor) -> Self {
        let mut honest = Self {
            welcomed: false,
            refused: false,
            step: 0,
            update: 0,
            next: None,
        };
        let actions = bench.hello(Self::SESSION, hello(&spec(algorithm(compressor))));
        honest.hear(bench, &actions);
        honest
    }

    fn play(&mut self, bench: &mut Bench) -> Vec<Action> {
        let ready = self.welcomed && !self.refused;
        let Some((kind, rows)) = self.next.take_if(|_| ready) else {
            return Vec::new();
        };
        let shape = bench.shape(self.update);
        let body = match kind {
            FrameKind::Sketch => vec![0; shape.sketch_layout().bytes],
            FrameKind::Dense => vec![0; shape.dense_layout().bytes],
            FrameKind::Sparse => sparse_body(&shape),
            _ => {
                let chosen = rows.map(|rows| rows.iter().map(Vec::len).collect());
                let kept: Vec<usize> = chosen.unwrap_or_else(|| shape.keep());
                vec![
                    0;
                    shape
                        .values_layout(&kept, arc_topk_common::wire::Direction::Up)
                        .bytes
                ]
            }
        };
        let mut head = header(kind, self.step, body.len());
        head.update = self.update;
        bench.frame(Self::SESSION, head, body)
    }

    fn hear(&mut self, bench: &Bench, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Control {
                    session: SessionId(Self::SESSION),
                    message: Control::Welcome(_),
                } => {
                    self.welcomed = true;
                    self.begin(bench);
                }
                Action::Round {
                    session: SessionId(Self::SESSION),
                    header,
                    body,
                } => self.answered(bench, *header, &body[..header.payload_bytes()]),
                Action::Close {
                    session: SessionId(Self::SESSION),
                    code,
                    detail,
                } => {
                    self.refused = true;
                    let others_fault = *code == RefusalCode::TooFewWorkers
                        || detail.contains("schedules have come apart")
                        || detail.contains("an update number grows by at most one a step");
                    assert!(others_fault, "{code:?}: {detail}");
                }
                _ => {}
            }
        }
    }

    fn begin(&mut self, bench: &Bench) {
        let shape = bench.shape(self.update);
        self.next = Some((shape.phases()[0].up, None));
    }

    fn answered(&mut self, bench: &Bench, header: FrameHeader, body: &[u8]) {
        assert_eq!((header.step, header.update), (Step(self.step), self.update));
        assert!(header.flags.counted || header.flags.non_finite);
        if header.kind == FrameKind::Selection && !header.flags.non_finite {
            let shape = bench.shape(self.update);
            let rows = shape.decode_selection_body(body).unwrap().rows;
            self.next = Some((FrameKind::Values, Some(rows)));
            return;
        }
        self.step += 1;
        self.update += u64::from(!header.flags.non_finite);
        self.begin(bench);
    }
}

/// The first rows of every segment.
fn sparse_body(shape: &RoundShape) -> Vec<u8> {
    let mut out = Vec::new();
    for segment in &shape.sparse {
        let rows: Vec<u32> = (0..segment.keep as u32).collect();
        arc_topk_common::wire::append_selection(segment.rows, &rows, &mut out);
        F32.encode(&vec![0.0; rows.len() * segment.width], &mut out);
    }
    for segment in &shape.dense {
        F32.encode(&vec![0.0; segment.elements()], &mut out);
    }
    out
}

fn play(
    bench: &mut Bench,
    honest: Option<&mut Honest>,
    compressor: Compressor,
    a_move: &Move,
) -> Vec<Action> {
    let spec = spec(algorithm(compressor));
    match *a_move {
        Move::Honest => honest.map_or_else(Vec::new, |honest| honest.play(bench)),
        Move::Hello {
            session,
            rank,
            start,
            shard,
        } => {
            let hello = Hello {
                shard,
                ..join(&spec, rank, start)
            };
            bench.hello(session, hello)
        }
        Move::Good { session, ahead } => {
            let step = bench.shard.status(bench.now).step.0.saturating_add(ahead);
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
            bench.send(session, step, kind, vec![0; bytes])
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
            bench.frame(session, head, vec![0xff; bytes])
        }
        Move::Leave(session) => bench.handle(Event::Leave {
            session: SessionId(session),
        }),
        Move::Closed(session) => bench.lose(session),
        Move::Violation(session) => bench.handle(Event::Violation {
            session: SessionId(session),
            detail: "x".to_owned(),
        }),
        Move::Report {
            session,
            step,
            loss,
        } => super::reports::report(bench, session, step, loss),
        Move::Tick(seconds) => {
            bench.now += Duration::from_secs(seconds);
            bench.handle(Event::Tick)
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
        with_honest in any::<bool>(),
    ) {
        let plan = Plan::build(spec(algorithm(compressor))).unwrap();
        let config = ShardConfig { min_workers: min_workers.min(world), ..config(world) };
        let mut bench = Bench { shard: Shard::new(config), now: Duration::ZERO, plan };
        let mut honest = with_honest.then(|| Honest::join(&mut bench, compressor));
        for a_move in &moves {
            let actions = play(&mut bench, honest.as_mut(), compressor, a_move);
            if let Some(honest) = &mut honest {
                honest.hear(&bench, &actions);
            }
            let status = bench.shard.status(bench.now);
            prop_assert!(status.members.len() <= usize::from(world));
            prop_assert!(status.open_rounds.len() <= bench.shard.open_rounds_limit());
            prop_assert!(status.journal.len() <= 40);
            // Each member's frames of the window, and no more.
            let load = bench.shard.load();
            let share_of_a_step = bench.shard.body_limit() * bench.shard.open_rounds_limit() / 2;
            prop_assert!(load.parked_bytes <= usize::from(load.members) * 2 * share_of_a_step);
            // Nothing waits that could go on.
            let waits = |round: &OpenRound| {
                let came = status.members.len() - round.missing.len();
                !round.missing.is_empty() || came < usize::from(min_workers)
            };
            prop_assert!(status.open_rounds.iter().all(waits));
        }
    }
}
