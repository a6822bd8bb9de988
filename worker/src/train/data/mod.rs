//! What is trained on. A batch follows from (seed, step, micro-batch, rank) alone, so the position in the data is
//! the step number: a resumed run needs nothing else.

mod builtin;
mod fashion;
mod text;

pub use builtin::builtin_text;
pub use fashion::Fashion;
pub use text::Text;

use arc_topk_common::config::train::{Task, TrainArgs};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::io;
use std::path::PathBuf;

/// Examples that go through the model together.
#[derive(Clone, PartialEq, Debug)]
pub enum Batch {
    /// Windows of text, one after the other.
    Tokens {
        /// Input tokens, windows·positions of them.
        inputs: Vec<u32>,
        /// For each input, the token that follows.
        targets: Vec<u32>,
        /// Windows.
        windows: usize,
    },
    /// Images.
    Images {
        /// Pixels, 28·28 each, in 0..=1.
        pixels: Vec<f32>,
        /// Classes.
        labels: Vec<u32>,
    },
}

impl Batch {
    /// Tokens or images.
    #[must_use]
    pub fn examples(&self) -> usize {
        match self {
            Self::Tokens { inputs, .. } => inputs.len(),
            Self::Images { labels, .. } => labels.len(),
        }
    }
}

/// Why data cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Nothing is there.
    #[error("no data at {}: {remedy}", path.display())]
    Missing {
        /// Path that was looked at.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// The file system refused.
    #[error("cannot read {}: {source}; check its permissions", path.display())]
    Read {
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A file that is not what its name says.
    #[error("{}: {detail}; {remedy}", path.display())]
    Format {
        /// File.
        path: PathBuf,
        /// What is wrong.
        detail: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Too little to train on.
    #[error("{} holds {tokens} tokens, but training and validation windows of {context} need at least {needed}: add text, or lower --context", path.display())]
    TooShort {
        /// File or directory.
        path: PathBuf,
        /// Tokens found.
        tokens: usize,
        /// Tokens per window.
        context: usize,
        /// Tokens needed.
        needed: usize,
    },
    /// The tokenizer knows more tokens than the model.
    #[error("token {token} of the tokenizer does not fit the model's vocabulary of {vocab}: pass --vocab {}", token + 1)]
    Vocabulary {
        /// Largest token found.
        token: u32,
        /// The model's.
        vocab: usize,
    },
}

/// Training and validation data of a task.
#[derive(Debug)]
pub enum Dataset {
    /// Text.
    Text(Text),
    /// Fashion-MNIST.
    Fashion(Fashion),
}

/// Names a batch: the same on every machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchKey {
    /// Seed of the job.
    pub seed: u64,
    /// Step.
    pub step: u64,
    /// Micro-batch within the step.
    pub micro_batch: u64,
    /// Rank of the worker.
    pub rank: u16,
}

impl BatchKey {
    fn rng(self) -> ChaCha8Rng {
        let mut key = [0u8; 32];
        let words = [self.seed, self.step, self.micro_batch, u64::from(self.rank)];
        for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        ChaCha8Rng::from_seed(key)
    }
}

/// A number in `0..bound`. The bias of the product method is below 2⁻³² for any data that fits in memory.
fn below(rng: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(rng.next_u64()) * bound as u128) >> 64) as usize
}

impl Dataset {
    /// Loads what the settings ask for. `--data builtin`, or none at all, takes the built-in text.
    ///
    /// # Errors
    /// If files are missing or broken; the error names the path and the remedy.
    pub fn load(args: &TrainArgs) -> Result<Self, DataError> {
        match args.task {
            Task::Lm => Ok(Self::Text(Text::load(args)?)),
            Task::Fashion => Ok(Self::Fashion(Fashion::load(args.data.as_deref())?)),
        }
    }

    /// What it is, for people.
    #[must_use]
    pub fn description(&self) -> &str {
        match self {
            Self::Text(text) => text.description(),
            Self::Fashion(fashion) => fashion.description(),
        }
    }

    /// The training batch of `size` windows (of `context` tokens) or images.
    #[must_use]
    pub fn training_batch(&self, key: BatchKey, size: usize, context: usize) -> Batch {
        let mut rng = key.rng();
        match self {
            Self::Text(text) => text.training_batch(|bound| below(&mut rng, bound), size, context),
            Self::Fashion(fashion) => fashion.training_batch(|bound| below(&mut rng, bound), size),
        }
    }

    /// Up to `batches` validation batches, always the same ones.
    #[must_use]
    pub fn validation_batches(&self, batches: usize, size: usize, context: usize) -> Vec<Batch> {
        match self {
            Self::Text(text) => text.validation_batches(batches, size, context),
            Self::Fashion(fashion) => fashion.validation_batches(batches, size),
        }
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::write_fashion;
