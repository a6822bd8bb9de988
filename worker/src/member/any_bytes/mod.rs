//! What must hold for any sequence of events, whatever the shards send: the fuzz target and `tests/fuzz_corpus.rs` call
//! [`operations`], which reads the events from bytes. The trainer keeps to the order of its calls, the shell to what it owes.

mod check;
mod shards;
mod trainer;

use super::{AWAY_AFTER, Input, Member, MemberConfig};
use crate::step::StepMachine;
use arc_topk_common::any_bytes::Source;
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, SelectionPolicy, ValueType};
use arc_topk_common::ids::{BucketId, Epoch, Rank, RunId, ShardId, Step};
use arc_topk_common::plan::{DType, Plan, PlanSpec, TensorSpec};
use arc_topk_common::wire::{Direction, FrameHeader, FrameKind, Place, RoundShape};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Ranks that messages name.
const RANKS: u8 = 4;
const ME: Rank = Rank(1);
const RUN: RunId = RunId([7; 16]);
/// Answers that are remembered, to come again.
const REMEMBERED: usize = 16;
/// A step that no job ends at: shards take no worker that starts later.
const LATE: Step = Step(1 << 62);

/// A step near `base`, or one of those at which arithmetic may fail.
fn any_step(source: &mut Source<'_>, base: Step) -> Step {
    Step(match source.byte() {
        255 => u64::MAX,
        254 => u64::MAX - 1,
        253 => 0,
        near if near < 128 => base.0.saturating_add(u64::from(near % 8)),
        near => base.0.saturating_sub(u64::from(near % 4)),
    })
}

/// One connection, as the shell and the shard behind it see it.
#[derive(Default)]
struct Line {
    up: bool,
    /// The shard was told to wait for this worker.
    waits: bool,
    /// Newest membership that was passed on.
    epoch: Epoch,
    /// Frames of the open step that went over the present connection.
    went: BTreeSet<(BucketId, u8)>,
}

/// An answer that was taken, and whether this worker is in its roster.
struct Taken {
    kind: FrameKind,
    non_finite: bool,
    body: Bytes,
    holds_me: bool,
}

/// A member and what its peers know of it.
struct Play {
    member: Member,
    plan: Arc<Plan>,
    now: Duration,
    lines: Vec<Line>,
    /// Answers that were given, to come again.
    given: VecDeque<(ShardId, FrameHeader, Bytes)>,
    /// Answers to the open step that were taken, by shard, bucket and phase.
    taken: BTreeMap<(ShardId, BucketId, usize), Taken>,
    /// Frames of the open step: one that is sent again is the same.
    sent: BTreeMap<(ShardId, BucketId, u8), Bytes>,
    /// Longest body of any round, without the roster.
    largest_body: usize,
    /// Between begin and commit.
    open: bool,
    filled: Vec<bool>,
    committed: u32,
    left: bool,
}

/// Plays the events that `bytes` stand for. Returns how many steps the trainer has committed.
///
/// # Panics
/// If an event makes the member panic, hold more than the plan allows, send over a connection that is not there or the same
/// twice over one, go on after it failed, wait without having asked for anything, name a deadline that is over or before which
/// something happens, or count itself in other rounds than the rosters do.
pub fn operations(bytes: &[u8]) -> u32 {
    let mut source = Source::new(bytes);
    let mut play = Play::new(&mut source);
    while !source.is_empty() {
        play.operation(&mut source);
    }
    play.committed
}

fn algorithm(source: &mut Source<'_>) -> AlgorithmConfig {
    let compressor = [
        Compressor::Arc,
        Compressor::Randk,
        Compressor::Topk,
        Compressor::Dense,
    ][source.below(4) as usize];
    let feedback = [Feedback::Ef14, Feedback::Ef21, Feedback::Ef21m][source.below(3) as usize];
    let choice = source.byte();
    let narrow = feedback == Feedback::Ef14 && choice & 1 == 1;
    let wire = |narrowed| if narrow { narrowed } else { ValueType::F32 };
    AlgorithmConfig {
        compressor,
        feedback,
        density: 0.3,
        sketch_rank: 2,
        dense_below_elements: 4,
        selection: if compressor == Compressor::Arc && choice & 2 == 2 {
            SelectionPolicy::Pooled
        } else {
            SelectionPolicy::PerTensor
        },
        wire_up: wire(ValueType::Int4),
        wire_down: wire(ValueType::Int8),
        wire_dense: wire(ValueType::Bf16),
        wire_warmup: wire(ValueType::F16),
        wire_sketch: wire(ValueType::Int8),
        warmup_updates: u64::from(choice >> 2 & 1),
        bucket_bytes: 1024,
        ..AlgorithmConfig::default()
    }
}

fn plan(source: &mut Source<'_>) -> Plan {
    let tensor = |name: &str, shape: &[u64]| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    };
    let spec = PlanSpec {
        trainer: String::new(),
        algorithm: algorithm(source),
        shards: 1 + source.below(3) as u16,
        tensors: vec![
            tensor("bias", &[3]),
            tensor("a", &[20, 8]),
            tensor("b", &[2, 3]),
            tensor("c", &[20, 8]),
        ],
    };
    Plan::build(spec)
        .expect("the plan is the same for all inputs but for settings that go together")
}

fn largest_body(plan: &Plan) -> usize {
    let shards = (0..plan.spec.shards).map(ShardId);
    let rounds = shards.flat_map(|shard| plan.buckets.iter().map(move |b| (b.id, shard)));
    let bodies = rounds.flat_map(|(bucket, shard)| {
        // In the warm-up, and after it.
        [0, 1].map(|update| {
            let shape = RoundShape::new(plan, bucket, shard, update);
            let both = [Direction::Up, Direction::Down];
            both.map(|direction| shape.largest_body(direction))
        })
    });
    bodies.flatten().max().unwrap_or(0)
}

impl Play {
    fn new(source: &mut Source<'_>) -> Self {
        let plan = Arc::new(plan(source));
        let start = [Step(0), Step(5), LATE][source.below(3) as usize];
        let config = MemberConfig {
            place: Place {
                run: RUN,
                rank: ME,
                epoch: Epoch(1),
                next_rank: u16::from(RANKS),
                members: vec![Rank(0), ME, Rank(2)],
            },
            coordinator: 1,
            waited: !source.flag(),
            away_after: AWAY_AFTER,
        };
        let mut lines: Vec<Line> = Vec::new();
        lines.resize_with(usize::from(plan.spec.shards), Line::default);
        lines[0].up = true;
        lines[0].waits = config.waited;
        let machine = StepMachine::new(
            Arc::clone(&plan),
            Arc::new(Fast),
            Epoch(0),
            start,
            start.0.min(5),
        );
        let mut out = Vec::new();
        let member = Member::new(machine, config, &mut out);
        assert_eq!(out.len(), lines.len() - 1, "all other shards are dialled");
        Self {
            member,
            now: Duration::from_secs(1),
            lines,
            given: VecDeque::new(),
            taken: BTreeMap::new(),
            sent: BTreeMap::new(),
            open: false,
            filled: vec![false; plan.tensors.len()],
            committed: 0,
            left: false,
            largest_body: largest_body(&plan),
            plan,
        }
    }

    fn step(&self) -> Step {
        self.member.machine().step()
    }

    fn pause(&mut self, pause: Duration) {
        self.now = self.now.saturating_add(pause);
    }

    fn operation(&mut self, source: &mut Source<'_>) {
        self.pause(Duration::from_millis(1));
        // One more than there are.
        let shard = ShardId(source.below(self.lines.len() as u64 + 1) as u16);
        match source.below(20) {
            0 | 1 => self.link_up(shard, source),
            2 => self.link_down(shard),
            3 | 4 => {
                let message = self.message(source);
                self.hear(Input::Control { shard, message });
            }
            5..=9 => self.good_answer(shard, source),
            10 => self.old_answer(source),
            11 => self.bad_frame(shard, source),
            12 | 13 => self.whole_gradient(),
            14 => self.fill(source),
            15 => self.trainer(source),
            16 | 17 => self.commit(),
            18 => {
                let pauses = [0, 1, 10, 400, 1000, 3000, 60_000, 1 << 60];
                self.pause(Duration::from_millis(pauses[source.below(8) as usize]));
                self.call(|member, now, out| member.tick(now, out));
            }
            _ => self.pass_the_deadline(),
        }
    }
}
