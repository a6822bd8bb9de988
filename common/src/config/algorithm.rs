//! What is computed: every setting that must be equal on all workers and shards of a job.

use crate::compress::ValueCodec;
use serde::{Deserialize, Serialize};

/// How a compressible tensor is thinned out before it travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Compressor {
    /// Every row travels every step.
    Dense,
    /// ARC-Top-K: the averaged sketch picks the rows (arXiv 2510.26709).
    #[default]
    Arc,
    /// The same random rows everywhere, from the shared generator; no sketch.
    Randk,
    /// Each worker its own top rows, with indices. For comparison only.
    Topk,
}

/// What becomes of the part of a gradient that was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Feedback {
    /// It is dropped. For tests.
    None,
    /// Kept in a residual and added to the next gradient (Seide et al. 2014).
    #[default]
    Ef14,
    /// Workers send corrections to an estimate h of their gradient (Richtárik et al. 2021).
    Ef21,
    /// [`Feedback::Ef21`] of a momentum average of the gradient (Fatkhullin et al. 2023).
    Ef21m,
}

/// How ef21 and ef21m start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// One dense round: v = h = g and H = mean g.
    #[default]
    #[value(name = "first_gradient")]
    FirstGradient,
    /// v = h = H = 0.
    Zeros,
}

/// Distribution of the projection V.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ProjectionKind {
    /// Signs ±1.
    #[default]
    Rademacher,
    /// Standard normal entries (the paper's choice).
    Gaussian,
}

/// How rows compete for the budget.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SelectionPolicy {
    /// K = max(1, ceil(μ·m)) rows of every tensor (the paper's rule).
    #[default]
    PerTensor,
    /// All rows of a bucket compete by score per element, for the same number of elements in all.
    Pooled,
}

/// Type of a value on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ValueType {
    /// IEEE single: nothing is lost.
    #[default]
    F32,
    /// bfloat16, round to nearest even.
    Bf16,
    /// IEEE half, round to nearest even.
    F16,
    /// 8-bit signed integers with a scale per block of `quant_block` values.
    Int8,
    /// 4-bit signed integers with a scale per block of `quant_block` values.
    Int4,
}

/// Every setting that decides the result. Part of the plan and of its hash.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AlgorithmConfig {
    /// How a compressible tensor is thinned out.
    pub compressor: Compressor,
    /// What becomes of what was not sent.
    pub feedback: Feedback,
    /// Start of ef21 and ef21m.
    pub init: Init,
    /// Momentum η of ef21m, in (0, 1].
    pub eta: f32,
    /// Factor applied to ef14's residual each step, in (0, 1]; 1 is the paper's.
    pub feedback_decay: f32,
    /// Density μ: share of the rows that travel, in (0, 1].
    pub density: f32,
    /// Rank r of the sketch, 1..=64.
    pub sketch_rank: u16,
    /// Distribution of the projection.
    pub projection: ProjectionKind,
    /// How rows compete.
    pub selection: SelectionPolicy,
    /// Rows of this many elements instead of the tensor's own; 0 keeps the tensor's own view.
    pub block_width: u32,
    /// Tensors with fewer elements are dense, as are 1-D tensors.
    pub dense_below_elements: u32,
    /// Type of the values that workers push.
    pub wire_up: ValueType,
    /// Type of the mean that shards return.
    pub wire_down: ValueType,
    /// Type of sketches.
    pub wire_sketch: ValueType,
    /// Type of dense tensors and dense rounds, both directions.
    pub wire_dense: ValueType,
    /// Values that share a scale in int8 and int4, 8..=4096.
    pub quant_block: u32,
    /// Dense rounds before compression starts, in updates.
    pub warmup_updates: u64,
    /// Updates over which the density falls geometrically from 1 to `density` after the warm-up; 0 jumps.
    pub ramp_updates: u64,
    /// Seed of the projections and of randk's rows.
    pub seed: u64,
    /// Bucket size in bytes of f32 gradient.
    pub bucket_bytes: u32,
}

impl Default for AlgorithmConfig {
    fn default() -> Self {
        Self {
            compressor: Compressor::Arc,
            feedback: Feedback::Ef14,
            init: Init::FirstGradient,
            eta: 0.1,
            feedback_decay: 1.0,
            density: 0.2,
            sketch_rank: 4,
            projection: ProjectionKind::Rademacher,
            selection: SelectionPolicy::PerTensor,
            block_width: 0,
            dense_below_elements: 1024,
            wire_up: ValueType::Int4,
            wire_down: ValueType::Int4,
            wire_sketch: ValueType::Bf16,
            wire_dense: ValueType::F32,
            quant_block: 64,
            warmup_updates: 20,
            ramp_updates: 0,
            seed: 0,
            bucket_bytes: 25 << 20,
        }
    }
}

/// What one round does with the compressible tensors.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RoundKind {
    /// All rows travel: warm-up, first round of ef21, or the dense compressor.
    Dense,
    /// The compressor's own exchange at this density.
    Sparse {
        /// Density of this round, in (0, 1].
        density: f32,
    },
}

impl AlgorithmConfig {
    /// What the round of update number `update` (counted from 0, skipped rounds not counted) does.
    #[must_use]
    pub fn round_kind(&self, update: u64) -> RoundKind {
        let ef21_start = matches!(self.feedback, Feedback::Ef21 | Feedback::Ef21m)
            && self.init == Init::FirstGradient
            && update == 0;
        if self.compressor == Compressor::Dense || update < self.warmup_updates || ef21_start {
            return RoundKind::Dense;
        }
        RoundKind::Sparse {
            density: self.density_at(update, self.density),
        }
    }

    /// Density at update number `update` of tensors whose density after the ramp is `density` (the job's or
    /// their own). Sparse rounds only; during the warm-up it is 1.
    #[must_use]
    pub fn density_at(&self, update: u64, density: f32) -> f32 {
        let Some(since) = update.checked_sub(self.warmup_updates) else {
            return 1.0;
        };
        if since >= self.ramp_updates {
            return density;
        }
        // Geometric, so that each update multiplies the bytes by the same factor.
        let t = (since + 1) as f32 / (self.ramp_updates + 1) as f32;
        density.powf(t).min(1.0)
    }

    /// How compressed rows travel up.
    #[must_use]
    pub fn codec_up(&self) -> ValueCodec {
        self.codec(self.wire_up)
    }

    /// How the mean of compressed rows travels down.
    #[must_use]
    pub fn codec_down(&self) -> ValueCodec {
        self.codec(self.wire_down)
    }

    /// How sketches travel.
    #[must_use]
    pub fn codec_sketch(&self) -> ValueCodec {
        self.codec(self.wire_sketch)
    }

    /// How dense tensors and dense rounds travel, both ways.
    #[must_use]
    pub fn codec_dense(&self) -> ValueCodec {
        self.codec(self.wire_dense)
    }

    fn codec(&self, value_type: ValueType) -> ValueCodec {
        ValueCodec {
            value_type,
            quant_block: self.quant_block as usize,
        }
    }
}
