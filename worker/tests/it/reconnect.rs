//! Shards and links that go and come back under real workers: training goes on, to the bit where the same workers count.

use crate::net::proxy::Proxy;
use crate::net::{Job, leave_all, request, results, step, step_all};
use crate::support::{self, Got, algorithm, cluster, gradients, model, spec};
use arc_topk_common::config::algorithm::Feedback;
use arc_topk_common::ids::{Rank, ShardId, Step};
use arc_topk_common::plan::PlanSpec;
use arc_topk_common::wire::JoinWhen;
use arc_topk_ps::shard::{RETAIN_STEPS, ShardConfig};
use arc_topk_transport::Identity;
use arc_topk_transport::certs::{Authority, Role};
use arc_topk_worker::reducer::{ReduceError, Reducer};
use arc_topk_worker::session::{NetConfig, NetEvent, QuicReducer};
use arc_topk_worker::step::WorkerState;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

const SHARDS: u16 = 2;

fn plan() -> PlanSpec {
    spec(algorithm(Feedback::Ef14, 0.3), SHARDS, model())
}

/// A job whose workers reach every shard through a proxy: all through the same ones, or each through its own.
struct Way {
    proxies: Vec<Proxy>,
}

impl Way {
    fn to(job: &Job) -> Self {
        let servers = job.servers.iter();
        let proxies = servers.map(|server| Proxy::to(server.quic_address()));
        Self {
            proxies: proxies.collect(),
        }
    }

    /// Settings of a worker that goes this way and notices soon that it is gone.
    fn config(&self, job: &Job) -> NetConfig {
        let mut config = job.config();
        let proxies = self.proxies.iter();
        config.shards = proxies.map(|proxy| proxy.address.to_string()).collect();
        config.transport.idle_timeout = Duration::from_secs(4);
        config
    }
}

fn events(config: &mut NetConfig) -> mpsc::Receiver<NetEvent> {
    let (sender, events) = mpsc::channel();
    let sender = Mutex::new(sender);
    config.observer = Some(Arc::new(move |event| {
        let _test_is_over = sender.lock().unwrap().send(event.clone());
    }));
    events
}

/// Waits for an event that fits.
fn await_event(events: &mpsc::Receiver<NetEvent>, fits: impl Fn(&NetEvent) -> bool) -> NetEvent {
    loop {
        let event = events.recv_timeout(Duration::from_secs(60)).unwrap();
        if fits(&event) {
            return event;
        }
    }
}

fn anywhere() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A fresh process takes the place of a shard in the middle of a step.
fn a_shard_is_restarted(shard: u16) {
    let mut job = Job::start(SHARDS, 3);
    let spec = plan();
    let way = Way::to(&job);
    let mut config = way.config(&job);
    let seen = events(&mut config);
    let mut workers = job.join_as(&config, &spec);
    let mut memory = cluster(&spec, 3);
    let mut steps = |workers: &mut [QuicReducer], numbers: std::ops::Range<u64>| {
        for number in numbers {
            let gradients = gradients(&spec, 3, number);
            for outcome in step_all(workers, &gradients) {
                outcome.unwrap();
            }
            support::step(&mut memory, &gradients);
            for (rank, worker) in (0..).zip(&mut *workers) {
                assert!(
                    results(worker) == support::results(&memory, rank),
                    "step {number}, rank {rank}"
                );
            }
        }
    };
    steps(&mut workers, 0..2);
    // One worker's contribution is there, and is lost with the shard.
    let third = gradients(&spec, 3, 2);
    let mut first = workers.remove(0);
    let own = third[0].clone();
    let pushing = std::thread::spawn(move || {
        step(&mut first, &own).unwrap();
        first
    });
    job.status_when(usize::from(shard), |status| !status.open_rounds.is_empty());
    let at = usize::from(shard);
    way.proxies[at].cut();
    let others = std::thread::scope(|scope| {
        let others = scope.spawn(|| step_all(&mut workers, &third[1..].to_vec()));
        let fresh = job.serve(anywhere(), shard, SHARDS);
        let address = fresh.quic_address();
        let old = std::mem::replace(&mut job.servers[at], fresh);
        job.runtime.block_on(old.shutdown("nobody hears this"));
        way.proxies[at].lead_to(address);
        way.proxies[at].mend();
        others.join().unwrap()
    });
    others
        .into_iter()
        .for_each(|outcome| assert!(!outcome.unwrap().skipped));
    workers.insert(0, pushing.join().unwrap());
    support::step(&mut memory, &third);
    for (rank, worker) in (0..).zip(&mut workers) {
        assert!(
            results(worker) == support::results(&memory, rank),
            "rank {rank}"
        );
    }
    let of = |shard: ShardId| move |event: &NetEvent| matches!(event, NetEvent::ShardBack { shard: back, .. } if *back == shard);
    await_event(&seen, of(ShardId(shard)));
    for number in 3..5 {
        let gradients = gradients(&spec, 3, number);
        for outcome in step_all(&mut workers, &gradients) {
            outcome.unwrap();
        }
        support::step(&mut memory, &gradients);
        for (rank, worker) in (0..).zip(&mut workers) {
            assert!(results(worker) == support::results(&memory, rank));
            assert!(worker.export_state() == support::state(&memory, rank));
        }
    }
    assert!(workers.iter().all(|worker| worker.members().len() == 3));
    leave_all(workers);
    job.shutdown();
}

#[test]
fn a_restarted_shard_is_told_and_goes_on() {
    a_shard_is_restarted(1);
}

#[test]
fn a_restarted_coordinator_is_told_and_goes_on() {
    a_shard_is_restarted(0);
}

/// Two workers of three lose none of their links; the third loses those to `cut` for as long as the others take `steps` steps.
fn cut_off(cut: &[usize], steps: u64, config: impl Fn(&mut NetConfig)) -> Cut {
    let job = Job::start(SHARDS, 3);
    let spec = plan();
    let ways = [Way::to(&job), Way::to(&job), Way::to(&job)];
    let threads: Vec<_> = ways
        .iter()
        .zip(0..)
        .map(|(way, rank)| {
            let mut own = way.config(&job);
            own.rank = Some(Rank(rank));
            config(&mut own);
            job.join_one(own, &spec)
        })
        .collect();
    let mut workers: Vec<QuicReducer> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap().unwrap())
        .collect();
    for outcome in step_all(&mut workers, &gradients(&spec, 3, 0)) {
        outcome.unwrap();
    }
    let lost = workers.pop().unwrap();
    for shard in cut {
        ways[2].proxies[*shard].cut();
    }
    let last = 1 + steps;
    let own: Vec<_> = (1..last)
        .map(|number| gradients(&spec, 3, number).remove(2))
        .collect();
    let lost = std::thread::spawn(move || steps_of(lost, &own));
    let mut told = Vec::new();
    for number in 1..last {
        let mut gradients = gradients(&spec, 3, number);
        gradients.pop();
        for outcome in step_all(&mut workers, &gradients) {
            outcome.unwrap();
        }
        told.push(results(&mut workers[0]));
        assert!(told.last() == Some(&results(&mut workers[1])));
    }
    Cut {
        job,
        spec,
        ways,
        workers,
        told,
        lost,
    }
}

struct Cut {
    job: Job,
    spec: PlanSpec,
    ways: [Way; 3],
    /// The two that were not cut off, and their results.
    workers: Vec<QuicReducer>,
    told: Vec<Vec<Got>>,
    /// The third.
    lost: std::thread::JoinHandle<(QuicReducer, Vec<Vec<Got>>, Option<ReduceError>)>,
}

/// Steps until the gradients or the worker end.
fn steps_of(
    mut worker: QuicReducer,
    gradients: &[Vec<Vec<f32>>],
) -> (QuicReducer, Vec<Vec<Got>>, Option<ReduceError>) {
    let mut all = Vec::new();
    for own in gradients {
        if let Err(error) = step(&mut worker, own) {
            return (worker, all, Some(error));
        }
        all.push(results(&mut worker));
    }
    (worker, all, None)
}

fn it_returns_and_catches_up(cut: &[usize]) {
    let steps = 3;
    let Cut {
        job,
        spec,
        ways,
        mut workers,
        told,
        lost,
    } = cut_off(cut, steps, |_| {});
    for shard in cut {
        ways[2].proxies[*shard].mend();
    }
    let (lost, caught_up, error) = lost.join().unwrap();
    assert_eq!(error, None);
    assert!(caught_up == told);
    workers.push(lost);
    for number in 0..2 {
        let gradients = gradients(&spec, 3, 1 + steps + number);
        for outcome in step_all(&mut workers, &gradients) {
            assert_eq!(outcome.unwrap().step, Step(1 + steps + number));
        }
        let all: Vec<_> = workers.iter_mut().map(results).collect();
        assert!(all[1..].iter().all(|own| *own == all[0]));
    }
    leave_all(workers);
    drop(ways);
    job.shutdown();
}

#[test]
fn a_worker_that_was_cut_off_returns_and_catches_up() {
    it_returns_and_catches_up(&[0, 1]);
}

#[test]
fn a_worker_that_was_cut_off_from_one_shard_stalls_nobody_and_catches_up() {
    it_returns_and_catches_up(&[1]);
}

#[test]
fn a_worker_that_was_cut_off_for_too_long_is_superseded() {
    let Cut {
        job,
        ways,
        workers,
        lost,
        ..
    } = cut_off(&[0, 1], RETAIN_STEPS + 3, |_| {});
    ways[2].proxies.iter().for_each(Proxy::mend);
    let (lost, _, error) = lost.join().unwrap();
    assert!(
        matches!(error, Some(ReduceError::Superseded { .. })),
        "{error:?}"
    );
    drop(lost);
    leave_all(workers);
    job.shutdown();
}

#[test]
fn a_worker_whose_machine_is_gone_is_soon_done_without() {
    let Cut {
        job,
        ways,
        workers,
        lost,
        ..
    } = cut_off(&[0, 1], 2, |config| {
        config.reconnect_timeout = Duration::from_secs(2);
    });
    let (lost, _, error) = lost.join().unwrap();
    let error = error.unwrap();
    assert!(
        matches!(&error, ReduceError::Disconnected { detail, .. } if detail.contains("--reconnect-timeout-seconds")),
        "{error:?}"
    );
    drop((lost, ways));
    leave_all(workers);
    job.shutdown();
}

#[test]
fn a_shard_that_comes_back_with_wrong_certificates_may_mend_them() {
    let mut job = Job::start(SHARDS, 2);
    let spec = plan();
    let way = Way::to(&job);
    let mut config = way.config(&job);
    let seen = events(&mut config);
    let mut workers = job.join_as(&config, &spec);
    for outcome in step_all(&mut workers, &gradients(&spec, 2, 0)) {
        outcome.unwrap();
    }
    way.proxies[1].cut();
    let old = job.servers.pop().unwrap();
    job.runtime.block_on(old.shutdown("nobody hears this"));
    let place = job.place("stranger");
    let stranger = Authority::new(&request()).unwrap();
    stranger.issue(&place, Role::Shard, &request()).unwrap();
    let mut options = job.options(anywhere(), 1, SHARDS);
    options.identity = Identity::load(&place).unwrap().into();
    let wrong = job
        .runtime
        .block_on(arc_topk_ps::server::Server::start(options))
        .unwrap();
    way.proxies[1].lead_to(wrong.quic_address());
    way.proxies[1].mend();
    let certificate = |event: &NetEvent| matches!(event, NetEvent::Retrying { cause, .. } if cause.contains("certificate"));
    await_event(&seen, certificate);
    let right = job.serve(anywhere(), 1, SHARDS);
    way.proxies[1].lead_to(right.quic_address());
    job.servers.push(right);
    for outcome in step_all(&mut workers, &gradients(&spec, 2, 1)) {
        outcome.unwrap();
    }
    leave_all(workers);
    job.runtime.block_on(wrong.shutdown("the test ends"));
    job.shutdown();
}

#[test]
fn a_shard_of_another_job_at_the_address_ends_the_session() {
    let mut job = Job::start(SHARDS, 1);
    let spec = plan();
    let way = Way::to(&job);
    let mut workers = job.join_as(&way.config(&job), &spec);
    way.proxies[1].cut();
    let mut options = job.options(anywhere(), 1, SHARDS);
    options.shard = ShardConfig::new("another", ShardId(1), SHARDS, 1);
    let other = job
        .runtime
        .block_on(arc_topk_ps::server::Server::start(options))
        .unwrap();
    way.proxies[1].lead_to(other.quic_address());
    way.proxies[1].mend();
    let error = step(&mut workers[0], &gradients(&spec, 1, 0)[0]).unwrap_err();
    assert!(
        matches!(&error, ReduceError::Refused { shard: 1, code, .. } if code == "Job"),
        "{error:?}"
    );
    drop(workers);
    job.servers.push(other);
    job.shutdown();
}

#[test]
fn a_worker_joins_the_running_job_with_a_copy_of_anothers_state() {
    let mut job = Job::prepare(1);
    for shard in 0..SHARDS {
        let mut options = job.options(anywhere(), shard, SHARDS);
        options.shard.max_workers = 2;
        let server = job
            .runtime
            .block_on(arc_topk_ps::server::Server::start(options))
            .unwrap();
        job.servers.push(server);
    }
    let spec = plan();
    let mut donor = job.join(&spec).pop().unwrap();
    assert_eq!(donor.needs_snapshot(), None);
    step(&mut donor, &gradients(&spec, 1, 0)[0]).unwrap();
    let mut config = job.config();
    config.when = JoinWhen::Any;
    let joining = job.join_one(config, &spec);
    let mut number = 1;
    while !donor.donation_due() {
        step(&mut donor, &gradients(&spec, 1, number)[0]).unwrap();
        number += 1;
    }
    let replica = donor.export_shared();
    assert_eq!(replica.step, Step(number));
    donor.donation_ended(Step(number), true);
    let mut joiner = joining.join().unwrap().unwrap();
    assert_eq!(joiner.rank(), Rank(1));
    assert_eq!(
        joiner.needs_snapshot(),
        Some((donor.run().unwrap(), Step(number)))
    );
    // Under ef14 a newcomer's residual is zero, as it is here already.
    let fresh = joiner.export_state();
    let state = WorkerState {
        arrays: fresh.arrays,
        ..replica
    };
    joiner.import_state(state).unwrap();
    assert_eq!(joiner.needs_snapshot(), None);
    // The joiner replays these, and counts from then on.
    let (first, missed) = (number, 2);
    let mut told = Vec::new();
    for number in first..first + missed {
        step(&mut donor, &gradients(&spec, 1, number)[0]).unwrap();
        told.push(results(&mut donor));
    }
    for own in &told {
        joiner.begin().unwrap();
        joiner.finish().unwrap();
        assert!(results(&mut joiner) == *own);
    }
    let mut workers = vec![donor, joiner];
    for number in first + missed..first + missed + 2 {
        for outcome in step_all(&mut workers, &gradients(&spec, 2, number)) {
            outcome.unwrap();
        }
        let all: Vec<_> = workers.iter_mut().map(results).collect();
        assert!(all[0] == all[1]);
    }
    leave_all(workers);
    job.shutdown();
}
