//! The shards' processes.

use super::{Happening, Place, World};
use crate::check::{LifeId, Origin, Violation, broken};
use crate::trainer::Replica;
use crate::wires::{Clock, ConnectionId, End, Packet, Stream};
use arc_topk_common::ids::{RunId, ShardId, Step};
use arc_topk_common::wire::{Control, FrameHeader, RefusalCode, Welcome};
use arc_topk_ps::shard::{Action, Event, Load, Observation, Report, SessionId, Shard, ShardConfig};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// Deadlines that may pass in a row without the machine moving its next one.
const MOST_IDLE_TICKS: u32 = 100;

/// A restarted shard 0 begins no job before its predecessor's members have noticed: their connections are silent for 3 s.
const START_GRACE: Duration = Duration::from_secs(4);

/// Steps of which there may be rounds while a shard does not know where the job is.
const MOST_STEPS_TOLD: usize = 16;

/// What a shard's shell knows of a connection.
#[derive(Debug)]
struct Session {
    connection: ConnectionId,
    /// Held frames that are still to come before the worker has told everything; `None`: not asked, or not announced.
    untold: Option<u32>,
}

/// One process of a shard, or none.
pub(super) struct ShardProcess {
    pub(super) up: bool,
    /// Counts the processes.
    pub(super) generation: u64,
    pub(super) frozen_until: Option<Duration>,
    pub(super) inbox: VecDeque<Happening>,
    pub(super) clock: Clock,
    pub(super) store: BTreeMap<(RunId, Step), Rc<Replica>>,
    machine: Shard,
    sessions: BTreeMap<SessionId, Session>,
    by_connection: BTreeMap<ConnectionId, SessionId>,
    next_session: u64,
    armed: Option<Duration>,
    token: u64,
    idle_ticks: u32,
}

impl ShardProcess {
    /// Its clock has changed.
    pub(super) fn rearm(&mut self) {
        self.armed = None;
    }

    pub(super) fn load(&self) -> Load {
        self.machine.load()
    }
}

impl World<'_> {
    pub(super) fn new_shard(&mut self, shard: usize, generation: u64) -> ShardProcess {
        let case = self.case;
        let config = ShardConfig {
            incarnation: self.randoms.processes.bits(),
            world: case.world,
            min_workers: case.min_workers,
            max_workers: case.max_workers,
            quorum: case.quorum,
            straggler_timeout: case.straggler_timeout,
            resync: case.resync,
            start_grace: if generation == 0 {
                Duration::ZERO
            } else {
                START_GRACE
            },
            ..ShardConfig::new("sim", ShardId(shard as u16), case.shards, case.world)
        };
        self.checker.shard_started(shard);
        ShardProcess {
            up: true,
            generation,
            frozen_until: None,
            inbox: VecDeque::new(),
            clock: Clock::new(&mut self.randoms.processes),
            store: BTreeMap::new(),
            machine: Shard::new(config),
            sessions: BTreeMap::new(),
            by_connection: BTreeMap::new(),
            next_session: 0,
            armed: None,
            token: generation << 32,
            idle_ticks: 0,
        }
    }

    /// A process that knows nothing takes the place of the one that was killed.
    pub(super) fn start_shard(&mut self, shard: usize) {
        if self.shards[shard].up {
            return;
        }
        let generation = self.shards[shard].generation + 1;
        let store = core::mem::take(&mut self.shards[shard].store);
        self.shards[shard] = self.new_shard(shard, generation);
        if self.case.durable_store {
            self.shards[shard].store = store;
        }
        self.disturbed();
        self.note(format_args!("shard {shard} starts, process {generation}"));
    }

    /// The process is gone. Nobody is told.
    pub(super) fn kill_shard(&mut self, shard: usize) {
        let process = &mut self.shards[shard];
        process.up = false;
        process.frozen_until = None;
        let inbox = core::mem::take(&mut process.inbox);
        for session in process.sessions.values() {
            self.connections[session.connection.0].close(End::Shard);
        }
        // Who knocked in vain tries again.
        for happening in inbox {
            if let Happening::Knock {
                life,
                worker,
                shard,
            } = happening
            {
                let again = Happening::Dial {
                    life,
                    worker,
                    shard,
                };
                self.schedule(Duration::from_millis(300), again);
            }
        }
    }

    /// A connection that is new.
    pub(super) fn shard_meets(&mut self, shard: usize, connection: ConnectionId) {
        let process = &mut self.shards[shard];
        let session = SessionId(process.next_session);
        process.next_session += 1;
        let untold = None;
        process
            .sessions
            .insert(session, Session { connection, untold });
        process.by_connection.insert(connection, session);
    }

    fn session_of(&self, connection: ConnectionId) -> Option<(usize, SessionId)> {
        let shard = self.connections[connection.0].shard;
        let session = self.shards[shard].by_connection.get(&connection)?;
        Some((shard, *session))
    }

    pub(super) fn life_of(&self, connection: ConnectionId) -> LifeId {
        LifeId(self.connections[connection.0].life)
    }

    pub(super) fn shard_receives(
        &mut self,
        connection: ConnectionId,
        packet: Packet,
    ) -> Result<(), Violation> {
        let Some((shard, session)) = self.session_of(connection) else {
            return Ok(());
        };
        let life = self.life_of(connection);
        let event = match packet {
            Packet::Control(message) => {
                if let Control::Retelling { frames } = message {
                    self.session(shard, session).untold = Some(frames);
                }
                self.note(format_args!(
                    "shard {shard} <- {} {}",
                    self.name(life),
                    short(&message)
                ));
                event_of(session, message)
            }
            Packet::Frame(header, body) => {
                self.note(format_args!(
                    "shard {shard} <- {} {}",
                    self.name(life),
                    frame(&header)
                ));
                self.shard_is_sent(shard, session, life, &header, &body);
                Event::Round {
                    session,
                    header,
                    body,
                }
            }
            Packet::Close { .. } => return Ok(()),
        };
        self.shard_handles(shard, event)?;
        self.told_all(shard, session)
    }

    fn session(&mut self, shard: usize, session: SessionId) -> &mut Session {
        self.shards[shard]
            .sessions
            .get_mut(&session)
            .expect("a session lives until it is closed")
    }

    fn shard_is_sent(
        &mut self,
        shard: usize,
        session: SessionId,
        life: LifeId,
        header: &FrameHeader,
        body: &Bytes,
    ) {
        if header.flags.held {
            self.checker.told(shard, life, header, body);
            let untold = &mut self.session(shard, session).untold;
            *untold = untold.map(|frames| frames.saturating_sub(1));
        } else if !header.flags.absent {
            self.checker.contributed(shard, life, header, body);
        }
    }

    /// Once a worker has told all it holds, and was not refused, it is as good as any.
    fn told_all(&mut self, shard: usize, session: SessionId) -> Result<(), Violation> {
        let Some(state) = self.shards[shard].sessions.get_mut(&session) else {
            return Ok(());
        };
        if state.untold != Some(0) {
            return Ok(());
        }
        state.untold = None;
        let life = LifeId(self.connections[state.connection.0].life);
        self.checker.accepted(shard, life);
        self.checker.same_way(life)
    }

    pub(super) fn shard_lost(
        &mut self,
        connection: ConnectionId,
        reason: &str,
        for_good: bool,
    ) -> Result<(), Violation> {
        self.connections[connection.0].close(End::Shard);
        let Some((shard, session)) = self.session_of(connection) else {
            return Ok(());
        };
        self.forget_session(shard, session);
        let life = self.life_of(connection);
        self.note(format_args!(
            "shard {shard} loses {}: {reason}",
            self.name(life)
        ));
        let reason = reason.to_owned();
        self.shard_handles(
            shard,
            Event::Closed {
                session,
                reason,
                for_good,
            },
        )
    }

    fn forget_session(&mut self, shard: usize, session: SessionId) {
        let process = &mut self.shards[shard];
        if let Some(state) = process.sessions.remove(&session) {
            process.by_connection.remove(&state.connection);
        }
    }

    pub(super) fn shard_timer(&mut self, shard: usize, token: u64) -> Result<(), Violation> {
        let now = self.now;
        let process = &mut self.shards[shard];
        if !process.up || process.token != token {
            return Ok(());
        }
        let due = process.armed.take();
        if due.is_some_and(|due| process.clock.local(now) < due) {
            return self.arm_shard(shard);
        }
        process.idle_ticks += 1;
        if process.idle_ticks > MOST_IDLE_TICKS {
            let detail =
                format!("shard {shard} asks for a tick again and again without doing anything");
            return broken("P busy", detail);
        }
        self.shard_handles(shard, Event::Tick)
    }

    pub(super) fn arm_shard(&mut self, shard: usize) -> Result<(), Violation> {
        let now = self.now;
        let process = &mut self.shards[shard];
        let deadline = process.machine.next_deadline();
        if deadline == process.armed || !process.up {
            return Ok(());
        }
        process.armed = deadline;
        process.token += 1;
        let token = process.token;
        let Some(deadline) = deadline else {
            return Ok(());
        };
        // A deadline that has passed already is looked at soon, not at once: a machine that asks again and again is found out.
        let at = process
            .clock
            .global(deadline)
            .max(now + Duration::from_micros(50));
        let place = Place::Shard(shard);
        self.schedule_at(at, Happening::Timer { place, token });
        Ok(())
    }

    /// The machine is handed an event.
    pub(super) fn shard_handles(&mut self, shard: usize, event: Event) -> Result<(), Violation> {
        let mut actions = Vec::new();
        let event = match self.sabotage {
            Some(_) => self.spoil_event(shard, event),
            None => Some(event),
        };
        let Some(event) = event else {
            return Ok(());
        };
        let tick = event == Event::Tick;
        let local = self.shard_time(shard);
        let process = &mut self.shards[shard];
        process.machine.handle(local, event, &mut actions);
        if !tick || !actions.is_empty() {
            process.idle_ticks = 0;
        }
        for action in actions {
            self.act(shard, action)?;
        }
        self.arm_shard(shard)?;
        self.within_bounds(shard)
    }

    fn act(&mut self, shard: usize, action: Action) -> Result<(), Violation> {
        match action {
            Action::Control { session, message } => self.shard_says(shard, session, message),
            Action::Round {
                session,
                header,
                body,
            } => self.shard_answers(shard, session, header, body),
            Action::Close {
                session,
                code,
                detail,
            } => self.shard_closes(shard, session, code, &detail),
            Action::Observe(observation) => {
                self.observed(shard, &observation);
                Ok(())
            }
        }
    }

    fn shard_says(
        &mut self,
        shard: usize,
        session: SessionId,
        message: Control,
    ) -> Result<(), Violation> {
        let message = decoded(&message)?;
        let Some(state) = self.shards[shard].sessions.get(&session) else {
            return Ok(());
        };
        let connection = state.connection;
        let life = self.life_of(connection);
        self.note(format_args!(
            "shard {shard} -> {} {}",
            self.name(life),
            short(&message)
        ));
        if let Control::Welcome(welcome) = &message {
            self.welcomed(shard, session, life, welcome)?;
        }
        self.send(
            connection,
            End::Worker,
            Stream::Control,
            Packet::Control(message),
        );
        Ok(())
    }

    fn welcomed(
        &mut self,
        shard: usize,
        session: SessionId,
        life: LifeId,
        welcome: &Welcome,
    ) -> Result<(), Violation> {
        if self.is_joining(life) {
            let place = &welcome.place;
            self.note(format_args!(
                "{} is rank {} of run {}",
                self.name(life),
                place.rank,
                place.run
            ));
            let first = (!welcome.snapshot).then_some(welcome.step);
            self.checker
                .life_began(life, place.run, place.rank, first)?;
            self.coverage.count(if welcome.snapshot {
                "joins of a running job"
            } else {
                "joins at a start"
            });
        }
        if welcome.retell {
            self.coverage.count("asked to retell");
            return Ok(());
        }
        self.session(shard, session).untold = None;
        self.checker.accepted(shard, life);
        self.checker.same_way(life)
    }

    fn shard_answers(
        &mut self,
        shard: usize,
        session: SessionId,
        mut header: FrameHeader,
        body: Bytes,
    ) -> Result<(), Violation> {
        self.answers += 1;
        self.answer_count_reached();
        let Some(state) = self.shards[shard].sessions.get(&session) else {
            return Ok(());
        };
        let connection = state.connection;
        let life = self.life_of(connection);
        let encoded = header.encode();
        if FrameHeader::decode(&encoded) != Ok(header) || header.body_bytes as usize != body.len() {
            return broken(
                "wire",
                format!("shard {shard} sends a header that cannot be read: {header:?}"),
            );
        }
        let mut body = body;
        self.spoil_answer(shard, life, &mut header, &mut body);
        self.note(format_args!(
            "shard {shard} -> {} {}",
            self.name(life),
            frame(&header)
        ));
        let short = self.checker.is_short_selection(shard, &header, &body);
        match self.checker.answered(shard, life, &header, &body)? {
            Origin::Formed => {
                self.coverage.count("answers formed");
                self.coverage
                    .add("selections short of the density formed", u64::from(short));
            }
            Origin::Adopted => {
                self.coverage.count("answers adopted");
                self.coverage
                    .add("selections short of the density adopted", u64::from(short));
            }
            Origin::Known => {}
        }
        self.coverage.count("frames down");
        let stream = Stream::Round(header.step, header.bucket);
        self.send(connection, End::Worker, stream, Packet::Frame(header, body));
        Ok(())
    }

    fn shard_closes(
        &mut self,
        shard: usize,
        session: SessionId,
        code: RefusalCode,
        detail: &str,
    ) -> Result<(), Violation> {
        let Some(state) = self.shards[shard].sessions.get(&session) else {
            return Ok(());
        };
        let connection = state.connection;
        let life = self.life_of(connection);
        self.note(format_args!(
            "shard {shard} closes {}: {code:?}: {detail}",
            self.name(life)
        ));
        self.forget_session(shard, session);
        self.close(connection, End::Shard, detail);
        let expected = match code {
            RefusalCode::Superseded
            | RefusalCode::World
            | RefusalCode::Step
            | RefusalCode::TooFewWorkers
            | RefusalCode::Shutdown => true,
            _ => self.sabotage.is_some(),
        };
        self.coverage.count(match code {
            RefusalCode::Superseded => "superseded",
            RefusalCode::World => "refused: world",
            RefusalCode::Step => "refused: the job that was waited for has ended",
            RefusalCode::TooFewWorkers => "refused: too few workers",
            _ => "refused: other",
        });
        if expected && !(self.case.faults.is_empty() && code == RefusalCode::Superseded) {
            return Ok(());
        }
        broken(
            "P a worker that keeps the rules is not refused",
            format!(
                "shard {shard} refuses {}: {code:?}: {detail}",
                self.name(life)
            ),
        )
    }

    fn observed(&mut self, shard: usize, observation: &Observation) {
        let what = match observation {
            Observation::Recovering { .. } => "recoveries begun",
            Observation::Recovered { .. } => "recoveries ended",
            Observation::Late { .. } => "late contributions",
            Observation::Away { .. } => "members away",
            Observation::Returned { .. } => "members returned",
            Observation::Lost { .. } => "members removed",
            Observation::Straggling { .. } => "stragglers",
            Observation::DigestsDiffer { .. } => "digests that differ",
            Observation::Emptied => "jobs ended",
            Observation::RoundClosed(_) => "rounds closed",
            _ => return,
        };
        self.coverage.count(what);
        if *observation == Observation::Emptied {
            // It knows as little of the job as a new process, and is told in the same way if somebody comes back.
            self.checker.shard_started(shard);
        }
        if !matches!(observation, Observation::RoundClosed(_)) {
            self.note(format_args!("shard {shard}: {observation:?}"));
        }
    }

    /// Nothing grows without bound.
    fn within_bounds(&self, shard: usize) -> Result<(), Violation> {
        let machine = &self.shards[shard].machine;
        let load = machine.load();
        // A job's end takes a step's rounds with it; two steps are open at once. While a shard is told where the job is,
        // each worker tells of its own step and those before.
        let steps = if machine.is_running() {
            3
        } else {
            MOST_STEPS_TOLD
        };
        if load.open_rounds > steps * self.case.plan.buckets.len() {
            return broken(
                "bounds",
                format!("shard {shard} has {} open rounds", load.open_rounds),
            );
        }
        Ok(())
    }

    /// What the shard's clock shows.
    fn shard_time(&self, shard: usize) -> Duration {
        self.shards[shard].clock.local(self.now)
    }
}

/// As the shell of a shard tells messages apart.
fn event_of(session: SessionId, message: Control) -> Event {
    if let Some(report) = Report::from_control(&message) {
        return Event::Report { session, report };
    }
    match message {
        Control::Hello(hello) => Event::Hello { session, hello },
        Control::Leave => Event::Leave { session },
        message => Event::Control { session, message },
    }
}

/// The message as the peer reads it.
pub(super) fn decoded(message: &Control) -> Result<Control, Violation> {
    match Control::decode(&message.encode()) {
        Ok(read) if read == *message => Ok(read),
        other => broken("wire", format!("{message:?} is read as {other:?}")),
    }
}

/// A message in a few words.
pub(super) fn short(message: &Control) -> String {
    match message {
        Control::Hello(hello) => format!("Hello {:?}", hello.intent),
        other => format!("{other:?}"),
    }
}

/// A header in a few words.
pub(super) fn frame(header: &FrameHeader) -> String {
    let flags = [
        (header.flags.non_finite, " non-finite"),
        (header.flags.counted, " counted"),
        (header.flags.absent, " absent"),
        (header.flags.held, " held"),
    ];
    let flags: String = flags
        .iter()
        .filter(|(set, _)| *set)
        .map(|(_, name)| *name)
        .collect();
    format!(
        "{:?} step {} bucket {} update {} lead {} {} B{flags}",
        header.kind, header.step, header.bucket, header.update, header.lead, header.body_bytes
    )
}
