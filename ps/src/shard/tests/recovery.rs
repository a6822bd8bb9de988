//! A shard that was started while the job goes on, and what workers tell it.

use super::rounds::{close, mean, numbers};
use super::*;
use proptest::prelude::*;

/// An answer as a worker got it, roster included.
pub(super) type Got = (FrameHeader, Bytes);

pub(super) const KINDS: [FrameKind; 2] = [FrameKind::Sketch, FrameKind::Values];

pub(super) fn contribution(kind: FrameKind, worker: u64, step: u64) -> Vec<u8> {
    let count = if kind == FrameKind::Sketch { 15 } else { 7 };
    encode(&numbers(count, worker * 1000 + step * 10 + kind as u64))
}

/// All workers' contributions, by session and rank, to one step of arc; both answers.
pub(super) fn arc_step(bench: &mut Bench, workers: &[(u64, u64)], step: u64) -> Vec<Got> {
    let mut got = Vec::new();
    for kind in KINDS {
        let mut last = Vec::new();
        for (session, worker) in workers {
            last = bench.send(*session, step, kind, contribution(kind, *worker, step));
        }
        let (_, header, body) = whole_answers(&last).remove(0);
        got.push((header, body));
    }
    got
}

/// What three workers got in the first steps, from a shard that is gone.
pub(super) fn past(steps: u64) -> Vec<Got> {
    let mut bench = Bench::running(3, Compressor::Arc);
    (0..steps)
        .flat_map(|step| arc_step(&mut bench, &[(0, 0), (1, 1), (2, 2)], step))
        .collect()
}

/// Shard 0 of the job, started anew.
pub(super) fn fresh() -> Bench {
    let config = ShardConfig {
        incarnation: 2,
        ..config(3)
    };
    Bench {
        now: Duration::from_secs(50),
        ..Bench::empty(config, algorithm(Compressor::Arc))
    }
}

/// Rank r comes on session 10 + r.
pub(super) fn come(bench: &mut Bench, rank: u16, step: u64) -> Vec<Action> {
    let hello = member(&bench.plan.spec, place(rank, &[0, 1, 2]), step);
    bench.hello(10 + u64::from(rank), hello)
}

pub(super) fn announce(bench: &mut Bench, session: u64, frames: u32) -> Vec<Action> {
    bench.control(session, Control::Retelling { frames })
}

pub(super) fn tell_one(bench: &mut Bench, session: u64, (header, body): &Got) -> Vec<Action> {
    let mut header = *header;
    header.flags.held = true;
    header.lead = 0;
    bench.frame(session, header, body.to_vec())
}

/// All actions of an announcement and the telling.
pub(super) fn tell(bench: &mut Bench, session: u64, held: &[Got]) -> Vec<Action> {
    let mut all = announce(bench, session, held.len() as u32);
    for got in held {
        all.extend(tell_one(bench, session, got));
    }
    all
}

pub(super) fn recovered(actions: &[Action]) -> Option<(u64, u16, u16, u64)> {
    actions.iter().find_map(|action| match action {
        Action::Observe(Observation::Recovered {
            step,
            told,
            members,
            adopted,
            ..
        }) => Some((step.0, *told, *members, *adopted)),
        _ => None,
    })
}

/// Answers as they go to one session, without how far the shard is and which list of members it has.
pub(super) fn to(actions: &[Action], session: u64) -> Vec<Got> {
    let own = whole_answers(actions).into_iter();
    own.filter(|(to, ..)| *to == session)
        .map(|(_, header, body)| as_answered((header, body)))
        .collect()
}

pub(super) fn as_answered((mut header, body): Got) -> Got {
    (header.lead, header.epoch) = (0, Epoch(0));
    (header, body)
}

#[test]
fn a_fresh_coordinator_goes_on_where_the_job_was_and_forms_the_same_bytes() {
    let past = past(3);
    let mut bench = fresh();
    // All are at step 2 and hold steps 0 and 1; of step 2 nobody has an answer.
    for rank in 0..3 {
        let welcome = welcomes(&come(&mut bench, rank, 2)).remove(0).1;
        assert!(welcome.retell && !welcome.snapshot);
        assert_eq!(welcome.shard_incarnation, 2);
        assert_eq!(welcome.place, place(rank, &[0, 1, 2]));
    }
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Recovering);
    for session in [10, 11] {
        let told = tell(&mut bench, session, &past[..4]);
        assert_eq!(recovered(&told), None);
        let kind = FrameKind::Sketch;
        let sent = bench.send(session, 2, kind, contribution(kind, session - 10, 2));
        assert_eq!(answers(&sent), [], "no answer of its own before it knows");
    }
    let told = tell(&mut bench, 12, &past[..4]);
    assert_eq!(recovered(&told), Some((2, 3, 3, 4)));
    let membership = Control::Membership {
        // Above any list that the one before may have made unheard.
        epoch: Epoch(17),
        next_rank: 3,
        members: vec![Rank(0), Rank(1), Rank(2)],
        away: Vec::new(),
        reason: "this shard was restarted and has been told where the job is".to_owned(),
    };
    assert_eq!(messages(&told).last(), Some(&(12, membership)));
    let kind = FrameKind::Sketch;
    let actions = bench.send(12, 2, kind, contribution(kind, 2, 2));
    assert_eq!(whole_answers(&actions).len(), 3);
    let selection = as_answered(past[4].clone());
    assert_eq!(to(&actions, 10), [selection], "the same bytes as before");
    let kind = FrameKind::Values;
    for rank in 0..2 {
        bench.send(10 + rank, 2, kind, contribution(kind, rank, 2));
    }
    let actions = bench.send(12, 2, kind, contribution(kind, 2, 2));
    assert_eq!(to(&actions, 12), [as_answered(past[5].clone())]);
    assert_eq!(closed_round(&actions).unwrap().outcome, Outcome::Complete);
    // The next round is formed as ever.
    arc_step(&mut bench, &[(10, 0), (11, 1), (12, 2)], 3);
    assert_eq!(bench.shard.status(bench.now).step, Step(4));
}

#[test]
fn an_answer_that_anybody_holds_goes_to_all_and_no_other_is_formed() {
    let past = past(3);
    let mut bench = fresh();
    // Rank 2 got all of step 2 before the shard was gone, and is at step 3; the others ask again.
    come(&mut bench, 0, 2);
    come(&mut bench, 1, 2);
    tell(&mut bench, 10, &past[..4]);
    tell(&mut bench, 11, &past[..4]);
    let kind = FrameKind::Sketch;
    // This is not what it sent before: it does not count.
    bench.send(10, 2, kind, contribution(kind, 77, 2));
    bench.send(11, 2, kind, contribution(kind, 1, 2));
    come(&mut bench, 2, 3);
    announce(&mut bench, 12, 4);
    for got in &past[2..4] {
        assert_eq!(answers(&tell_one(&mut bench, 12, got)), []);
    }
    let actions = tell_one(&mut bench, 12, &past[4]);
    let selection = as_answered(past[4].clone());
    assert_eq!(
        to(&actions, 10),
        core::slice::from_ref(&selection),
        "at once"
    );
    assert_eq!(to(&actions, 11), [selection]);
    assert_eq!(to(&actions, 12), [], "it did not ask");
    let kind = FrameKind::Values;
    bench.send(10, 2, kind, contribution(kind, 78, 2));
    let actions = tell_one(&mut bench, 12, &past[5]);
    assert_eq!(to(&actions, 10), [as_answered(past[5].clone())]);
    assert_eq!(recovered(&actions), Some((3, 3, 3, 6)));
    assert_eq!(closed_round(&actions).unwrap().contributors, 3);
    // The second one asks later, and is told that it was counted.
    let actions = bench.send(11, 2, kind, contribution(kind, 1, 2));
    let (header, body) = whole_answers(&actions)
        .into_iter()
        .map(|(_, h, b)| (h, b))
        .next()
        .unwrap();
    assert_eq!((body, header.flags.counted), (past[5].1.clone(), true));
    assert_eq!(header.lead, 1, "the job is at step 3");
    arc_step(&mut bench, &[(10, 0), (11, 1), (12, 2)], 3);
}

#[test]
fn an_answer_that_only_one_who_was_not_counted_holds_is_an_answer_too() {
    let mut old = Bench::running(3, Compressor::Dense);
    let body = encode(&numbers(17, 1));
    for session in 0..2 {
        old.send(session, 0, FrameKind::Dense, body.clone());
    }
    let actions = old.ask(2, 0, FrameKind::Dense);
    let got: Got = (
        whole_answers(&actions)[2].1,
        whole_answers(&actions)[2].2.clone(),
    );
    assert!(!got.0.flags.counted);
    let mut bench = fresh();
    bench.plan = old.plan.clone();
    for rank in 0..3 {
        come(&mut bench, rank, u64::from(rank == 2));
    }
    tell(&mut bench, 10, &[]);
    tell(&mut bench, 12, core::slice::from_ref(&got));
    let actions = bench.send(10, 0, FrameKind::Dense, encode(&numbers(17, 9)));
    let (_, header, body) = whole_answers(&actions).remove(0);
    assert_eq!((body, header.flags.counted), (got.1, true));
}

#[test]
fn a_skip_that_somebody_holds_is_a_skip_for_all() {
    let mut old = Bench::running(3, Compressor::Arc);
    let mut flagged = header(FrameKind::Sketch, 0, 0);
    flagged.flags.non_finite = true;
    for session in 0..2 {
        old.send(session, 0, FrameKind::Sketch, contribution(KINDS[0], 0, 0));
    }
    let actions = old.frame(2, flagged, Vec::new());
    let got: Got = (whole_answers(&actions)[0].1, Bytes::new());
    let mut bench = fresh();
    for rank in 0..3 {
        come(&mut bench, rank, u64::from(rank == 2));
    }
    tell(&mut bench, 10, &[]);
    bench.send(10, 0, FrameKind::Sketch, contribution(KINDS[0], 0, 0));
    let actions = tell(&mut bench, 12, &[got]);
    let (_, header, _) = answers(&actions).remove(0);
    assert!(header.flags.non_finite);
    assert_eq!(closed_round(&actions).unwrap().outcome, Outcome::NonFinite);
    assert_eq!(recovered(&tell(&mut bench, 11, &[])), Some((1, 3, 3, 1)));
    assert_eq!(bench.shard.status(bench.now).step, Step(1));
}

proptest! {
    /// Streams of different frames come in any order, from any of those that hold them.
    #[test]
    fn frames_are_told_in_any_order(
        order in Just((0..12usize).collect::<Vec<_>>()).prop_shuffle(),
    ) {
        let past = past(3);
        let mut bench = fresh();
        for rank in 0..3 {
            come(&mut bench, rank, 3);
        }
        announce(&mut bench, 10, 6);
        announce(&mut bench, 11, 6);
        announce(&mut bench, 12, 0);
        let mut last = Vec::new();
        for at in order {
            last = tell_one(&mut bench, 10 + (at / 6) as u64, &past[at % 6]);
            prop_assert_eq!(refusals(&last), []);
        }
        prop_assert_eq!(recovered(&last), Some((3, 3, 3, 6)));
        prop_assert_eq!(bench.shard.status(bench.now).step, Step(3));
        for got in &past {
            let kind = if got.0.kind == FrameKind::Selection { KINDS[0] } else { KINDS[1] };
            let answer = to(&bench.ask(12, got.0.step.0, kind), 12).remove(0);
            prop_assert_eq!(answer.1, got.1.clone());
        }
    }
}

#[test]
fn a_selection_short_of_the_density_is_taken_over_as_it_was() {
    let by_energy = AlgorithmConfig {
        energy: 0.5,
        ..algorithm(Compressor::Arc)
    };
    let mut old = Bench::running_with(config(2), by_energy.clone());
    // One row of each of the two matrices holds nearly all: of the first, the density allows two.
    let mut sketch = vec![0.01; 15];
    (sketch[2], sketch[10]) = (1.0, 1.0);
    old.send(0, 0, FrameKind::Sketch, encode(&sketch));
    let given = old.send(1, 0, FrameKind::Sketch, encode(&sketch));
    let (_, header, body) = whole_answers(&given).remove(0);
    let shape = old.shape(0);
    let selected = shape.decode_selection_body(&body[..header.payload_bytes()]);
    assert_eq!(
        (selected.unwrap().kept(), shape.keep()),
        (vec![1, 1], vec![2, 1])
    );

    let restarted = ShardConfig {
        incarnation: 2,
        ..config(2)
    };
    let mut bench = Bench {
        now: Duration::from_secs(50),
        ..Bench::empty(restarted, by_energy)
    };
    let spec = bench.plan.spec.clone();
    for rank in 0..2 {
        bench.hello(10 + u64::from(rank), member(&spec, place(rank, &[0, 1]), 0));
    }
    tell(&mut bench, 10, &[(header, body.clone())]);
    announce(&mut bench, 11, 0);
    // The one to whom it was lost gets the same bytes, and both send a row of each.
    let again = bench.send(11, 0, FrameKind::Sketch, encode(&sketch));
    assert_eq!(whole_answers(&again).remove(0).2, body);
    let values: Vec<_> = (0..2).map(|worker| numbers(5, worker + 1)).collect();
    bench.send(10, 0, FrameKind::Values, encode(&values[0]));
    let means = answers(&bench.send(11, 0, FrameKind::Values, encode(&values[1])));
    assert_eq!(means.len(), 2);
    close(&decode(&means[0].2), &mean(&values));
}

#[test]
fn whoever_is_behind_what_anybody_holds_cannot_follow() {
    let past = past(4);
    let mut bench = fresh();
    // Rank 0 has been away since step 0, and asks for it; the others hold steps 1 to 3.
    come(&mut bench, 0, 0);
    tell(&mut bench, 10, &[]);
    let kind = FrameKind::Sketch;
    bench.send(10, 0, kind, contribution(kind, 0, 0));
    come(&mut bench, 1, 4);
    tell(&mut bench, 11, &past[2..]);
    come(&mut bench, 2, 4);
    let actions = tell(&mut bench, 12, &past[2..]);
    assert_eq!(recovered(&actions), Some((4, 3, 3, 6)));
    assert_eq!(
        refusals(&actions),
        [(
            10,
            RefusalCode::Superseded,
            "rank 0 is at a step before 4 of which nobody else holds the answers any more: join again"
                .to_owned()
        )]
    );
    // Nothing of step 0 was formed of its contribution alone.
    assert_eq!(answers(&actions), []);
    arc_step(&mut bench, &[(11, 1), (12, 2)], 4);
}

#[test]
fn one_step_behind_is_not_too_far() {
    let past = past(4);
    let mut bench = fresh();
    come(&mut bench, 0, 3);
    tell(&mut bench, 10, &past[2..6]);
    let kind = FrameKind::Sketch;
    bench.send(10, 3, kind, contribution(kind, 0, 3));
    come(&mut bench, 1, 4);
    tell(&mut bench, 11, &past[4..]);
    come(&mut bench, 2, 4);
    let actions = tell(&mut bench, 12, &past[4..]);
    assert_eq!(
        (refusals(&actions), recovered(&actions)),
        (vec![], Some((4, 3, 3, 6)))
    );
    let kind = FrameKind::Values;
    let actions = bench.send(10, 3, kind, contribution(kind, 0, 3));
    assert_eq!(to(&actions, 10)[0].1, past[7].1);
    arc_step(&mut bench, &[(10, 0), (11, 1), (12, 2)], 4);
}

#[test]
fn a_rank_that_a_coordinator_gave_before_it_died_is_not_given_again() {
    let config = ShardConfig {
        max_workers: 5,
        ..config(3)
    };
    let mut bench = Bench::empty(config, algorithm(Compressor::Arc));
    for rank in 0..3 {
        come(&mut bench, rank, 0);
        announce(&mut bench, 10 + u64::from(rank), 0);
    }
    // Only the newcomer itself has heard that it is rank 3.
    let unheard = Place {
        epoch: Epoch(2),
        ..place(3, &[0, 1, 2, 3])
    };
    let hello = member(&bench.plan.spec, unheard, 0);
    assert_eq!(
        refusals(&bench.hello(13, hello))[0].1,
        RefusalCode::Superseded
    );
    let hello = elastic(&bench.plan.spec, 14);
    bench.hello(14, hello);
    let actions = bench.control(10, Control::Donated { step: Step(0) });
    assert_eq!(ranks(&actions), [(14, 4)]);
}

#[test]
fn those_who_never_come_are_removed_in_time() {
    let mut bench = fresh();
    come(&mut bench, 0, 0);
    let came = bench.now;
    tell(&mut bench, 10, &[]);
    let kind = FrameKind::Sketch;
    bench.send(10, 0, kind, contribution(kind, 0, 0));
    assert_eq!(bench.shard.next_deadline(), Some(came + RECOVERY_GRACE));
    let end = came + RECOVERY_GRACE;
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    let actions = bench.tick_at(end);
    assert_eq!(recovered(&actions), Some((0, 1, 3, 0)));
    assert_eq!(roster(&actions), [0], "rounds go on without them");
    let Control::Membership { epoch, away, .. } = messages(&actions).remove(0).1 else {
        panic!("{actions:?}")
    };
    assert_eq!((epoch, away), (Epoch(17), vec![Rank(1), Rank(2)]));
    assert_eq!(
        bench.shard.next_deadline(),
        Some(bench.now + MEMBER_TIMEOUT)
    );
    let actions = bench.tick(MEMBER_TIMEOUT);
    let epochs: Vec<_> = messages(&actions)
        .into_iter()
        .map(|(_, message)| match message {
            Control::Membership { epoch, members, .. } => (epoch, members.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(epochs, [(Epoch(18), 2), (Epoch(19), 1)]);
    let (_, code, detail) = refusals(&come(&mut bench, 2, 0)).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
    assert_eq!(
        detail,
        "rank 2 was away too long and is no member any more (epoch 19): join again"
    );
}

/// Ranks 0 and 1 have told that the job is at step 2 and gone on with it alone.
fn without_the_third() -> (Bench, Vec<Got>) {
    let past = past(3);
    let mut bench = fresh();
    for rank in 0..2 {
        come(&mut bench, rank, 2);
        tell(&mut bench, 10 + u64::from(rank), &past[..4]);
    }
    let actions = bench.tick(RECOVERY_GRACE);
    assert_eq!(recovered(&actions), Some((2, 2, 3, 4)));
    let new = arc_step(&mut bench, &[(10, 0), (11, 1)], 2);
    assert_ne!(new[0].1, past[4].1);
    (bench, past)
}

#[test]
fn a_late_one_that_agrees_is_taken_in() {
    let (mut bench, past) = without_the_third();
    let actions = come(&mut bench, 2, 2);
    assert!(welcomes(&actions)[0].1.retell);
    let actions = tell(&mut bench, 12, &past[..4]);
    assert_eq!((refusals(&actions), recovered(&actions)), (vec![], None));
    // It replays what closed without it, and is counted in the next.
    let kind = FrameKind::Sketch;
    let late = bench.send(12, 2, kind, contribution(kind, 2, 2));
    assert!(!answers(&late)[0].1.flags.counted);
    bench.ask(12, 2, FrameKind::Values);
    arc_step(&mut bench, &[(10, 0), (11, 1), (12, 2)], 3);
    assert_eq!(bench.shard.status(bench.now).step, Step(4));
}

#[test]
fn a_late_one_that_differs_must_join_again() {
    let (mut bench, past) = without_the_third();
    come(&mut bench, 2, 3);
    announce(&mut bench, 12, 4);
    for got in &past[2..4] {
        assert_eq!(refusals(&tell_one(&mut bench, 12, got)), []);
    }
    let (session, code, detail) = refusals(&tell_one(&mut bench, 12, &past[4])).remove(0);
    assert_eq!((session, code), (12, RefusalCode::Superseded));
    assert_eq!(
        detail,
        "rank 2 holds another answer to step 2, bucket 0 than the others: it was cut off while shard 0 restarted, and the job went on without it; join again"
    );
    arc_step(&mut bench, &[(10, 0), (11, 1)], 3);
}

#[test]
fn a_late_one_that_is_too_far_behind_must_join_again() {
    let (mut bench, _) = without_the_third();
    for step in 3..3 + RETAIN_STEPS {
        arc_step(&mut bench, &[(10, 0), (11, 1)], step);
    }
    come(&mut bench, 2, 0);
    tell(&mut bench, 12, &[]);
    let kind = FrameKind::Sketch;
    let (_, code, detail) = refusals(&bench.send(12, 0, kind, contribution(kind, 2, 0))).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
    assert_eq!(
        detail,
        "step 0 is closed and its answers are no longer kept: the job is at step 11; join again"
    );
}

#[test]
fn one_that_is_ahead_of_all_the_others_when_it_comes_too_late_must_join_again() {
    let (mut bench, past) = without_the_third();
    // It has gone on to a step that the job has not come to, with answers that nobody else got.
    let mut ahead = past[5].clone();
    ahead.0.step = Step(6);
    ahead.0.update = 6;
    let mut actions = come(&mut bench, 2, 7);
    actions.extend(tell(&mut bench, 12, &[ahead]));
    assert_eq!(refusals(&actions)[0].1, RefusalCode::Superseded);
    assert!(bench.shard.load().open_rounds <= bench.shard.open_rounds_limit());
    arc_step(&mut bench, &[(10, 0), (11, 1)], 3);
}

#[test]
fn another_shard_is_told_as_shard_0_is() {
    let (mut old, spec) = second_of_two();
    for rank in 0..2 {
        old.hello(u64::from(rank), to_second(&spec, rank));
        announce(&mut old, u64::from(rank), 0);
    }
    let shape = RoundShape::new(&old.plan, BucketId(0), ShardId(1), 0);
    let body = |salt| encode(&numbers(shape.dense_layout().bytes / 4, salt));
    old.send(0, 0, FrameKind::Dense, body(1));
    let actions = old.send(1, 0, FrameKind::Dense, body(2));
    let (_, header, bytes) = whole_answers(&actions).remove(0);

    let (mut bench, _) = second_of_two();
    bench.hello(10, to_second(&spec, 0));
    bench.send(10, 0, FrameKind::Dense, body(3));
    announce(&mut bench, 10, 0);
    let ahead = Hello {
        shard: 1,
        ..member(&spec, place(1, &[0, 1]), 1)
    };
    bench.hello(11, ahead);
    let actions = tell(&mut bench, 11, &[(header, bytes.clone())]);
    assert_eq!(whole_answers(&actions)[0].2, bytes);
    assert_eq!(recovered(&actions), Some((1, 2, 2, 1)));
    assert_eq!(messages(&actions), [], "only shard 0 speaks of the members");
}

#[test]
fn a_coordinator_that_gathers_learns_that_the_job_goes_on() {
    let mut bench = fresh();
    let spec = bench.plan.spec.clone();
    bench.hello(1, elastic(&spec, 1));
    bench.hello(2, hello(&spec));
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Gathering);
    let actions = come(&mut bench, 0, 5);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Recovering);
    // One that cannot follow a running job is told so; the other one waits for a donor.
    let refused: Vec<_> = refusals(&actions).into_iter().map(|r| (r.0, r.1)).collect();
    assert_eq!(refused, [(2, RefusalCode::World)]);
    come(&mut bench, 1, 5);
    come(&mut bench, 2, 5);
    for session in 10..13 {
        tell(&mut bench, session, &[]);
    }
    assert!(bench.shard.is_running());
    assert_eq!(bench.shard.status(bench.now).step, Step(5));
}

#[test]
fn a_shard_that_owns_nothing_finds_nobody_behind() {
    let mut spec = spec(algorithm(Compressor::Dense));
    spec.shards = 16;
    let plan = Plan::build(spec.clone()).unwrap();
    let owns_nothing = |shard: &u16| {
        let mut buckets = plan.buckets.iter();
        buckets.all(|bucket| plan.segments(bucket.id, ShardId(*shard)).is_empty())
    };
    let shard = (0..16).find(owns_nothing).unwrap();
    let mut bench = Bench {
        shard: Shard::new(ShardConfig::new("job", ShardId(shard), 16, 2)),
        now: Duration::ZERO,
        plan,
    };
    // Nobody waits for it: they may be steps apart by the time they have met it.
    for (rank, step) in [(0, 0), (1, 5)] {
        let hello = Hello {
            shard,
            ..member(&spec, place(rank, &[0, 1]), step)
        };
        bench.hello(u64::from(rank), hello);
    }
    bench.control(0, Control::Retelling { frames: 0 });
    let actions = bench.control(1, Control::Retelling { frames: 0 });
    assert_eq!(refusals(&actions), []);
    assert!(bench.shard.is_running());
}
