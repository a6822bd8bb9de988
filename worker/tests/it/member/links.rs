//! Connections that are lost and found: what is sent and told again, and who is told to wait.

use super::*;

#[test]
fn exactly_what_is_unanswered_is_sent_again_and_what_is_held_is_told_to_a_new_incarnation() {
    for compressor in [
        Compressor::Arc,
        Compressor::Randk,
        Compressor::Topk,
        Compressor::Dense,
    ] {
        for restarted in [false, true] {
            lost_in_every_state(compressor, restarted);
        }
    }
}

/// Shard 1 is lost and comes back again and again; a naive list of what went and came says what must be repeated.
fn lost_in_every_state(compressor: Compressor, restarted: bool) {
    let algorithm = AlgorithmConfig {
        compressor,
        ..algorithm(Feedback::Ef14, 0.3)
    };
    let mut bench = Bench::new(&spec(algorithm, 2, model()));
    // By (step, bucket) in order: the frame that waits; and all answers so far.
    let mut unanswered: BTreeMap<(u64, u16), Outgoing> = BTreeMap::new();
    let mut held: BTreeMap<(u64, u16), Vec<(FrameHeader, Bytes)>> = BTreeMap::new();
    let mut incarnation = 1;
    for step in 0..4u64 {
        held.retain(|(of, _), _| of + 2 >= step);
        interrupt(&mut bench, &mut incarnation, restarted, &unanswered, &held);
        bench.begin();
        interrupt(&mut bench, &mut incarnation, restarted, &unanswered, &held);
        bench.fill();
        let mut queue = bench.frames();
        for frame in of(&queue, 1) {
            unanswered.insert((step, frame.header.bucket.0), frame);
        }
        while let Some(frame) = queue.pop() {
            let key = (step, frame.header.bucket.0);
            if frame.shard.0 == 1 {
                if queue.len().is_multiple_of(3) {
                    interrupt(&mut bench, &mut incarnation, restarted, &unanswered, &held);
                }
                let (header, body) = shard::answer(&bench.plan, &frame, &[0, ME], 0.5);
                held.entry(key).or_default().push((header, body));
                unanswered.remove(&key);
            }
            bench.answer(&frame, &[0, ME], 0.5);
            let next = bench.frames();
            for frame in of(&next, 1) {
                unanswered.insert((step, frame.header.bucket.0), frame);
            }
            if frame.shard.0 == 1 {
                interrupt(&mut bench, &mut incarnation, restarted, &unanswered, &held);
            }
            queue.extend(next);
        }
        assert!(unanswered.is_empty() && bench.member.is_complete());
        interrupt(&mut bench, &mut incarnation, restarted, &unanswered, &held);
        let outcome = bench.member.commit();
        assert_eq!(outcome.stats.rounds, outcome.stats.rounds_counted);
        let stats = &outcome.stats;
        assert!(stats.rounds > 1, "{stats:?}");
    }
}

fn interrupt(
    bench: &mut Bench,
    incarnation: &mut u64,
    restarted: bool,
    unanswered: &BTreeMap<(u64, u16), Outgoing>,
    held: &BTreeMap<(u64, u16), Vec<(FrameHeader, Bytes)>>,
) {
    bench.take();
    bench.down(1);
    assert!(matches!(
        bench.take()[..],
        [
            Output::Notice(Notice::ShardLost { .. }),
            Output::Dial { shard: ShardId(1) }
        ]
    ));
    *incarnation += u64::from(restarted);
    bench.up(1, *incarnation, restarted);
    let out = bench.take();
    let told: Vec<&(FrameHeader, Bytes)> = held.values().flatten().collect();
    let expected: Vec<Outgoing> = unanswered.values().cloned().collect();
    let mut actual = out.into_iter();
    if restarted {
        let frames = told.len() as u32;
        let message = Control::Retelling { frames };
        let shard = ShardId(1);
        assert_eq!(actual.next(), Some(Output::Control { shard, message }));
        for (header, body) in told {
            let Some(Output::Frame(frame)) = actual.next() else {
                panic!("an answer is missing");
            };
            assert!(frame.header.flags.held && frame.last);
            let mut same = frame.header;
            same.flags.held = false;
            assert_eq!((&same, &frame.body), (header, body));
        }
    }
    let (notice, rest): (Vec<_>, Vec<_>) =
        actual.partition(|output| matches!(output, Output::Notice(_)));
    bench.out = rest;
    let others = bench.out.len();
    let frames = bench.frames();
    assert_eq!(keys(&frames), keys(&expected));
    assert!(frames == expected && frames.len() == others);
    assert!(
        matches!(&notice[..], [Output::Notice(Notice::ShardBack { restarted: r, again, .. })]
            if *r == restarted && *again == frames.len()),
        "{notice:?}"
    );
}

#[test]
fn frames_for_a_lost_shard_are_made_again_when_it_is_back() {
    let mut bench = Bench::new(&arc(2));
    bench.begin();
    bench.down(1);
    bench.take();
    bench.fill();
    let sent = bench.frames();
    assert!(!sent.is_empty() && of(&sent, 1).is_empty());
    bench.up(1, 1, false);
    let again = bench.frames();
    assert!(of(&again, 0).is_empty());
    let kinds: Vec<FrameKind> = again.iter().map(|frame| frame.header.kind).collect();
    assert!(kinds.contains(&FrameKind::Sketch), "{kinds:?}");
    // What was on its way on the old connection is not heard any more.
    bench.down(1);
    bench.answer(&again[0], &[ME], 0.0);
    bench.take();
    bench.up(1, 2, true);
    let told = bench.take();
    let message = Control::Retelling { frames: 0 };
    let shard = ShardId(1);
    assert_eq!(told[0], Output::Control { shard, message });
}

#[test]
fn the_others_do_not_wait_for_one_that_has_lost_a_shard() {
    let mut bench = Bench::new(&arc(3));
    bench.begin();
    bench.now = ms(5000);
    assert_eq!(bench.member.next_deadline(), None);
    bench.down(1);
    bench.now = ms(5400);
    bench.down(2);
    bench.take();
    let deadline = bench.member.next_deadline().unwrap();
    assert_eq!(deadline, ms(6000));
    let waited = |bench: &mut Bench, shard| {
        let Intent::Member { waited, .. } = bench.member.intent(ShardId(shard)) else {
            panic!("a member comes as one");
        };
        waited
    };
    assert!(waited(&mut bench, 1));
    bench.member.tick(ms(5999), &mut bench.out);
    assert!(bench.take().is_empty());
    bench.member.tick(ms(6000), &mut bench.out);
    assert_eq!(bench.controls(), [(0, Control::Away)]);
    assert_eq!(bench.member.next_deadline(), None);
    bench.member.tick(ms(9000), &mut bench.out);
    assert!(bench.take().is_empty());
    // The first to be back is not to wait, either.
    assert!(!waited(&mut bench, 1));
    bench.now = ms(9500);
    bench.up(1, 1, false);
    assert_eq!(bench.controls(), []);
    bench.up(2, 1, false);
    let ready = Control::Ready { step: Step(0) };
    assert_eq!(
        bench.controls(),
        [(0, ready.clone()), (1, ready.clone()), (2, ready)]
    );
    assert!(waited(&mut bench, 2));
}

#[test]
fn a_short_loss_is_nobody_elses_business() {
    let mut bench = Bench::new(&arc(2));
    bench.down(1);
    bench.now = ms(900);
    bench.up(1, 1, false);
    bench.member.tick(ms(2000), &mut bench.out);
    assert_eq!(bench.controls(), []);
    // A start is not in a hurry, either.
    let bench = Bench::dialling(&arc(2), true);
    assert_eq!(bench.member.next_deadline(), None);
    let dial = Output::Dial { shard: ShardId(1) };
    assert_eq!(bench.out, [dial]);
}

#[test]
fn answers_that_came_before_are_ignored_and_others_in_their_place_are_not() {
    let mut bench = Bench::new(&one_matrix());
    bench.begin();
    bench.fill();
    let sketch = bench.frames().remove(0);
    bench.answer(&sketch, &[ME], 0.0);
    let values = bench.frames();
    assert_eq!(keys(&values), [(FrameKind::Values, 0, 0)]);
    bench.answer(&sketch, &[ME], 0.0);
    assert_eq!(bench.take(), []);
    bench.answer(&values[0], &[ME], 0.0);
    bench.answer(&sketch, &[ME], 0.0);
    assert!(bench.member.is_complete());
    bench.member.commit();
    bench.answer(&values[0], &[ME], 0.0);
    bench.begin();
    bench.answer(&values[0], &[ME], 9.0);
    assert_eq!(bench.take(), []);
    bench.fill();
    let sketch = bench.frames().remove(0);
    bench.answer(&sketch, &[ME], 0.0);
    bench.answer(&sketch, &[ME, 2], 0.0);
    assert!(matches!(
        bench.failure(),
        Some(ReduceError::Step(error)) if error.to_string().contains("differently")
    ));
}
