//! Rounds that close without those that are late.

use super::rounds::numbers;
use super::*;
use proptest::prelude::*;

const PATIENCE: Duration = Duration::from_millis(300);

fn quorum_of(quorum: u16, world: u16, compressor: Compressor) -> Bench {
    let config = ShardConfig {
        quorum,
        straggler_timeout: PATIENCE,
        ..config(world)
    };
    Bench::running_with(config, algorithm(compressor))
}

fn dense(bench: &mut Bench, session: u64, step: u64) -> Vec<Action> {
    let body = encode(&numbers(17, session + 1));
    bench.send(session, step, FrameKind::Dense, body)
}

fn straggling(actions: &[Action]) -> Vec<(u16, bool)> {
    let said = actions.iter().filter_map(|action| match action {
        Action::Observe(Observation::Straggling { rank, persistent }) => {
            Some((rank.0, *persistent))
        }
        _ => None,
    });
    said.collect()
}

#[test]
fn a_phase_with_its_quorum_closes_after_the_timeout() {
    let mut bench = quorum_of(2, 3, Compressor::Dense);
    dense(&mut bench, 0, 0);
    assert_eq!(bench.shard.next_deadline(), None, "one is no quorum");
    bench.tick(PATIENCE * 10);
    dense(&mut bench, 2, 0);
    let end = bench.now + PATIENCE;
    assert_eq!(bench.shard.next_deadline(), Some(end));
    assert_eq!(bench.tick_at(end - Duration::from_nanos(1)), []);
    let actions = bench.tick_at(end);
    assert_eq!(roster(&actions), [0, 2]);
    assert_eq!(answers(&actions).len(), 2, "the late one has not asked");
    assert_eq!(closed_round(&actions).unwrap().outcome, Outcome::Partial);
    // It gets the same, and knows that it was not counted.
    bench.now += Duration::from_secs(1);
    let late = dense(&mut bench, 1, 0);
    assert_eq!(whole_answers(&late)[0].2, whole_answers(&actions)[0].2);
    assert!(!answers(&late)[0].1.flags.counted);
    assert!(late.contains(&Action::Observe(Observation::Late {
        rank: Rank(1),
        seconds: 1.01
    })));
    assert_eq!(bench.shard.next_deadline(), None);
}

#[test]
fn with_all_in_time_nothing_waits_for_the_timeout() {
    let mut bench = quorum_of(2, 3, Compressor::Dense);
    dense(&mut bench, 0, 0);
    dense(&mut bench, 1, 0);
    assert_eq!(roster(&dense(&mut bench, 2, 0)), [0, 1, 2]);
}

#[test]
fn every_phase_has_a_timeout_of_its_own() {
    let mut bench = quorum_of(2, 3, Compressor::Arc);
    let sketch = encode(&numbers(15, 1));
    bench.send(0, 0, FrameKind::Sketch, sketch.clone());
    bench.send(1, 0, FrameKind::Sketch, sketch);
    assert_eq!(roster(&bench.tick(PATIENCE)), [0, 1]);
    // The late one takes part in the second.
    let values = encode(&numbers(7, 1));
    bench.send(2, 0, FrameKind::Values, values.clone());
    assert_eq!(answers(&bench.tick(PATIENCE * 3)), []);
    bench.send(0, 0, FrameKind::Values, values);
    assert_eq!(roster(&bench.tick(PATIENCE)), [0, 2]);
}

#[test]
fn fewer_than_the_minimum_are_no_quorum() {
    let config = ShardConfig {
        quorum: 1,
        min_workers: 2,
        straggler_timeout: PATIENCE,
        ..config(3)
    };
    let mut bench = Bench::running_with(config, algorithm(Compressor::Dense));
    dense(&mut bench, 0, 0);
    assert_eq!(answers(&bench.tick(PATIENCE * 9)), []);
    dense(&mut bench, 1, 0);
    assert_eq!(roster(&bench.tick(PATIENCE)), [0, 1]);
}

#[test]
fn absent_ones_are_no_quorum() {
    let mut bench = quorum_of(2, 3, Compressor::Dense);
    bench.ask(0, 0, FrameKind::Dense);
    dense(&mut bench, 1, 0);
    assert_eq!(answers(&bench.tick(PATIENCE * 9)), []);
    assert_eq!(roster(&dense(&mut bench, 2, 0)), [1, 2]);
}

#[test]
fn a_quorum_is_no_more_than_there_are() {
    let mut bench = quorum_of(3, 3, Compressor::Dense);
    dense(&mut bench, 0, 0);
    bench.cut(2);
    bench.tick(RETURN_GRACE);
    assert_eq!(roster(&dense(&mut bench, 1, 0)), [0, 1]);
    assert_eq!(
        bench.shard.next_deadline().map(|d| d > bench.now),
        Some(true)
    );
}

#[test]
fn a_straggler_by_habit_is_said_once_and_when_it_is_over() {
    let mut bench = quorum_of(2, 3, Compressor::Dense);
    let mut said = Vec::new();
    for step in 0..60 {
        dense(&mut bench, 0, step);
        said.extend(straggling(&dense(&mut bench, 1, step)));
        if step < 30 {
            said.extend(straggling(&bench.tick(PATIENCE)));
        }
        said.extend(straggling(&dense(&mut bench, 2, step)));
        let member = &bench.shard.status(bench.now).members[2];
        assert_eq!(member.straggling, said.len() == 1);
    }
    assert_eq!(said, [(2, true), (2, false)]);
    let status = bench.shard.status(bench.now);
    let missed: Vec<_> = status.members.iter().map(|m| m.missed_phases).collect();
    assert_eq!(missed, [0, 0, 30]);
}

#[test]
fn ef21_needs_all_and_takes_no_quorum() {
    use arc_topk_common::config::algorithm::Feedback;
    let config = ShardConfig {
        quorum: 1,
        ..config(2)
    };
    let mut bench = Bench::empty(
        config,
        AlgorithmConfig {
            feedback: Feedback::Ef21,
            ..algorithm(Compressor::Arc)
        },
    );
    let spec = bench.plan.spec.clone();
    let (_, code, detail) = refusals(&bench.hello(0, hello(&spec))).remove(0);
    assert_eq!(code, RefusalCode::Plan);
    assert_eq!(
        detail,
        "feedback ef21 and ef21m need every worker's part in every round: start the shards without --quorum, or use --feedback ef14"
    );
}

/// The mean of these workers' numbers, added up in the order of their ranks.
fn folded(ranks: &[u16]) -> Vec<f32> {
    let mut sum = vec![0.0f32; 17];
    for rank in ranks {
        for (sum, value) in sum.iter_mut().zip(numbers(17, u64::from(*rank) + 1)) {
            *sum += value;
        }
    }
    let factor = 1.0 / ranks.len() as f32;
    sum.into_iter().map(|sum| sum * factor).collect()
}

proptest! {
    /// I3 with members that are waited for, cut off, or come after the close: the bytes follow from the roster.
    #[test]
    fn bytes_follow_from_the_roster(
        order in Just((0..6u64).collect::<Vec<_>>()).prop_shuffle(),
        cut_off in prop::collection::btree_set(0..6u64, 0..5),
        quorum in 0u16..5,
        pause in 0usize..6,
        absent in prop::option::of(0..6u64),
    ) {
        let mut bench = quorum_of(quorum, 6, Compressor::Dense);
        for session in &cut_off {
            bench.control(*session, Control::Away);
        }
        let mut given: BTreeMap<u64, (FrameHeader, Bytes)> = BTreeMap::new();
        for (at, session) in order.iter().enumerate() {
            let mut actions = if Some(*session) == absent {
                bench.ask(*session, 0, FrameKind::Dense)
            } else {
                dense(&mut bench, *session, 0)
            };
            prop_assert_eq!(refusals(&actions), []);
            if at == pause {
                actions.extend(bench.tick(PATIENCE));
            }
            let answers = whole_answers(&actions).into_iter();
            given.extend(answers.map(|(to, header, body)| (to, (header, body))));
        }
        prop_assert_eq!(given.len(), 6, "everyone has asked, and none is waited for any more");
        let (header, body) = given[&order[0]].clone();
        let roster = decode_roster(&body[header.payload_bytes()..]).unwrap();
        for (session, (header, other)) in &given {
            prop_assert_eq!(&body, other);
            prop_assert_eq!(header.flags.counted, roster.contains(&Rank(*session as u16)));
        }
        if header.flags.non_finite {
            prop_assert!(roster.is_empty());
        } else {
            let ranks: Vec<u16> = roster.iter().map(|rank| rank.0).collect();
            prop_assert_eq!(decode(&body[..header.payload_bytes()]), folded(&ranks));
        }
    }
}
