//! The workers' processes: a member, a trainer, and the way into the job.

use super::shards::{decoded, frame, short};
use super::{Happening, Place, World};
use crate::check::{Answer, FrameKey, LifeId, Violation, broken};
use crate::estimates::Answers;
use crate::trainer::{Books, Model, Replica};
use crate::wires::{Clock, ConnectionId, End, Packet, Stream};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::config::algorithm::Feedback;
use arc_topk_common::ids::{BucketId, Rank, RunId, ShardId, Step, TensorId};
use arc_topk_common::wire::{Control, FrameHeader, FrameKind, Hello, Intent, PROTOCOL_VERSION, Welcome};
use arc_topk_worker::backend::Gradient;
use arc_topk_worker::member::{Input, Member, MemberConfig, Output};
use arc_topk_worker::reducer::ReduceError;
use arc_topk_worker::step::{Outgoing, StepMachine, StepOutcome, WorkerState};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// Attempts of a donor to put a replica into a store.
const MOST_UPLOADS: u32 = 6;

/// What a worker does.
enum Stage {
    /// Asks shard 0 for a place.
    Joining,
    /// Fetches a replica.
    Fetching { run: RunId, step: Step },
    /// Trains, or has done all steps.
    Training,
}

/// The open step as seen from outside.
#[derive(Default)]
pub(crate) struct OpenStep {
    /// Gradients are still to come: the position of the next tensor in the order of backward.
    next_fill: Option<usize>,
    pub(crate) gradients: BTreeMap<TensorId, Vec<f32>>,
    pub(crate) sent: BTreeMap<(BucketId, ShardId, FrameKey), Bytes>,
    pub(crate) answers: BTreeMap<(BucketId, ShardId, FrameKey), (FrameHeader, Answer)>,
}

/// A replica on its way to the stores.
struct Upload {
    step: Step,
    run: RunId,
    replica: Rc<Replica>,
    missing: Vec<bool>,
    attempts: u32,
}

/// One process of a worker.
pub(super) struct WorkerProcess {
    pub(super) alive: bool,
    pub(super) life: LifeId,
    pub(super) frozen_until: Option<Duration>,
    pub(super) inbox: VecDeque<Happening>,
    pub(super) clock: Clock,
    pub(super) links: Vec<Option<ConnectionId>>,
    /// Welcomed on that connection.
    up: Vec<bool>,
    incarnation: [u8; 16],
    stage: Stage,
    member: Option<Member>,
    model: Model,
    pub(super) books: Books,
    pub(super) open: OpenStep,
    is_open: bool,
    upload: Option<Upload>,
    /// It leaves after its step.
    pub(super) leaving: bool,
    armed: Option<Duration>,
    token: u64,
    /// Last refusal to let it join.
    pub(super) refused: bool,
}

impl WorkerProcess {
    /// Its clock has changed.
    pub(super) fn rearm(&mut self) {
        self.armed = None;
    }

    pub(super) fn is_training(&self) -> bool {
        self.alive && matches!(self.stage, Stage::Training)
    }

    /// Its next step.
    pub(super) fn step(&self) -> Step {
        self.member.as_ref().map_or(Step(0), |m| m.machine().step())
    }

    pub(super) fn run(&self) -> Option<RunId> {
        self.member.as_ref().map(|m| m.place().run)
    }

    pub(super) fn digest(&self) -> u64 {
        self.model.digest()
    }
}

impl World<'_> {
    pub(super) fn new_worker(&mut self) {
        let random = &mut self.randoms.processes;
        let shards = usize::from(self.case.shards);
        let worker = self.workers.len();
        self.workers.push(WorkerProcess {
            alive: true,
            life: LifeId(0),
            frozen_until: None,
            inbox: VecDeque::new(),
            clock: Clock::new(random),
            links: vec![None; shards],
            up: vec![false; shards],
            incarnation: [0; 16],
            stage: Stage::Joining,
            member: None,
            model: Model::new(self.case),
            books: Books::new(&self.case.plan),
            open: OpenStep::default(),
            is_open: false,
            upload: None,
            leaving: false,
            armed: None,
            token: 0,
            refused: false,
        });
        self.disturbed();
        self.join(worker, Duration::ZERO);
    }

    /// The worker asks for a place, as nobody that was there before.
    fn join(&mut self, worker: usize, after: Duration) {
        self.lives += 1;
        let life = LifeId(self.lives);
        let incarnation = self.randoms.processes.bytes16();
        let process = &mut self.workers[worker];
        process.life = life;
        process.incarnation = incarnation;
        process.stage = Stage::Joining;
        process.member = None;
        process.model = Model::new(self.case);
        process.books = Books::new(&self.case.plan);
        process.open = OpenStep::default();
        process.is_open = false;
        process.upload = None;
        process.armed = None;
        self.note(format_args!("worker {worker} joins as life {}", life.0));
        self.schedule(
            after,
            Happening::Dial {
                life,
                worker,
                shard: 0,
            },
        );
    }

    /// The life ends: connections close in order, and the worker joins again.
    fn rejoin(&mut self, worker: usize, reason: &str, after: Duration) {
        self.note(format_args!(
            "{} ends: {reason}",
            self.name(self.workers[worker].life)
        ));
        self.hang_up(worker, reason);
        self.checker.life_ended(self.workers[worker].life);
        self.disturbed();
        if self.workers[worker].leaving {
            self.workers[worker].alive = false;
            return;
        }
        self.join(worker, after);
    }

    fn hang_up(&mut self, worker: usize, reason: &str) {
        for shard in 0..self.workers[worker].links.len() {
            self.workers[worker].up[shard] = false;
            if let Some(connection) = self.workers[worker].links[shard].take() {
                self.close(connection, End::Worker, reason);
            }
        }
    }

    /// The process is gone. Nobody is told.
    pub(super) fn kill_worker(&mut self, worker: usize) {
        let process = &mut self.workers[worker];
        process.alive = false;
        process.frozen_until = None;
        process.inbox.clear();
        let links: Vec<_> = process.links.iter_mut().filter_map(Option::take).collect();
        let life = process.life;
        for connection in links {
            self.connections[connection.0].close(End::Worker);
        }
        self.checker.life_ended(life);
    }

    /// A life for people.
    pub(super) fn name(&self, life: LifeId) -> String {
        let rank = self.checker.rank(life);
        rank.map_or_else(
            || format!("life {}", life.0),
            |rank| format!("rank {rank} (life {})", life.0),
        )
    }

    pub(super) fn rank_of(&self, life: LifeId) -> Option<Rank> {
        self.checker.rank(life)
    }

    pub(super) fn is_joining(&self, life: LifeId) -> bool {
        self.checker.rank(life).is_none()
    }

    /// Whether it still looks for a connection with this shard.
    pub(super) fn wants(&self, life: LifeId, worker: usize, shard: usize) -> bool {
        let process = &self.workers[worker];
        process.alive
            && process.life == life
            && process.links[shard].is_none()
            && (process.member.is_some() || shard == 0)
    }

    pub(super) fn worker_connected(
        &mut self,
        worker: usize,
        shard: usize,
        connection: ConnectionId,
    ) -> Result<(), Violation> {
        let case = self.case;
        let process = &mut self.workers[worker];
        process.links[shard] = Some(connection);
        process.up[shard] = false;
        let intent = match &mut process.member {
            Some(member) => member.intent(ShardId(shard as u16)),
            None => Intent::Join {
                rank: None,
                world: None,
                start_step: Step(0),
                elastic: true,
            },
        };
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            job: "sim".to_owned(),
            incarnation: process.incarnation,
            shard: shard as u16,
            host: format!("worker {worker}"),
            intent,
            plan: case.plan.spec.clone(),
        };
        self.worker_says(worker, shard, Control::Hello(Box::new(hello)))
    }

    fn worker_says(
        &mut self,
        worker: usize,
        shard: usize,
        message: Control,
    ) -> Result<(), Violation> {
        let mut message = decoded(&message)?;
        let life = self.workers[worker].life;
        self.note(format_args!(
            "{} -> shard {shard} {}",
            self.name(life),
            short(&message)
        ));
        let Some(connection) = self.workers[worker].links[shard] else {
            return Ok(());
        };
        if self.spoils_saying(shard, &mut message) {
            return Ok(());
        }
        self.send(
            connection,
            End::Shard,
            Stream::Control,
            Packet::Control(message),
        );
        Ok(())
    }

    pub(super) fn worker_receives(
        &mut self,
        connection: ConnectionId,
        packet: Packet,
    ) -> Result<(), Violation> {
        let (worker, at) = {
            let wire = &self.connections[connection.0];
            (wire.worker, wire.shard)
        };
        let shard = ShardId(at as u16);
        let life = self.workers[worker].life;
        match packet {
            Packet::Control(message) => {
                self.note(format_args!(
                    "{} <- shard {shard} {}",
                    self.name(life),
                    short(&message)
                ));
                if self.workers[worker].member.is_none() {
                    return self.joiner_hears(worker, message);
                }
                match message {
                    Control::Welcome(welcome) => {
                        self.workers[worker].up[at] = true;
                        self.worker_handles(worker, Input::LinkUp { shard, welcome })
                    }
                    message => self.worker_handles(worker, Input::Control { shard, message }),
                }
            }
            Packet::Frame(mut header, mut body) => {
                self.note(format_args!(
                    "{} <- shard {shard} {}",
                    self.name(life),
                    frame(&header)
                ));
                self.note_answer(worker, shard, &header, &body)?;
                self.spoil_receipt(life, &mut header, &mut body);
                self.worker_handles(
                    worker,
                    Input::Frame {
                        shard,
                        header,
                        body,
                    },
                )
            }
            Packet::Close { .. } => Ok(()),
        }
    }

    fn note_answer(
        &mut self,
        worker: usize,
        shard: ShardId,
        header: &FrameHeader,
        body: &Bytes,
    ) -> Result<(), Violation> {
        let process = &mut self.workers[worker];
        if !process.is_open || header.step != process.step() {
            return Ok(());
        }
        let key = (header.bucket, shard, FrameKey::from(header.kind));
        let answer = Answer::of(header, body);
        match process.open.answers.get(&key) {
            Some((_, known)) if *known != answer => broken(
                "I1 one answer",
                format!(
                    "worker {worker} gets two answers of shard {shard}: {}",
                    frame(header)
                ),
            ),
            Some(_) => Ok(()),
            None => {
                process.open.answers.insert(key, (*header, answer));
                Ok(())
            }
        }
    }

    fn joiner_hears(&mut self, worker: usize, message: Control) -> Result<(), Violation> {
        match message {
            Control::Welcome(welcome) => self.placed(worker, &welcome),
            Control::Refused { code, detail } => {
                self.workers[worker].refused = true;
                let after = self
                    .randoms
                    .processes
                    .time(Duration::from_millis(300)..Duration::from_millis(2000));
                self.rejoin(worker, &format!("{code:?}: {detail}"), after);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Shard 0 has given it a place.
    fn placed(&mut self, worker: usize, welcome: &Welcome) -> Result<(), Violation> {
        let case = self.case;
        let machine = StepMachine::new(
            Arc::clone(&case.plan),
            Arc::new(Fast),
            welcome.place.epoch,
            welcome.step,
            0,
        );
        let mut out = Vec::new();
        let member = Member::new(machine, MemberConfig::new(welcome), &mut out);
        let life = self.workers[worker].life;
        let process = &mut self.workers[worker];
        process.member = Some(member);
        process.up[0] = true;
        process.refused = false;
        self.outputs(worker, out)?;
        if welcome.snapshot {
            self.workers[worker].stage = Stage::Fetching {
                run: welcome.place.run,
                step: welcome.step,
            };
            let time = self
                .randoms
                .store
                .time(Duration::from_millis(20)..Duration::from_millis(800));
            self.schedule(time, Happening::Fetched { life, worker });
            return Ok(());
        }
        self.workers[worker].stage = Stage::Training;
        self.begin(life, worker)
    }

    pub(super) fn fetched(&mut self, life: LifeId, worker: usize) -> Result<(), Violation> {
        if !self.workers[worker].alive || self.workers[worker].life != life {
            return Ok(());
        }
        let Stage::Fetching { run, step } = self.workers[worker].stage else {
            return Ok(());
        };
        let here = |shard: &super::shards::ShardProcess| {
            let replica = shard.store.get(&(run, step));
            replica
                .filter(|_| shard.up && shard.frozen_until.is_none())
                .cloned()
        };
        let parts: Option<Vec<Rc<Replica>>> = self.shards.iter().map(here).collect();
        let fails =
            self.randoms.store.chance(self.case.fetch_fails_per_mille) && self.healed.is_none();
        let Some(replica) = parts.filter(|_| !fails).and_then(|mut parts| parts.pop()) else {
            self.coverage.count("fetches that failed");
            self.rejoin(
                worker,
                "its replica cannot be fetched",
                Duration::from_millis(200),
            );
            return Ok(());
        };
        self.coverage.count("replicas fetched");
        let process = &mut self.workers[worker];
        let member = process
            .member
            .as_mut()
            .expect("a fetching worker is a member");
        let mut state = member.export_state();
        merge(&mut state, &replica.shared);
        member
            .import_state(state)
            .or_else(|error| broken("P import", error.to_string()))?;
        process.model = Model::of_replica(&replica);
        process.stage = Stage::Training;
        self.checker.inherits(life, step, replica.chain);
        self.checker.same_way(life)?;
        self.begin(life, worker)
    }

    pub(super) fn worker_lost(
        &mut self,
        connection: ConnectionId,
        reason: &str,
    ) -> Result<(), Violation> {
        let (worker, shard) = {
            let wire = &mut self.connections[connection.0];
            wire.close(End::Worker);
            (wire.worker, wire.shard)
        };
        let process = &mut self.workers[worker];
        let life = process.life;
        process.links[shard] = None;
        let was_up = core::mem::take(&mut process.up[shard]);
        self.note(format_args!(
            "{} loses shard {shard}: {reason}",
            self.name(life)
        ));
        if self.workers[worker].member.is_none() {
            let after = self
                .randoms
                .processes
                .time(Duration::from_millis(10)..Duration::from_millis(300));
            self.join(worker, after);
            return Ok(());
        }
        if was_up {
            let (shard, reason) = (ShardId(shard as u16), reason.to_owned());
            return self.worker_handles(worker, Input::LinkDown { shard, reason });
        }
        let after = self
            .randoms
            .network
            .time(Duration::from_millis(50)..Duration::from_millis(300));
        self.schedule(
            after,
            Happening::Dial {
                life,
                worker,
                shard,
            },
        );
        Ok(())
    }

    pub(super) fn worker_timer(&mut self, worker: usize, token: u64) -> Result<(), Violation> {
        let now = self.now;
        let process = &mut self.workers[worker];
        if !process.alive || process.token != token {
            return Ok(());
        }
        process.armed = None;
        let local = process.clock.local(now);
        let mut out = Vec::new();
        if let Some(member) = &mut process.member {
            member.tick(local, &mut out);
        }
        self.outputs(worker, out)?;
        self.after(worker)
    }

    fn worker_handles(&mut self, worker: usize, input: Input) -> Result<(), Violation> {
        let now = self.now;
        let process = &mut self.workers[worker];
        let local = process.clock.local(now);
        let mut out = Vec::new();
        if let Some(member) = &mut process.member {
            member.handle(local, input, &mut out);
        }
        self.outputs(worker, out)?;
        self.after(worker)
    }

    /// Whatever follows from a change of the machine's state.
    fn after(&mut self, worker: usize) -> Result<(), Violation> {
        self.arm_worker(worker);
        let process = &self.workers[worker];
        if !process.alive {
            return Ok(());
        }
        let complete = process.is_open && process.member.as_ref().is_some_and(Member::is_complete);
        if complete {
            return self.commit(worker);
        }
        if process.is_training() && !process.is_open && process.step().0 >= self.case.steps {
            self.donate(worker)?;
        }
        Ok(())
    }

    pub(super) fn arm_worker(&mut self, worker: usize) {
        let now = self.now;
        let process = &mut self.workers[worker];
        let deadline = process.member.as_ref().and_then(Member::next_deadline);
        if deadline == process.armed || !process.alive {
            return;
        }
        process.armed = deadline;
        process.token += 1;
        let token = process.token;
        if let Some(deadline) = deadline {
            let at = process
                .clock
                .global(deadline)
                .max(now + Duration::from_micros(50));
            let place = Place::Worker(worker);
            self.schedule_at(at, Happening::Timer { place, token });
        }
    }

    fn outputs(&mut self, worker: usize, out: Vec<Output>) -> Result<(), Violation> {
        let life = self.workers[worker].life;
        for output in out {
            if self.workers[worker].life != life {
                break;
            }
            match output {
                Output::Dial { shard } => {
                    let shard = shard.index();
                    self.schedule(
                        Duration::ZERO,
                        Happening::Dial {
                            life,
                            worker,
                            shard,
                        },
                    );
                }
                Output::Control { shard, message } => {
                    self.worker_says(worker, shard.index(), message)?
                }
                Output::Frame(outgoing) => self.worker_sends(worker, outgoing)?,
                Output::Fail(error) => return self.failed(worker, &error),
                Output::Notice(notice) => {
                    self.note(format_args!("{}: {notice:?}", self.name(life)));
                }
            }
        }
        Ok(())
    }

    fn failed(&mut self, worker: usize, error: &ReduceError) -> Result<(), Violation> {
        self.coverage.count("members that failed");
        let expected = match error {
            ReduceError::Superseded { .. } => !self.case.faults.is_empty(),
            ReduceError::Refused { code, .. } => {
                ["TooFewWorkers", "Shutdown", "World"].contains(&&code[..])
            }
            _ => false,
        };
        if !expected && self.sabotage.is_none() {
            let name = self.name(self.workers[worker].life);
            return broken("P a member does not fail", format!("{name}: {error}"));
        }
        let after = self
            .randoms
            .processes
            .time(Duration::from_millis(50)..Duration::from_millis(1000));
        self.rejoin(worker, &error.to_string(), after);
        Ok(())
    }

    fn worker_sends(&mut self, worker: usize, frame_out: Outgoing) -> Result<(), Violation> {
        let Outgoing {
            shard,
            header,
            body,
            ..
        } = frame_out;
        let process = &mut self.workers[worker];
        if FrameHeader::decode(&header.encode()) != Ok(header)
            || header.body_bytes as usize != body.len()
        {
            return broken(
                "wire",
                format!("worker {worker} sends a header that cannot be read: {header:?}"),
            );
        }
        let current = process.is_open && header.step == process.step();
        if current && !header.flags.held && !header.flags.absent && !header.flags.non_finite {
            let key = (header.bucket, shard, FrameKey::from(header.kind));
            let before = process.open.sent.insert(key, body.clone());
            if before.is_some_and(|before| before != body) {
                let what = frame(&header);
                return broken(
                    "I2 a contribution stays the same",
                    format!("worker {worker} sends another {what}"),
                );
            }
        }
        let Some(connection) = process.links[shard.index()] else {
            return broken(
                "P",
                format!("worker {worker} sends to shard {shard}, which is not connected"),
            );
        };
        let life = process.life;
        self.note(format_args!(
            "{} -> shard {shard} {}",
            self.name(life),
            frame(&header)
        ));
        if self.spoils_sending(&header) {
            return Ok(());
        }
        self.coverage.count(if header.flags.held {
            "held answers told"
        } else if header.flags.absent {
            "absent frames"
        } else {
            "frames up"
        });
        let stream = if header.flags.held {
            self.scheduled += 1;
            Stream::Held(self.scheduled)
        } else {
            Stream::Round(header.step, header.bucket)
        };
        self.send(connection, End::Shard, stream, Packet::Frame(header, body));
        Ok(())
    }

    /// The trainer begins its next step, or has done them all.
    pub(super) fn begin(&mut self, life: LifeId, worker: usize) -> Result<(), Violation> {
        let case = self.case;
        let process = &mut self.workers[worker];
        if !process.alive || process.life != life || process.is_open {
            return Ok(());
        }
        if process.step().0 >= case.steps {
            return self.after(worker);
        }
        let mut out = Vec::new();
        process.open = OpenStep::default();
        process.is_open = true;
        let member = process
            .member
            .as_mut()
            .expect("a worker that trains is a member");
        let behind = member.begin(&mut out);
        if behind {
            self.coverage.count("steps begun behind");
        } else {
            process.open.next_fill = Some(0);
            let time = self.fill_time(worker);
            self.schedule(time, Happening::Fill { life, worker });
        }
        self.outputs(worker, out)?;
        self.after(worker)
    }

    /// Time until the next tensor's gradient is there.
    fn fill_time(&mut self, worker: usize) -> Duration {
        let case = self.case;
        let straggles = self.workers[worker].open.next_fill == Some(0)
            && self.randoms.compute.chance(case.straggler_per_mille);
        let time = self.randoms.compute.time(case.compute.clone()) / case.plan.tensors.len() as u32;
        if straggles {
            self.coverage.count("slow steps");
            self.randoms.compute.time(case.compute.clone()) * 10
        } else {
            time
        }
    }

    pub(super) fn fill(&mut self, life: LifeId, worker: usize) -> Result<(), Violation> {
        let case = self.case;
        let process = &mut self.workers[worker];
        if !process.alive || process.life != life || !process.is_open {
            return Ok(());
        }
        let Some(at) = process.open.next_fill else {
            return Ok(());
        };
        let mut order = case.plan.buckets.iter().flat_map(|bucket| &bucket.tensors);
        let tensor = *order.nth(at).expect("fills end with the last tensor");
        let member = process
            .member
            .as_mut()
            .expect("a worker that trains is a member");
        let (rank, step) = (member.place().rank, member.machine().step());
        let mut gradient = Model::gradient(case, process.model.digest(), rank, step, tensor);
        if Model::poisoned(case, rank, step) == Some(tensor) {
            gradient[0] = f32::NAN;
            self.coverage.count("gradients with a NaN");
        }
        let mut out = Vec::new();
        member
            .fill(tensor, Gradient::F32(&gradient), &mut out)
            .or_else(|error| broken("P fill", error.to_string()))?;
        process.open.gradients.insert(tensor, gradient);
        let last = at + 1 == case.plan.tensors.len();
        process.open.next_fill = (!last).then_some(at + 1);
        if last {
            member.flush(&mut out);
        } else {
            let time = self.fill_time(worker);
            self.schedule(time, Happening::Fill { life, worker });
        }
        self.outputs(worker, out)?;
        self.after(worker)
    }

    fn commit(&mut self, worker: usize) -> Result<(), Violation> {
        let case = self.case;
        let process = &mut self.workers[worker];
        let life = process.life;
        let member = process
            .member
            .as_mut()
            .expect("a complete step has a member");
        let rank = member.place().rank;
        let abstained = member.is_abstaining();
        let outcome = member.commit();
        let (step, update) = (outcome.step, outcome.update);
        process.is_open = false;
        let open = core::mem::take(&mut process.open);
        if !outcome.skipped {
            process.model.apply(&mut |f| member.for_each_result(f));
            process
                .books
                .settle(case, rank, step, update, &open, abstained);
            if case.exact && case.plan.spec.algorithm.feedback == Feedback::Ef14 {
                process
                    .books
                    .check(case, &member.export_state())
                    .or_else(|detail| {
                        broken(
                            "I2 given = residual + counted",
                            format!("rank {rank} after step {step}: {detail}"),
                        )
                    })?;
            }
        }
        self.note(format_args!(
            "{} applies step {step}, update {update}{}{}",
            self.name(life),
            if outcome.skipped { ", skipped" } else { "" },
            if abstained { ", behind" } else { "" }
        ));
        self.coverage.count(if outcome.skipped {
            "steps skipped"
        } else {
            "steps applied"
        });
        let answers = open
            .answers
            .iter()
            .map(|(key, (_, answer))| (*key, answer.clone()));
        let answers = answers.collect();
        self.checker.committed(life, step, &answers)?;
        self.check_estimates(worker, &outcome, &answers)?;
        self.progressed(step);
        self.report(worker)?;
        self.donate(worker)?;
        if self.workers[worker].leaving {
            return self.leave(worker);
        }
        self.schedule(
            Duration::from_micros(200),
            Happening::Begin { life, worker },
        );
        Ok(())
    }

    /// What ef21 keeps, after a step that was not skipped.
    fn check_estimates(
        &mut self,
        worker: usize,
        outcome: &StepOutcome,
        answers: &Answers,
    ) -> Result<(), Violation> {
        let case = self.case;
        let process = &self.workers[worker];
        let (Some(member), false) = (&process.member, outcome.skipped) else {
            return Ok(());
        };
        if !case.plan.spec.algorithm.keeps_estimates() {
            return Ok(());
        }
        if answers.keys().any(|key| key.2 == FrameKind::Restore.into()) {
            self.coverage.count("steps that made H anew");
        }
        let rank = member.place().rank;
        let after = Step(outcome.step.0 + 1);
        let chain = self.checker.chain(process.life, after);
        self.estimates
            .check(case, rank, outcome, chain, &member.export_state(), answers)
            .or_else(|detail| {
                let step = outcome.step;
                broken(
                    "I2 H is the mean of h",
                    format!("rank {rank} after step {step}: {detail}"),
                )
            })
    }

    /// The digest of the parameters goes to shard 0.
    fn report(&mut self, worker: usize) -> Result<(), Violation> {
        let process = &mut self.workers[worker];
        let step = process.step();
        if self.case.digest_every == 0 || !step.0.is_multiple_of(self.case.digest_every) {
            return Ok(());
        }
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&process.model.digest().to_le_bytes());
        let mut out = Vec::new();
        if let Some(member) = &mut process.member {
            member.tell_coordinator(Control::Digest { step, digest }, &mut out);
        }
        self.outputs(worker, out)
    }

    /// One that has nothing to finish leaves at once.
    pub(super) fn leaves_if_idle(&mut self, worker: usize) -> Result<(), Violation> {
        let process = &self.workers[worker];
        if process.is_open || process.frozen_until.is_some() {
            return Ok(());
        }
        self.leave(worker)
    }

    fn leave(&mut self, worker: usize) -> Result<(), Violation> {
        let mut out = Vec::new();
        if let Some(member) = &mut self.workers[worker].member {
            member.leave(&mut out);
        }
        self.outputs(worker, out)?;
        self.rejoin(worker, "it leaves", Duration::ZERO);
        Ok(())
    }

    /// A worker that is between steps and was asked for its replica begins to upload it.
    fn donate(&mut self, worker: usize) -> Result<(), Violation> {
        let process = &mut self.workers[worker];
        let Some(member) = process.member.as_mut().filter(|m| m.donation_due()) else {
            return Ok(());
        };
        let (step, run) = (member.machine().step(), member.place().run);
        let mut out = Vec::new();
        member.donation_taken(step, &mut out);
        let mut shared = member.export_state();
        shared.arrays.retain(|(name, _)| name.starts_with("global"));
        let life = process.life;
        let chain = self.checker.chain(life, step);
        let process = &mut self.workers[worker];
        process.upload = Some(Upload {
            step,
            run,
            replica: Rc::new(process.model.replica(shared, chain)),
            missing: vec![true; process.links.len()],
            attempts: 0,
        });
        self.coverage.count("donations");
        self.note(format_args!("{} donates step {step}", self.name(life)));
        for shard in 0..usize::from(self.case.shards) {
            let time = self
                .randoms
                .store
                .time(Duration::from_millis(5)..Duration::from_millis(600));
            self.schedule(
                time,
                Happening::Stored {
                    life,
                    worker,
                    shard,
                },
            );
        }
        self.outputs(worker, out)
    }

    pub(super) fn stored(
        &mut self,
        life: LifeId,
        worker: usize,
        shard: usize,
    ) -> Result<(), Violation> {
        let reachable = {
            let now = self.now;
            let link = self.link(worker, shard);
            link.up.blocked <= now && link.down.blocked <= now
        };
        let (up, frozen) = (
            self.shards[shard].up,
            self.shards[shard].frozen_until.is_some(),
        );
        let process = &mut self.workers[worker];
        if !process.alive || process.life != life {
            return Ok(());
        }
        let Some(upload) = &mut process.upload else {
            return Ok(());
        };
        let (run, step) = (upload.run, upload.step);
        if !up || frozen || !reachable {
            upload.attempts += 1;
            if upload.attempts <= MOST_UPLOADS * u32::from(self.case.shards) {
                self.schedule(
                    Duration::from_millis(500),
                    Happening::Stored {
                        life,
                        worker,
                        shard,
                    },
                );
            }
            return Ok(());
        }
        upload.missing[shard] = false;
        let replica = Rc::clone(&upload.replica);
        let done = !upload.missing.contains(&true);
        self.shards[shard].store.insert((run, step), replica);
        if done {
            let mut out = Vec::new();
            let process = &mut self.workers[worker];
            process.upload = None;
            if let Some(member) = &mut process.member {
                member.donated(step, &mut out);
            }
            self.outputs(worker, out)?;
        }
        Ok(())
    }
}

/// Puts the shared arrays of a replica into a state, with its step and update.
fn merge(state: &mut WorkerState, shared: &WorkerState) {
    state.step = shared.step;
    state.update = shared.update;
    for (name, values) in &mut state.arrays {
        let shared_name = name.replace("local", "global");
        if let Some((_, replica)) = shared
            .arrays
            .iter()
            .find(|(other, _)| *other == shared_name)
        {
            values.clone_from(replica);
        }
    }
}
