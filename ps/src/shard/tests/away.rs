//! Members whose connection is lost, and who come back.

use super::*;

/// The worker of `rank` comes on another session.
fn back(bench: &mut Bench, rank: u16, session: u64, step: u64) -> Vec<Action> {
    let hello = member(&bench.plan.spec, place(rank, &[0, 1, 2]), step);
    bench.hello(session, hello)
}

fn standing(bench: &Bench, rank: u16) -> Standing {
    let members = bench.shard.status(bench.now).members;
    let own = members.iter().find(|m| m.rank == Some(Rank(rank)));
    own.unwrap().standing
}

#[test]
fn rounds_wait_a_moment_for_one_whose_connection_is_lost() {
    let mut bench = Bench::running(3, Compressor::Dense);
    let actions = bench.cut(2);
    let gone = bench.now;
    let away = Control::Membership {
        epoch: Epoch(1),
        next_rank: 3,
        members: vec![Rank(0), Rank(1), Rank(2)],
        away: vec![Rank(2)],
        reason: "rank 2 is away: timed out".to_owned(),
    };
    assert_eq!(messages(&actions), [(0, away.clone()), (1, away)]);
    assert_eq!(standing(&bench, 2), Standing::Away);
    bench.dense(0, 0);
    assert_eq!(answers(&bench.dense(1, 0)), []);
    assert_eq!(bench.shard.next_deadline(), Some(gone + RETURN_GRACE));
    let end = gone + RETURN_GRACE;
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    let actions = bench.tick_at(end);
    assert_eq!(answers(&actions).len(), 2);
    assert_eq!(roster(&actions), [0, 1]);
    let closed = closed_round(&actions).unwrap();
    assert_eq!((closed.outcome, closed.contributors), (Outcome::Partial, 2));
    // The next ones do not wait at all.
    bench.dense(0, 1);
    assert_eq!(answers(&bench.dense(1, 1)).len(), 2);
}

#[test]
fn one_that_is_back_within_the_moment_has_missed_nothing() {
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.dense(2, 0);
    bench.cut(2);
    bench.dense(0, 0);
    let actions = back(&mut bench, 2, 12, 0);
    let welcome = &welcomes(&actions)[0].1;
    assert!(!welcome.retell, "this shard has forgotten nothing");
    let told = messages(&actions);
    let (reason, away) = match &told[1] {
        (0, Control::Membership { reason, away, .. }) => (reason.as_str(), away.as_slice()),
        other => panic!("{other:?}"),
    };
    assert_eq!((reason, away), ("rank 2 (host:1) is connected", &[][..]));
    // It sends what was not answered again; that counts once.
    assert_eq!(refusals(&bench.dense(12, 0)), []);
    let actions = bench.dense(1, 0);
    let to: Vec<_> = answers(&actions).iter().map(|answer| answer.0).collect();
    assert_eq!(to, [0, 1, 12], "the answer goes where it asked last");
    let closed = closed_round(&actions).unwrap();
    assert_eq!((closed.contributors, closed.received.dense), (3, 3 * 68));
    assert_eq!(closed.outcome, Outcome::Complete);
}

#[test]
fn what_one_sent_before_its_loss_counts_and_the_answer_waits_for_it() {
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.send(1, 0, FrameKind::Dense, encode(&[4.0; 17]));
    bench.cut(1);
    let actions = bench.send(0, 0, FrameKind::Dense, encode(&[2.0; 17]));
    let to: Vec<_> = answers(&actions).iter().map(|answer| answer.0).collect();
    assert_eq!(to, [0]);
    assert_eq!(decode(&answers(&actions)[0].2), [3.0; 17]);
    back(&mut bench, 1, 11, 0);
    // Other numbers now change nothing.
    let late = answers(&bench.send(11, 0, FrameKind::Dense, encode(&[9.0; 17])));
    assert_eq!(decode(&late[0].2), [3.0; 17]);
    assert!(late[0].1.flags.counted);
    assert_eq!(late[0].1.lead, 1);
}

#[test]
fn a_session_that_is_replaced_is_closed_and_heard_no_more() {
    let mut bench = Bench::running(3, Compressor::Dense);
    let actions = back(&mut bench, 2, 12, 0);
    assert_eq!(replaced(&actions), [2]);
    assert_eq!(ranks(&actions), [(12, 2)]);
    assert_eq!(bench.dense(2, 0), [], "what was under way on it");
    assert_eq!(bench.cut(2), [], "its end is no loss");
    assert_eq!(bench.lose(2), []);
    assert_eq!(bench.shard.status(bench.now).members.len(), 3);
    for session in [0, 1] {
        bench.dense(session, 0);
    }
    assert_eq!(answers(&bench.dense(12, 0)).len(), 3);
}

#[test]
fn one_session_sends_a_frame_once_even_after_a_return() {
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.dense(2, 0);
    back(&mut bench, 2, 12, 0);
    assert_eq!(refusals(&bench.dense(12, 0)), []);
    let (session, code, detail) = refusals(&bench.dense(12, 0)).remove(0);
    assert_eq!((session, code), (12, RefusalCode::Protocol));
    assert!(detail.contains("sent its Dense frame twice"), "{detail}");
}

#[test]
fn an_absent_frame_counts_for_nothing_and_may_not_come_twice() {
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.ask(2, 0, FrameKind::Dense);
    bench.dense(0, 0);
    let actions = bench.dense(1, 0);
    assert_eq!(roster(&actions), [0, 1]);
    let counted: Vec<_> = answers(&actions)
        .iter()
        .map(|(to, header, _)| (*to, header.flags.counted))
        .collect();
    assert_eq!(counted, [(0, true), (1, true), (2, false)]);
    bench.ask(2, 1, FrameKind::Dense);
    let refused = refusals(&bench.ask(2, 1, FrameKind::Dense));
    assert_eq!(refused[0].1, RefusalCode::Protocol);
}

#[test]
fn where_all_are_absent_all_skip() {
    let mut bench = Bench::running(2, Compressor::Arc);
    bench.ask(0, 0, FrameKind::Sketch);
    let actions = bench.ask(1, 0, FrameKind::Sketch);
    let answers = answers(&actions);
    assert_eq!(answers.len(), 2);
    assert!(
        answers
            .iter()
            .all(|a| a.1.flags.non_finite && a.2.is_empty())
    );
    assert_eq!(closed_round(&actions).unwrap().outcome, Outcome::NonFinite);
    assert_eq!(bench.shard.status(bench.now).step, Step(1));
}

/// Ranks 0 and 1 go on for `steps` steps while rank 2 is away.
fn went_on_without_one(steps: u64) -> (Bench, Vec<Bytes>) {
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.cut(2);
    bench.tick(RETURN_GRACE);
    let mut got = Vec::new();
    for step in 0..steps {
        let value = step as f32 + 1.0;
        bench.send(0, step, FrameKind::Dense, encode(&[value; 17]));
        let actions = bench.send(1, step, FrameKind::Dense, encode(&[3.0 * value; 17]));
        got.push(whole_answers(&actions).remove(0).2);
    }
    (bench, got)
}

#[test]
fn one_that_was_away_replays_what_is_kept() {
    let steps = RETAIN_STEPS;
    let (mut bench, got) = went_on_without_one(steps);
    let actions = back(&mut bench, 2, 12, 0);
    assert_eq!(refusals(&actions), []);
    for step in 0..steps {
        let actions = bench.ask(12, step, FrameKind::Dense);
        let (to, header, body) = whole_answers(&actions).remove(0);
        assert_eq!((to, &body), (12, &got[step as usize]));
        assert!(!header.flags.counted);
        assert_eq!(u64::from(header.lead), steps - step);
        assert!(!actions.iter().any(|action| matches!(
            action,
            Action::Observe(Observation::Late { .. } | Observation::RoundClosed(_))
        )));
    }
    // Then it takes part again.
    bench.dense(12, steps);
    bench.dense(0, steps);
    assert_eq!(roster(&bench.dense(1, steps)), [0, 1, 2]);
}

#[test]
fn one_that_was_away_longer_must_join_again() {
    let (mut bench, _) = went_on_without_one(RETAIN_STEPS + 1);
    assert_eq!(bench.shard.load().retained_rounds, RETAIN_STEPS as usize);
    back(&mut bench, 2, 12, 0);
    let (session, code, detail) = refusals(&bench.ask(12, 0, FrameKind::Dense)).remove(0);
    assert_eq!((session, code), (12, RefusalCode::Superseded));
    assert_eq!(
        detail,
        "step 0 is closed and its answers are no longer kept: the job is at step 9; join again"
    );
    // It is no member any more, and what it comes with later is of no use.
    let (_, code, _) = refusals(&back(&mut bench, 2, 13, 0)).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
}

#[test]
fn a_contribution_that_comes_too_late_is_said_to_be_so() {
    let (mut bench, _) = went_on_without_one(1);
    let closed = bench.now;
    back(&mut bench, 2, 12, 0);
    bench.now = closed + Duration::from_secs(2) - Duration::from_millis(10);
    let actions = bench.dense(12, 0);
    assert!(!answers(&actions)[0].1.flags.counted);
    assert!(actions.contains(&Action::Observe(Observation::Late {
        rank: Rank(2),
        seconds: 2.0
    })));
    let status = bench.shard.status(bench.now);
    assert_eq!(status.members[2].worst_lateness_seconds, 2.0);
}

#[test]
fn late_in_the_first_phase_is_not_too_late_for_the_second() {
    let mut bench = Bench::running(3, Compressor::Arc);
    bench.cut(2);
    bench.tick(RETURN_GRACE);
    let sketch = encode(&[1.0; 15]);
    bench.send(0, 0, FrameKind::Sketch, sketch.clone());
    bench.send(1, 0, FrameKind::Sketch, sketch.clone());
    back(&mut bench, 2, 12, 0);
    let late = bench.send(12, 0, FrameKind::Sketch, sketch);
    assert_eq!(answers(&late)[0].1.kind, FrameKind::Selection);
    assert!(!answers(&late)[0].1.flags.counted);
    bench.send(0, 0, FrameKind::Values, encode(&[1.0; 7]));
    bench.send(1, 0, FrameKind::Values, encode(&[2.0; 7]));
    let actions = bench.send(12, 0, FrameKind::Values, encode(&[6.0; 7]));
    assert_eq!(roster(&actions), [0, 1, 2]);
    assert_eq!(decode(&answers(&actions)[0].2), [3.0; 7]);
}

#[test]
fn one_that_missed_a_skip_is_told_in_whichever_phase_it_asks() {
    let mut bench = Bench::running(2, Compressor::Arc);
    let mut flagged = header(FrameKind::Sketch, 0, 0);
    flagged.flags.non_finite = true;
    bench.frame(0, flagged, Vec::new());
    bench.cut(1);
    bench.tick(RETURN_GRACE);
    back(&mut bench, 1, 11, 0);
    let answer = answers(&bench.ask(11, 0, FrameKind::Values)).remove(0);
    assert!(answer.1.flags.non_finite);
}

#[test]
fn one_that_is_cut_off_from_another_shard_is_not_waited_for_until_it_is_ready() {
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.dense(0, 0);
    bench.dense(1, 0);
    let actions = bench.control(2, Control::Away);
    assert_eq!(roster(&actions), [0, 1]);
    assert_eq!(standing(&bench, 2), Standing::CutOff);
    for session in 0..2 {
        bench.dense(session, 1);
    }
    assert_eq!(bench.shard.status(bench.now).step, Step(2));
    // It replays, as one that was away.
    bench.ask(2, 0, FrameKind::Dense);
    bench.ask(2, 1, FrameKind::Dense);
    bench.control(2, Control::Ready { step: Step(3) });
    assert_eq!(standing(&bench, 2), Standing::Live);
    bench.dense(0, 2);
    assert_eq!(answers(&bench.dense(1, 2)).len(), 2, "not in step 2");
    bench.dense(0, 3);
    assert_eq!(answers(&bench.dense(1, 3)), []);
    assert_eq!(roster(&bench.dense(2, 3)), [0, 1, 2]);
}

#[test]
fn a_contribution_of_one_that_is_cut_off_counts() {
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.control(1, Control::Away);
    bench.dense(1, 0);
    assert_eq!(roster(&bench.dense(0, 0)), [0, 1]);
}

#[test]
fn where_all_are_cut_off_nothing_is_formed() {
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.dense(0, 0);
    bench.control(0, Control::Away);
    assert_eq!(answers(&bench.control(1, Control::Away)), []);
    let actions = bench.control(0, Control::Ready { step: Step(0) });
    assert_eq!(roster(&actions), [0]);
}

#[test]
fn a_round_waits_while_fewer_than_the_minimum_contribute() {
    let mut bench = at_least_two_of(2, Compressor::Dense);
    bench.dense(0, 0);
    bench.cut(1);
    assert_eq!(answers(&bench.tick(RETURN_GRACE)), []);
    back(&mut bench, 1, 11, 0);
    assert_eq!(roster(&bench.dense(11, 0)), [0, 1]);
}

#[test]
fn one_that_does_not_come_back_is_removed() {
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.cut(1);
    let gone = bench.now;
    bench.tick(RETURN_GRACE);
    assert_eq!(bench.shard.next_deadline(), Some(gone + MEMBER_TIMEOUT));
    let end = gone + MEMBER_TIMEOUT;
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    let actions = bench.tick_at(end);
    let reason = "rank 1 (host:1) was lost: it was away for 15 s".to_owned();
    let message = Control::Membership {
        epoch: Epoch(2),
        next_rank: 3,
        members: vec![Rank(0), Rank(2)],
        away: Vec::new(),
        reason,
    };
    assert_eq!(messages(&actions), [(0, message.clone()), (2, message)]);
    let (_, code, detail) = refusals(&back(&mut bench, 1, 11, 0)).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
    assert_eq!(
        detail,
        "rank 1 was away too long and is no member any more (epoch 2): join again"
    );
}

#[test]
fn removing_one_may_leave_too_few() {
    let mut bench = at_least_two_of(2, Compressor::Dense);
    bench.cut(1);
    let actions = bench.tick(MEMBER_TIMEOUT);
    assert_eq!(refusals(&actions)[0].1, RefusalCode::TooFewWorkers);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
}

#[test]
fn a_job_whose_members_are_all_away_is_remembered_and_then_forgotten() {
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.cut(0);
    bench.cut(1);
    let last = bench.now;
    assert_eq!(bench.tick(MEMBER_TIMEOUT * 2), [], "nobody else is there");
    let again = back(&mut bench, 0, 10, 0);
    assert_eq!(ranks(&again), [(10, 0)]);
    bench.cut(10);
    let end = bench.now + Duration::from_secs(600);
    assert!(bench.now > last);
    bench.tick(RETURN_GRACE);
    assert_eq!(bench.shard.next_deadline(), Some(end));
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    let actions = bench.tick_at(end);
    assert!(actions.contains(&Action::Observe(Observation::Emptied)));
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
    assert_eq!(bench.shard.next_deadline(), None);
}

#[test]
fn a_job_that_ends_in_order_while_one_is_away_is_over_for_that_one_too() {
    let leave = |bench: &mut Bench, session| {
        let session = SessionId(session);
        bench.handle(Event::Leave { session })
    };
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.cut(2);
    leave(&mut bench, 0);
    leave(&mut bench, 1);
    let cut = bench.now - Duration::from_millis(20);
    // It may come back for the last answers, and then leave as well.
    let again = back(&mut bench, 2, 12, 0);
    assert_eq!(ranks(&again), [(12, 2)]);
    assert_eq!(roster(&bench.dense(12, 0)), [2]);
    leave(&mut bench, 12);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
    // One that does not is forgotten soon, so that another job can start.
    let mut bench = Bench::running(3, Compressor::Dense);
    bench.cut(2);
    leave(&mut bench, 0);
    leave(&mut bench, 1);
    let end = cut + MEMBER_TIMEOUT;
    bench.tick(RETURN_GRACE);
    assert_eq!(bench.shard.next_deadline(), Some(end));
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    bench.tick_at(end);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
}

#[test]
fn one_that_is_back_and_not_waited_for_yet_holds_nobody_up() {
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.dense(0, 0);
    let mut hello = member(&bench.plan.spec, place(1, &[0, 1]), 0);
    let Intent::Member { waited, .. } = &mut hello.intent else {
        unreachable!()
    };
    *waited = false;
    assert_eq!(roster(&bench.hello(11, hello)), [0]);
}

#[test]
fn shards_other_than_0_remove_nobody_by_themselves() {
    let (mut bench, spec, _) = second_of_two_running();
    bench.cut(1);
    bench.tick(MEMBER_TIMEOUT * 2);
    assert_eq!(bench.shard.next_deadline(), None, "nothing to wake up for");
    assert_eq!(bench.shard.status(bench.now).members.len(), 2);
    // Shard 0 does, and a worker passes that on.
    let removed = Control::Membership {
        epoch: Epoch(2),
        next_rank: 2,
        members: vec![Rank(0)],
        away: Vec::new(),
        reason: String::new(),
    };
    bench.control(0, removed);
    let status = bench.shard.status(bench.now);
    assert_eq!((status.members.len(), status.epoch), (1, Epoch(2)));
    let (_, code, _) = refusals(&bench.hello(11, to_second(&spec, 1))).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
}

#[test]
fn relayed_news_makes_rounds_go_on() {
    let (mut bench, _, body) = second_of_two_running();
    bench.cut(1);
    assert_eq!(answers(&bench.send(0, 0, FrameKind::Dense, body)), []);
    // Its process has ended, which shard 0 saw: no need to wait for the rest of the moment.
    let removed = Control::Membership {
        epoch: Epoch(2),
        next_rank: 2,
        members: vec![Rank(0)],
        away: Vec::new(),
        reason: String::new(),
    };
    assert_eq!(roster(&bench.control(0, removed)), [0]);
}

#[test]
fn while_all_are_cut_off_nobody_misses_its_turn() {
    let mut bench = at_least_two_of(3, Compressor::Dense);
    for session in 0..3 {
        bench.control(session, Control::Away);
    }
    for session in [2, 0, 1] {
        assert_eq!(answers(&bench.dense(session, 0)), []);
    }
    let actions = bench.control(1, Control::Ready { step: Step(0) });
    assert_eq!(roster(&actions), [0, 1, 2]);
}

#[test]
fn one_that_only_takes_the_answer_is_no_worker_too_few() {
    let mut bench = at_least_two_of(2, Compressor::Dense);
    bench.ask(0, 0, FrameKind::Dense);
    let actions = bench.dense(1, 0);
    assert_eq!(roster(&actions), [1], "rank 0 will not contribute any more");
    assert_eq!(answers(&actions).len(), 2);
}
