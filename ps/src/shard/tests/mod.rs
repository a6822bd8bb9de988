//! The machine, driven by hand.
#![allow(clippy::unwrap_used, reason = "tests")]

mod hostile;
mod membership;
mod refusals;
mod reports;
mod rounds;
mod successors;

use super::*;
use arc_topk_common::compress::ValueCodec;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, ValueType};
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_common::wire::{FrameFlags, FrameHeader, FrameKind, Hello, PROTOCOL_VERSION};
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

fn hello(spec: &PlanSpec) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        job: "job".to_owned(),
        incarnation: [0; 16],
        rank: None,
        world: None,
        start_step: Step(0),
        shard: 0,
        host: "host:1".to_owned(),
        plan: spec.clone(),
    }
}

fn config(world: u16) -> ShardConfig {
    ShardConfig {
        shard: ShardId(0),
        shards: 1,
        job: "job".to_owned(),
        world,
        min_workers: 1,
    }
}

/// Shard 1 of two, which waits for a job of two workers, and that job's specification.
fn second_of_two() -> (Bench, PlanSpec) {
    let mut spec = spec(algorithm(Compressor::Dense));
    spec.shards = 2;
    let shard = Shard::new(ShardConfig {
        shard: ShardId(1),
        shards: 2,
        ..config(2)
    });
    let bench = Bench {
        shard,
        now: Duration::ZERO,
        plan: Plan::build(spec.clone()).unwrap(),
    };
    (bench, spec)
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

    fn running_with(config: ShardConfig, algorithm: AlgorithmConfig) -> Self {
        let spec = spec(algorithm);
        let world = config.world;
        let mut bench = Self {
            shard: Shard::new(config),
            now: Duration::ZERO,
            plan: Plan::build(spec.clone()).unwrap(),
        };
        for session in 0..world {
            bench.hello(u64::from(session), hello(&spec));
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

    fn lose(&mut self, session: u64) -> Vec<Action> {
        self.handle(Event::Closed {
            session: SessionId(session),
            reason: "timed out".to_owned(),
        })
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

/// Round frames among the actions.
fn answers(actions: &[Action]) -> Vec<(u64, FrameHeader, Bytes)> {
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

/// Who was refused, why, and that it was closed too.
fn refusals(actions: &[Action]) -> Vec<(u64, RefusalCode, String)> {
    let closed: Vec<_> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Close {
                session,
                code,
                detail,
            } => Some((session.0, *code, detail.clone())),
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
