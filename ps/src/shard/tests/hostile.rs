//! Whatever peers send: no panic, no hang, bounded memory, and one who keeps the rules is not refused for it (I5). Peers are
//! members, with certificates of the job; what one that lies can still do to one that keeps the rules:
//!
//! - The first frame of a step decides its update number, so a peer that comes first with a false one has the others
//!   removed. Nobody could tell which of them is right.
//! - Where fewer than the minimum are left, the job ends for all.
//! - While the job gathers, one that says that it goes on has those refused that cannot take their state from a snapshot.
//! - While a worker is away, rounds go on without it; and a shard that was started anew believes what members tell. A liar
//!   that comes first decides whose start of the job it is, who its members are, how far it is and what was answered. One who
//!   keeps the rules is then found to differ, or to be too far behind: it is told to join again (Superseded), no worse. The
//!   same holds, at shards other than 0, for what a liar passes on of the members while another one is away.
//!
//! A worker that is connected all the time to a shard that is not restarted is refused for nothing else.

use super::honest::Honest;
use super::*;
use arc_topk_common::wire::Direction;
use proptest::prelude::*;
use std::collections::BTreeSet;

#[derive(Clone, Debug)]
enum Move {
    Hello {
        session: u64,
        rank: Option<u16>,
        start: u64,
        shard: u16,
        elastic: bool,
    },
    /// Of a member, true or not.
    Member {
        session: u64,
        place: Place,
        step: u64,
        waited: bool,
        incarnation: u8,
    },
    /// A frame as the open phase asks for, this many steps after the shard's.
    Good {
        session: u64,
        ahead: u64,
    },
    /// An answer that was given to anybody, perhaps spoiled.
    Held {
        session: u64,
        at: usize,
        spoiled: Option<usize>,
        step: Option<u64>,
    },
    Control {
        session: u64,
        message: Control,
    },
    /// The next frame of the worker that keeps the rules.
    Honest,
    HonestCut,
    HonestBack,
    /// The process is started anew.
    Restart,
    Frame {
        session: u64,
        kind: usize,
        bucket: u16,
        step: u64,
        update: u64,
        bytes: usize,
        flags: (bool, bool, bool),
    },
    Leave(u64),
    Closed(u64, bool),
    Violation(u64),
    Report {
        session: u64,
        step: u64,
        loss: f32,
    },
    Tick(u64),
}

const KINDS: [FrameKind; 11] = FrameKind::ALL;

fn any_move() -> impl Strategy<Value = Move> {
    let session = 0u64..6;
    prop_oneof![
        3 => (session.clone(), prop::option::of(0u16..4), starts(), prop_oneof![9 => Just(0u16), 1 => 0u16..3], any::<bool>())
            .prop_map(|(session, rank, start, shard, elastic)| Move::Hello { session, rank, start, shard, elastic }),
        3 => (session.clone(), any_place(), steps(), any::<bool>(), 0u8..8)
            .prop_map(|(session, place, step, waited, incarnation)| Move::Member { session, place, step, waited, incarnation }),
        12 => (session.clone(), 0u64..3).prop_map(|(session, ahead)| Move::Good { session, ahead }),
        4 => (session.clone(), 0usize..16, prop::option::weighted(0.2, 0usize..90), prop::option::weighted(0.2, steps()))
            .prop_map(|(session, at, spoiled, step)| Move::Held { session, at, spoiled, step }),
        6 => (session.clone(), any_control()).prop_map(|(session, message)| Move::Control { session, message }),
        8 => Just(Move::Honest),
        1 => Just(Move::HonestCut),
        2 => Just(Move::HonestBack),
        1 => Just(Move::Restart),
        3 => (session.clone(), 0usize..11, 0u16..3, steps(), steps(), 0usize..80, any::<(bool, bool, bool)>())
            .prop_map(|(session, kind, bucket, step, update, bytes, flags)| Move::Frame { session, kind, bucket, step, update, bytes, flags }),
        1 => session.clone().prop_map(Move::Leave),
        1 => (session.clone(), any::<bool>()).prop_map(|(session, for_good)| Move::Closed(session, for_good)),
        1 => session.clone().prop_map(Move::Violation),
        1 => (session, any::<u64>(), any::<f32>()).prop_map(|(session, step, loss)| Move::Report { session, step, loss }),
        1 => (0u64..40).prop_map(Move::Tick),
    ]
}

fn steps() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0u64..4, 1 => Just(LAST_START_STEP.0), 1 => Just(u64::MAX), 1 => any::<u64>()]
}

/// Of the run that there is, mostly: who its first member was, nobody can know.
fn any_place() -> impl Strategy<Value = Place> {
    let epoch = prop_oneof![8 => 0u32..4, 1 => Just(u32::MAX)];
    let next_rank = prop_oneof![8 => 4u16..6, 1 => Just(u16::MAX), 1 => Just(0u16)];
    (
        0u16..4,
        prop::collection::btree_set(0u16..4, 0..4),
        epoch,
        next_rank,
        any::<bool>(),
    )
        .prop_map(|(rank, mut named, epoch, next_rank, known)| {
            named.insert(rank);
            let named: Vec<u16> = named.into_iter().collect();
            let real = place(rank, &named);
            Place {
                run: if known { real.run } else { RunId([77; 16]) },
                epoch: Epoch(epoch),
                next_rank,
                ..real
            }
        })
}

fn any_control() -> impl Strategy<Value = Control> {
    let step = || steps().prop_map(Step);
    prop_oneof![
        prop_oneof![6 => 0u32..8, 1 => Just(u32::MAX)]
            .prop_map(|frames| Control::Retelling { frames }),
        step().prop_map(|step| Control::Ready { step }),
        Just(Control::Away),
        step().prop_map(|step| Control::Donating { step }),
        step().prop_map(|step| Control::Donated { step }),
        (step(), 0u8..3).prop_map(|(step, byte)| Control::Digest {
            step,
            digest: [byte; 32]
        }),
        any_place().prop_map(|place| Control::Membership {
            epoch: place.epoch,
            next_rank: place.next_rank,
            members: place.members,
            away: Vec::new(),
            reason: String::new(),
        }),
        Just(Control::Donate),
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

/// The frame that the oldest open round asks for, if it is of a fixed length.
fn good(bench: &mut Bench, session: u64, ahead: u64) -> Vec<Action> {
    let status = bench.shard.status(bench.now);
    let shape = bench.shape(0);
    let gathers = status.open_rounds.first().and_then(|round| {
        let named = |kind: &FrameKind| format!("{kind:?}").to_lowercase() == round.gathers;
        KINDS.into_iter().find(named)
    });
    let kind = gathers.unwrap_or(shape.phases()[0].up);
    let bytes = match kind {
        FrameKind::Sketch => shape.sketch_layout().bytes,
        FrameKind::Dense => shape.dense_layout().bytes,
        _ => shape.values_layout(&shape.keep(), Direction::Up).bytes,
    };
    let step = status.step.0.saturating_add(ahead);
    bench.send(session, step, kind, vec![0; bytes])
}

fn play(bench: &mut Bench, given: &[(FrameHeader, Bytes)], a_move: &Move) -> Vec<Action> {
    let spec = bench.plan.spec.clone();
    match a_move.clone() {
        Move::Honest | Move::HonestCut | Move::HonestBack | Move::Restart => Vec::new(),
        Move::Hello {
            session,
            rank,
            start,
            shard,
            elastic,
        } => {
            let mut hello = Hello {
                shard,
                incarnation: incarnation(session),
                ..join(&spec, rank, start)
            };
            if let Intent::Join { when, .. } = &mut hello.intent {
                *when = if elastic {
                    JoinWhen::Any
                } else {
                    JoinWhen::Start
                };
            }
            bench.hello(session, hello)
        }
        Move::Member {
            session,
            place,
            step,
            waited,
            incarnation,
        } => {
            let hello = Hello {
                incarnation: [incarnation; 16],
                intent: Intent::Member {
                    place,
                    step: Step(step),
                    waited,
                },
                ..hello(&spec)
            };
            bench.hello(session, hello)
        }
        Move::Good { session, ahead } => good(bench, session, ahead),
        Move::Held {
            session,
            at,
            spoiled,
            step,
        } => {
            let Some((mut header, body)) = given.get(at % given.len().max(1)).cloned() else {
                return Vec::new();
            };
            let mut body = body.to_vec();
            header.flags.held = true;
            header.step = step.map_or(header.step, Step);
            if let Some(byte) = spoiled.and_then(|at| body.get_mut(at)) {
                *byte ^= 0x55;
            }
            bench.frame(session, header, body)
        }
        Move::Control { session, message } => bench.control(session, message),
        Move::Frame {
            session,
            kind,
            bucket,
            step,
            update,
            bytes,
            flags: (non_finite, absent, held),
        } => {
            let mut head = header(KINDS[kind], step, bytes);
            head.bucket = BucketId(bucket);
            head.update = update;
            head.flags.non_finite = non_finite;
            head.flags.absent = absent;
            head.flags.held = held;
            bench.frame(session, head, vec![0xff; bytes])
        }
        Move::Leave(session) => bench.handle(Event::Leave {
            session: SessionId(session),
        }),
        Move::Closed(session, for_good) => bench.close(session, for_good),
        Move::Violation(session) => bench.handle(Event::Violation {
            session: SessionId(session),
            detail: "x".to_owned(),
        }),
        Move::Report {
            session,
            step,
            loss,
        } => super::reports::report(bench, session, step, loss),
        Move::Tick(seconds) => bench.tick(Duration::from_secs(seconds)),
    }
}

/// The bounds of what the machine holds, and that nothing waits that could go on.
fn check(bench: &Bench, config: &ShardConfig) -> Result<(), TestCaseError> {
    let status = bench.shard.status(bench.now);
    let load = bench.shard.load();
    // Six peers, the one that keeps the rules, and four ranks that are named.
    prop_assert!(status.members.len() <= 11);
    prop_assert!(status.journal.len() <= 40);
    let steps = if status.stage == Stage::Recovering {
        16
    } else {
        2
    };
    let share_of_a_step = bench.shard.body_limit() * bench.shard.open_rounds_limit() / 2;
    prop_assert!(status.open_rounds.len() <= steps * bench.shard.open_rounds_limit() / 2);
    prop_assert!(load.parked_bytes <= status.members.len() * steps * share_of_a_step);
    let phases = 3;
    let kept = RETAIN_STEPS as usize + steps + 1;
    let pinned = bench.shard.limits.retained_bytes;
    prop_assert!(load.retained_bytes <= pinned + kept * phases * share_of_a_step);
    prop_assert!(
        bench
            .shard
            .next_deadline()
            .is_none_or(|deadline| deadline > bench.now)
    );
    let job = bench.shard.job.as_ref().filter(|job| job.is_running());
    for (step, _, round) in job.iter().flat_map(|job| job.rounds.open()) {
        let live = job.map_or_else(BTreeSet::new, |job| job.members.live(bench.now, step));
        let enough = live.len() >= usize::from(config.min_workers.max(1));
        prop_assert!(!enough || !live.iter().all(|rank| round.has(*rank)));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 800, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_is_survived_with_bounded_memory(
        moves in prop::collection::vec(any_move(), 1..160),
        compressor in prop::sample::select(vec![Compressor::Arc, Compressor::Randk, Compressor::Topk, Compressor::Dense]),
        world in 1u16..4,
        min_workers in 1u16..3,
        with_honest in any::<bool>(),
        restarts in any::<bool>(),
    ) {
        let plan = Plan::build(spec(algorithm(compressor))).unwrap();
        let config = ShardConfig { min_workers: min_workers.min(world), max_workers: 4, ..config(world) };
        let limits = Limits { retained_bytes: 3000, ..Limits::default() };
        let fresh = || Shard::with_limits(config.clone(), limits);
        let mut bench = Bench { shard: fresh(), now: Duration::ZERO, plan };
        let mut honest = with_honest.then(|| Honest::join(&mut bench));
        let mut given = Vec::new();
        for a_move in &moves {
            let actions = match (a_move, &mut honest) {
                (Move::Honest, Some(honest)) => honest.play(&mut bench),
                (Move::HonestCut, Some(honest)) if restarts => honest.cut(&mut bench),
                (Move::HonestBack, Some(honest)) => honest.come_back(&mut bench),
                (Move::Restart, honest) if restarts => {
                    bench.shard = fresh();
                    if let Some(honest) = honest {
                        honest.restarted();
                    }
                    Vec::new()
                }
                _ => play(&mut bench, &given, a_move),
            };
            if let Some(honest) = &mut honest {
                honest.hear(&bench, &actions);
            }
            given.extend(whole_answers(&actions).into_iter().map(|(_, header, body)| (header, body)));
            check(&bench, &config)?;
        }
    }
}
