//! The workers' processes: a member, a trainer, and the way into the job.

use super::joining::Upload;
use super::shards::{decoded, frame, short};
use super::{Happening, Place, World};
use crate::check::{Answer, FrameKey, LifeId, Violation, broken};
use crate::trainer::{Books, Model};
use crate::wires::{Clock, ConnectionId, End, Packet, Stream};
use arc_topk_common::ids::{BucketId, Rank, RunId, ShardId, Step, TensorId};
use arc_topk_common::wire::{Control, FrameHeader, Hello, Intent, JoinWhen, PROTOCOL_VERSION};
use arc_topk_worker::member::{Input, Member, Output};
use arc_topk_worker::reducer::ReduceError;
use arc_topk_worker::step::Outgoing;
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

/// What a worker does.
pub(super) enum Stage {
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
    pub(super) next_fill: Option<usize>,
    pub(crate) gradients: BTreeMap<TensorId, Vec<f32>>,
    pub(crate) sent: BTreeMap<(BucketId, ShardId, FrameKey), Bytes>,
    pub(crate) answers: BTreeMap<(BucketId, ShardId, FrameKey), (FrameHeader, Answer)>,
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
    pub(super) up: Vec<bool>,
    pub(super) incarnation: [u8; 16],
    pub(super) stage: Stage,
    pub(super) member: Option<Member>,
    pub(super) model: Model,
    pub(super) books: Books,
    pub(super) open: OpenStep,
    pub(super) is_open: bool,
    pub(super) upload: Option<Upload>,
    /// It leaves after its step.
    pub(super) leaving: bool,
    pub(super) armed: Option<Duration>,
    pub(super) token: u64,
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
    pub(super) fn join(&mut self, worker: usize, after: Duration) {
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
    pub(super) fn rejoin(&mut self, worker: usize, reason: &str, after: Duration) {
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
                when: JoinWhen::Any,
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

    pub(super) fn worker_says(
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

    pub(super) fn worker_handles(&mut self, worker: usize, input: Input) -> Result<(), Violation> {
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
    pub(super) fn after(&mut self, worker: usize) -> Result<(), Violation> {
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

    pub(super) fn outputs(&mut self, worker: usize, out: Vec<Output>) -> Result<(), Violation> {
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
}
