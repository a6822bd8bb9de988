//! The plan: parameters in registration order → rows → buckets → shard ranges.
//!
//! Every peer builds the plan from the same [`PlanSpec`], so only the spec travels; its hash is compared
//! and a difference is named ([`PlanSpec::first_difference`]).

use crate::config::AlgorithmConfig;
use crate::ids::{BucketId, ShardId, TensorId};
use serde::{Deserialize, Serialize};

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
    /// What is computed.
    pub algorithm: AlgorithmConfig,
    /// Number of shards.
    pub shards: u16,
    /// Parameters in registration order.
    pub tensors: Vec<TensorSpec>,
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

/// Rows K that travel of `rows` rows at `density`: max(1, ⌈density·rows⌉), at most `rows`.
///
/// A density such as 0.2 has no exact f32; one part in 10⁷ is taken off the product before it is rounded up, so
/// that 0.2 of 5 rows is 1 row and not 2.
#[must_use]
pub fn rows_kept(density: f32, rows: usize) -> usize {
    if density >= 1.0 {
        return rows;
    }
    let exact = f64::from(density) * rows as f64;
    ((exact * (1.0 - 1e-7)).ceil() as usize).clamp(1, rows.max(1))
}

impl Segment {
    /// Rows of the range.
    #[must_use]
    pub fn rows(&self) -> usize {
        (self.row_end - self.row_start) as usize
    }
}

impl Plan {
    /// Segments of a shard in a bucket.
    #[must_use]
    pub fn segments(&self, bucket: BucketId, shard: ShardId) -> &[Segment] {
        &self.buckets[bucket.index()].segments[shard.index()]
    }
}
