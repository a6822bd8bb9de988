//! Who is in the job, and what shard 0 says.

use super::*;

#[test]
fn memberships_are_passed_on_and_never_go_back() {
    let mut bench = Bench::new(&arc(3));
    bench.down(2);
    bench.take();
    assert_eq!(bench.member.leader(), Rank(0));
    bench.control(0, membership(3, &[0, 1, 2, 5], &[0]));
    assert_eq!(bench.controls(), [(1, membership(3, &[0, 1, 2, 5], &[0]))]);
    assert_eq!(bench.member.leader(), Rank(1));
    assert_eq!(bench.member.place(), &place(3, &[0, 1, 2, 5]));
    // The same again is no news; another's connection is.
    bench.control(0, membership(3, &[0, 1, 2, 5], &[0]));
    assert_eq!(bench.controls(), []);
    bench.control(0, membership(3, &[0, 1, 2, 5], &[]));
    assert_eq!(bench.controls().len(), 1);
    assert_eq!(bench.member.leader(), Rank(0));
    // Older ones, and those of other shards.
    bench.control(0, membership(2, &[1], &[]));
    bench.control(1, membership(9, &[1], &[]));
    assert_eq!(bench.take(), []);
    let Intent::Member { place: told, .. } = bench.member.intent(ShardId(2)) else {
        panic!("a member comes as one");
    };
    assert_eq!(told, place(3, &[0, 1, 2, 5]));
    // News that came after the Hello was sent.
    bench.control(0, membership(4, &[0, 1, 2], &[]));
    bench.take();
    let welcome = Welcome {
        shard_incarnation: 1,
        retell: false,
        place: told,
        step: Step(0),
        snapshot: false,
    };
    let shard = ShardId(2);
    bench.input(Input::LinkUp { shard, welcome });
    assert!(matches!(
        bench.controls()[..],
        [(
            2,
            Control::Membership {
                epoch: Epoch(4),
                ..
            }
        )]
    ));
    bench.begin();
    bench.fill();
    assert!(bench.frames().iter().all(|f| f.header.epoch == Epoch(4)));
}

#[test]
fn one_that_is_no_member_any_more_must_join_again() {
    let mut bench = Bench::new(&arc(2));
    bench.control(0, membership(2, &[0, 2], &[]));
    assert!(matches!(
        bench.failure(),
        Some(ReduceError::Superseded { shard: 0, .. })
    ));
    bench.take();
    bench.control(0, membership(3, &[0, 1, 2], &[]));
    bench.begin();
    bench.fill();
    assert_eq!(bench.take(), []);
}

#[test]
fn refusals_end_the_session_unless_the_shard_will_be_back() {
    let refused = |code| Control::Refused {
        code,
        detail: "why".to_owned(),
    };
    let mut bench = Bench::new(&arc(2));
    bench.control(1, refused(RefusalCode::Shutdown));
    bench.down(1);
    let out = bench.take();
    assert_eq!(out.len(), 2, "{out:?}");
    assert_eq!(out[1], Output::Dial { shard: ShardId(1) });
    bench.control(1, refused(RefusalCode::Superseded));
    assert_eq!(
        bench.failure(),
        Some(&ReduceError::Superseded {
            shard: 1,
            detail: "why".to_owned()
        })
    );
    let mut bench = Bench::new(&arc(2));
    bench.control(0, refused(RefusalCode::Plan));
    assert!(matches!(
        bench.failure(),
        Some(ReduceError::Refused { shard: 0, code, .. }) if code == "Plan"
    ));
}

#[test]
fn a_snapshot_is_asked_for_and_told() {
    let mut bench = Bench::new(&arc(2));
    bench.control(1, Control::Donate);
    assert!(!bench.member.donation_due());
    bench.control(0, Control::Donate);
    bench.control(0, Control::Donate);
    assert_eq!(bench.take(), [Output::Notice(Notice::DonationAsked)]);
    assert!(bench.member.donation_due());
    bench.member.donation_taken(Step(0), &mut Vec::new());
    bench.down(0);
    bench.member.donated(Step(3), &mut bench.out);
    assert_eq!(bench.controls(), []);
    bench.up(0, 1, false);
    assert_eq!(bench.controls(), [(0, Control::Donated { step: Step(3) })]);
    // A new coordinator has not asked.
    bench.control(0, Control::Donate);
    bench.down(0);
    bench.member.donated(Step(4), &mut bench.out);
    bench.take();
    bench.up(0, 2, false);
    assert!(bench.controls().is_empty() && !bench.member.donation_due());
}

#[test]
fn a_copy_that_is_on_its_way_serves_all_and_one_that_failed_is_made_again() {
    let mut bench = Bench::new(&arc(2));
    bench.control(0, Control::Donate);
    bench.member.donation_taken(Step(0), &mut bench.out);
    bench.take();
    bench.control(0, Control::Donate);
    assert!(bench.take().is_empty() && !bench.member.donation_due());
    bench.member.donation_failed();
    assert!(bench.member.donation_due());
    bench.member.donation_taken(Step(0), &mut bench.out);
    bench.member.donated(Step(0), &mut bench.out);
    bench.take();
    // The next one that joins needs another.
    bench.control(0, Control::Donate);
    assert!(bench.member.donation_due());
    bench.member.donation_failed();
    assert!(bench.member.donation_due(), "none was on its way");
}

#[test]
fn one_that_has_no_more_steps_is_not_waited_for_until_it_leaves() {
    let mut bench = Bench::new(&arc(2));
    bench.member.step_aside(&mut bench.out);
    assert_eq!(bench.controls(), [(0, Control::Away), (1, Control::Away)]);
    bench.member.step_aside(&mut bench.out);
    assert_eq!(bench.controls(), []);
    // Nor by a shard that comes back.
    bench.down(1);
    let intent = bench.member.intent(ShardId(1));
    assert!(matches!(intent, Intent::Member { waited: false, .. }));
    bench.up(1, 1, false);
    assert_eq!(bench.controls(), []);
    bench.member.leave(&mut bench.out);
    assert_eq!(bench.controls(), [(0, Control::Leave), (1, Control::Leave)]);
}

#[test]
fn one_that_leaves_says_so_and_does_not_come_back() {
    let mut bench = Bench::new(&arc(2));
    bench.member.leave(&mut bench.out);
    assert_eq!(bench.controls(), [(0, Control::Leave), (1, Control::Leave)]);
    bench.down(0);
    bench.member.leave(&mut bench.out);
    assert_eq!(bench.take(), []);
}

#[test]
fn one_that_joins_says_that_it_is_ready_when_it_has_caught_up() {
    let mut bench = Bench::dialling(&arc(2), false);
    let Intent::Member { waited, .. } = bench.member.intent(ShardId(1)) else {
        panic!("a member comes as one");
    };
    assert!(!waited);
    let welcome = Welcome {
        shard_incarnation: 1,
        retell: false,
        place: place(1, &[0, 1, 2]),
        step: Step(2),
        snapshot: false,
    };
    let shard = ShardId(1);
    bench.input(Input::LinkUp { shard, welcome });
    for step in 0..2u16 {
        assert!(bench.begin(), "step {step}");
        assert_eq!(bench.member.next_deadline(), None);
        loop {
            let frames = bench.frames();
            if frames.is_empty() {
                break;
            }
            for frame in &frames {
                assert!(frame.header.flags.absent);
                bench.answer_ahead(frame, &[0, 2], 0.5, 2 - step);
            }
        }
        bench.member.commit();
    }
    assert!(!bench.begin());
    let ready = Control::Ready { step: Step(2) };
    assert_eq!(bench.controls(), [(0, ready.clone()), (1, ready)]);
    bench.fill();
    let outcome = bench.finish(&[0, 1, 2], 0.5);
    assert_eq!(outcome.stats.rounds_counted, outcome.stats.rounds);
}
