//! What is computed: every setting that must be equal on all workers and shards of a job.

use super::setting::{SettingError, check_density, require};
use crate::compress::ValueCodec;
use crate::elementary::{exp, ln};
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
    /// ef21 of a momentum average of the gradient (Fatkhullin et al. 2023).
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
///
/// The same names serve as flags (`--sketch-rank`), environment (`ARC_SKETCH_RANK`) and TOML keys (`sketch_rank`).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Algorithm (must be equal on all workers)")]
pub struct AlgorithmConfig {
    /// How a compressible tensor is thinned out before it travels.
    #[arg(long, env = "ARC_COMPRESSOR", value_enum, default_value_t = Self::default().compressor)]
    pub compressor: Compressor,
    /// What becomes of the part of a gradient that was not sent. ef14 trains best with adaptive optimizers. ef21 and
    /// ef21m need wire_down, wire_dense and wire_warmup f32, and every worker in every round: one that is lost costs a dense round.
    #[arg(long, env = "ARC_FEEDBACK", value_enum, default_value_t = Self::default().feedback)]
    pub feedback: Feedback,
    /// How ef21 and ef21m start: from one dense round, or from zeros.
    #[arg(long, env = "ARC_INIT", value_enum, default_value_t = Self::default().init)]
    pub init: Init,
    /// Momentum η of ef21m, in (0, 1]: weight of the newest gradient. 1 is ef21.
    #[arg(long, env = "ARC_ETA", default_value_t = Self::default().eta)]
    pub eta: f32,
    /// Factor on ef14's residual in each step, in (0, 1]. 1 is the paper's; 0.95 forgets old gradients, which helps at
    /// low densities and high learning rates.
    #[arg(long, env = "ARC_FEEDBACK_DECAY", default_value_t = Self::default().feedback_decay)]
    pub feedback_decay: f32,
    /// Density μ: share of a tensor's rows that travel in each step, in (0, 1]. Bytes are proportional to it. Lower it
    /// for slow links; below 0.05 training lags visibly.
    #[arg(long, env = "ARC_DENSITY", default_value_t = Self::default().density)]
    pub density: f32,
    /// Share of the averaged sketch's energy at which no more rows are chosen, in (0, 1]: of every tensor the fewest that
    /// hold it, and at most what the density allows. 1 always sends the whole density. Compressor arc alone.
    #[arg(long, env = "ARC_ENERGY", default_value_t = Self::default().energy)]
    pub energy: f32,
    /// Rank r of the sketch that chooses the rows, 1..=64. Costs r values per row.
    #[arg(long, env = "ARC_SKETCH_RANK", default_value_t = Self::default().sketch_rank)]
    pub sketch_rank: u16,
    /// Distribution of the sketch's projection. Signs are never worse than Gaussian entries.
    #[arg(long, env = "ARC_PROJECTION", value_enum, default_value_t = Self::default().projection)]
    pub projection: ProjectionKind,
    /// How rows compete for the budget: within their tensor, or within their bucket.
    #[arg(long, env = "ARC_SELECTION", value_enum, default_value_t = Self::default().selection)]
    pub selection: SelectionPolicy,
    /// Rows of this many elements instead of the tensor's own; 0 keeps the tensor's own view. Finer rows capture more
    /// energy at the same density and cost a larger sketch.
    #[arg(long, env = "ARC_BLOCK_WIDTH", default_value_t = Self::default().block_width)]
    pub block_width: u32,
    /// Tensors with fewer elements are averaged whole, as are all 1-D tensors.
    #[arg(long, env = "ARC_DENSE_BELOW_ELEMENTS", default_value_t = Self::default().dense_below_elements)]
    pub dense_below_elements: u32,
    /// Type of the values that workers push. What rounding loses goes into the feedback state.
    #[arg(long, env = "ARC_WIRE_UP", value_enum, default_value_t = Self::default().wire_up)]
    pub wire_up: ValueType,
    /// Type of the mean that shards return. Its rounding is lost: ef21 and ef21m need f32.
    #[arg(long, env = "ARC_WIRE_DOWN", value_enum, default_value_t = Self::default().wire_down)]
    pub wire_down: ValueType,
    /// Type of sketches.
    #[arg(long, env = "ARC_WIRE_SKETCH", value_enum, default_value_t = Self::default().wire_sketch)]
    pub wire_sketch: ValueType,
    /// Type of dense tensors and dense rounds, both directions. What rounding loses on the way up goes into the residual;
    /// the mean's rounding is lost: f32 or bf16 is wise. ef21 and ef21m need f32.
    #[arg(long, env = "ARC_WIRE_DENSE", value_enum, default_value_t = Self::default().wire_dense)]
    pub wire_dense: ValueType,
    /// Type of everything in the warm-up's dense rounds (and in ef21's first), both directions, unless the compressor is
    /// dense. int8 loses nothing that training would notice, and spares slow links most of the warm-up. ef21 and
    /// ef21m need f32.
    #[arg(long, env = "ARC_WIRE_WARMUP", value_enum, default_value_t = Self::default().wire_warmup)]
    pub wire_warmup: ValueType,
    /// Values that share a scale in int8 and int4, 8..=4096.
    #[arg(long, env = "ARC_QUANT_BLOCK", default_value_t = Self::default().quant_block)]
    pub quant_block: u32,
    /// Dense updates before compression starts.
    #[arg(long, alias = "warmup", env = "ARC_WARMUP_UPDATES", default_value_t = Self::default().warmup_updates)]
    pub warmup_updates: u64,
    /// Updates over which the density falls geometrically from 1 to its value after the warm-up; 0 jumps.
    #[arg(long, alias = "ramp", env = "ARC_RAMP_UPDATES", default_value_t = Self::default().ramp_updates)]
    pub ramp_updates: u64,
    /// Seed of everything random: initial parameters, order of the data, projections, randk's rows.
    #[arg(long, env = "ARC_SEED", default_value_t = Self::default().seed)]
    pub seed: u64,
    /// Bucket size, bytes of f32 gradient: tensors that travel together.
    #[arg(long, env = "ARC_BUCKET_BYTES", default_value_t = Self::default().bucket_bytes)]
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
            energy: 1.0,
            sketch_rank: 4,
            projection: ProjectionKind::Rademacher,
            selection: SelectionPolicy::PerTensor,
            block_width: 0,
            dense_below_elements: 1024,
            wire_up: ValueType::Int4,
            wire_down: ValueType::Int4,
            wire_sketch: ValueType::Int8,
            wire_dense: ValueType::F32,
            wire_warmup: ValueType::Int8,
            quant_block: 64,
            warmup_updates: 20,
            ramp_updates: 0,
            seed: 0,
            bucket_bytes: 25 << 20,
        }
    }
}

/// Most updates that the warm-up and the ramp may each last: above any job, and their sum is far from an overflow.
pub const MAX_SCHEDULE_UPDATES: u64 = 1 << 40;

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
    /// Checks every range.
    ///
    /// # Errors
    /// The first setting outside its range: its name and value, what is accepted, what to set.
    pub fn validate(&self) -> Result<(), SettingError> {
        let share = |v: f32| v > 0.0 && v <= 1.0;
        check_density(self.density)?;
        self.validate_energy()?;
        let advice = "it is the weight of the newest gradient in ef21m's average; 0.1 is usual, 1 turns ef21m into ef21";
        require(
            share(self.eta),
            "eta",
            self.eta,
            "above 0 and at most 1",
            advice,
        )?;
        let advice =
            "it scales the residual in each step; 1 loses nothing, 0.95 forgets old gradients";
        require(
            share(self.feedback_decay),
            "feedback_decay",
            self.feedback_decay,
            "above 0 and at most 1",
            advice,
        )?;
        let advice = "it is the number of sketch entries per row; 4 is the paper's, more costs bytes for a slightly better choice";
        require(
            (1..=64).contains(&self.sketch_rank),
            "sketch_rank",
            self.sketch_rank,
            "1 to 64",
            advice,
        )?;
        let advice = "it is how many int8 or int4 values share a scale; 64 is a good value, smaller is more exact and larger";
        require(
            (8..=4096).contains(&self.quant_block),
            "quant_block",
            self.quant_block,
            "8 to 4096",
            advice,
        )?;
        let advice = "a narrower row costs more in sketch than it saves; 0 keeps each tensor's own rows, 64 or 128 are finer than most";
        let block = self.block_width;
        require(
            block == 0 || (8..=1 << 20).contains(&block),
            "block_width",
            block,
            "0, or 8 to 1048576",
            advice,
        )?;
        let wide =
            block == 0 || self.compressor != Compressor::Arc || block > u32::from(self.sketch_rank);
        require(
            wide,
            "block_width",
            block,
            "0, or above sketch_rank",
            "a sketch as wide as its row saves nothing; use a multiple of 32",
        )?;
        let advice = "small buckets cost round trips, large ones delay the first exchange; 26214400 (25 MiB of f32 gradient) is usual";
        let bucket = self.bucket_bytes;
        require(
            (1024..=128 << 20).contains(&bucket),
            "bucket_bytes",
            bucket,
            "1024 to 134217728",
            advice,
        )?;
        let scored =
            self.selection == SelectionPolicy::PerTensor || self.compressor != Compressor::Randk;
        let advice = "randk draws rows without scores, so nothing can be pooled";
        require(
            scored,
            "selection",
            "pooled",
            "per-tensor with compressor randk",
            advice,
        )?;
        self.validate_schedule()?;
        self.validate_estimates()
    }

    fn validate_energy(&self) -> Result<(), SettingError> {
        let advice = "it is the share of the sketch's energy at which no more rows are chosen; 1 always sends the whole density, 0.8 less where \
                      fewer rows hold it";
        let energy = self.energy;
        require(
            energy > 0.0 && energy <= 1.0,
            "energy",
            energy,
            "above 0 and at most 1",
            advice,
        )?;
        require(
            energy == 1.0 || self.compressor == Compressor::Arc,
            "energy",
            energy,
            "1 unless the compressor is arc",
            "the others have no sketch whose energy could be told; leave energy out, or set compressor arc",
        )
    }

    fn validate_schedule(&self) -> Result<(), SettingError> {
        let schedule = [
            ("warmup_updates", self.warmup_updates),
            ("ramp_updates", self.ramp_updates),
        ];
        schedule.into_iter().try_for_each(|(name, updates)| {
            require(
                updates <= MAX_SCHEDULE_UPDATES,
                name,
                updates,
                "at most 1099511627776",
                "it is a number of updates; compressor dense never compresses",
            )
        })
    }

    /// ef21's H is the mean of the workers' h only while it moves by the exact mean of what they moved by.
    fn validate_estimates(&self) -> Result<(), SettingError> {
        let wires = [
            ("wire_down", self.wire_down),
            ("wire_dense", self.wire_dense),
            ("wire_warmup", self.wire_warmup),
        ];
        wires.into_iter().try_for_each(|(name, value_type)| {
            require(
                !self.keeps_estimates() || value_type == ValueType::F32,
                name,
                format!("{value_type:?}").to_lowercase(),
                "f32 with feedback ef21 or ef21m",
                "what rounding the mean loses would stay in their estimate for ever; wire_up may be any type, and feedback ef14 takes any",
            )
        })
    }

    /// The same job without compression.
    #[must_use]
    pub fn dense(&self) -> Self {
        Self {
            compressor: Compressor::Dense,
            // Nothing is sketched.
            energy: 1.0,
            ..self.clone()
        }
    }

    /// Whether workers keep ef21's estimates: h of their own gradient, and H, which must be the mean of all h. Without
    /// compression there is nothing to estimate.
    #[must_use]
    pub fn keeps_estimates(&self) -> bool {
        self.compressor != Compressor::Dense
            && matches!(self.feedback, Feedback::Ef21 | Feedback::Ef21m)
    }

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
    /// their own). Sparse rounds only; during the warm-up it is 1. The same bits on every machine.
    #[must_use]
    pub fn density_at(&self, update: u64, density: f32) -> f32 {
        let Some(since) = update.checked_sub(self.warmup_updates) else {
            return 1.0;
        };
        if since >= self.ramp_updates {
            return density;
        }
        // Geometric, so that each update multiplies the bytes by the same factor.
        let t = (since + 1) as f64 / (self.ramp_updates + 1) as f64;
        (exp(t * ln(f64::from(density))) as f32).min(1.0)
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

    /// How dense tensors travel, both ways, and everything if the compressor is dense.
    #[must_use]
    pub fn codec_dense(&self) -> ValueCodec {
        self.codec(self.wire_dense)
    }

    /// How everything travels in a dense round, both ways: `wire_warmup`, or `wire_dense` if the compressor is dense.
    #[must_use]
    pub fn codec_dense_round(&self) -> ValueCodec {
        match self.compressor {
            Compressor::Dense => self.codec_dense(),
            _ => self.codec(self.wire_warmup),
        }
    }

    /// Whether a dense tensor is ever rounded on its way up, so that it needs a residual.
    #[must_use]
    pub fn rounds_dense_tensors(&self) -> bool {
        self.codec_dense().is_lossy() || self.codec_dense_round().is_lossy()
    }

    fn codec(&self, value_type: ValueType) -> ValueCodec {
        ValueCodec {
            value_type,
            quant_block: self.quant_block as usize,
        }
    }
}
