//! The plan: parameters in registration order → rows → buckets → shard ranges.
//!
//! Every peer builds the plan from the same [`PlanSpec`], so only the spec travels; its hash is compared
//! and a difference is named ([`PlanSpec::first_difference`]).
//!
//! Invariants of a built plan: every row of every tensor is owned by exactly one shard; a shard's rows of a bucket are
//! contiguous in the bucket's concatenated rows; the same spec gives the same plan on every machine.

mod build;
mod difference;
pub mod predict;
#[cfg(test)]
mod tests;

pub use build::{
    MAX_BUCKETS, MAX_ELEMENTS, MAX_SHARDS, MIN_CUT_DENSE_ELEMENTS, MIN_CUT_KEPT_ROWS, PlanError,
};
pub use difference::PlanDifference;

use crate::config::AlgorithmConfig;
use crate::ids::{BucketId, ShardId, TensorId};
use crate::wire::encode_plan_spec;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Element type of a gradient.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE single.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

/// One registered parameter.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Unique name.
    pub name: String,
    /// Shape; empty means a scalar.
    pub shape: Vec<u64>,
    /// Element type of its gradient.
    pub dtype: DType,
    /// Density of this tensor, overriding the job's.
    pub density: Option<f32>,
}

/// All that peers must agree on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PlanSpec {
    /// Whatever else the trainers must agree on (learning rate, optimizer, steps …), a line `name=value` for each, in a
    /// fixed order; may be empty. At most [`MAX_TRAINER_BYTES`](crate::wire::MAX_TRAINER_BYTES).
    #[serde(default)]
    pub trainer: String,
    /// What is computed.
    pub algorithm: AlgorithmConfig,
    /// Number of shards.
    pub shards: u16,
    /// Parameters in registration order.
    pub tensors: Vec<TensorSpec>,
}

impl PlanSpec {
    /// SHA-256 of the canonical encoding. Equal on all peers of a job.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        hasher.update(b"arc-topk plan 1\0");
        hasher.update(encode_plan_spec(self));
        hasher.finalize().into()
    }
}

/// How one tensor is viewed.
#[derive(Clone, PartialEq, Debug)]
pub struct TensorPlan {
    /// Position in the list.
    pub id: TensorId,
    /// Its registration.
    pub spec: TensorSpec,
    /// Elements, without padding.
    pub elements: usize,
    /// Rows m. A dense tensor is seen as `elements` rows of width 1.
    pub rows: usize,
    /// Width n. rows·width ≥ elements; the last row is zero-padded (only with `block_width`).
    pub width: usize,
    /// Whether rows are chosen; false: averaged whole.
    pub sparse: bool,
    /// Its bucket.
    pub bucket: BucketId,
}

/// A contiguous range of one tensor's rows, owned by one shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Tensor.
    pub tensor: TensorId,
    /// First row.
    pub row_start: u32,
    /// Past the last row.
    pub row_end: u32,
}

/// One bucket: tensors that travel together.
#[derive(Clone, PartialEq, Debug)]
pub struct BucketPlan {
    /// Position.
    pub id: BucketId,
    /// Its tensors, in the order that backward produces them (reverse registration).
    pub tensors: Vec<TensorId>,
    /// Per shard, its segments, in the order of `tensors`. A shard may own none.
    pub segments: Vec<Vec<Segment>>,
}

/// The whole plan. Build it with [`Plan::build`].
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// What it was built from.
    pub spec: PlanSpec,
    /// Tensors by id.
    pub tensors: Vec<TensorPlan>,
    /// Buckets in the order of backward; bucket 0 is ready first.
    pub buckets: Vec<BucketPlan>,
}

impl Segment {
    /// Rows of the range.
    #[must_use]
    pub fn rows(&self) -> usize {
        (self.row_end - self.row_start) as usize
    }
}

impl TensorPlan {
    /// rows·width: elements with padding.
    #[must_use]
    pub fn padded_elements(&self) -> usize {
        self.rows * self.width
    }
}

impl Plan {
    /// [`PlanSpec::hash`] of its spec.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        self.spec.hash()
    }

    /// Elements of all tensors, without padding.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.tensors.iter().map(|t| t.elements).sum()
    }

    /// Number of shards.
    #[must_use]
    pub fn shards(&self) -> usize {
        usize::from(self.spec.shards)
    }

    /// Segments of a shard in a bucket.
    #[must_use]
    pub fn segments(&self, bucket: BucketId, shard: ShardId) -> &[Segment] {
        &self.buckets[bucket.index()].segments[shard.index()]
    }
}
