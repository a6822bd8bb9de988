//! Members and the real shard machines, joined by queues: links and shards are lost in mid-step, and all workers still get
//! the same results.

use crate::support::{algorithm, bits, gradients, model, spec};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback};
use arc_topk_common::ids::{Epoch, Rank, ShardId, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec};
use arc_topk_common::wire::{Control, Hello, Intent, JoinWhen, PROTOCOL_VERSION, Welcome};
use arc_topk_ps::shard::{Action, Event, SessionId, Shard, ShardConfig};
use arc_topk_worker::backend::Gradient;
use arc_topk_worker::member::{Input, Member, MemberConfig, Output};
use arc_topk_worker::step::StepMachine;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

const WORKERS: u16 = 3;
const SHARDS: u16 = 2;

struct Net {
    spec: PlanSpec,
    now: Duration,
    shards: Vec<Shard>,
    members: Vec<Member>,
    sessions: BTreeMap<SessionId, (usize, u16)>,
    next_session: u64,
    queue: VecDeque<(usize, u16, Event)>,
    /// This worker cannot reach this shard; its dials wait.
    unreachable: Option<(usize, u16)>,
}

impl Net {
    fn start(spec: &PlanSpec) -> Self {
        let shards = (0..SHARDS).map(|shard| Shard::new(config(shard, 1)));
        let mut net = Self {
            spec: spec.clone(),
            now: Duration::ZERO,
            shards: shards.collect(),
            members: Vec::new(),
            sessions: BTreeMap::new(),
            next_session: 0,
            queue: VecDeque::new(),
            unreachable: None,
        };
        let mut actions = Vec::new();
        for worker in 0..usize::from(WORKERS) {
            let intent = Intent::Join {
                rank: Some(Rank(worker as u16)),
                world: Some(WORKERS),
                start_step: Step(0),
                when: JoinWhen::Any,
            };
            let event = net.hello(worker, 0, intent);
            net.shards[0].handle(net.now, event, &mut actions);
        }
        let welcomes: BTreeMap<SessionId, Welcome> = actions
            .into_iter()
            .filter_map(|action| match action {
                Action::Control {
                    session,
                    message: Control::Welcome(welcome),
                } => Some((session, welcome)),
                _ => None,
            })
            .collect();
        let plan = Arc::new(Plan::build(spec.clone()).unwrap());
        for (worker, welcome) in welcomes.values().enumerate() {
            let machine = StepMachine::new(Arc::clone(&plan), Arc::new(Fast), Epoch(0), Step(0), 0);
            let mut out = Vec::new();
            net.members
                .push(Member::new(machine, MemberConfig::new(welcome), &mut out));
            net.carry_out(worker, out);
        }
        net.run();
        assert!(net.members.iter().all(Member::all_up));
        net
    }

    fn hello(&mut self, worker: usize, shard: u16, intent: Intent) -> Event {
        let session = SessionId(self.next_session);
        self.next_session += 1;
        self.sessions.insert(session, (worker, shard));
        let mut incarnation = [0; 16];
        incarnation[0] = worker as u8 + 1;
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            job: "test".to_owned(),
            incarnation,
            shard,
            host: format!("worker {worker}"),
            intent,
            plan: self.spec.clone(),
        };
        Event::Hello {
            session,
            hello: Box::new(hello),
        }
    }

    fn session(&self, worker: usize, shard: u16) -> Option<SessionId> {
        let mut sessions = self.sessions.iter();
        let found = sessions.find(|(_, of)| **of == (worker, shard));
        found.map(|(session, _)| *session)
    }

    fn carry_out(&mut self, worker: usize, out: Vec<Output>) {
        for output in out {
            let (shard, event) = match output {
                Output::Dial { shard } if self.unreachable == Some((worker, shard.0)) => continue,
                Output::Dial { shard } => {
                    let intent = self.members[worker].intent(shard);
                    (shard.0, self.hello(worker, shard.0, intent))
                }
                Output::Control { shard, message } => {
                    let session = self.session(worker, shard.0).unwrap();
                    (shard.0, Event::Control { session, message })
                }
                Output::Frame(frame) => {
                    let session = self.session(worker, frame.shard.0).unwrap();
                    let (header, body) = (frame.header, frame.body);
                    let event = Event::Round {
                        session,
                        header,
                        body,
                    };
                    (frame.shard.0, event)
                }
                Output::Fail(error) => panic!("worker {worker}: {error}"),
                Output::Notice(_) => continue,
            };
            self.queue.push_back((worker, shard, event));
        }
    }

    /// Delivers so many events, those that follow included.
    fn deliver(&mut self, most: usize) {
        for _ in 0..most {
            let Some((_, shard, event)) = self.queue.pop_front() else {
                return;
            };
            self.shard(shard, event);
        }
    }

    fn run(&mut self) {
        self.deliver(usize::MAX);
    }

    fn shard(&mut self, shard: u16, event: Event) {
        let mut actions = Vec::new();
        self.shards[usize::from(shard)].handle(self.now, event, &mut actions);
        for action in actions {
            let (session, input) = match action {
                Action::Control { session, message } => {
                    let shard = ShardId(shard);
                    let input = match message {
                        Control::Welcome(welcome) => Input::LinkUp { shard, welcome },
                        message => Input::Control { shard, message },
                    };
                    (session, input)
                }
                Action::Round {
                    session,
                    header,
                    body,
                } => {
                    let shard = ShardId(shard);
                    let input = Input::Frame {
                        shard,
                        header,
                        body,
                    };
                    (session, input)
                }
                _ => continue,
            };
            if let Some((worker, _)) = self.sessions.get(&session).copied() {
                self.input(worker, input);
            }
        }
    }

    fn input(&mut self, worker: usize, input: Input) {
        let mut out = Vec::new();
        self.members[worker].handle(self.now, input, &mut out);
        self.carry_out(worker, out);
    }

    /// The connection breaks, and with it goes what is on its way.
    fn cut(&mut self, worker: usize, shard: u16, shard_hears: bool) {
        let session = self.session(worker, shard).unwrap();
        self.sessions.remove(&session);
        self.queue.retain(|(w, s, _)| (*w, *s) != (worker, shard));
        let reason = "the cable".to_owned();
        if shard_hears {
            let event = Event::Closed {
                session,
                reason: reason.clone(),
                for_good: false,
            };
            self.shard(shard, event);
        }
        let shard = ShardId(shard);
        self.input(worker, Input::LinkDown { shard, reason });
    }

    fn restart(&mut self, shard: u16, incarnation: u64) {
        self.shards[usize::from(shard)] = Shard::new(config(shard, incarnation));
        for worker in 0..usize::from(WORKERS) {
            self.cut(worker, shard, false);
        }
    }

    fn begin(&mut self) {
        for worker in 0..usize::from(WORKERS) {
            self.begin_one(worker);
        }
    }

    /// Whether it is behind.
    fn begin_one(&mut self, worker: usize) -> bool {
        let mut out = Vec::new();
        let member = &mut self.members[worker];
        let step = member.machine().step().0;
        let behind = member.begin(&mut out);
        if !behind {
            let all = &gradients(&self.spec, usize::from(WORKERS), step)[worker];
            for (id, gradient) in all.iter().enumerate() {
                let gradient = Gradient::F32(gradient);
                member
                    .fill(TensorId(id as u32), gradient, &mut out)
                    .unwrap();
            }
        }
        self.carry_out(worker, out);
        behind
    }

    /// The cable is whole again.
    fn reach(&mut self) {
        if let Some((worker, shard)) = self.unreachable.take() {
            let shard = ShardId(shard);
            self.carry_out(worker, vec![Output::Dial { shard }]);
        }
    }

    /// One worker's results once it has all of them.
    fn finish_one(&mut self, worker: usize) -> Vec<Vec<u32>> {
        self.run();
        while !self.members[worker].is_complete() {
            assert!(self.now < Duration::from_secs(60), "a round stays open");
            self.tick(Duration::from_millis(500));
        }
        assert!(!self.members[worker].commit().skipped);
        let mut results = Vec::new();
        self.members[worker].for_each_result(&mut |result| results.push(bits(result.values)));
        results
    }

    fn tick(&mut self, more: Duration) {
        self.now += more;
        for worker in 0..usize::from(WORKERS) {
            let mut out = Vec::new();
            self.members[worker].tick(self.now, &mut out);
            self.carry_out(worker, out);
        }
        for shard in 0..SHARDS {
            self.shard(shard, Event::Tick);
        }
        self.run();
    }

    /// Results of all workers, which must be the same.
    fn finish(&mut self) -> Vec<Vec<u32>> {
        let workers = 0..usize::from(WORKERS);
        let mut all: Vec<_> = workers.map(|worker| self.finish_one(worker)).collect();
        assert!(all.iter().all(|results| *results == all[0]));
        all.remove(0)
    }
}

fn config(shard: u16, incarnation: u64) -> ShardConfig {
    ShardConfig {
        incarnation,
        ..ShardConfig::new("test", ShardId(shard), SHARDS, WORKERS)
    }
}

fn job(compressor: Compressor) -> PlanSpec {
    let algorithm = AlgorithmConfig {
        compressor,
        ..algorithm(Feedback::Ef14, 0.3)
    };
    spec(algorithm, SHARDS, model())
}

/// Whatever breaks wherever in a step: nobody is lost, so the results are those of a job in which nothing broke.
#[test]
fn short_losses_and_restarts_change_no_result() {
    for compressor in [Compressor::Arc, Compressor::Randk, Compressor::Topk] {
        let spec = job(compressor);
        let mut whole = Net::start(&spec);
        let mut broken = Net::start(&spec);
        for step in 0..12u64 {
            whole.begin();
            broken.begin();
            broken.deliver(5 * step as usize);
            match step % 4 {
                0 => broken.cut(1, 1, true),
                1 => broken.restart(1, step + 2),
                2 => broken.cut(2, 0, true),
                _ => broken.restart(0, step + 2),
            }
            assert_eq!(broken.finish(), whole.finish(), "{compressor:?}, {step}");
        }
        for (a, b) in broken.members.iter().zip(&whole.members) {
            assert_eq!(a.export_state(), b.export_state());
        }
    }
}

/// One worker cannot reach one shard for a while. The others go on without it; it takes their results one by one, and its
/// gradient counts again as soon as it is there.
#[test]
fn one_that_was_cut_off_catches_up_and_counts_again() {
    for compressor in [Compressor::Arc, Compressor::Randk, Compressor::Topk] {
        let mut net = Net::start(&job(compressor));
        net.begin();
        net.finish();
        net.begin();
        net.deliver(7);
        net.unreachable = Some((2, 1));
        net.cut(2, 1, true);
        let mut results = Vec::new();
        for _ in 0..4 {
            let first = net.finish_one(0);
            assert_eq!(net.finish_one(1), first);
            results.push(first);
            (0..2).for_each(|worker| {
                net.begin_one(worker);
            });
        }
        net.run();
        net.reach();
        let mut behind = Vec::new();
        for (at, expected) in results.iter().enumerate() {
            if at > 0 {
                behind.push(net.begin_one(2));
            }
            assert_eq!(&net.finish_one(2), expected, "{compressor:?}, {at}");
        }
        assert!(behind[0], "{behind:?}");
        // All are in the same step again.
        net.begin_one(2);
        net.finish();
        net.begin();
        net.run();
        for worker in 0..usize::from(WORKERS) {
            assert!(net.members[worker].is_complete());
            let stats = net.members[worker].commit().stats;
            assert_eq!(stats.rounds_counted, stats.rounds, "worker {worker}");
        }
    }
}
