//! Hashes of the parameters.

use super::*;

fn digest(bench: &mut Bench, session: u64, step: u64, byte: u8) -> Vec<Action> {
    let digest = [byte; 32];
    let step = Step(step);
    bench.control(session, Control::Digest { step, digest })
}

fn stepped(resync: bool) -> Bench {
    let config = ShardConfig {
        resync,
        ..config(3)
    };
    let mut bench = Bench::running_with(config, algorithm(Compressor::Dense));
    for step in 0..4 {
        super::reports::step(&mut bench, 3, step);
    }
    bench
}

fn differ(step: u64, ranks: &[u16]) -> Control {
    Control::DigestsDiffer {
        step: Step(step),
        ranks: ranks.iter().copied().map(Rank).collect(),
    }
}

#[test]
fn the_same_everywhere_is_no_news() {
    let mut bench = stepped(true);
    let compared = |bench: &Bench| bench.shard.status(bench.now).digests_compared;
    for session in [2, 0, 1] {
        assert_eq!(compared(&bench), None);
        assert_eq!(digest(&mut bench, session, 4, 7), []);
    }
    assert_eq!(compared(&bench), Some(Step(4)));
}

#[test]
fn all_are_told_of_one_that_differs_and_it_goes_on() {
    let mut bench = stepped(false);
    digest(&mut bench, 0, 4, 7);
    digest(&mut bench, 1, 4, 8);
    let actions = digest(&mut bench, 2, 4, 7);
    let told: Vec<_> = (0..3).map(|session| (session, differ(4, &[1]))).collect();
    assert_eq!(messages(&actions), told);
    assert!(
        actions.contains(&Action::Observe(Observation::DigestsDiffer {
            step: Step(4),
            ranks: vec![Rank(1)]
        }))
    );
    let journal = bench.shard.status(bench.now).journal;
    assert!(journal.last().unwrap().text.contains("step 4"));
    super::reports::step(&mut bench, 3, 4);
    assert_eq!(bench.shard.status(bench.now).step, Step(5));
}

#[test]
fn with_resync_one_that_differs_must_join_again() {
    let mut bench = stepped(true);
    digest(&mut bench, 0, 4, 7);
    digest(&mut bench, 1, 4, 8);
    let actions = digest(&mut bench, 2, 4, 7);
    let (session, code, detail) = refusals(&actions).remove(0);
    assert_eq!((session, code), (1, RefusalCode::Superseded));
    assert_eq!(
        detail,
        "the parameters of rank 1 differ from those of the most at step 4: join again, with the others' state"
    );
    assert_eq!(bench.shard.status(bench.now).members.len(), 2);
    let spec = bench.plan.spec.clone();
    let again = bench.hello(11, member(&spec, place(1, &[0, 1, 2]), 4));
    assert_eq!(refusals(&again)[0].1, RefusalCode::Superseded);
}

#[test]
fn nobody_waits_for_the_digest_of_one_that_is_away_or_joins() {
    let mut bench = stepped(false);
    bench.cut(2);
    digest(&mut bench, 0, 4, 7);
    assert_eq!(messages(&digest(&mut bench, 1, 4, 8)).len(), 2);
}

#[test]
fn one_that_catches_up_later_is_compared_with_what_most_had() {
    let mut bench = stepped(true);
    bench.cut(2);
    digest(&mut bench, 0, 4, 7);
    assert_eq!(digest(&mut bench, 1, 4, 7), []);
    let spec = bench.plan.spec.clone();
    bench.hello(12, member(&spec, place(2, &[0, 1, 2]), 4));
    let actions = digest(&mut bench, 12, 4, 8);
    let told: Vec<_> = messages(&actions).into_iter().take(3).collect();
    let expected: Vec<_> = [0, 1, 12].map(|session| (session, differ(4, &[2]))).into();
    assert_eq!(told, expected);
    assert_eq!(refusals(&actions)[0].0, 12);
}

#[test]
fn the_same_word_again_is_no_news() {
    let mut bench = stepped(false);
    for session in 0..3 {
        digest(&mut bench, session, 4, 7 + u8::from(session == 1));
    }
    for _ in 0..1000 {
        assert_eq!(digest(&mut bench, 1, 4, 8), []);
    }
    for byte in 0..100 {
        assert_eq!(digest(&mut bench, 1, 4, byte), [], "nor is another one");
    }
}

#[test]
fn the_first_to_speak_are_not_the_most() {
    let mut bench = stepped(true);
    bench.cut(1);
    bench.cut(2);
    digest(&mut bench, 0, 4, 9);
    let spec = bench.plan.spec.clone();
    for rank in 1..3 {
        let hello = member(&spec, place(rank, &[0, 1, 2]), 4);
        bench.hello(10 + u64::from(rank), hello);
    }
    let actions = digest(&mut bench, 11, 4, 7);
    assert_eq!(refusals(&actions), [], "one word against another");
    assert_eq!(messages(&actions)[0].1, differ(4, &[1]));
    let actions = digest(&mut bench, 12, 4, 7);
    assert_eq!(messages(&actions)[0].1, differ(4, &[0]));
    assert_eq!(refusals(&actions)[0].0, 0);
}

#[test]
fn no_resync_ends_the_job_for_want_of_workers() {
    let stepped = |min_workers| {
        let config = ShardConfig {
            resync: true,
            min_workers,
            ..config(3)
        };
        let mut bench = Bench::running_with(config, algorithm(Compressor::Dense));
        for step in 0..4 {
            super::reports::step(&mut bench, 3, step);
        }
        bench
    };
    let mut bench = stepped(3);
    digest(&mut bench, 0, 4, 7);
    digest(&mut bench, 1, 4, 8);
    let actions = digest(&mut bench, 2, 4, 7);
    assert_eq!((refusals(&actions), messages(&actions).len()), (vec![], 3));
    super::reports::step(&mut bench, 3, 4);
    // One that is away may not come back, so it is none to spare.
    let mut bench = stepped(2);
    digest(&mut bench, 0, 4, 7);
    digest(&mut bench, 1, 4, 8);
    bench.cut(0);
    assert_eq!(refusals(&digest(&mut bench, 2, 4, 7)), []);
}

#[test]
fn digests_of_a_slow_worker_are_waited_for_over_some_steps() {
    let mut bench = stepped(false);
    for step in 1..=4 {
        digest(&mut bench, 0, step, step as u8);
        digest(&mut bench, 1, step, step as u8);
    }
    assert_eq!(messages(&digest(&mut bench, 2, 1, 1)), []);
    let told = messages(&digest(&mut bench, 2, 2, 9));
    assert_eq!(told[0].1, differ(2, &[2]));
}

#[test]
fn digests_of_steps_that_have_not_been_are_not_kept() {
    let mut bench = stepped(false);
    digest(&mut bench, 0, 4, 7);
    // One that floods does not push the others' out.
    for step in (5..40).chain([u64::MAX]) {
        assert_eq!(digest(&mut bench, 1, step, 1), []);
    }
    digest(&mut bench, 1, 4, 8);
    assert_eq!(messages(&digest(&mut bench, 2, 4, 7)).len(), 3);
}
