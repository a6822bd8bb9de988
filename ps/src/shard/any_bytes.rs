//! What must hold for any sequence of events, whoever sends them: the fuzz target and `tests/fuzz_corpus.rs` call
//! [`operations`], which reads the events from bytes. The honest worker among hostile ones is the business of the unit tests.

use super::{
    Action, Event, LAST_START_STEP, Limits, Observation, Report, SessionId, Shard, ShardConfig,
    Stage,
};
use arc_topk_common::any_bytes::Source;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ValueType};
use arc_topk_common::ids::{BucketId, Epoch, Rank, RunId, ShardId, Step};
use arc_topk_common::plan::{DType, Plan, PlanSpec, TensorSpec};
use arc_topk_common::wire::{
    Control, Direction, FrameFlags, FrameHeader, FrameKind, Hello, Intent, JoinWhen,
    PROTOCOL_VERSION, Place, RoundShape, append_selection,
};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};

/// Connections that there are at once.
const SESSIONS: u64 = 6;
/// Ranks that Hellos name.
const RANKS: u8 = 6;
/// Answers that are remembered, to be told.
const REMEMBERED: usize = 16;
const RETAINED_BYTES: usize = 2000;

/// A step near `base`, or one of those at which arithmetic may fail.
fn any_step(source: &mut Source<'_>, base: Step) -> Step {
    Step(match source.byte() {
        255 => u64::MAX,
        254 => u64::MAX - 1,
        253 => LAST_START_STEP.0,
        252 => LAST_START_STEP.0 + 1,
        251 => 0,
        near if near < 128 => base.0.saturating_add(u64::from(near % 4)),
        near => base.0.saturating_sub(u64::from(near % 16)),
    })
}

/// A shard and what the events' maker knows of it.
struct Play {
    shard: Shard,
    now: Duration,
    plan: Plan,
    /// Answers that were given, for telling.
    given: VecDeque<(FrameHeader, Bytes)>,
    /// All that was answered in this start of the job, by step, bucket and phase.
    answered: BTreeMap<(Step, BucketId, usize), Bytes>,
}

/// Plays the events that `bytes` stand for.
///
/// # Panics
/// If an event makes the machine panic, hold more than it may, give two answers to one phase, let a round wait that could
/// go on, or name a deadline that is over or before which something happens.
pub fn operations(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let mut play = Play::new(&mut source);
    while !source.is_empty() {
        play.operation(&mut source);
    }
}

fn spec(compressor: Compressor, feedback: Feedback, shards: u16) -> PlanSpec {
    let tensor = |name: &str, shape: &[u64]| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    };
    PlanSpec {
        trainer: String::new(),
        algorithm: AlgorithmConfig {
            compressor,
            feedback,
            density: 0.5,
            sketch_rank: 2,
            dense_below_elements: 4,
            wire_up: ValueType::F32,
            wire_down: ValueType::F32,
            wire_warmup: ValueType::F32,
            wire_sketch: ValueType::F32,
            warmup_updates: 0,
            ..AlgorithmConfig::default()
        },
        shards,
        tensors: vec![
            tensor("bias", &[3]),
            tensor("b", &[2, 3]),
            tensor("a", &[4, 2]),
        ],
    }
}

impl Play {
    fn new(source: &mut Source<'_>) -> Self {
        let compressor = [
            Compressor::Arc,
            Compressor::Randk,
            Compressor::Topk,
            Compressor::Dense,
        ][source.below(4) as usize];
        let feedback = [Feedback::Ef14, Feedback::Ef21][source.below(2) as usize];
        let shards = 1 + source.below(2) as u16;
        let world = 1 + source.below(3) as u16;
        let config = ShardConfig {
            min_workers: 1 + source.below(2) as u16,
            max_workers: world + source.below(2) as u16,
            quorum: source.below(3) as u16,
            straggler_timeout: Duration::from_millis(300),
            resync: source.flag(),
            ..ShardConfig::new("job", ShardId(shards - 1), shards, world)
        };
        let limits = Limits {
            retained_bytes: RETAINED_BYTES,
            ..Limits::default()
        };
        let plan = Plan::build(spec(compressor, feedback, shards))
            .expect("the plan is the same for all inputs but for settings that go together");
        Self {
            shard: Shard::with_limits(config, limits),
            now: Duration::from_secs(1),
            plan,
            given: VecDeque::new(),
            answered: BTreeMap::new(),
        }
    }

    fn step(&self) -> Step {
        self.shard
            .job
            .as_ref()
            .map_or(Step(0), |job| job.rounds.step())
    }

    fn operation(&mut self, source: &mut Source<'_>) {
        let session = SessionId(source.below(SESSIONS));
        let base = self.step();
        let control = |message| Event::Control { session, message };
        let event = match source.below(20) {
            0 => self.join(session, source),
            1 | 2 => self.member(session, source),
            3..=7 => self.good_frame(session, source),
            8 => self.bad_frame(session, source),
            9 | 10 => self.held_frame(session, source),
            11 => control(Control::Retelling {
                frames: match source.byte() {
                    255 => u32::MAX,
                    frames => u32::from(frames % 12),
                },
            }),
            12 => control(Control::Ready {
                step: any_step(source, base),
            }),
            13 => control(Control::Digest {
                step: any_step(source, base),
                digest: [source.byte() % 2; 32],
            }),
            14 => control(Control::Donated {
                step: any_step(source, base),
            }),
            15 => {
                let Place {
                    epoch,
                    next_rank,
                    members,
                    ..
                } = place(source);
                control(Control::Membership {
                    epoch,
                    next_rank,
                    members,
                    away: Vec::new(),
                    reason: String::new(),
                })
            }
            16 => self.end(session, source),
            17 => self.other(session, source),
            18 => {
                let pauses = [1, 10, 400, 1000, 3000, 15_000, 60_000, 700_000];
                self.now += Duration::from_millis(pauses[source.below(8) as usize]);
                Event::Tick
            }
            _ => return self.pass_the_deadline(),
        };
        self.now += Duration::from_millis(1);
        self.handle(event);
    }

    fn hello(&self, session: SessionId, incarnation: u8, intent: Intent) -> Event {
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            job: "job".to_owned(),
            incarnation: [incarnation; 16],
            shard: self.shard.config().shard.0,
            host: String::new(),
            intent,
            plan: self.plan.spec.clone(),
        };
        Event::Hello {
            session,
            hello: Box::new(hello),
        }
    }

    fn join(&self, session: SessionId, source: &mut Source<'_>) -> Event {
        let rank = source.byte();
        let intent = Intent::Join {
            rank: (rank < 4).then_some(Rank(rank.into())),
            world: None,
            start_step: match source.byte() {
                255 => Step(u64::MAX),
                254 => LAST_START_STEP,
                253 => Step(1),
                _ => Step(0),
            },
            when: [JoinWhen::Start, JoinWhen::Any, JoinWhen::Running][source.below(3) as usize],
        };
        self.hello(session, session.0 as u8, intent)
    }

    fn member(&self, session: SessionId, source: &mut Source<'_>) -> Event {
        let intent = Intent::Member {
            place: place(source),
            step: any_step(source, self.step()),
            waited: source.flag(),
        };
        self.hello(session, source.byte() % 8, intent)
    }

    /// A frame as the phase that is open asks for.
    fn good_frame(&self, session: SessionId, source: &mut Source<'_>) -> Event {
        let step = any_step(source, self.step());
        let bucket = BucketId(0);
        let open = self.shard.job.as_ref().and_then(|job| {
            let mut open = job.rounds.open();
            open.find(|(s, b, _)| (*s, *b) == (step, bucket))
                .map(|(.., round)| (round.gathers(), round.update))
        });
        let update = open.map_or(step.0, |(_, update)| update);
        let shape = RoundShape::new(&self.plan, bucket, self.shard.config().shard, update);
        let first = shape.phases().first().map_or(FrameKind::Dense, |p| p.up);
        let kind = open.map_or(first, |(kind, _)| kind);
        let mut flags = FrameFlags::default();
        let (content, choice) = (source.byte(), source.byte());
        flags.non_finite = choice == 255;
        flags.absent = choice % 4 == 3 && !flags.non_finite;
        let body = if flags.non_finite || flags.absent {
            Vec::new()
        } else {
            body(&shape, kind, content)
        };
        round_frame(session, kind, flags, step, update, body)
    }

    fn bad_frame(&self, session: SessionId, source: &mut Source<'_>) -> Event {
        let kind = FrameKind::ALL[source.below(FrameKind::ALL.len() as u64) as usize];
        let choice = source.byte();
        let flags = FrameFlags {
            non_finite: choice & 1 == 1,
            counted: choice & 2 == 2,
            absent: choice & 4 == 4,
            held: choice & 8 == 8,
        };
        let step = any_step(source, self.step());
        let update = any_step(source, self.step()).0;
        let bytes = usize::from(source.byte() % 80);
        let body = vec![source.byte(); bytes];
        round_frame(session, kind, flags, step, update, body)
    }

    /// An answer that was given before, to somebody, and perhaps spoiled.
    fn held_frame(&self, session: SessionId, source: &mut Source<'_>) -> Event {
        let at = source.byte();
        let known = self.given.len().max(1);
        let Some((mut header, body)) = self.given.get(usize::from(at) % known).cloned() else {
            return Event::Tick;
        };
        let mut body = body.to_vec();
        header.flags.held = true;
        match source.byte() {
            0..200 => {}
            choice if choice % 4 == 0 => header.step = any_step(source, self.step()),
            choice if choice % 4 == 1 => header.update = any_step(source, self.step()).0,
            choice if choice % 4 == 2 => header.roster_bytes = u16::from(choice),
            choice => {
                let at = usize::from(source.byte()) % body.len().max(1);
                if let Some(byte) = body.get_mut(at) {
                    *byte ^= choice | 1;
                }
            }
        }
        Event::Round {
            session,
            header,
            body: body.into(),
        }
    }

    fn end(&self, session: SessionId, source: &mut Source<'_>) -> Event {
        match source.below(8) {
            0 => Event::Leave { session },
            1 => Event::Violation {
                session,
                detail: String::new(),
            },
            2 => Event::Shutdown {
                reason: String::new(),
            },
            choice => Event::Closed {
                session,
                reason: String::new(),
                for_good: choice == 3,
            },
        }
    }

    fn other(&self, session: SessionId, source: &mut Source<'_>) -> Event {
        let step = any_step(source, self.step());
        match source.below(4) {
            0 => Event::Control {
                session,
                message: Control::Donating { step },
            },
            1 => Event::Report {
                session,
                report: Report {
                    step,
                    loss: f32::from_bits(u32::from(source.byte()) << 24),
                    step_seconds: 0.0,
                    wait_seconds: 0.0,
                    bytes_sent: 0,
                    bytes_received: 0,
                    bytes_dense_equivalent: 0,
                    captured_energy: 0.0,
                    residual_ratio: 0.0,
                },
            },
            2 => Event::Control {
                session,
                message: Control::Away,
            },
            _ => Event::Control {
                session,
                message: Control::Donate,
            },
        }
    }

    /// Before the deadline nothing happens by itself, and after it there is another one or none.
    fn pass_the_deadline(&mut self) {
        let Some(deadline) = self.shard.next_deadline() else {
            return;
        };
        let mut out = Vec::new();
        let before = deadline - Duration::from_nanos(1);
        if before > self.now {
            self.now = before;
            self.shard.handle(before, Event::Tick, &mut out);
            assert_eq!(out, [], "something happened before the deadline");
        }
        self.now = deadline;
        self.handle(Event::Tick);
    }

    fn handle(&mut self, event: Event) {
        let mut out = Vec::new();
        let run = self.shard.job.as_ref().map(|job| job.run);
        self.shard.handle(self.now, event, &mut out);
        let after = self.shard.job.as_ref().map(|job| job.run);
        let anew = |action: &Action| {
            matches!(
                action,
                Action::Observe(Observation::Emptied | Observation::Recovering { .. })
            )
        };
        if run != after || out.iter().any(anew) {
            self.answered.clear();
        }
        for action in &out {
            if let Action::Round { header, body, .. } = action {
                self.hear(header, body);
            }
        }
        let mut again = Vec::new();
        self.shard.handle(self.now, Event::Tick, &mut again);
        assert_eq!(again, [], "something was left undone");
        self.check();
    }

    fn hear(&mut self, header: &FrameHeader, body: &Bytes) {
        assert_eq!(header.body_bytes as usize, body.len());
        let shape = RoundShape::new(
            &self.plan,
            header.bucket,
            self.shard.config().shard,
            header.update,
        );
        let key = (header.step, header.bucket, shape.phase_of(header.kind));
        let first = self.answered.entry(key).or_insert_with(|| body.clone());
        assert_eq!(first, body, "one answer to each phase");
        if self.given.len() == REMEMBERED {
            self.given.pop_front();
        }
        self.given.push_back((*header, body.clone()));
    }

    fn check(&self) {
        let (now, shard) = (self.now, &self.shard);
        if let Some(deadline) = shard.next_deadline() {
            assert!(
                deadline > now,
                "a deadline that is over keeps the shell awake"
            );
        }
        let status = shard.status(now);
        let max = usize::from(shard.config().max_workers);
        assert!(shard.successors.len() <= max);
        assert!(shard.load().members as u64 <= SESSIONS);
        assert!(status.members.len() <= SESSIONS as usize + usize::from(RANKS));
        let Some(job) = &shard.job else {
            assert_eq!(shard.next_deadline(), None, "nothing can happen");
            return;
        };
        let told = status.stage == Stage::Recovering;
        // A worker has a frame, and the shard an answer, of at most this in each step and phase.
        let share = job.rounds.body_limit() * job.rounds.buckets_here() * 3;
        let steps = if told { 16 } else { 2 };
        let load = shard.load();
        assert!(load.open_rounds <= steps * job.rounds.buckets_here());
        assert!(load.parked_bytes <= steps * share * SESSIONS as usize);
        assert!(load.retained_bytes <= RETAINED_BYTES + (steps + 1) * share);
        for (step, _, round) in job.rounds.open().filter(|_| job.is_running()) {
            let live = job.members.live(now, step);
            let all = live.iter().all(|rank| round.has(*rank));
            let enough = live.len() >= usize::from(shard.config().min_workers);
            assert!(!enough || !all, "a round waits that could go on");
        }
        // Told too early: of each rank in each step, and one phase of three is never early.
        let (early, told) = job.rounds.told();
        let ranks = status.members.len() + 256;
        assert!(early.max(told) <= 16 * job.rounds.buckets_here() * 2 * ranks);
        assert!(job.applicants.len() as u64 <= SESSIONS);
        assert!(job.digests.held() <= 17 * 256);
    }
}

/// As a shard calls its starts, from the first on.
fn run(before: u8) -> RunId {
    let mut run = [0; 16];
    (run[0], run[8]) = (1, before + 1);
    RunId(run)
}

fn place(source: &mut Source<'_>) -> Place {
    let rank = source.byte() % RANKS;
    let named = source.byte() | 1 << rank;
    let epoch = match source.byte() {
        255 => u32::MAX,
        254 => 0,
        epoch => 1 + u32::from(epoch % 4),
    };
    let next_rank = match source.byte() {
        255 => u16::MAX,
        more => u16::from(RANKS) + u16::from(more % 2),
    };
    Place {
        run: run(source.byte() % 3),
        rank: Rank(rank.into()),
        epoch: Epoch(epoch),
        next_rank,
        members: (0..RANKS)
            .filter(|rank| named >> rank & 1 == 1)
            .map(|rank| Rank(rank.into()))
            .collect(),
    }
}

fn round_frame(
    session: SessionId,
    kind: FrameKind,
    flags: FrameFlags,
    step: Step,
    update: u64,
    body: Vec<u8>,
) -> Event {
    let header = FrameHeader {
        kind,
        flags,
        bucket: BucketId(0),
        epoch: Epoch(1),
        step,
        update,
        body_bytes: body.len() as u32,
        roster_bytes: 0,
        lead: 0,
    };
    Event::Round {
        session,
        header,
        body: body.into(),
    }
}

/// A body of the right length; `content` makes its numbers.
fn body(shape: &RoundShape, kind: FrameKind, content: u8) -> Vec<u8> {
    let values = |bytes: usize| {
        let value = f32::from(content) / 16.0;
        value.to_le_bytes().repeat(bytes / size_of::<f32>())
    };
    match kind {
        FrameKind::Sketch => values(shape.sketch_layout().bytes),
        FrameKind::Values => values(shape.values_layout(&shape.keep(), Direction::Up).bytes),
        FrameKind::Sparse => {
            let mut out = Vec::new();
            for segment in &shape.sparse {
                let rows: Vec<u32> = (0..segment.keep as u32).collect();
                append_selection(segment.rows, &rows, &mut out);
                out.extend(values(rows.len() * segment.width * size_of::<f32>()));
            }
            for segment in &shape.dense {
                out.extend(values(segment.elements() * size_of::<f32>()));
            }
            out
        }
        _ => values(shape.dense_layout().bytes),
    }
}
