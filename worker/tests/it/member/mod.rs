//! A member against shards made by hand: what it sends again and tells again, when it says that it is away, and what its
//! feedback state becomes when it is late, behind, or not counted.

mod any_order;
mod feedback;
mod links;
mod members;

use crate::support::{algorithm, bits, gradients, model, spec, tensor};
use crate::support::{emulated, shard};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback};
use arc_topk_common::ids::{Epoch, Rank, RunId, ShardId, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec};
use arc_topk_common::wire::{Control, FrameHeader, FrameKind, Intent, Place, RefusalCode, Welcome};
use arc_topk_worker::backend::{Gradient, on_cpu};
use arc_topk_worker::member::{AWAY_AFTER, Input, Member, MemberConfig, Notice, Output};
use arc_topk_worker::reducer::ReduceError;
use arc_topk_worker::step::{Outgoing, StepMachine, StepOutcome};
use bytes::Bytes;
use core::cell::Cell;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const ME: u16 = 1;
const RUN: RunId = RunId([7; 16]);

fn place(epoch: u32, members: &[u16]) -> Place {
    Place {
        run: RUN,
        rank: Rank(ME),
        epoch: Epoch(epoch),
        next_rank: 8,
        members: members.iter().copied().map(Rank).collect(),
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

thread_local! {
    /// Members of this thread compress on the kernels' emulator.
    static ON_DEVICE: Cell<bool> = const { Cell::new(false) };
}

/// A member, the clock and what came out since it was last looked at.
struct Bench {
    member: Member,
    spec: PlanSpec,
    plan: Plan,
    now: Duration,
    out: Vec<Output>,
}

impl Bench {
    fn new(spec: &PlanSpec) -> Self {
        let mut bench = Self::dialling(spec, true);
        for shard in 1..spec.shards {
            bench.up(shard, 1, false);
        }
        bench.out.clear();
        bench
    }

    fn dialling(spec: &PlanSpec, waited: bool) -> Self {
        let plan = Arc::new(Plan::build(spec.clone()).unwrap());
        // A device refuses topk.
        let on_device = ON_DEVICE.get() && spec.algorithm.compressor != Compressor::Topk;
        let make = if on_device {
            emulated::backend(1)
        } else {
            on_cpu(Arc::new(Fast))
        };
        let backend = make(&plan).unwrap();
        let machine = StepMachine::with_backend(Arc::clone(&plan), backend, Epoch(0), Step(0), 0);
        let config = MemberConfig {
            place: place(1, &[0, 1, 2]),
            coordinator: 1,
            waited,
            away_after: AWAY_AFTER,
        };
        let mut out = Vec::new();
        let member = Member::new(machine, config, &mut out);
        Self {
            member,
            spec: spec.clone(),
            plan: Plan::build(spec.clone()).unwrap(),
            now: Duration::ZERO,
            out,
        }
    }

    fn input(&mut self, input: Input) {
        self.member.handle(self.now, input, &mut self.out);
    }

    fn up(&mut self, shard: u16, incarnation: u64, retell: bool) {
        let shard = ShardId(shard);
        let Intent::Member { place, step, .. } = self.member.intent(shard) else {
            panic!("a member comes as one");
        };
        let welcome = Welcome {
            shard_incarnation: incarnation,
            retell,
            place,
            step,
            snapshot: false,
        };
        self.input(Input::LinkUp { shard, welcome });
    }

    fn down(&mut self, shard: u16) {
        self.input(Input::LinkDown {
            shard: ShardId(shard),
            reason: "the cable".to_owned(),
        });
    }

    fn control(&mut self, shard: u16, message: Control) {
        self.input(Input::Control {
            shard: ShardId(shard),
            message,
        });
    }

    fn answer(&mut self, frame: &Outgoing, counted: &[u16], mean: f32) {
        self.answer_ahead(frame, counted, mean, 0);
    }

    fn answer_ahead(&mut self, frame: &Outgoing, counted: &[u16], mean: f32, lead: u16) {
        let (header, body) = shard::answer(&self.plan, frame, counted, mean);
        self.input(Input::Frame {
            shard: frame.shard,
            header: FrameHeader { lead, ..header },
            body,
        });
    }

    fn fill(&mut self) {
        let step = self.member.machine().step().0;
        let all = gradients(&self.spec, 1, step).remove(0);
        for (id, gradient) in all.iter().enumerate() {
            let gradient = Gradient::F32(gradient);
            let id = TensorId(id as u32);
            self.member.fill(id, gradient, &mut self.out).unwrap();
        }
    }

    fn begin(&mut self) -> bool {
        self.member.begin(&mut self.out)
    }

    /// What came out.
    fn take(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.out)
    }

    /// The frames that came out.
    fn frames(&mut self) -> Vec<Outgoing> {
        let frame = |output| match output {
            Output::Frame(frame) => Some(frame),
            _ => None,
        };
        self.take().into_iter().filter_map(frame).collect()
    }

    fn controls(&mut self) -> Vec<(u16, Control)> {
        let control = |output| match output {
            Output::Control { shard, message } => Some((shard.0, message)),
            _ => None,
        };
        self.take().into_iter().filter_map(control).collect()
    }

    /// Answers everything until the step is complete, and commits.
    fn finish(&mut self, counted: &[u16], mean: f32) -> StepOutcome {
        self.member.flush(&mut self.out).unwrap();
        loop {
            let frames = self.frames();
            if frames.is_empty() {
                break;
            }
            for frame in &frames {
                self.answer(frame, counted, mean);
            }
        }
        assert!(self.member.is_complete());
        self.member.commit()
    }

    fn whole_step(&mut self, counted: &[u16], mean: f32) -> StepOutcome {
        if !self.begin() {
            self.fill();
        }
        self.finish(counted, mean)
    }

    fn array(&self, name: &str) -> Vec<f32> {
        let arrays = self.member.export_state().arrays;
        let found = arrays.into_iter().find(|(n, _)| n == name);
        found.map(|(_, values)| values).unwrap_or_default()
    }

    fn failure(&self) -> Option<&ReduceError> {
        self.out.iter().find_map(|output| match output {
            Output::Fail(error) => Some(error),
            _ => None,
        })
    }
}

fn arc(shards: u16) -> PlanSpec {
    spec(algorithm(Feedback::Ef14, 0.3), shards, model())
}

fn one_matrix() -> PlanSpec {
    spec(
        algorithm(Feedback::Ef14, 0.25),
        1,
        vec![tensor("w", &[8, 8])],
    )
}

fn membership(epoch: u32, members: &[u16], away: &[u16]) -> Control {
    let ranks = |ranks: &[u16]| ranks.iter().copied().map(Rank).collect();
    Control::Membership {
        epoch: Epoch(epoch),
        next_rank: 8,
        members: ranks(members),
        away: ranks(away),
        reason: "a loss".to_owned(),
    }
}

fn of(frames: &[Outgoing], shard: u16) -> Vec<Outgoing> {
    let of = frames.iter().filter(|frame| frame.shard.0 == shard);
    of.cloned().collect()
}

/// Kind, bucket and step: what makes two frames the same to a reader.
fn keys(frames: &[Outgoing]) -> Vec<(FrameKind, u16, u64)> {
    let key = |frame: &Outgoing| {
        let header = frame.header;
        (header.kind, header.bucket.0, header.step.0)
    };
    frames.iter().map(key).collect()
}
