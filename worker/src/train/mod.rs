//! The built-in trainer: models on candle, data, the loop, checkpoints.
//!
//! [`run`] trains one worker with any [`Reducer`](crate::reducer::Reducer). Everything that decides the result comes from the settings, the
//! seed (the plan's) and the step number, so a run can be repeated, and resumed from a checkpoint, to the bit, with
//! any number of threads. [`Trainer`] is one worker's share without the loop, for programs with a loop of their own.

mod checkpoint;
pub mod data;
mod local;
pub mod model;
mod observer;
mod run;
mod schedule;
#[cfg(test)]
mod tests;
mod trainer;

pub use checkpoint::{Arrays, Checkpoint, CheckpointError, CheckpointStore};
pub use local::LocalReducer;
pub use observer::{Observer, Quiet, Validation};
pub use run::{ResumePoint, TrainConfig, agreed_settings, resume_point, run, run_on};
pub use schedule::Schedule;
pub use trainer::{Push, Results, Trainer, optimizer_config, parameters, use_threads};

use crate::record::RecordError;
use crate::reducer::ReduceError;
use arc_topk_common::ids::Step;

/// Why training stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Settings out of range.
    #[error(transparent)]
    Setting(#[from] arc_topk_common::config::SettingError),
    /// No usable data.
    #[error(transparent)]
    Data(#[from] data::DataError),
    /// The model cannot be made or run.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// The other workers or the shards.
    #[error(transparent)]
    Reduce(#[from] ReduceError),
    /// A checkpoint cannot be written or used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Records cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// This worker would start elsewhere than the job.
    #[error(
        "the job starts at {joined}, but rank {rank} would start at {here}, since {} checkpoint of that rank is used here: \
         start every worker with the same --checkpoint-dir and --resume, and with the --rank whose checkpoints it has",
        if *here == Step(0) { "no" } else { "a" }
    )]
    StartStep {
        /// Rank of this worker.
        rank: u16,
        /// Where the job starts.
        joined: Step,
        /// Where this worker would.
        here: Step,
    },
    /// The plan was made for another model.
    #[error(
        "the plan does not fit the model: {detail}; build the plan from train::parameters of the same settings"
    )]
    Plan {
        /// First difference.
        detail: String,
    },
}
