//! The machine, driven by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

mod away;
mod digests;
mod honest;
mod hostile;
mod joining;
mod membership;
mod quorum;
mod recovery;
mod refusals;
mod reports;
mod rounds;
mod sequences;
mod successors;
mod telling;

use super::*;
use arc_topk_common::compress::ValueCodec;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, ValueType};
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_common::wire::{
    FrameFlags, FrameHeader, FrameKind, Hello, Intent, JoinWhen, PROTOCOL_VERSION, Place, Welcome,
    decode_roster,
};
use bytes::Bytes;

/// Lossless on the wire, no warm-up: numbers can be compared exactly.
fn algorithm(compressor: Compressor) -> AlgorithmConfig {
    AlgorithmConfig {
        compressor,
        density: 0.5,
        sketch_rank: 2,
        dense_below_elements: 4,
        wire_up: ValueType::F32,
        wire_down: ValueType::F32,
        wire_warmup: ValueType::F32,
        wire_sketch: ValueType::F32,
        warmup_updates: 0,
        ..AlgorithmConfig::default()
    }
}

/// A matrix of 4 rows, one of 2 rows, and a vector of 3.
fn spec(algorithm: AlgorithmConfig) -> PlanSpec {
    let tensor = |name: &str, shape: &[u64]| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    };
    let tensors = vec![
        tensor("bias", &[3]),
        tensor("b", &[2, 3]),
        tensor("a", &[4, 2]),
    ];
    PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors,
    }
}

/// Of a worker that starts the job.
fn hello(spec: &PlanSpec) -> Hello {
    join(spec, None, 0)
}

fn join(spec: &PlanSpec, rank: Option<u16>, start: u64) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        job: "job".to_owned(),
        incarnation: [1; 16],
        shard: 0,
        host: "host:1".to_owned(),
        intent: Intent::Join {
            rank: rank.map(Rank),
            world: None,
            start_step: Step(start),
            when: JoinWhen::Start,
        },
        plan: spec.clone(),
    }
}

/// Of a worker that can join a running job.
fn elastic(spec: &PlanSpec, session: u64) -> Hello {
    Hello {
        incarnation: incarnation(session),
        intent: Intent::Join {
            rank: None,
            world: None,
            start_step: Step(0),
            when: JoinWhen::Any,
        },
        ..hello(spec)
    }
}

/// Of the worker that [`Bench::running`] started with this session.
fn incarnation(session: u64) -> [u8; 16] {
    [session as u8 + 1; 16]
}

/// What the shard calls the n-th start of the job.
fn run(start: u8) -> RunId {
    let mut run = [0; 16];
    (run[0], run[8]) = (1, start);
    RunId(run)
}

/// As shard 0 gave it when the job started with these members.
fn place(rank: u16, members: &[u16]) -> Place {
    Place {
        run: run(1),
        rank: Rank(rank),
        epoch: Epoch(1),
        next_rank: members.iter().max().map_or(0, |rank| rank + 1),
        members: members.iter().copied().map(Rank).collect(),
    }
}

/// Of the worker with this place, which is at `step`; rounds wait for it.
fn member(spec: &PlanSpec, place: Place, step: u64) -> Hello {
    Hello {
        incarnation: incarnation(u64::from(place.rank.0)),
        intent: Intent::Member {
            place,
            step: Step(step),
            waited: true,
        },
        ..hello(spec)
    }
}

fn config(world: u16) -> ShardConfig {
    ShardConfig::new("job", ShardId(0), 1, world)
}

/// Shard 1 of two, which knows nothing yet of a job of two workers, and that job's specification.
fn second_of_two() -> (Bench, PlanSpec) {
    let config = ShardConfig::new("job", ShardId(1), 2, 2);
    let bench = Bench::empty(config, algorithm(Compressor::Dense));
    let spec = bench.plan.spec.clone();
    (bench, spec)
}

/// The same, once both have come and had nothing to tell; and the body of their dense frames.
fn second_of_two_running() -> (Bench, PlanSpec, Vec<u8>) {
    let (mut bench, spec) = second_of_two();
    for rank in 0..2 {
        bench.hello(u64::from(rank), to_second(&spec, rank));
        bench.control(u64::from(rank), Control::Retelling { frames: 0 });
    }
    let shape = RoundShape::new(&bench.plan, BucketId(0), ShardId(1), 0);
    let body = vec![0; shape.dense_layout().bytes];
    (bench, spec, body)
}

/// Of the member of two with this rank, to the second shard.
fn to_second(spec: &PlanSpec, rank: u16) -> Hello {
    Hello {
        shard: 1,
        ..member(spec, place(rank, &[0, 1]), 0)
    }
}

/// So many workers run, of which two at least must stay.
fn at_least_two_of(world: u16, compressor: Compressor) -> Bench {
    let config = ShardConfig {
        min_workers: 2,
        ..config(world)
    };
    Bench::running_with(config, algorithm(compressor))
}

/// A shard and its clock.
struct Bench {
    shard: Shard,
    now: Duration,
    plan: Plan,
}

impl Bench {
    /// `world` workers with ranks in order of their sessions, welcomed.
    fn running(world: u16, compressor: Compressor) -> Self {
        Self::running_with(config(world), algorithm(compressor))
    }

    /// A shard without a job, and the plan of workers that may come.
    fn empty(config: ShardConfig, algorithm: AlgorithmConfig) -> Self {
        let shards = config.shards;
        let spec = PlanSpec {
            shards,
            ..spec(algorithm)
        };
        Self {
            shard: Shard::new(config),
            now: Duration::ZERO,
            plan: Plan::build(spec).unwrap(),
        }
    }

    fn running_with(config: ShardConfig, algorithm: AlgorithmConfig) -> Self {
        let world = config.world;
        let mut bench = Self::empty(config, algorithm);
        let spec = bench.plan.spec.clone();
        for session in 0..world {
            let session = u64::from(session);
            let incarnation = incarnation(session);
            bench.hello(
                session,
                Hello {
                    incarnation,
                    ..hello(&spec)
                },
            );
        }
        assert!(bench.shard.is_running());
        bench
    }

    fn handle(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        self.now += Duration::from_millis(10);
        self.shard.handle(self.now, event, &mut out);
        out
    }

    fn hello(&mut self, session: u64, hello: Hello) -> Vec<Action> {
        self.handle(Event::Hello {
            session: SessionId(session),
            hello: Box::new(hello),
        })
    }

    fn frame(&mut self, session: u64, header: FrameHeader, body: Vec<u8>) -> Vec<Action> {
        self.handle(Event::Round {
            session: SessionId(session),
            header,
            body: body.into(),
        })
    }

    fn send(&mut self, session: u64, step: u64, kind: FrameKind, body: Vec<u8>) -> Vec<Action> {
        let header = header(kind, step, body.len());
        self.frame(session, header, body)
    }

    /// A dense frame of zeros, to the only shard.
    fn dense(&mut self, session: u64, step: u64) -> Vec<Action> {
        self.send(session, step, FrameKind::Dense, vec![0; 68])
    }

    /// A frame that is not counted and asks for the answer.
    fn ask(&mut self, session: u64, step: u64, kind: FrameKind) -> Vec<Action> {
        let mut header = header(kind, step, 0);
        header.flags.absent = true;
        self.frame(session, header, Vec::new())
    }

    fn control(&mut self, session: u64, message: Control) -> Vec<Action> {
        self.handle(Event::Control {
            session: SessionId(session),
            message,
        })
    }

    /// The worker has ended.
    fn lose(&mut self, session: u64) -> Vec<Action> {
        self.close(session, true)
    }

    /// The connection is lost; the worker may come back.
    fn cut(&mut self, session: u64) -> Vec<Action> {
        self.close(session, false)
    }

    fn close(&mut self, session: u64, for_good: bool) -> Vec<Action> {
        self.handle(Event::Closed {
            session: SessionId(session),
            reason: "timed out".to_owned(),
            for_good,
        })
    }

    /// At that moment exactly.
    fn tick_at(&mut self, now: Duration) -> Vec<Action> {
        let mut out = Vec::new();
        self.now = now;
        self.shard.handle(now, Event::Tick, &mut out);
        out
    }

    fn tick(&mut self, after: Duration) -> Vec<Action> {
        self.now += after;
        self.handle(Event::Tick)
    }

    fn shape(&self, update: u64) -> RoundShape {
        RoundShape::new(&self.plan, BucketId(0), ShardId(0), update)
    }
}

fn header(kind: FrameKind, step: u64, bytes: usize) -> FrameHeader {
    FrameHeader {
        kind,
        flags: FrameFlags::default(),
        bucket: BucketId(0),
        epoch: Epoch(1),
        step: Step(step),
        update: step,
        body_bytes: bytes as u32,
        roster_bytes: 0,
        lead: 0,
    }
}

const F32: ValueCodec = ValueCodec {
    value_type: ValueType::F32,
    quant_block: 64,
};

fn encode(values: &[f32]) -> Vec<u8> {
    let mut out = Vec::new();
    F32.encode(values, &mut out);
    out
}

fn decode(bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / 4];
    F32.decode(bytes, &mut out);
    out
}

/// Round frames among the actions, their bodies without the roster, which says the same as the flag.
fn answers(actions: &[Action]) -> Vec<(u64, FrameHeader, Bytes)> {
    let frames = whole_answers(actions).into_iter();
    let frames = frames.map(|(session, header, body)| {
        let payload = body.slice(..header.payload_bytes());
        let roster = decode_roster(&body[payload.len()..]).unwrap();
        assert!(!header.flags.counted || !roster.is_empty());
        (session, header, payload)
    });
    frames.collect()
}

/// Round frames among the actions, rosters included.
fn whole_answers(actions: &[Action]) -> Vec<(u64, FrameHeader, Bytes)> {
    let frames = actions.iter().filter_map(|action| match action {
        Action::Round {
            session,
            header,
            body,
        } => Some((session.0, *header, body.clone())),
        _ => None,
    });
    frames.collect()
}

/// Who is counted in the first answer.
fn roster(actions: &[Action]) -> Vec<u16> {
    let (_, header, body) = whole_answers(actions).remove(0);
    let ranks = decode_roster(&body[header.payload_bytes()..]).unwrap();
    ranks.into_iter().map(|rank| rank.0).collect()
}

/// Who was refused, why, and that it was closed too.
fn refusals(actions: &[Action]) -> Vec<(u64, RefusalCode, String)> {
    let closed: Vec<_> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Close {
                session,
                code,
                detail,
            } if detail != "the worker came on another connection" => {
                Some((session.0, *code, detail.clone()))
            }
            _ => None,
        })
        .collect();
    let told = actions.iter().filter_map(|action| match action {
        Action::Control {
            session,
            message: Control::Refused { code, detail },
        } => Some((session.0, *code, detail.clone())),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), closed, "told and closed alike");
    closed
}

/// Sessions that were closed because their workers came on other ones.
fn replaced(actions: &[Action]) -> Vec<u64> {
    let closed = actions.iter().filter_map(|action| match action {
        Action::Close {
            session, detail, ..
        } if detail == "the worker came on another connection" => Some(session.0),
        _ => None,
    });
    closed.collect()
}

fn welcomes(actions: &[Action]) -> Vec<(u64, Welcome)> {
    let of = |(session, message)| match message {
        Control::Welcome(welcome) => Some((session, welcome)),
        _ => None,
    };
    messages(actions).into_iter().filter_map(of).collect()
}

/// (session, rank) of those that were welcomed.
fn ranks(actions: &[Action]) -> Vec<(u64, u16)> {
    let welcomes = welcomes(actions).into_iter();
    welcomes
        .map(|(session, welcome)| (session, welcome.place.rank.0))
        .collect()
}

fn messages(actions: &[Action]) -> Vec<(u64, Control)> {
    let controls = actions.iter().filter_map(|action| match action {
        Action::Control { session, message } => Some((session.0, message.clone())),
        _ => None,
    });
    controls.collect()
}

fn closed_round(actions: &[Action]) -> Option<RoundClosed> {
    actions.iter().find_map(|action| match action {
        Action::Observe(Observation::RoundClosed(round)) => Some((**round).clone()),
        _ => None,
    })
}
