//! A restart of the job that reaches a shard before the last start's workers are forgotten there.

use super::*;

/// Shard 1 of two, with a job of two workers at step 1, and the specification.
fn stepping() -> (Bench, PlanSpec) {
    let (mut bench, spec) = second_of_two();
    for rank in 0..2 {
        let welcomed = bench.hello(u64::from(rank), old(&spec, rank));
        assert_eq!(welcomes(&welcomed), [(u64::from(rank), rank, 0)]);
    }
    let shape = RoundShape::new(&bench.plan, BucketId(0), ShardId(1), 0);
    for session in 0..2 {
        let body = vec![0; shape.dense_layout().bytes];
        bench.send(session, 0, FrameKind::Dense, body);
    }
    assert_eq!(bench.shard.status(bench.now).step, Step(1));
    (bench, spec)
}

fn old(spec: &PlanSpec, rank: u16) -> Hello {
    Hello {
        rank: Some(Rank(rank)),
        incarnation: [rank as u8; 16],
        shard: 1,
        ..hello(spec)
    }
}

/// Of another process, from a checkpoint.
fn new(spec: &PlanSpec, rank: u16) -> Hello {
    Hello {
        incarnation: [100 + rank as u8; 16],
        start_step: Step(40),
        ..old(spec, rank)
    }
}

/// (session, rank, start step)
fn welcomes(actions: &[Action]) -> Vec<(u64, u16, u64)> {
    let of = |(session, message)| match message {
        Control::Welcome(welcome) => Some((session, welcome.rank.0, welcome.start_step.0)),
        _ => None,
    };
    messages(actions).into_iter().filter_map(of).collect()
}

#[test]
fn a_restart_waits_for_the_dead_to_be_noticed() {
    let (mut bench, spec) = stepping();
    assert_eq!(bench.hello(10, new(&spec, 0)), []);
    assert_eq!(welcomes(&bench.lose(0)), []);
    // Its rank was taken when it came and is gone now; neither admits it to the old start.
    assert_eq!(bench.hello(11, new(&spec, 1)), []);
    let actions = bench.lose(1);
    assert_eq!(welcomes(&actions), [(10, 0, 40), (11, 1, 40)]);
    assert_eq!(refusals(&actions), []);
    assert_eq!(bench.shard.status(bench.now).totals.refused, 0);
}

#[test]
fn those_who_live_are_not_removed_for_it() {
    let (mut bench, spec) = stepping();
    bench.hello(10, new(&spec, 0));
    bench.now += JOIN_GRACE;
    let actions = bench.handle(Event::Tick);
    let [(session, code, detail)] = &refusals(&actions)[..] else {
        panic!("{actions:?}")
    };
    // Not that the job started elsewhere: it runs, and has this rank.
    assert_eq!((*session, *code), (10, RefusalCode::Rank));
    assert!(detail.contains("rank 0 is taken"), "{detail}");
    assert_eq!(bench.shard.status(bench.now).members.len(), 2);
    let same_start = Hello {
        start_step: Step(0),
        ..new(&spec, 0)
    };
    bench.hello(11, same_start);
    bench.now += JOIN_GRACE;
    let (_, code, detail) = refusals(&bench.handle(Event::Tick)).remove(0);
    assert_eq!(code, RefusalCode::Rank);
    assert!(detail.contains("rank 0 is taken"), "{detail}");
}

#[test]
fn one_that_goes_while_it_waits_is_forgotten() {
    let (mut bench, spec) = stepping();
    bench.hello(10, new(&spec, 0));
    bench.hello(11, new(&spec, 1));
    assert_eq!(bench.lose(10), []);
    let again = refusals(&bench.hello(11, new(&spec, 1)));
    assert!(again[0].2.starts_with("a second Hello"), "{again:?}");
    bench.lose(0);
    assert_eq!(welcomes(&bench.lose(1)), []);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
}

#[test]
fn a_process_that_is_here_already_and_more_than_the_world_are_refused_at_once() {
    let (mut bench, spec) = stepping();
    let twice = refusals(&bench.hello(10, old(&spec, 0)));
    assert_eq!(twice[0].1, RefusalCode::Rank);
    bench.hello(11, new(&spec, 0));
    bench.hello(12, new(&spec, 1));
    let third = refusals(&bench.hello(13, new(&spec, 0)));
    assert_eq!(third.len(), 1);
    let shutdown = bench.handle(Event::Shutdown {
        reason: "SIGTERM".to_owned(),
    });
    let told: Vec<_> = refusals(&shutdown).into_iter().map(|r| r.0).collect();
    assert_eq!(told, [0, 1, 11, 12]);
}

#[test]
fn shard_0_refuses_at_once() {
    let mut bench = Bench::running(2, Compressor::Dense);
    let spec = bench.plan.spec.clone();
    let another = Hello {
        rank: Some(Rank(0)),
        incarnation: [9; 16],
        ..hello(&spec)
    };
    assert_eq!(refusals(&bench.hello(9, another))[0].1, RefusalCode::Rank);
}
