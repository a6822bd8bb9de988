//! A restart of the job that reaches a shard before the last start's workers are forgotten there.

use super::*;

/// Shard 1 of two, with a job of two workers at step 1, and the specification.
fn stepping() -> (Bench, PlanSpec) {
    let (mut bench, spec) = second_of_two();
    for rank in 0..2 {
        let session = u64::from(rank);
        let welcomed = bench.hello(session, to_second(&spec, rank));
        assert_eq!(ranks(&welcomed), [(session, rank)]);
        bench.control(session, Control::Retelling { frames: 0 });
    }
    let shape = RoundShape::new(&bench.plan, BucketId(0), ShardId(1), 0);
    for session in 0..2 {
        let body = vec![0; shape.dense_layout().bytes];
        bench.send(session, 0, FrameKind::Dense, body);
    }
    assert_eq!(bench.shard.status(bench.now).step, Step(1));
    (bench, spec)
}

/// Of another start, from a checkpoint.
fn new(spec: &PlanSpec, rank: u16) -> Hello {
    let place = Place {
        run: RunId([100; 16]),
        ..place(rank, &[0, 1])
    };
    Hello {
        incarnation: [100 + rank as u8; 16],
        shard: 1,
        ..member(spec, place, 40)
    }
}

#[test]
fn a_restart_waits_for_the_dead_to_be_noticed() {
    let (mut bench, spec) = stepping();
    assert_eq!(bench.hello(10, new(&spec, 0)), []);
    assert_eq!(ranks(&bench.lose(0)), []);
    // Its rank was taken when it came and is gone now; neither admits it to the old start.
    assert_eq!(bench.hello(11, new(&spec, 1)), []);
    let actions = bench.lose(1);
    assert_eq!(ranks(&actions), [(10, 0), (11, 1)]);
    assert_eq!(refusals(&actions), []);
    let status = bench.shard.status(bench.now);
    assert_eq!(status.totals.refused, 0);
    let steps: Vec<_> = status.members.iter().map(|member| member.step).collect();
    assert_eq!(steps, [Step(40), Step(40)]);
}

#[test]
fn a_restart_need_not_wait_for_those_who_are_away() {
    let (mut bench, spec) = stepping();
    bench.cut(0);
    assert_eq!(bench.hello(10, new(&spec, 0)), []);
    // They may come back for a long time, but shard 0 has begun anew without them.
    assert_eq!(ranks(&bench.cut(1)), [(10, 0)]);
    let back = bench.hello(12, to_second(&spec, 1));
    assert_eq!(
        refusals(&back),
        [],
        "it waits, as anyone of another start does"
    );
    bench.now += JOIN_GRACE;
    let (session, code, _) = refusals(&bench.handle(Event::Tick)).remove(0);
    assert_eq!((session, code), (12, RefusalCode::World));
}

#[test]
fn those_who_live_are_not_removed_for_it() {
    let (mut bench, spec) = stepping();
    bench.hello(10, new(&spec, 0));
    assert_eq!(bench.shard.next_deadline(), Some(bench.now + JOIN_GRACE));
    bench.now += JOIN_GRACE;
    let actions = bench.handle(Event::Tick);
    let [(session, code, detail)] = &refusals(&actions)[..] else {
        panic!("{actions:?}")
    };
    assert_eq!((*session, *code), (10, RefusalCode::World));
    assert_eq!(
        detail,
        "workers of an earlier start are still connected to shard 1 after 10 s: end them first"
    );
    assert_eq!(bench.shard.status(bench.now).members.len(), 2);
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
    assert_eq!(ranks(&bench.lose(1)), []);
    assert_eq!(bench.shard.status(bench.now).stage, Stage::Empty);
}

#[test]
fn another_process_with_a_rank_that_is_taken_is_refused_at_once() {
    let (mut bench, spec) = stepping();
    let other = Hello {
        incarnation: [9; 16],
        ..to_second(&spec, 0)
    };
    let (_, code, detail) = refusals(&bench.hello(10, other)).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
    assert_eq!(detail, "rank 0 is another worker: join again");
    bench.hello(11, new(&spec, 0));
    bench.hello(12, new(&spec, 1));
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
        incarnation: [9; 16],
        ..member(&spec, place(0, &[0, 1]), 0)
    };
    let (_, code, _) = refusals(&bench.hello(9, another)).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
    let another_run = Place {
        run: RunId([100; 16]),
        ..place(0, &[0, 1])
    };
    let (_, code, detail) = refusals(&bench.hello(10, member(&spec, another_run, 0))).remove(0);
    assert_eq!(code, RefusalCode::Superseded);
    assert_eq!(detail, "another start of the job is under way: join again");
}
