//! Every refusal, with its text; the other workers go on.

use super::*;

/// A hello to a shard where one of two workers waits; its refusal, and that the other one was left alone.
fn refused(change: impl FnOnce(&mut Hello)) -> (RefusalCode, String) {
    let spec = spec(algorithm(Compressor::Arc));
    let plan = Plan::build(spec.clone()).unwrap();
    let mut bench = Bench {
        shard: Shard::new(config(2)),
        now: Duration::ZERO,
        plan,
    };
    bench.hello(
        0,
        Hello {
            host: "first:42".to_owned(),
            ..join(&spec, Some(1), 0)
        },
    );
    let mut second = hello(&spec);
    change(&mut second);
    let actions = bench.hello(1, second);
    let mut refusals = refusals(&actions);
    assert_eq!(refusals.len(), 1);
    let (session, code, detail) = refusals.remove(0);
    assert_eq!(session, 1);
    bench.hello(2, hello(&spec));
    assert!(bench.shard.is_running(), "the others go on");
    (code, detail)
}

fn asks(hello: &mut Hello, rank: Option<u16>, world: Option<u16>, start: u64) {
    hello.intent = Intent::Join {
        rank: rank.map(Rank),
        world,
        start_step: Step(start),
        when: JoinWhen::Start,
    };
}

#[test]
fn hellos() {
    let cases = [
        (
            refused(|h| h.protocol = 9),
            RefusalCode::Version,
            "the worker speaks protocol 9 and this shard 2: install the same release of arc-topk on both",
        ),
        (
            refused(|h| h.job = "other".to_owned()),
            RefusalCode::Job,
            "this shard serves job \"job\", the worker belongs to job \"other\": check --job on both, and the shards' addresses",
        ),
        (
            refused(|h| h.shard = 1),
            RefusalCode::Shard,
            "this is shard 0, but it stands at position 1 of the worker's list: give every worker the shards' addresses in the order of their index",
        ),
        (
            refused(|h| asks(h, None, Some(3), 0)),
            RefusalCode::World,
            "the worker expects 3 workers, this shard was started for 2: give the same --workers everywhere",
        ),
        (
            refused(|h| asks(h, Some(2), None, 0)),
            RefusalCode::Rank,
            "rank 2 is out of range: a world of 2 has ranks 0 to 1",
        ),
        (
            refused(|h| asks(h, Some(1), None, 0)),
            RefusalCode::Rank,
            "rank 1 is taken by first:42: give every worker a rank of its own, or none",
        ),
        (
            refused(|h| h.plan.shards = 2),
            RefusalCode::Plan,
            "the worker was given 2 shards, this shard was started as one of 1: give every worker all shards' addresses and every shard --shards",
        ),
        (
            refused(|h| h.plan.algorithm.density = 0.25),
            RefusalCode::Plan,
            "this worker's plan is not that of the job's others: density is 0.25 with this one, 0.5 with them; give all workers the same model and settings",
        ),
        (
            refused(|h| asks(h, None, None, 5)),
            RefusalCode::Step,
            "the worker starts at step 5, the others at step 0: resume all workers from checkpoints of one step",
        ),
        (
            refused(|h| asks(h, None, None, u64::MAX)),
            RefusalCode::Step,
            "the worker starts at step 18446744073709551615, above the limit of 4611686018427387904: its checkpoint is damaged; resume from another one",
        ),
    ];
    for ((code, detail), expected, text) in cases {
        assert_eq!((code, detail.as_str()), (expected, text));
    }
}

#[test]
fn a_plan_that_cannot_be_built() {
    let mut spec = spec(algorithm(Compressor::Arc));
    spec.algorithm.density = 0.0;
    let mut shard = Shard::new(config(1));
    let mut actions = Vec::new();
    let event = Event::Hello {
        session: SessionId(0),
        hello: Box::new(hello(&spec)),
    };
    shard.handle(Duration::ZERO, event, &mut actions);
    let (_, code, detail) = refusals(&actions).remove(0);
    assert_eq!(code, RefusalCode::Plan);
    assert!(detail.contains("density"), "{detail}");
    assert_eq!(shard.status(Duration::ZERO).stage, Stage::Empty);
}

#[test]
fn a_plan_above_the_limit() {
    let limits = Limits {
        elements: 10,
        ..Limits::default()
    };
    let mut shard = Shard::with_limits(config(1), limits);
    let mut actions = Vec::new();
    let event = Event::Hello {
        session: SessionId(0),
        hello: Box::new(hello(&spec(algorithm(Compressor::Arc)))),
    };
    shard.handle(Duration::ZERO, event, &mut actions);
    assert_eq!(
        refusals(&actions)[0].2,
        "the plan has 17 elements, above this shard's limit of 10: use more shards or a smaller model"
    );
}

#[test]
fn a_running_job_takes_nobody_who_cannot_follow() {
    let mut bench = Bench::running(2, Compressor::Arc);
    let spec = bench.plan.spec.clone();
    let text = "the job runs already, and this worker cannot take its state from a snapshot: wait until the job ends";
    let (_, code, detail) = refusals(&bench.hello(9, hello(&spec))).remove(0);
    assert_eq!((code, detail.as_str()), (RefusalCode::World, text));
    // A worker that was lost and comes back from its checkpoint is told the same, not where the job started.
    let (_, code, detail) = refusals(&bench.hello(10, join(&spec, None, 200))).remove(0);
    assert_eq!((code, detail.as_str()), (RefusalCode::World, text));
    // One that can follow waits for room.
    let waits = bench.hello(11, elastic(&spec, 11));
    assert_eq!(refusals(&waits), []);
    let waiting = Control::Waiting {
        joined: 3,
        world: 2,
    };
    assert_eq!(messages(&waits), [(11, waiting)]);
}

/// Sends one frame as rank 1 of 3 after rank 0 sent a good one; the refusal's text. Ranks 0 and 2 then finish the phase.
fn broken(change: impl FnOnce(&mut FrameHeader, &mut Vec<u8>)) -> String {
    let mut bench = Bench::running(3, Compressor::Arc);
    let good = vec![0; bench.shape(0).sketch_layout().bytes];
    bench.send(0, 0, FrameKind::Sketch, good.clone());
    let (mut head, mut body) = (header(FrameKind::Sketch, 0, good.len()), good.clone());
    change(&mut head, &mut body);
    let actions = bench.frame(1, head, body);
    let mut refusals = refusals(&actions);
    assert_eq!(refusals.len(), 1);
    let (session, code, detail) = refusals.remove(0);
    assert_eq!((session, code), (1, RefusalCode::Protocol));
    let answers = answers(&bench.send(2, 0, FrameKind::Sketch, good));
    let got: Vec<_> = answers
        .iter()
        .map(|(session, header, _)| (*session, header.flags.counted))
        .collect();
    assert_eq!(got, [(0, true), (2, true)]);
    detail
}

#[test]
fn frames() {
    let same = "; run the same release with the same plan everywhere";
    let cases = [
        (
            broken(|h, b| {
                b.pop();
                h.body_bytes -= 1;
            }),
            format!("a Sketch body of this round has 60 bytes, but 59 came: the peers' plans differ{same}"),
        ),
        (broken(|h, _| h.body_bytes = 3), "a frame's header says 3 bytes, its body has 60".to_owned()),
        (
            broken(|h, _| h.bucket = BucketId(7)),
            "a frame names bucket 7, but the plan has 1: run the same release with the same plan everywhere".to_owned(),
        ),
        (
            broken(|h, _| h.step = Step(9)),
            "a frame came for step 9, bucket 0, which is not open yet: this shard takes steps 0 to 1; run the same release everywhere".to_owned(),
        ),
        (
            broken(|h, _| h.update = 4),
            "rank 1 is at update 4 in step 0, but rank 0 is at update 0: their schedules have come apart; resume all workers from one checkpoint".to_owned(),
        ),
        (
            broken(|h, _| h.kind = FrameKind::Values),
            "a Values frame came where the round gathers Sketch: worker and shard disagree about the phase or the compressor; run the same release everywhere".to_owned(),
        ),
        (
            broken(|h, _| h.kind = FrameKind::Selection),
            "a Selection frame came where the round gathers Sketch: worker and shard disagree about the phase or the compressor; run the same release everywhere".to_owned(),
        ),
        (
            broken(|h, _| h.flags.non_finite = true),
            "a frame flagged non-finite or absent must have an empty body, but 60 bytes came; run the same release everywhere".to_owned(),
        ),
    ];
    for (detail, expected) in cases {
        assert_eq!(detail, expected);
    }
}

#[test]
fn a_duplicate_removes_its_sender_but_its_contribution_counts_once() {
    let mut bench = Bench::running(2, Compressor::Arc);
    let good = vec![0; bench.shape(0).sketch_layout().bytes];
    bench.send(0, 0, FrameKind::Sketch, good.clone());
    let actions = bench.send(0, 0, FrameKind::Sketch, good.clone());
    assert_eq!(
        refusals(&actions)[0].2,
        "rank 0 sent its Sketch frame twice, but a contribution counts once; run the same release everywhere"
    );
    assert_eq!(answers(&bench.send(1, 0, FrameKind::Sketch, good)).len(), 1);
}

#[test]
fn a_closed_step_stays_closed() {
    let mut bench = Bench::running(1, Compressor::Dense);
    let bytes = bench.shape(0).dense_layout().bytes;
    let first = bench.send(0, 0, FrameKind::Dense, vec![0; bytes]);
    // Another body now changes nothing: what was answered is answered again, and says how far the job is.
    let second = bench.send(0, 0, FrameKind::Dense, encode(&[1.0; 17]));
    let (before, after) = (whole_answers(&first), whole_answers(&second));
    assert_eq!((before[0].1.lead, after[0].1.lead), (1, 1));
    assert_eq!(before, after);
    assert_eq!(closed_round(&second), None);
    assert_eq!(bench.shard.status(bench.now).step, Step(1));
    // A kind that no phase of the round has is no late frame.
    let refused = refusals(&bench.send(0, 0, FrameKind::Sketch, vec![0; bytes]));
    assert_eq!(
        refused[0].2,
        "a Sketch frame came for step 0, bucket 0, which has no such phase: run the same release everywhere"
    );
}

#[test]
fn an_update_number_may_jump_and_never_falls() {
    let mut bench = Bench::running(1, Compressor::Dense);
    let bytes = bench.shape(0).dense_layout().bytes;
    bench.send(0, 0, FrameKind::Dense, vec![0; bytes]);
    // Workers have averaged some updates by other means.
    let mut head = header(FrameKind::Dense, 1, bytes);
    head.update = 7;
    let actions = bench.frame(0, head, vec![0; bytes]);
    assert_eq!(refusals(&actions), []);
    assert_eq!(answers(&actions).len(), 1);
    let mut head = header(FrameKind::Dense, 2, bytes);
    head.update = 6;
    let actions = bench.frame(0, head, vec![0; bytes]);
    let refused = refusals(&actions);
    assert_eq!(
        refused[0].2,
        "rank 0 is at update 6 in step 2, but update 7 was in step 1: an update number never falls; resume all workers from one checkpoint"
    );
}

#[test]
fn rounds_before_the_welcome_and_unreadable_peers() {
    let spec = spec(algorithm(Compressor::Arc));
    let mut bench = Bench {
        shard: Shard::new(config(2)),
        now: Duration::ZERO,
        plan: Plan::build(spec.clone()).unwrap(),
    };
    bench.hello(9, hello(&spec));
    let actions = bench.send(9, 0, FrameKind::Sketch, Vec::new());
    assert_eq!(
        refusals(&actions),
        [(
            9,
            RefusalCode::Protocol,
            "a round frame came before the Welcome: say Hello and wait for it".to_owned()
        )]
    );
    let mut bench = Bench::running(2, Compressor::Arc);
    let detail = "nonsense".to_owned();
    let actions = bench.handle(Event::Violation {
        session: SessionId(1),
        detail: detail.clone(),
    });
    assert_eq!(refusals(&actions), [(1, RefusalCode::Protocol, detail)]);
    let spec = bench.plan.spec.clone();
    let actions = bench.hello(0, hello(&spec));
    assert!(refusals(&actions)[0].2.starts_with("a second Hello"));
}

#[test]
fn what_was_under_way_from_a_removed_worker_is_no_further_offence() {
    let mut bench = Bench::running(2, Compressor::Dense);
    let bytes = bench.shape(0).dense_layout().bytes;
    let violation = |detail: &str| Event::Violation {
        session: SessionId(1),
        detail: detail.to_owned(),
    };
    assert_eq!(refusals(&bench.handle(violation("the first"))).len(), 1);
    assert_eq!(bench.send(1, 0, FrameKind::Dense, vec![0; bytes]), []);
    assert_eq!(bench.send(1, 9, FrameKind::Dense, vec![0; 3]), []);
    assert_eq!(bench.handle(violation("the second")), []);
    let status = bench.shard.status(bench.now);
    assert_eq!((status.totals.refused, status.totals.lost), (1, 1));
    let told = status
        .journal
        .iter()
        .filter(|line| line.text.starts_with("refused"));
    assert_eq!(told.count(), 1);
}

#[test]
fn a_job_may_start_at_the_last_step_that_is_allowed() {
    let mut bench = Bench::running(1, Compressor::Dense);
    let spec = bench.plan.spec.clone();
    bench.lose(0);
    let last = join(&spec, None, LAST_START_STEP.0);
    assert_eq!(refusals(&bench.hello(0, last)), []);
    let bytes = bench.shape(0).dense_layout().bytes;
    let actions = bench.send(0, LAST_START_STEP.0, FrameKind::Dense, vec![0; bytes]);
    assert_eq!(answers(&actions).len(), 1);
    assert_eq!(
        bench.shard.status(bench.now).step,
        Step(LAST_START_STEP.0 + 1)
    );
}

#[test]
fn parked_bytes_are_bounded() {
    let spec = spec(algorithm(Compressor::Arc));
    let limits = Limits {
        parked_bytes_per_session: 40,
        ..Limits::default()
    };
    let mut bench = Bench {
        shard: Shard::with_limits(config(2), limits),
        now: Duration::ZERO,
        plan: Plan::build(spec.clone()).unwrap(),
    };
    bench.hello(0, hello(&spec));
    bench.hello(1, hello(&spec));
    let actions = bench.send(1, 0, FrameKind::Sketch, vec![0; 60]);
    assert_eq!(
        refusals(&actions)[0].2,
        "60 bytes of rank 1 would wait here for other workers, above the limit of 40: use more shards or smaller buckets"
    );
}

#[test]
fn places_that_shard_0_never_gave() {
    let refused = |change: fn(&mut Place)| {
        let mut bench = Bench::running(2, Compressor::Dense);
        let mut place = place(1, &[0, 1]);
        change(&mut place);
        let hello = member(&bench.plan.spec, place, 0);
        let (_, code, detail) = refusals(&bench.hello(9, hello)).remove(0);
        assert_eq!(code, RefusalCode::Rank);
        detail
    };
    assert_eq!(
        refused(|place| place.members = vec![Rank(0)]),
        "rank 1 is not among the members that it names: run the same release everywhere"
    );
    assert_eq!(
        refused(|place| place.epoch = Epoch(0)),
        "rank 1 names no membership that shard 0 ever gave: run the same release everywhere"
    );
    assert_eq!(
        refused(|place| place.next_rank = 1),
        "a rank among the members is not below 1, the next one to be given: run the same release everywhere"
    );
}

#[test]
fn a_running_coordinator_takes_no_list_of_members_from_one_of_them() {
    let mut bench = Bench::running(2, Compressor::Dense);
    let spec = bench.plan.spec.clone();
    let lie = |epoch| Place {
        epoch: Epoch(epoch),
        ..place(1, &[1])
    };
    bench.hello(11, member(&spec, lie(2), 0));
    let place = bench
        .shard
        .job
        .as_ref()
        .unwrap()
        .members
        .place(run(1), Rank(0));
    assert_eq!(place.members, [Rank(0), Rank(1)]);
    assert_eq!(place.epoch, Epoch(3), "above what others may know");
    bench.hello(12, member(&spec, lie(u32::MAX), 0));
    assert_eq!(bench.shard.status(bench.now).epoch, Epoch(3));
}
