//! Workers that join a running job.

use super::*;

const NOBODY: [u64; 0] = [];

/// Two workers run, and `max` may.
fn two_of(max: u16) -> (Bench, PlanSpec) {
    let config = ShardConfig {
        max_workers: max,
        ..config(2)
    };
    let bench = Bench::running_with(config, algorithm(Compressor::Dense));
    let spec = bench.plan.spec.clone();
    (bench, spec)
}

fn steps(bench: &mut Bench, sessions: &[u64], steps: core::ops::Range<u64>) {
    for step in steps {
        for session in sessions {
            assert_eq!(refusals(&bench.dense(*session, step)), []);
        }
        assert_eq!(bench.shard.status(bench.now).step, Step(step + 1));
    }
}

/// Sessions that are asked for a snapshot.
fn asked(actions: &[Action]) -> Vec<u64> {
    let messages = messages(actions).into_iter();
    messages
        .filter(|(_, message)| *message == Control::Donate)
        .map(|(session, _)| session)
        .collect()
}

fn donated(bench: &mut Bench, session: u64, step: u64) -> Vec<Action> {
    bench.control(session, Control::Donated { step: Step(step) })
}

#[test]
fn a_joiner_gets_the_next_rank_with_a_donors_snapshot_and_catches_up() {
    let (mut bench, spec) = two_of(3);
    steps(&mut bench, &[0, 1], 0..5);
    let actions = bench.hello(7, elastic(&spec, 7));
    let waiting = Control::Waiting {
        joined: 3,
        world: 3,
    };
    assert_eq!(messages(&actions), [(7, waiting), (0, Control::Donate)]);
    let numbers = |bench: &Bench| {
        let status = bench.shard.status(bench.now);
        (status.world, status.max_workers, status.members_now)
    };
    assert_eq!(numbers(&bench), (2, 3, 2));
    assert_eq!(asked(&bench.handle(Event::Tick)), NOBODY, "asked once");
    steps(&mut bench, &[0, 1], 5..6);
    bench.control(0, Control::Donating { step: Step(6) });
    steps(&mut bench, &[0, 1], 6..30);
    let actions = donated(&mut bench, 0, 6);
    let expected = Place {
        rank: Rank(2),
        epoch: Epoch(2),
        next_rank: 3,
        members: vec![Rank(0), Rank(1), Rank(2)],
        ..place(2, &[0, 1, 2])
    };
    let welcome = Welcome {
        shard_incarnation: 1,
        retell: false,
        place: expected.clone(),
        step: Step(6),
        snapshot: true,
    };
    assert_eq!(welcomes(&actions), [(7, welcome)]);
    assert_eq!(numbers(&bench), (2, 3, 3));
    let told: Vec<_> = messages(&actions).iter().map(|m| m.0).collect();
    assert_eq!(told, [7, 0, 1, 7], "all are told of it");
    assert!(actions.contains(&Action::Observe(Observation::JoinedLater {
        rank: Rank(2),
        step: Step(6)
    })));
    // Rounds do not wait for it while it fetches and replays.
    steps(&mut bench, &[0, 1], 30..31);
    for step in 6..31 {
        let answer = answers(&bench.ask(7, step, FrameKind::Dense)).remove(0);
        assert_eq!(u64::from(answer.1.lead), 31 - step);
    }
    bench.control(7, Control::Ready { step: Step(31) });
    bench.dense(0, 31);
    assert_eq!(answers(&bench.dense(1, 31)), []);
    assert_eq!(roster(&bench.dense(7, 31)), [0, 1, 2]);
    // The next joiner's rank is another, even after this one is gone.
    bench.lose(7);
    bench.hello(8, elastic(&spec, 8));
    assert_eq!(ranks(&donated(&mut bench, 0, 32)), [(8, 3)]);
}

#[test]
fn another_shard_learns_of_a_joiner_by_its_coming() {
    let (mut bench, spec, body) = second_of_two_running();
    let joined = Place {
        epoch: Epoch(2),
        ..place(2, &[0, 1, 2])
    };
    let mut hello = Hello {
        shard: 1,
        ..member(&spec, joined, 0)
    };
    let Intent::Member { waited, .. } = &mut hello.intent else {
        unreachable!()
    };
    *waited = false;
    let actions = bench.hello(7, hello);
    assert_eq!(ranks(&actions), [(7, 2)]);
    bench.control(7, Control::Retelling { frames: 0 });
    for session in 0..2 {
        bench.send(session, 0, FrameKind::Dense, body.clone());
    }
    assert_eq!(
        bench.shard.status(bench.now).step,
        Step(1),
        "not waited for"
    );
    assert_eq!(bench.shard.status(bench.now).epoch, Epoch(2));
    bench.control(7, Control::Ready { step: Step(1) });
    bench.send(0, 1, FrameKind::Dense, body.clone());
    assert_eq!(
        answers(&bench.send(1, 1, FrameKind::Dense, body.clone())),
        []
    );
    assert_eq!(roster(&bench.send(7, 1, FrameKind::Dense, body)), [0, 1, 2]);
}

#[test]
fn those_beyond_the_most_workers_wait_for_room() {
    let (mut bench, spec) = two_of(3);
    assert_eq!(asked(&bench.hello(7, elastic(&spec, 7))), [0]);
    assert_eq!(asked(&bench.hello(8, elastic(&spec, 8))), NOBODY);
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), [(7, 2)]);
    assert_eq!(asked(&bench.tick(Duration::from_secs(100))), NOBODY);
    let actions = bench.handle(Event::Leave {
        session: SessionId(7),
    });
    assert_eq!(asked(&actions), [0]);
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), [(8, 3)]);
}

#[test]
fn room_that_one_who_came_back_took_is_none() {
    let (mut bench, spec) = two_of(2);
    bench.cut(1);
    assert_eq!(asked(&bench.hello(7, elastic(&spec, 7))), [0]);
    bench.hello(11, member(&spec, place(1, &[0, 1]), 0));
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), []);
    assert_eq!(bench.shard.load().members, 2);
    // It waits still.
    assert_eq!(asked(&bench.lose(11)), [0]);
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), [(7, 2)]);
}

#[test]
fn several_join_with_one_snapshot() {
    let (mut bench, spec) = two_of(5);
    assert_eq!(asked(&bench.hello(7, elastic(&spec, 7))), [0]);
    assert_eq!(
        asked(&bench.hello(8, elastic(&spec, 8))),
        [0],
        "for it, too"
    );
    let actions = donated(&mut bench, 0, 0);
    assert_eq!(ranks(&actions), [(7, 2), (8, 3)]);
    assert_eq!(bench.shard.status(bench.now).epoch, Epoch(3));
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), [], "nobody waits");
}

#[test]
fn a_donor_that_is_lost_or_takes_too_long_is_replaced() {
    let (mut bench, spec) = two_of(4);
    bench.hello(7, elastic(&spec, 7));
    let asked_at = bench.now;
    assert_eq!(asked(&bench.cut(0)), [1], "at once");
    bench.hello(10, member(&spec, place(0, &[0, 1]), 0));
    let second = bench.now - Duration::from_millis(10);
    let end = second + Duration::from_secs(600);
    assert!(asked_at < second);
    assert_eq!(bench.shard.next_deadline(), Some(end));
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    assert_eq!(asked(&bench.tick_at(end)), [10], "the first one again");
    // What the slow one gives in the end is no help for those that wait for another.
    assert_eq!(ranks(&donated(&mut bench, 1, 0)), []);
    assert_eq!(ranks(&donated(&mut bench, 10, 0)), [(7, 2)]);
}

#[test]
fn with_one_worker_the_same_is_asked_again() {
    let config = ShardConfig {
        max_workers: 2,
        ..config(1)
    };
    let mut bench = Bench::running_with(config, algorithm(Compressor::Dense));
    let spec = bench.plan.spec.clone();
    bench.hello(7, elastic(&spec, 7));
    assert_eq!(asked(&bench.tick(Duration::from_secs(600))), [0]);
}

#[test]
fn one_that_joins_is_no_donor() {
    let (mut bench, spec) = two_of(5);
    bench.hello(7, elastic(&spec, 7));
    donated(&mut bench, 0, 0);
    bench.control(0, Control::Away);
    bench.control(1, Control::Away);
    assert_eq!(asked(&bench.hello(8, elastic(&spec, 8))), NOBODY);
    assert_eq!(
        asked(&bench.control(7, Control::Ready { step: Step(0) })),
        [7]
    );
}

#[test]
fn an_applicant_that_goes_is_forgotten() {
    let (mut bench, spec) = two_of(3);
    bench.hello(7, elastic(&spec, 7));
    let gone = bench.cut(7);
    assert!(gone.contains(&Action::Observe(Observation::Lost {
        rank: None,
        reason: "timed out".to_owned(),
        remaining: 0,
    })));
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), []);
    assert_eq!(bench.shard.status(bench.now).members.len(), 2);
}

#[test]
fn a_snapshot_of_a_step_that_has_not_been_is_refused() {
    let (mut bench, spec) = two_of(3);
    steps(&mut bench, &[0, 1], 0..3);
    bench.hello(7, elastic(&spec, 7));
    let actions = donated(&mut bench, 0, 4);
    let (session, code, detail) = refusals(&actions).remove(0);
    assert_eq!((session, code), (0, RefusalCode::Protocol));
    assert!(detail.contains("step 4"), "{detail}");
    assert_eq!((ranks(&actions), asked(&actions)), (vec![], vec![1]));
    assert_eq!(ranks(&donated(&mut bench, 1, 3)), [(7, 2)]);
}

#[test]
fn answers_are_kept_from_a_pin_on_and_no_longer_than_needed() {
    let (mut bench, _) = two_of(3);
    let retained = |bench: &Bench| bench.shard.load().retained_rounds as u64;
    let pin = |step| Control::Donating { step: Step(step) };
    steps(&mut bench, &[0, 1], 0..20);
    assert_eq!(retained(&bench), RETAIN_STEPS);
    // What is gone stays gone, and nobody else has a say.
    bench.control(9, pin(0));
    steps(&mut bench, &[0, 1], 20..21);
    assert_eq!(retained(&bench), RETAIN_STEPS);
    bench.control(0, pin(14));
    steps(&mut bench, &[0, 1], 21..40);
    assert_eq!(retained(&bench), 40 - 14);
    // A later one does not take from the first.
    bench.control(0, pin(30));
    steps(&mut bench, &[0, 1], 40..41);
    assert_eq!(retained(&bench), 41 - 14);
    bench.tick(Duration::from_secs(599));
    assert_eq!(retained(&bench), 41 - 14);
    // Whoever replays is not forgotten.
    bench.ask(1, 20, FrameKind::Dense);
    bench.tick(Duration::from_secs(599));
    assert_eq!(retained(&bench), 41 - 14);
    bench.tick(Duration::from_secs(1));
    assert_eq!(retained(&bench), RETAIN_STEPS);
}

#[test]
fn retained_answers_have_a_limit_that_no_pin_moves() {
    // An answer holds 68 bytes and a roster of 4.
    let limits = Limits {
        retained_bytes: 10 * 73,
        ..Limits::default()
    };
    let mut bench = Bench::running(2, Compressor::Dense);
    bench.shard.limits = limits;
    bench.control(0, Control::Donating { step: Step(0) });
    for step in 0..30 {
        steps(&mut bench, &[0, 1], step..step + 1);
        let load = bench.shard.load();
        assert!(load.retained_bytes <= limits.retained_bytes);
        assert!(load.retained_rounds as u64 >= (step + 1).min(9), "{load:?}");
    }
    let (_, code, _) = refusals(&bench.ask(1, 5, FrameKind::Dense)).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
    // The step before the open one is kept whatever the limit.
    bench.shard.limits.retained_bytes = 0;
    bench.handle(Event::Tick);
    assert_eq!(bench.shard.load().retained_rounds, 1);
}

#[test]
fn a_run_that_has_given_all_ranks_takes_nobody() {
    let (mut bench, spec) = two_of(3);
    bench.shard.job.as_mut().unwrap().members.next_rank = u16::MAX;
    bench.hello(7, elastic(&spec, 7));
    let (session, code, detail) = refusals(&donated(&mut bench, 0, 0)).remove(0);
    assert_eq!((session, code), (7, RefusalCode::World));
    assert!(detail.contains("65535 ranks"), "{detail}");
}

#[test]
fn those_that_wait_start_the_job_anew_when_the_others_are_gone() {
    let (mut bench, spec) = two_of(2);
    steps(&mut bench, &[0, 1], 0..3);
    bench.hello(7, elastic(&spec, 7));
    bench.hello(8, elastic(&spec, 8));
    bench.lose(0);
    let actions = bench.lose(1);
    // There may be a snapshot by now.
    let refused = refusals(&actions);
    let codes: Vec<_> = refused.iter().map(|r| (r.0, r.1)).collect();
    assert_eq!(codes, [(7, RefusalCode::Step), (8, RefusalCode::Step)]);
    assert_eq!(
        refused[0].2,
        "the job for which the worker waited has ended at step 3, and it starts at step 0: look for the newest snapshot, and come again"
    );
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
    bench.hello(9, elastic(&spec, 7));
    let actions = bench.hello(10, elastic(&spec, 8));
    assert_eq!(ranks(&actions), [(9, 0), (10, 1)]);
    let welcome = &welcomes(&actions)[0].1;
    assert!(!welcome.snapshot);
    assert_eq!(welcome.place.run, run(2));
    assert_eq!((welcome.step, bench.shard.is_running()), (Step(0), true));
    steps(&mut bench, &[9, 10], 0..2);
}

/// Of a worker that was a member of a job and lost its place.
fn again(spec: &PlanSpec, session: u64) -> Hello {
    let mut hello = elastic(spec, session);
    let Intent::Join { when, .. } = &mut hello.intent else {
        unreachable!()
    };
    *when = JoinWhen::Running;
    hello
}

#[test]
fn one_that_was_a_member_joins_a_job_that_runs_and_starts_none() {
    let (mut bench, spec) = two_of(3);
    assert_eq!(asked(&bench.hello(7, again(&spec, 7))), [0]);
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), [(7, 2)]);
    let mut bench = Bench::empty(config(2), algorithm(Compressor::Dense));
    let (session, code, detail) = refusals(&bench.hello(7, again(&spec, 7))).remove(0);
    assert_eq!((session, code), (7, RefusalCode::World));
    assert!(detail.starts_with("no job runs"), "{detail}");
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
}

#[test]
fn one_that_was_a_member_waits_until_a_restarted_shard_knows_of_no_job() {
    let config = ShardConfig {
        start_grace: Duration::from_secs(4),
        ..config(2)
    };
    let mut bench = Bench::empty(config.clone(), algorithm(Compressor::Dense));
    let spec = bench.plan.spec.clone();
    assert_eq!(refusals(&bench.hello(7, again(&spec, 7))), []);
    let end = Duration::from_millis(10) + Duration::from_secs(4);
    assert_eq!(bench.shard.next_deadline(), Some(end));
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    assert_eq!(refusals(&bench.tick_at(end))[0].0, 7);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
    // Others that wait start without it.
    bench.hello(8, elastic(&spec, 8));
    assert_eq!(ranks(&bench.hello(9, elastic(&spec, 9))).len(), 2);
    // If the members come, it joins them.
    let mut bench = Bench::empty(config, algorithm(Compressor::Dense));
    bench.hello(7, again(&spec, 7));
    for rank in 0..2 {
        let session = u64::from(rank);
        bench.hello(session, member(&spec, place(rank, &[0, 1]), 0));
        bench.control(session, Control::Retelling { frames: 0 });
    }
    assert!(bench.shard.is_running());
    bench.lose(1);
    assert_eq!(ranks(&donated(&mut bench, 0, 0)), [(7, 2)]);
}

#[test]
fn those_that_start_anew_start_where_their_checkpoints_are() {
    let (mut bench, spec) = two_of(2);
    let from = |session: u64, step: u64, rank: Option<u16>| Hello {
        intent: Intent::Join {
            rank: rank.map(Rank),
            world: None,
            start_step: Step(step),
            when: JoinWhen::Any,
        },
        ..elastic(&spec, session)
    };
    bench.hello(7, from(7, 40, Some(1)));
    bench.hello(8, from(8, 30, None));
    bench.hello(9, from(9, 40, Some(1)));
    bench.hello(10, from(10, 40, Some(9)));
    bench.hello(11, from(11, 40, None));
    bench.lose(0);
    let actions = bench.lose(1);
    // What was no matter while the job ran is one now.
    let refused: Vec<_> = refusals(&actions).into_iter().map(|r| (r.0, r.1)).collect();
    let expected = [
        (8, RefusalCode::Step),
        (9, RefusalCode::Rank),
        (10, RefusalCode::Rank),
    ];
    assert_eq!(refused, expected);
    assert_eq!(ranks(&actions), [(11, 0), (7, 1)]);
    assert_eq!(welcomes(&actions)[0].1.step, Step(40));
    steps(&mut bench, &[7, 11], 40..42);
}

#[test]
fn those_that_wait_for_members_that_are_all_away_do_not_wait_for_ever() {
    let (mut bench, spec) = two_of(3);
    bench.cut(0);
    bench.cut(1);
    let gone = bench.now;
    let actions = bench.hello(7, elastic(&spec, 7));
    assert_eq!((asked(&actions), refusals(&actions)), (vec![], vec![]));
    bench.hello(8, elastic(&spec, 8));
    bench.tick(RETURN_GRACE);
    let end = gone + MEMBER_TIMEOUT;
    assert_eq!(bench.shard.next_deadline(), Some(end));
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    assert_eq!(ranks(&bench.tick_at(end)), [(7, 0), (8, 1)]);
}
