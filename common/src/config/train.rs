//! What the built-in trainer is told. All of it must be equal on all workers, except where it says otherwise.

use super::setting::{SettingError, require};
use clap::builder::FalseyValueParser;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What is trained.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// A LLaMA-style decoder on text.
    #[default]
    Lm,
    /// A small convolutional network on Fashion-MNIST.
    Fashion,
}

/// Size of the decoder (hidden/intermediate/layers/heads).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ModelPreset {
    /// 128/344/4/4: trains on a laptop in minutes.
    #[default]
    Tiny,
    /// LLaMA-60M: 512/1376/8/8.
    #[value(name = "60m")]
    #[serde(rename = "60m")]
    M60,
    /// LLaMA-130M: 768/2048/12/12.
    #[value(name = "130m")]
    #[serde(rename = "130m")]
    M130,
    /// LLaMA-350M: 1024/2736/24/16.
    #[value(name = "350m")]
    #[serde(rename = "350m")]
    M350,
    /// LLaMA-1B: 2048/5461/24/32.
    #[value(name = "1b")]
    #[serde(rename = "1b")]
    B1,
}

/// Dimensions of the decoder.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ModelShape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention heads; each is hidden/heads wide.
    pub heads: usize,
    /// Positions of a training sequence.
    pub context: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

impl ModelPreset {
    /// Dimensions of the preset. The vocabulary is 256 bytes for tiny and 32000 for the others.
    #[must_use]
    pub fn shape(self) -> ModelShape {
        let (hidden, intermediate, layers, heads, context, vocab) = match self {
            Self::Tiny => (128, 344, 4, 4, 128, 256),
            Self::M60 => (512, 1376, 8, 8, 256, 32000),
            Self::M130 => (768, 2048, 12, 12, 256, 32000),
            Self::M350 => (1024, 2736, 24, 16, 256, 32000),
            Self::B1 => (2048, 5461, 24, 32, 256, 32000),
        };
        ModelShape {
            hidden,
            intermediate,
            layers,
            heads,
            context,
            vocab,
        }
    }
}

/// Update rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerChoice {
    /// SGD with momentum.
    Sgd,
    /// AdamW; with sparse rows it lags, see catch-up-adamw.
    #[value(name = "adamw")]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW that knows how many steps a row's gradient stands for. Equal to adamw in dense training.
    #[default]
    #[value(name = "catchup-adamw")]
    #[serde(rename = "catchup-adamw")]
    CatchUpAdamW,
}

/// Settings of the trainer.
#[derive(Clone, PartialEq, Debug, Serialize, Args)]
#[command(next_help_heading = "Training")]
pub struct TrainArgs {
    /// What is trained.
    #[arg(long, env = "ARC_TASK", value_enum, default_value_t = Task::Lm)]
    pub task: Task,
    /// Size of the decoder.
    #[arg(long, env = "ARC_MODEL", value_enum, default_value_t = ModelPreset::Tiny)]
    pub model: ModelPreset,
    /// Width of the residual stream, instead of the preset's. A multiple of twice the heads.
    #[arg(long, env = "ARC_HIDDEN")]
    pub hidden: Option<usize>,
    /// Width of the feed-forward layer, instead of the preset's.
    #[arg(long, env = "ARC_INTERMEDIATE")]
    pub intermediate: Option<usize>,
    /// Decoder layers, instead of the preset's.
    #[arg(long, env = "ARC_LAYERS")]
    pub layers: Option<usize>,
    /// Attention heads, instead of the preset's.
    #[arg(long, env = "ARC_HEADS")]
    pub heads: Option<usize>,
    /// Tokens of a training sequence, instead of the preset's.
    #[arg(long, env = "ARC_CONTEXT")]
    pub context: Option<usize>,
    /// Tokens of the vocabulary, instead of the tokenizer's.
    #[arg(long, env = "ARC_VOCAB")]
    pub vocab: Option<usize>,
    /// Text file, or directory of text files (lm) or IDX files (fashion). Without it a small built-in text is used.
    #[arg(long, value_name = "PATH", env = "ARC_DATA")]
    pub data: Option<PathBuf>,
    /// `byte` (256 tokens, no file), or a Hugging Face `tokenizer.json`.
    #[arg(
        long,
        value_name = "byte|FILE",
        env = "ARC_TOKENIZER",
        default_value = "byte"
    )]
    pub tokenizer: String,
    /// Sequences (lm) or images (fashion) of a micro-batch on each worker.
    #[arg(long, env = "ARC_BATCH", default_value_t = 8)]
    pub batch: usize,
    /// Micro-batches whose gradients are averaged before each exchange. Raise it if communication dominates.
    #[arg(long, env = "ARC_ACCUMULATION", default_value_t = 1)]
    pub accumulation: usize,
    /// Update rule.
    #[arg(long, env = "ARC_OPTIMIZER", value_enum, default_value_t = OptimizerChoice::CatchUpAdamW)]
    pub optimizer: OptimizerChoice,
    /// Peak learning rate.
    #[arg(long, env = "ARC_LR", default_value_t = 2e-3)]
    pub lr: f32,
    /// Learning rate at the end of the cosine schedule, as a share of the peak.
    #[arg(long, env = "ARC_LR_MIN_RATIO", default_value_t = 0.1)]
    pub lr_min_ratio: f32,
    /// Steps over which the learning rate rises to its peak.
    #[arg(long, env = "ARC_LR_WARMUP", default_value_t = 20)]
    pub lr_warmup: u64,
    /// Steps to train: one step is one update of the model.
    #[arg(long, env = "ARC_STEPS", default_value_t = 300)]
    pub steps: u64,
    /// Decoupled weight decay of matrices.
    #[arg(long, env = "ARC_WEIGHT_DECAY", default_value_t = 0.01)]
    pub weight_decay: f32,
    /// Decay of the first moment.
    #[arg(long, env = "ARC_BETA1", default_value_t = 0.9)]
    pub beta1: f32,
    /// Decay of the second moment.
    #[arg(long, env = "ARC_BETA2", default_value_t = 0.99)]
    pub beta2: f32,
    /// Term that keeps AdamW's quotient finite.
    #[arg(long, env = "ARC_EPSILON", default_value_t = 1e-8)]
    pub epsilon: f32,
    /// Momentum of sgd.
    #[arg(long, env = "ARC_MOMENTUM", default_value_t = 0.9)]
    pub momentum: f32,
    /// Largest norm of the averaged gradient; 0 does not clip.
    #[arg(long, env = "ARC_CLIP", default_value_t = 1.0)]
    pub clip: f32,
    /// Most steps that catch-up AdamW makes up for in a row that was long absent. 8 bears high learning rates.
    #[arg(
        long,
        value_name = "STEPS",
        env = "ARC_CATCH_UP_CAP",
        default_value_t = 20
    )]
    pub catch_up_cap: u32,
    /// Steps between validations; 0 validates only at the end.
    #[arg(
        long,
        value_name = "STEPS",
        env = "ARC_VALIDATE_EVERY",
        default_value_t = 50
    )]
    pub validate_every: u64,
    /// Batches of a validation.
    #[arg(
        long,
        value_name = "BATCHES",
        env = "ARC_VALIDATE_BATCHES",
        default_value_t = 8
    )]
    pub validate_batches: usize,
    /// Directory for checkpoints. Without it none are written.
    #[arg(long, value_name = "DIR", env = "ARC_CHECKPOINT_DIR")]
    pub checkpoint_dir: Option<PathBuf>,
    /// Steps between checkpoints; 0 writes one at the end.
    #[arg(
        long,
        value_name = "STEPS",
        env = "ARC_CHECKPOINT_EVERY",
        default_value_t = 0
    )]
    pub checkpoint_every: u64,
    /// Steps between snapshots in the shards' store, from which a whole job can go on with `--resume`, also with another
    /// number of workers; 0 makes none. Uploads run beside training, one at a time: a step costs a copy of the model.
    #[arg(
        long,
        value_name = "STEPS",
        env = "ARC_SNAPSHOT_EVERY",
        default_value_t = 0
    )]
    pub snapshot_every: u64,
    /// Steps between comparisons of all workers' parameters by their SHA-256; 0 makes none. A difference is a defect of
    /// hardware or program, and is reported loudly.
    #[arg(
        long,
        value_name = "STEPS",
        env = "ARC_DIGEST_EVERY",
        default_value_t = 100
    )]
    pub digest_every: u64,
    /// Goes on from the newest checkpoint in `--checkpoint-dir`; if there is none, from the newest snapshot in the
    /// shards' store; if there is none either, from the start.
    #[arg(long, env = "ARC_RESUME", value_parser = FalseyValueParser::new())]
    pub resume: bool,
    /// Directory for this run's records (`steps.jsonl`, `summary.json`). May differ between workers.
    #[arg(long, value_name = "DIR", env = "ARC_RUN_DIR")]
    pub run_dir: Option<PathBuf>,
    /// Threads for mathematics; 0 takes one per core. May differ between workers: results do not.
    #[arg(long, value_name = "N", env = "ARC_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// Prints one JSON object per step instead of progress for people.
    #[arg(long, env = "ARC_JSON", value_parser = FalseyValueParser::new())]
    pub json: bool,
}

impl TrainArgs {
    /// Dimensions of the decoder: the preset's with the overrides. The byte tokenizer has 256 tokens.
    #[must_use]
    pub fn model_shape(&self) -> ModelShape {
        let preset = self.model.shape();
        let vocab = if self.tokenizer == "byte" {
            256
        } else {
            preset.vocab
        };
        ModelShape {
            hidden: self.hidden.unwrap_or(preset.hidden),
            intermediate: self.intermediate.unwrap_or(preset.intermediate),
            layers: self.layers.unwrap_or(preset.layers),
            heads: self.heads.unwrap_or(preset.heads),
            context: self.context.unwrap_or(preset.context),
            vocab: self.vocab.unwrap_or(vocab),
        }
    }

    /// Checks every range.
    ///
    /// # Errors
    /// The first setting outside its range: its name and value, what is accepted, what to set.
    pub fn validate(&self) -> Result<(), SettingError> {
        self.validate_model()?;
        self.validate_optimizer()?;
        require(
            (1..=1 << 16).contains(&self.batch),
            "batch",
            self.batch,
            "1 to 65536",
            "8 is usual for tiny",
        )?;
        let advice = "it is micro-batches per update; 1 exchanges after every one";
        require(
            (1..=1 << 16).contains(&self.accumulation),
            "accumulation",
            self.accumulation,
            "1 to 65536",
            advice,
        )?;
        require(
            self.steps >= 1,
            "steps",
            self.steps,
            "1 or more",
            "300 shows a falling loss",
        )?;
        let advice = "it is batches per validation; 8 is usual";
        require(
            self.validate_batches >= 1,
            "validate_batches",
            self.validate_batches,
            "1 or more",
            advice,
        )?;
        let kept = self.checkpoint_dir.is_some() || self.checkpoint_every == 0;
        let advice = "checkpoints need a place: pass --checkpoint-dir DIR with --checkpoint-every";
        require(kept, "checkpoint_dir", "not set", "a directory", advice)
    }

    fn validate_model(&self) -> Result<(), SettingError> {
        let shape = self.model_shape();
        let sized = |v: usize, most: usize| (1..=most).contains(&v);
        require(
            sized(shape.layers, 512),
            "layers",
            shape.layers,
            "1 to 512",
            "4 is tiny, 24 is 1b",
        )?;
        require(
            sized(shape.heads, 256),
            "heads",
            shape.heads,
            "1 to 256",
            "4 is tiny, 32 is 1b",
        )?;
        let advice = "each head takes hidden/heads, an even number for rotary positions";
        let even = sized(shape.hidden, 1 << 16) && shape.hidden.is_multiple_of(2 * shape.heads);
        require(
            even,
            "hidden",
            shape.hidden,
            "a multiple of 2·heads, at most 65536",
            advice,
        )?;
        let advice = "about 8/3 of hidden is usual";
        require(
            sized(shape.intermediate, 1 << 18),
            "intermediate",
            shape.intermediate,
            "1 to 262144",
            advice,
        )?;
        let advice = "it is tokens per sequence; 128 is tiny, 256 the others";
        require(
            (2..=1 << 16).contains(&shape.context),
            "context",
            shape.context,
            "2 to 65536",
            advice,
        )?;
        let advice = "the byte tokenizer needs 256, others what their file says";
        let least = if self.tokenizer == "byte" { 256 } else { 2 };
        require(
            (least..=1 << 20).contains(&shape.vocab),
            "vocab",
            shape.vocab,
            "at least the tokenizer's, at most 1048576",
            advice,
        )
    }

    fn validate_optimizer(&self) -> Result<(), SettingError> {
        let positive = self.lr.is_finite() && self.lr > 0.0;
        require(
            positive,
            "lr",
            self.lr,
            "a positive number",
            "1e-3 to 4e-3 suits adamw on tiny; halve it if the loss jumps",
        )?;
        let share = |v: f32| (0.0..=1.0).contains(&v);
        let decay = |v: f32| (0.0..1.0).contains(&v);
        require(
            share(self.lr_min_ratio),
            "lr_min_ratio",
            self.lr_min_ratio,
            "0 to 1",
            "0.1 is usual, 1 keeps the rate constant",
        )?;
        let advice = "it is a share per step, times the learning rate; 0.01 to 0.1 is usual";
        require(
            share(self.weight_decay),
            "weight_decay",
            self.weight_decay,
            "0 to 1",
            advice,
        )?;
        require(
            decay(self.beta1),
            "beta1",
            self.beta1,
            "at least 0 and below 1",
            "0.9 is usual",
        )?;
        require(
            decay(self.beta2),
            "beta2",
            self.beta2,
            "at least 0 and below 1",
            "0.95 to 0.999 is usual",
        )?;
        require(
            decay(self.momentum),
            "momentum",
            self.momentum,
            "at least 0 and below 1",
            "0.9 is usual",
        )?;
        let epsilon = self.epsilon > 0.0 && self.epsilon < 1.0;
        require(
            epsilon,
            "epsilon",
            self.epsilon,
            "above 0 and below 1",
            "1e-8 is usual",
        )?;
        let clip = self.clip.is_finite() && self.clip >= 0.0;
        require(
            clip,
            "clip",
            self.clip,
            "0 or more",
            "1 is usual, 0 does not clip",
        )?;
        let advice = "8 bears high learning rates, 20 is usual";
        require(
            (1..=1000).contains(&self.catch_up_cap),
            "catch_up_cap",
            self.catch_up_cap,
            "1 to 1000",
            advice,
        )
    }
}
