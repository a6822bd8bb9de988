//! Workers and real shards over loopback QUIC: the same bits as in memory, and every end that a session can have.
#![allow(
    unsafe_code,
    reason = "lending is a promise about memory, which the tests keep"
)]

use crate::net::{Job, leave_all, results, step, step_all};
use crate::support::{self, algorithm, cluster, gradients, model, spec};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ValueType};
use arc_topk_common::ids::{Rank, Step, TensorId};
use arc_topk_common::plan::PlanSpec;
use arc_topk_common::wire::Control;
use arc_topk_ps::shard::Stage;
use arc_topk_transport::TransportError;
use arc_topk_worker::backend::Lent;
use arc_topk_worker::reducer::{ReduceError, Reducer, TrainReport};
use arc_topk_worker::session::{ConnectError, NetEvent, QuicReducer};
use arc_topk_worker::step::{ByteCounts, StepError};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

fn arc_spec(shards: u16) -> PlanSpec {
    let algorithm = AlgorithmConfig {
        wire_up: ValueType::Int4,
        wire_down: ValueType::Int4,
        wire_sketch: ValueType::Bf16,
        warmup_updates: 1,
        ..algorithm(Feedback::Ef14, 0.3)
    };
    spec(algorithm, shards, model())
}

/// Steps over QUIC and in memory, compared bit for bit on every worker.
fn same_as_in_memory(spec: &PlanSpec, shards: u16, world: u16) {
    let job = Job::start(shards, world);
    let mut workers = job.join(spec);
    let mut memory = cluster(spec, world);
    // Over QUIC a worker tells every shard but the first that it has nothing to tell.
    let told = Control::Retelling { frames: 0 }.framed_bytes() * u64::from(shards - 1);
    let (mut control, mut expected_control) = (0, told * u64::from(world));
    for number in 0..4 {
        let gradients = gradients(spec, usize::from(world), number);
        let outcomes = step_all(&mut workers, &gradients);
        let expected = support::step(&mut memory, &gradients);
        for ((worker, outcome), expected) in workers.iter_mut().zip(outcomes).zip(expected) {
            let (outcome, expected) = (outcome.unwrap(), expected.unwrap());
            assert_eq!(
                (outcome.step, outcome.update, outcome.kind),
                (expected.step, expected.update, expected.kind)
            );
            control += outcome.stats.sent.control;
            expected_control += expected.stats.sent.control;
            let sent = ByteCounts {
                control: expected.stats.sent.control,
                ..outcome.stats.sent
            };
            assert_eq!(sent, expected.stats.sent);
            assert_eq!(outcome.stats.received, expected.stats.received);
            let rank = worker.rank();
            assert!(
                results(worker) == support::results(&memory, rank.0),
                "step {number}, rank {rank}"
            );
        }
    }
    assert_eq!(control, expected_control);
    for worker in &mut workers {
        let rank = worker.rank().0;
        assert!(worker.export_state() == support::state(&memory, rank));
    }
    leave_all(workers);
    job.shutdown();
}

#[test]
fn arc_gives_the_same_bits_as_in_memory() {
    same_as_in_memory(&arc_spec(2), 2, 3);
}

#[test]
fn every_compressor_gives_the_same_bits_as_in_memory() {
    for compressor in [Compressor::Dense, Compressor::Randk, Compressor::Topk] {
        let mut spec = arc_spec(3);
        spec.algorithm.compressor = compressor;
        same_as_in_memory(&spec, 3, 2);
    }
}

#[test]
fn a_gradient_that_is_not_finite_makes_all_skip() {
    let job = Job::start(2, 2);
    let spec = arc_spec(2);
    let mut workers = job.join(&spec);
    let good = gradients(&spec, 2, 0);
    let mut bad = good.clone();
    bad[1][2][17] = f32::NAN;
    for (number, skipped) in [(0, true), (1, false)] {
        let given = if skipped { &bad } else { &good };
        for outcome in step_all(&mut workers, given) {
            let outcome = outcome.unwrap();
            assert_eq!((outcome.step.0, outcome.update), (number, 0));
            assert_eq!(outcome.skipped, skipped);
        }
        for worker in &mut workers {
            assert_eq!(results(worker).is_empty(), skipped);
        }
    }
    leave_all(workers);
    job.shutdown();
}

#[test]
fn tensors_left_out_are_zeros() {
    let job = Job::start(1, 1);
    let spec = arc_spec(1);
    let mut worker = job.join(&spec).pop().unwrap();
    worker.begin().unwrap();
    worker.push(TensorId(1), &[2.0; 24]).unwrap();
    worker.finish().unwrap();
    for got in results(&mut worker) {
        let expected = if got.tensor == TensorId(1) { 2.0 } else { 0.0 };
        assert!(got.values.iter().all(|v| *v == expected), "{got:?}");
    }
    leave_all(vec![worker]);
    job.shutdown();
}

#[test]
fn misuse_is_told_at_once_and_harms_nothing() {
    let job = Job::start(1, 1);
    let spec = arc_spec(1);
    let mut worker = job.join(&spec).pop().unwrap();
    let expect = |result: Result<(), ReduceError>, part: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, ReduceError::Step(_)), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    };
    expect(worker.push(TensorId(1), &[0.0; 24]), "call begin");
    assert_eq!(
        worker.finish().unwrap_err(),
        ReduceError::Step(StepError::NotBegun)
    );
    worker.begin().unwrap();
    expect(worker.push(TensorId(99), &[0.0; 24]), "register every");
    expect(worker.push(TensorId(1), &[0.0; 23]), "24 were registered");
    worker.push(TensorId(1), &[1.0; 24]).unwrap();
    expect(worker.push(TensorId(1), &[1.0; 24]), "pushed twice");
    worker.finish().unwrap();
    let state = worker.export_state();
    let error = worker.import_state(state).unwrap_err();
    assert!(matches!(error, ReduceError::StartStep { .. }), "{error:?}");
    leave_all(vec![worker]);
    job.shutdown();
}

#[test]
fn leaving_is_no_loss_and_frees_the_shards() {
    let job = Job::start(2, 2);
    let spec = arc_spec(2);
    for _ in 0..2 {
        let mut workers = job.join(&spec);
        for outcome in step_all(&mut workers, &gradients(&spec, 2, 0)) {
            outcome.unwrap();
        }
        leave_all(workers);
        for shard in 0..2 {
            let status = job.status_when(shard, |status| status.stage == Stage::Empty);
            assert_eq!(status.totals.lost, 0, "{:?}", status.journal);
        }
    }
    job.shutdown();
}

#[test]
fn a_lost_worker_is_told_and_the_others_go_on() {
    let job = Job::start(2, 3);
    let spec = arc_spec(2);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let mut config = job.config();
            let seen = Arc::clone(&seen);
            config.observer = Some(Arc::new(move |event| {
                seen.lock().unwrap().push(event.clone());
            }));
            job.join_one(config, &spec)
        })
        .collect();
    let mut workers: Vec<QuicReducer> = threads
        .into_iter()
        .map(|t| t.join().unwrap().unwrap())
        .collect();
    workers.sort_by_key(Reducer::rank);
    let first = gradients(&spec, 3, 0);
    for outcome in step_all(&mut workers, &first) {
        outcome.unwrap();
    }
    // Dropped without a word, in the middle of a step of which it has sent a part.
    let mut lost = workers.pop().unwrap();
    lost.begin().unwrap();
    lost.push(TensorId(7), &first[2][7]).unwrap();
    drop(lost);
    for outcome in step_all(&mut workers, &first) {
        outcome.unwrap();
    }
    let (left, right) = workers.split_at_mut(1);
    assert!(results(&mut left[0]) == results(&mut right[0]));
    assert!(workers.iter().all(|worker| worker.world() == 3));
    let told = |shard: usize| {
        job.status_when(shard, |status| status.members.len() == 2)
            .totals
            .lost
    };
    assert_eq!((told(0), told(1)), (1, 1));
    for outcome in step_all(&mut workers, &first) {
        outcome.unwrap();
    }
    let members = [Rank(0), Rank(1)];
    let told = |w: &QuicReducer| w.members() == members;
    for _ in 0..12_000 {
        if workers.iter().all(told) {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(workers.iter().all(told), "not told within a minute");
    let seen = seen.lock().unwrap().clone();
    assert!(
        seen.iter()
            .any(|e| matches!(e, NetEvent::Membership { reason, .. } if reason.contains("rank 2"))),
        "{seen:?}"
    );
    leave_all(workers);
    job.shutdown();
}

#[test]
fn a_shard_that_shuts_down_for_good_ends_the_step_with_its_reason() {
    let mut job = Job::start(2, 2);
    let spec = arc_spec(2);
    let mut config = job.config();
    config.reconnect_timeout = Duration::from_millis(500);
    let mut workers = job.join_as(&config, &spec);
    let mut waiting = workers.remove(0);
    let own = gradients(&spec, 2, 0).remove(0);
    // The other worker never pushes: this one waits.
    let thread = std::thread::spawn(move || {
        let result = step(&mut waiting, &own);
        (waiting, result)
    });
    job.status_when(1, |status| !status.open_rounds.is_empty());
    let shard = job.servers.pop().unwrap();
    job.runtime.block_on(shard.shutdown("maintenance"));
    let (mut waiting, result) = thread.join().unwrap();
    let error = result.unwrap_err();
    match &error {
        ReduceError::Disconnected { shard: 1, detail } => {
            assert!(detail.contains("maintenance"), "{detail}");
            assert!(detail.contains("dialled for 0.5 s"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
    // The failure stays.
    assert_eq!(waiting.begin().unwrap_err(), error);
    assert_eq!(waiting.finish().unwrap_err(), error);
    drop(waiting);
    job.shutdown();
}

/// Lends all but the last tensors.
fn lend_most(worker: &mut QuicReducer, own: &mut [Vec<f32>], but: usize) {
    worker.begin().unwrap();
    let most = own.len() - but;
    for (id, gradient) in (0..).map(TensorId).zip(&mut own[..most]) {
        let address = NonNull::new(gradient.as_mut_ptr()).unwrap();
        // SAFETY: the gradients outlive the loan, and nobody looks at them before it ends.
        let lent = unsafe { Lent::new(address, gradient.len()) };
        worker.lend(id, lent).unwrap();
    }
}

#[test]
fn a_step_that_is_abandoned_may_begin_again_with_other_gradients() {
    let job = Job::start(2, 1);
    let mut spec = arc_spec(2);
    // One bucket, so that nothing is sent before the last tensor comes.
    spec.algorithm.bucket_bytes = 1 << 20;
    let mut worker = job.join(&spec).pop().unwrap();
    let mut memory = cluster(&spec, 1);
    for number in 0..4 {
        let mut own = gradients(&spec, 1, 50 + number).remove(0);
        lend_most(&mut worker, &mut own, 1);
        assert!(!worker.give_back(), "a step is open");
        worker.abandon();
        assert!(worker.give_back());
        own.iter_mut().for_each(|gradient| gradient.fill(f32::NAN));
        assert!(worker.export_state() == support::state(&memory, 0));
        assert_eq!(
            worker.push(TensorId(0), &own[0]).unwrap_err(),
            ReduceError::Step(StepError::NotBegun)
        );

        let given = gradients(&spec, 1, number);
        step(&mut worker, &given[0]).unwrap();
        support::step(&mut memory, &given);
        assert!(results(&mut worker) == support::results(&memory, 0));
        assert!(worker.export_state() == support::state(&memory, 0));
    }
    leave_all(vec![worker]);
    job.shutdown();
}

#[test]
fn a_job_that_ends_in_a_step_leaves_the_state_before_it_and_needs_nothing_of_what_was_lent() {
    let mut job = Job::start(2, 2);
    let spec = arc_spec(2);
    let mut config = job.config();
    config.reconnect_timeout = Duration::from_millis(500);
    let mut workers = job.join_as(&config, &spec);
    for outcome in step_all(&mut workers, &gradients(&spec, 2, 0)) {
        outcome.unwrap();
    }
    let before = workers[0].export_state();
    let mut own = gradients(&spec, 2, 1).remove(0);
    // The other worker never pushes: this one waits.
    lend_most(&mut workers[0], &mut own, 0);
    job.status_when(1, |status| !status.open_rounds.is_empty());
    let shard = job.servers.pop().unwrap();
    job.runtime.block_on(shard.shutdown("maintenance"));
    let error = workers[0].finish().unwrap_err();
    assert!(
        matches!(error, ReduceError::Disconnected { .. }),
        "{error:?}"
    );
    assert!(workers[0].give_back());
    own.iter_mut().for_each(|gradient| gradient.fill(f32::NAN));
    assert!(workers[0].export_state() == before);
    drop(workers);
    job.shutdown();
}

#[test]
fn a_round_that_nobody_answers_is_named() {
    let job = Job::start(2, 2);
    let spec = arc_spec(2);
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let mut config = job.config();
            config.progress_timeout = Duration::from_millis(300);
            job.join_one(config, &spec)
        })
        .collect();
    let mut workers: Vec<QuicReducer> = threads
        .into_iter()
        .map(|t| t.join().unwrap().unwrap())
        .collect();
    let own = gradients(&spec, 2, 0).remove(0);
    let error = step(&mut workers[0], &own).unwrap_err();
    assert!(
        matches!(&error, ReduceError::Stalled { shard: 0, bucket: 0, sent, .. } if sent == "Dense"),
        "{error:?}"
    );
    assert!(error.to_string().contains("another worker"), "{error}");
    drop(workers);
    job.shutdown();
}

#[test]
fn workers_may_start_before_the_shards() {
    let mut job = Job::start(1, 1);
    let spec = arc_spec(1);
    let address = job.servers[0].quic_address();
    let mut config = job.config();
    config.transport.connect_timeout = Duration::from_millis(200);
    let first = job.servers.pop().unwrap();
    job.runtime.block_on(first.shutdown("not yet"));
    let (retried, retries) = mpsc::channel();
    config.observer = Some(Arc::new(move |event| {
        if let NetEvent::Retrying { cause, .. } = event {
            let _received_one_already = retried.send(cause.clone());
        }
    }));
    let thread = job.join_one(config, &spec);
    let cause = retries.recv().unwrap();
    assert!(cause.contains("no answer"), "{cause}");
    let server = job.serve(address, 0, 1);
    job.servers.push(server);
    let mut worker = thread.join().unwrap().unwrap();
    step(&mut worker, &gradients(&spec, 1, 0)[0]).unwrap();
    leave_all(vec![worker]);
    job.shutdown();
}

#[test]
fn a_shard_that_never_comes_is_an_error() {
    let mut job = Job::start(1, 1);
    let mut config = job.config();
    config.connect_timeout = Duration::from_millis(400);
    config.transport.connect_timeout = Duration::from_millis(100);
    let server = job.servers.pop().unwrap();
    job.runtime.block_on(server.shutdown("for good"));
    let error = QuicReducer::connect(config, arc_spec(1)).err().unwrap();
    assert!(
        matches!(
            &error,
            ConnectError::Transport {
                shard: 0,
                source: TransportError::ConnectTimeout { .. },
                ..
            }
        ),
        "{error:?}"
    );
    assert!(error.to_string().contains("start the shard"), "{error}");
}

#[test]
fn others_that_never_come_are_counted() {
    let job = Job::start(1, 3);
    let mut config = job.config();
    config.join_timeout = Duration::from_secs(3);
    let error = QuicReducer::connect(config, arc_spec(1)).err().unwrap();
    assert!(
        matches!(
            error,
            ConnectError::Join {
                joined: 1,
                world: 3,
                ..
            }
        ),
        "{error:?}"
    );
    job.status_when(0, |status| status.stage == Stage::Empty);
    job.shutdown();
}

#[test]
fn reports_and_figures_reach_those_who_look() {
    let job = Job::start(1, 1);
    let spec = arc_spec(1);
    let mut worker = job.join(&spec).pop().unwrap();
    let outcome = step(&mut worker, &gradients(&spec, 1, 0)[0]).unwrap();
    worker.report(TrainReport {
        step: outcome.step,
        loss: 2.5,
        step_seconds: 0.1,
        wait_seconds: 0.05,
    });
    let status = job.status_when(0, |s| s.members.first().is_some_and(|m| m.report.is_some()));
    let report = status.members[0].report.unwrap();
    assert_eq!((report.step, report.loss), (Step(0), 2.5));
    assert_eq!(report.bytes_sent, outcome.stats.sent.total());
    let (shard, figures) = worker.connections()[0];
    assert_eq!(shard.0, 0);
    assert!(figures.sent_bytes >= outcome.stats.sent.total());
    leave_all(vec![worker]);
    job.shutdown();
}

#[test]
fn a_worker_continues_from_its_checkpoint_to_the_bit() {
    let spec = arc_spec(2);
    let mut memory = cluster(&spec, 2);
    let job = Job::start(2, 2);
    let mut workers = job.join(&spec);
    for number in 0..2 {
        let gradients = gradients(&spec, 2, number);
        support::step(&mut memory, &gradients);
        for outcome in step_all(&mut workers, &gradients) {
            outcome.unwrap();
        }
    }
    let saved: Vec<_> = workers.iter_mut().map(Reducer::export_state).collect();
    leave_all(workers);
    job.status_when(0, |status| status.stage == Stage::Empty);
    job.status_when(1, |status| status.stage == Stage::Empty);
    let threads: Vec<_> = (0..2)
        .map(|rank| {
            let mut config = job.config();
            config.rank = Some(Rank(rank));
            config.start_step = Step(2);
            config.start_update = 2;
            job.join_one(config, &spec)
        })
        .collect();
    let mut workers: Vec<QuicReducer> = threads
        .into_iter()
        .map(|t| t.join().unwrap().unwrap())
        .collect();
    for (worker, state) in workers.iter_mut().zip(saved) {
        worker.import_state(state).unwrap();
    }
    let third = gradients(&spec, 2, 2);
    support::step(&mut memory, &third);
    for outcome in step_all(&mut workers, &third) {
        outcome.unwrap();
    }
    for (rank, worker) in (0..).zip(&mut workers) {
        assert!(results(worker) == support::results(&memory, rank));
    }
    leave_all(workers);
    job.shutdown();
}
