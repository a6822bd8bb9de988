use super::*;
use arc_topk_common::config::algorithm::Feedback;

fn empty(world: u16) -> (Bench, PlanSpec) {
    let bench = Bench::empty(config(world), algorithm(Compressor::Arc));
    let spec = bench.plan.spec.clone();
    (bench, spec)
}

#[test]
fn ranks_asked_for_are_honoured_and_the_rest_filled_in_order() {
    let (mut bench, spec) = empty(3);
    let first = bench.hello(7, hello(&spec));
    assert_eq!(
        messages(&first),
        [(
            7,
            Control::Waiting {
                joined: 1,
                world: 3
            }
        )]
    );
    bench.hello(8, join(&spec, Some(0), 0));
    let last = bench.hello(9, hello(&spec));
    assert_eq!(ranks(&last), [(8, 0), (7, 1), (9, 2)]);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Running);
}

#[test]
fn a_worker_that_goes_while_gathering_makes_room() {
    let (mut bench, spec) = empty(2);
    bench.hello(1, join(&spec, Some(0), 0));
    bench.lose(1);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
    bench.hello(2, join(&spec, Some(0), 0));
    let started = bench.hello(3, hello(&spec));
    assert_eq!(ranks(&started), [(2, 0), (3, 1)]);
}

#[test]
fn no_more_than_the_most_start_and_the_rest_waits() {
    let config = ShardConfig {
        start_grace: Duration::from_secs(4),
        max_workers: 3,
        ..config(2)
    };
    let mut bench = Bench::empty(config, algorithm(Compressor::Dense));
    let spec = bench.plan.spec.clone();
    bench.hello(5, elastic(&spec, 5));
    bench.hello(6, elastic(&spec, 6));
    bench.hello(7, hello(&spec));
    bench.hello(8, elastic(&spec, 8));
    bench.hello(9, join(&spec, Some(1), 0));
    let actions = bench.tick(Duration::from_secs(4));
    assert_eq!(ranks(&actions), [(5, 0), (9, 1), (6, 2)]);
    let refused = refusals(&actions);
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!((refused[0].0, refused[0].1), (7, RefusalCode::World));
    // One that can take its state from another waits until there is room.
    let actions = bench.lose(6);
    assert_eq!(messages(&actions).last(), Some(&(5, Control::Donate)));
    let actions = bench.control(5, Control::Donated { step: Step(0) });
    assert_eq!(ranks(&actions), [(8, 3)]);
}

#[test]
fn other_shards_welcome_at_once_and_wait_for_the_others_in_rounds() {
    let (mut bench, spec) = second_of_two();
    let first = bench.hello(5, to_second(&spec, 1));
    assert_eq!(ranks(&first), [(5, 1)]);
    assert!(welcomes(&first)[0].1.retell, "it knows nothing");
    let nothing = Control::Retelling { frames: 0 };
    bench.control(5, nothing.clone());
    let shape = RoundShape::new(&bench.plan, BucketId(0), ShardId(1), 0);
    let body = vec![0; shape.dense_layout().bytes];
    assert!(!body.is_empty());
    assert_eq!(
        answers(&bench.send(5, 0, FrameKind::Dense, body.clone())),
        []
    );
    assert_eq!(ranks(&bench.hello(6, to_second(&spec, 0))), [(6, 0)]);
    assert!(!bench.shard.is_running());
    assert_eq!(answers(&bench.control(6, nothing)), []);
    assert!(bench.shard.is_running());
    let actions = bench.send(6, 0, FrameKind::Dense, body);
    assert_eq!(answers(&actions).len(), 2);
    assert_eq!(roster(&actions), [0, 1]);
}

#[test]
fn a_rank_that_never_comes_is_given_up_after_the_grace() {
    let (mut bench, spec) = second_of_two();
    bench.hello(5, to_second(&spec, 1));
    bench.control(5, Control::Retelling { frames: 0 });
    let came = bench.now - Duration::from_millis(10);
    let shape = RoundShape::new(&bench.plan, BucketId(0), ShardId(1), 0);
    let body = vec![0; shape.dense_layout().bytes];
    bench.send(5, 0, FrameKind::Dense, body);
    assert_eq!(bench.handle(Event::Tick), []);
    assert_eq!(bench.shard.next_deadline(), Some(came + RECOVERY_GRACE));
    let actions = bench.tick(RECOVERY_GRACE);
    assert_eq!(answers(&actions).len(), 1);
    // The other one is still listed, and may come.
    assert_eq!(closed_round(&actions).unwrap().outcome, Outcome::Partial);
}

#[test]
fn a_lost_worker_raises_the_epoch_and_the_rest_is_told() {
    let mut bench = Bench::running(3, Compressor::Arc);
    let actions = bench.lose(1);
    let reason = "rank 1 (host:1) was lost: timed out".to_owned();
    let message = Control::Membership {
        epoch: Epoch(2),
        next_rank: 3,
        members: vec![Rank(0), Rank(2)],
        away: Vec::new(),
        reason,
    };
    assert_eq!(messages(&actions), [(0, message.clone()), (2, message)]);
    assert_eq!(bench.lose(1), [], "a session is lost once");
}

#[test]
fn too_few_workers_end_the_job_for_all() {
    let mut bench = at_least_two_of(2, Compressor::Arc);
    let (session, code, detail) = refusals(&bench.lose(0)).remove(0);
    assert_eq!((session, code), (1, RefusalCode::TooFewWorkers));
    assert_eq!(
        detail,
        "1 of the at least 2 workers are left (rank 0 (host:1) was lost: timed out): start the job again from its last checkpoint, or lower --min-workers"
    );
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
}

#[test]
fn leaving_in_order_ends_no_job_until_a_round_is_short_of_workers() {
    let mut bench = at_least_two_of(2, Compressor::Dense);
    let actions = bench.handle(Event::Leave {
        session: SessionId(0),
    });
    assert_eq!(refusals(&actions), []);
    let bytes = bench.shape(0).dense_layout().bytes;
    let actions = bench.send(1, 0, FrameKind::Dense, vec![0; bytes]);
    assert_eq!(refusals(&actions)[0].1, RefusalCode::TooFewWorkers);
}

#[test]
fn one_that_waits_for_an_answer_is_told_when_the_others_have_left() {
    let mut bench = at_least_two_of(2, Compressor::Dense);
    let bytes = bench.shape(0).dense_layout().bytes;
    bench.send(1, 0, FrameKind::Dense, vec![0; bytes]);
    let actions = bench.handle(Event::Leave {
        session: SessionId(0),
    });
    let refused = refusals(&actions);
    assert_eq!(
        (refused[0].0, refused[0].1),
        (1, RefusalCode::TooFewWorkers)
    );
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
}

/// Three workers under ef21, whose H is the mean of the h of all; the first round, a dense one, is closed.
fn ef21() -> Bench {
    let algorithm = AlgorithmConfig {
        feedback: Feedback::Ef21,
        ..algorithm(Compressor::Arc)
    };
    let mut bench = Bench::running_with(config(3), algorithm);
    let bytes = bench.shape(0).dense_layout().bytes;
    for session in 0..3 {
        bench.send(session, 0, FrameKind::Dense, vec![0; bytes]);
    }
    assert_eq!(bench.shard.status(bench.now).step, Step(1));
    bench
}

/// Both phases of step 1 by those that are left: the answer of the second.
fn second_step(bench: &mut Bench, sessions: &[u64]) -> Vec<Action> {
    let sketch = bench.shape(1).sketch_layout().bytes;
    let mut last = Vec::new();
    for session in sessions {
        last = bench.send(*session, 1, FrameKind::Sketch, vec![0; sketch]);
    }
    assert_eq!(answers(&last)[0].1.kind, FrameKind::Selection);
    for session in sessions {
        last = bench.send(*session, 1, FrameKind::Values, vec![0; 28]);
    }
    last
}

#[test]
fn under_ef21_a_lost_worker_leaves_its_part_of_h_behind_and_h_is_made_anew() {
    let mut bench = ef21();
    assert_eq!(refusals(&bench.lose(2)), [], "the job goes on");
    let actions = second_step(&mut bench, &[0, 1]);
    let given = answers(&actions);
    assert_eq!(given.len(), 2);
    assert!(
        given
            .iter()
            .all(|a| a.1.kind == FrameKind::Restore && a.2.is_empty())
    );
    assert_eq!(closed_round(&actions), None);
    bench.send(0, 1, FrameKind::Estimates, encode(&[1.0; 17]));
    let actions = bench.send(1, 1, FrameKind::Estimates, encode(&[5.0; 17]));
    let answer = answers(&actions).remove(0);
    assert_eq!(answer.1.kind, FrameKind::EstimatesMean);
    assert_eq!(decode(&answer.2), [3.0; 17]);
    assert_eq!(roster(&actions), [0, 1]);
    assert_eq!(bench.shard.status(bench.now).step, Step(2));
}

#[test]
fn under_ef21_a_step_that_all_skipped_changes_nothing_of_whose_h_is_in_h() {
    let mut bench = ef21();
    bench.lose(2);
    // A round of the other bucket, or of another shard, made all skip this step: the next is of the same update. In this
    // round it was not even noticed that rank 2 was lost, for it is not in the answer that was made and thrown away.
    second_step(&mut bench, &[0, 1]);
    for session in [0, 1] {
        bench.send(session, 1, FrameKind::Estimates, vec![0; 4 * 17]);
    }
    assert_eq!(bench.shard.status(bench.now).step, Step(2));
    let again = |bench: &mut Bench, step, kind, bytes| {
        let frames = [0, 1].map(|session| {
            let header = FrameHeader {
                update: 1,
                ..header(kind, step, bytes)
            };
            bench.frame(session, header, vec![0; bytes])
        });
        answers(&frames[1])[0].1.kind
    };
    let sketch = bench.shape(1).sketch_layout().bytes;
    assert_eq!(
        again(&mut bench, 2, FrameKind::Sketch, sketch),
        FrameKind::Selection
    );
    assert_eq!(
        again(&mut bench, 2, FrameKind::Values, 28),
        FrameKind::Restore
    );
}

#[test]
fn under_ef21_leaving_is_no_end_either() {
    let mut bench = ef21();
    for session in 0..3 {
        let session = SessionId(session);
        assert_eq!(refusals(&bench.handle(Event::Leave { session })), []);
    }
    assert_eq!(bench.shard.status(bench.now).totals.lost, 0);
    let mut bench = ef21();
    let actions = second_step(&mut bench, &[0, 1, 2]);
    assert_eq!(
        answers(&actions)[0].1.kind,
        FrameKind::Mean,
        "with all nothing is missing"
    );
}

#[test]
fn after_all_left_the_job_can_start_again() {
    let mut bench = Bench::running(2, Compressor::Arc);
    bench.handle(Event::Leave {
        session: SessionId(0),
    });
    let actions = bench.lose(1);
    assert!(actions.contains(&Action::Observe(Observation::Emptied)));
    let other = spec(AlgorithmConfig {
        density: 0.25,
        ..algorithm(Compressor::Arc)
    });
    let restart = join(&other, None, 40);
    bench.hello(10, restart.clone());
    assert_eq!(ranks(&bench.hello(11, restart)), [(10, 0), (11, 1)]);
    assert_eq!(bench.shard.status(bench.now).step, Step(40));
}

#[test]
fn shutdown_tells_everyone() {
    let mut bench = Bench::running(2, Compressor::Arc);
    let actions = bench.handle(Event::Shutdown {
        reason: "SIGTERM".to_owned(),
    });
    let codes: Vec<_> = refusals(&actions).into_iter().map(|r| (r.0, r.1)).collect();
    assert_eq!(
        codes,
        [(0, RefusalCode::Shutdown), (1, RefusalCode::Shutdown)]
    );
}
