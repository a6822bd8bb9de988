//! ef21: after every step H is the mean of the h of those whom the round counted, and is the h of all others.

use crate::case::Case;
use crate::check::{Answer, FrameKey};
use arc_topk_common::ids::{BucketId, Rank, ShardId, Step};
use arc_topk_common::wire::{FrameKind, RoundShape, SegmentShape};
use arc_topk_worker::step::{StepOutcome, WorkerState};
use std::collections::BTreeMap;

/// Steps that are remembered.
const REMEMBERED: u64 = 40;
/// Adding up and dividing round a little, step after step; a part of a gradient is larger than this.
const ROUNDING: f64 = 1e-3;

/// Answers of a step, by bucket, shard and kind.
pub(crate) type Answers = BTreeMap<(BucketId, ShardId, FrameKey), Answer>;

/// A round, of those that got there by the same answers (a hash of them).
type Key = (Step, u64, BucketId, ShardId);

/// What the counted ones have made of a round so far.
#[derive(Debug, Default)]
pub(crate) struct Estimates(BTreeMap<Key, BTreeMap<Rank, Vec<f32>>>);

impl Estimates {
    /// A worker has applied a step. `chain`: hash of all answers that led there.
    ///
    /// # Errors
    /// The first element that is not as it must be.
    pub(crate) fn check(
        &mut self,
        case: &Case,
        rank: Rank,
        outcome: &StepOutcome,
        chain: u64,
        state: &WorkerState,
        answers: &Answers,
    ) -> Result<(), String> {
        for bucket in &case.plan.buckets {
            for shard in (0..case.shards).map(ShardId) {
                let shape = RoundShape::new(&case.plan, bucket.id, shard, outcome.update);
                if shape.sparse.is_empty() {
                    continue;
                }
                let last = last_answer(&shape, answers)
                    .ok_or_else(|| "a round has no last answer".to_owned())?;
                let roster = last.roster().map_err(|broken| broken.detail)?;
                let [h, global] =
                    ["local", "global"].map(|array| segments(case, state, array, &shape.sparse));
                let at = format!("bucket {}, shard {shard}", bucket.id);
                if !roster.contains(&rank) {
                    if h != global {
                        return Err(format!("{at}: it was not counted, and its h is not H"));
                    }
                    continue;
                }
                let key = (outcome.step, chain, bucket.id, shard);
                let counted = self.0.entry(key).or_default();
                counted.insert(rank, h);
                if counted.len() == roster.len() {
                    is_mean(counted, &global).map_err(|detail| format!("{at}: {detail}"))?;
                }
            }
        }
        let oldest = Step(outcome.step.0.saturating_sub(REMEMBERED));
        self.0 = self.0.split_off(&(oldest, 0, BucketId(0), ShardId(0)));
        Ok(())
    }
}

fn last_answer<'a>(shape: &RoundShape, answers: &'a Answers) -> Option<&'a Answer> {
    let of = |kind: FrameKind| answers.get(&(shape.bucket, shape.shard, FrameKey::from(kind)));
    let last = shape.phases().last()?.down;
    of(FrameKind::EstimatesMean).or_else(|| of(last))
}

/// An array of the feedback state where a round has its compressible segments.
fn segments(case: &Case, state: &WorkerState, array: &str, of: &[SegmentShape]) -> Vec<f32> {
    let mut found = Vec::new();
    for segment in of {
        let tensor = &case.plan.tensors[segment.segment.tensor.index()];
        let name = format!("{array}/{}", tensor.spec.name);
        let rows = segment.segment.row_start as usize..segment.segment.row_end as usize;
        let values = state.arrays.iter().find(|(other, _)| *other == name);
        let range = rows.start * segment.width..rows.end * segment.width;
        found.extend(
            values
                .into_iter()
                .flat_map(|(_, values)| &values[range.clone()]),
        );
    }
    found
}

fn is_mean(counted: &BTreeMap<Rank, Vec<f32>>, global: &[f32]) -> Result<(), String> {
    for (at, kept) in global.iter().enumerate() {
        let sum: f64 = counted.values().map(|h| f64::from(h[at])).sum();
        let mean = sum / counted.len() as f64;
        if (mean - f64::from(*kept)).abs() > ROUNDING * (1.0 + mean.abs()) {
            let ranks: Vec<String> = counted.keys().map(ToString::to_string).collect();
            return Err(format!(
                "H is {kept} in element {at}, but the mean of the h of ranks {} is {mean}",
                ranks.join(", ")
            ));
        }
    }
    Ok(())
}
