//! How answers are told: cut, begun again, false, and what belongs together.

use super::recovery::{
    Got, KINDS, announce, arc_step, come, contribution, fresh, past, recovered, tell, tell_one, to,
};
use super::*;

#[test]
fn a_telling_that_is_cut_is_begun_again() {
    let past = past(2);
    let mut bench = fresh();
    come(&mut bench, 0, 2);
    announce(&mut bench, 10, 4);
    tell_one(&mut bench, 10, &past[1]);
    tell_one(&mut bench, 10, &past[0]);
    bench.cut(10);
    for rank in 1..3 {
        come(&mut bench, rank, 2);
        let told = tell(&mut bench, 10 + u64::from(rank), &[]);
        assert_eq!(recovered(&told), None);
    }
    let hello = member(&bench.plan.spec, place(0, &[0, 1, 2]), 2);
    assert!(welcomes(&bench.hello(20, hello))[0].1.retell);
    let told = tell(&mut bench, 20, &past);
    assert_eq!(
        (refusals(&told), recovered(&told)),
        (vec![], Some((2, 3, 3, 4)))
    );
}

#[test]
fn a_telling_that_takes_long_is_waited_for() {
    let past = past(3);
    let mut bench = fresh();
    for rank in 0..3 {
        come(&mut bench, rank, 2);
    }
    // Behind a slow link.
    announce(&mut bench, 12, 5);
    tell_one(&mut bench, 12, &past[0]);
    tell(&mut bench, 10, &past[..4]);
    tell(&mut bench, 11, &past[..4]);
    for rank in 0..2 {
        let kind = FrameKind::Sketch;
        bench.send(10 + rank, 2, kind, contribution(kind, 90 + rank, 2));
    }
    for _ in 0..5 {
        assert_eq!(bench.tick(RECOVERY_GRACE), []);
    }
    // It alone holds an answer of the open step, which the others must have.
    for got in &past[1..4] {
        assert_eq!(recovered(&tell_one(&mut bench, 12, got)), None);
    }
    let told = tell_one(&mut bench, 12, &past[4]);
    assert_eq!(recovered(&told), Some((2, 3, 3, 5)));
    assert_eq!(
        to(&told, 10),
        [super::recovery::as_answered(past[4].clone())]
    );
}

#[test]
fn a_telling_that_does_not_end_is_not_waited_for_for_ever() {
    let mut bench = fresh();
    for rank in 0..3 {
        come(&mut bench, rank, 2);
    }
    let came = bench.now;
    announce(&mut bench, 12, 4);
    tell(&mut bench, 10, &[]);
    tell(&mut bench, 11, &[]);
    let end = bench.shard.next_deadline().unwrap();
    assert!(end > came + 10 * RECOVERY_GRACE);
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    assert_eq!(recovered(&bench.tick_at(end)), Some((2, 2, 3, 0)));
}

#[test]
fn whoever_has_told_all_need_not_tell_again() {
    let past = past(2);
    let mut bench = fresh();
    come(&mut bench, 0, 2);
    tell(&mut bench, 10, &past);
    bench.cut(10);
    let hello = member(&bench.plan.spec, place(0, &[0, 1, 2]), 2);
    assert!(!welcomes(&bench.hello(20, hello))[0].1.retell);
    let refused = refusals(&tell_one(&mut bench, 20, &past[0]));
    assert!(refused[0].2.contains("not asked for"), "{refused:?}");
}

/// What a member that is at step 2 is told for this; the others go on.
fn refused_for(session: u64, play: impl FnOnce(&mut Bench, &[Got]) -> Vec<Action>) -> String {
    let past = past(2);
    let mut bench = fresh();
    for rank in 0..3 {
        come(&mut bench, rank, 2);
    }
    let actions = play(&mut bench, &past);
    let mut refused = refusals(&actions);
    assert_eq!(refused.len(), 1, "{refused:?}");
    let (at, code, detail) = refused.remove(0);
    assert_eq!((at, code), (session, RefusalCode::Protocol));
    tell(&mut bench, 11, &past);
    tell(&mut bench, 12, &past);
    assert!(bench.shard.is_running());
    arc_step(&mut bench, &[(11, 1), (12, 2)], 2);
    detail
}

#[test]
fn what_cannot_be_an_answer_is_refused() {
    let one = |change: fn(&mut FrameHeader, &mut Vec<u8>)| {
        refused_for(10, |bench, past| {
            announce(bench, 10, 4);
            let (mut header, mut body) = (past[0].0, past[0].1.to_vec());
            change(&mut header, &mut body);
            tell_one(bench, 10, &(header, body.into()))
        })
    };
    let told = [
        one(|h, _| h.kind = FrameKind::Sketch),
        one(|h, _| h.bucket = BucketId(3)),
        one(|h, _| h.step = Step(9)),
        one(|h, _| h.body_bytes += 1),
        one(|h, b| {
            b.push(0);
            h.body_bytes += 1;
        }),
        one(|_, b| b[0] = 0xff),
        one(|h, _| h.roster_bytes = u16::MAX),
        one(|h, _| h.roster_bytes = 0),
    ];
    assert!(
        told[0].contains("is no answer that could be told"),
        "{told:?}"
    );
    assert!(told[1].starts_with("a frame names bucket 3"), "{told:?}");
    assert_eq!(
        told[2],
        "rank 0 is at step 2 and tells an answer of step 9: run the same release everywhere"
    );
}

#[test]
fn more_frames_than_announced_and_more_than_there_can_be_are_refused() {
    let detail = refused_for(10, |bench, past| {
        announce(bench, 10, 1);
        tell_one(bench, 10, &past[0]);
        tell_one(bench, 10, &past[1])
    });
    assert_eq!(
        detail,
        "rank 0 tells an answer that it was not asked for: run the same release everywhere"
    );
    let detail = refused_for(10, |bench, _| announce(bench, 10, 11));
    assert_eq!(
        detail,
        "rank 0 announces 11 answers, above the limit of 10: run the same release everywhere"
    );
    // Without an announcement the limit is the same.
    let detail = refused_for(10, |bench, past| {
        for _ in 0..10 {
            assert_eq!(refusals(&tell_one(bench, 10, &past[0])), []);
        }
        tell_one(bench, 10, &past[0])
    });
    assert_eq!(
        detail,
        "rank 0 tells more answers than it announced: run the same release everywhere"
    );
}

/// Both answers of step 0 from another life of the job: other rows, other values.
fn other_life() -> Vec<Got> {
    let mut bench = Bench::running(3, Compressor::Arc);
    arc_step(&mut bench, &[(0, 5), (1, 6), (2, 7)], 0)
}

#[test]
fn a_mean_belongs_to_the_selection_that_its_teller_holds() {
    let (mine, theirs) = (past(1), other_life());
    let (selection, mean) = (0, 1);
    assert_ne!(mine[selection].1, theirs[selection].1);
    assert_eq!(
        mine[mean].1.len(),
        theirs[mean].1.len(),
        "nothing else tells"
    );
    let mut bench = fresh();
    come(&mut bench, 0, 0);
    tell(&mut bench, 10, &mine[..1]);
    bench.send(10, 0, KINDS[1], contribution(KINDS[1], 0, 0));
    // One that was cut off tells its mean before its selection.
    come(&mut bench, 1, 1);
    announce(&mut bench, 11, 2);
    let actions = tell_one(&mut bench, 11, &theirs[mean]);
    assert_eq!((answers(&actions), refusals(&actions)), (vec![], vec![]));
    let actions = tell_one(&mut bench, 11, &theirs[selection]);
    assert_eq!(refusals(&actions)[0].1, RefusalCode::Superseded);
    assert_eq!(answers(&actions), []);
    // The right one is taken, in whichever order it is told.
    come(&mut bench, 2, 1);
    announce(&mut bench, 12, 2);
    assert_eq!(answers(&tell_one(&mut bench, 12, &mine[mean])), []);
    let actions = tell_one(&mut bench, 12, &mine[selection]);
    assert_eq!(to(&actions, 10)[0].1, mine[mean].1);
}

#[test]
fn a_held_answer_with_another_update_number_is_of_another_life() {
    let mut told = past(1);
    let mut bench = fresh();
    come(&mut bench, 0, 0);
    tell(&mut bench, 10, &[]);
    bench.send(10, 0, KINDS[0], contribution(KINDS[0], 0, 0));
    come(&mut bench, 1, 0);
    told[0].0.update = 7;
    let refused = refusals(&tell(&mut bench, 11, &told[..1]));
    assert_eq!(refused[0].1, RefusalCode::Superseded);
}

#[test]
fn steps_that_are_told_have_a_limit() {
    let told = past(1);
    let mut bench = fresh();
    come(&mut bench, 0, 0);
    // One that comes again and again, each time further on.
    let mut refused = Vec::new();
    for time in 0..40 {
        let session = 100 + time;
        let hello = member(&bench.plan.spec, place(1, &[0, 1, 2]), 10 * time);
        refused.extend(refusals(&bench.hello(session, hello)));
        let mut held = told[0].clone();
        held.0.step = Step(10 * time);
        held.0.update = 10 * time;
        refused.extend(refusals(&tell_one(&mut bench, session, &held)));
    }
    assert_eq!(refused[0].1, RefusalCode::Superseded);
    assert_eq!(bench.shard.load().open_rounds, 16);
    // It is gone, and what it claimed with it.
    come(&mut bench, 2, 0);
    for session in [10, 12] {
        announce(&mut bench, session, 0);
    }
    assert!(bench.shard.is_running());
    assert_eq!(bench.shard.status(bench.now).step, Step(0));
    arc_step(&mut bench, &[(10, 0), (12, 2)], 0);
    assert!(bench.shard.load().open_rounds <= 2);
}
