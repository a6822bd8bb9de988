//! What a trainer sees: gradients in, results out, wherever the shards are.

use crate::step::{ImportError, StepError, StepOutcome, TensorResult, WorkerState};
use arc_topk_common::ids::{Rank, Step, TensorId};
use arc_topk_common::plan::Plan;

/// Why a step could not be finished.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum ReduceError {
    /// A call or a frame did not fit the step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// Saved state does not fit.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A shard refused this worker or ended the job. The text names cause and remedy.
    #[error("shard {shard} ended the session ({code}): {detail}")]
    Refused {
        /// Shard.
        shard: u16,
        /// Reason code.
        code: String,
        /// Cause and remedy.
        detail: String,
    },
    /// The job went on without this worker, further than it can follow. It may join again, with the state of a snapshot.
    #[error(
        "shard {shard} goes on without this worker: {detail}; join again, with the state of a snapshot"
    )]
    Superseded {
        /// Shard.
        shard: u16,
        /// What happened.
        detail: String,
    },
    /// A connection was lost.
    #[error("connection to shard {shard} is lost: {detail}")]
    Disconnected {
        /// Shard.
        shard: u16,
        /// Cause and remedy.
        detail: String,
    },
    /// A shard keeps its connection but does not answer.
    #[error(
        "no shard answered for {seconds:.0} s while {rounds} rounds waited, the first at shard {shard}, bucket {bucket}, after its {sent} was sent: \
         another worker is stuck or far behind (see the shard's status page), or raise --progress-timeout-seconds"
    )]
    Stalled {
        /// Shard of the first round that waits.
        shard: u16,
        /// Its bucket.
        bucket: u16,
        /// Kind of the frame that it was sent last.
        sent: String,
        /// Rounds that wait.
        rounds: usize,
        /// How long nothing came.
        seconds: f32,
    },
    /// The session's own machinery ended.
    #[error("the session has ended: {detail}")]
    Ended {
        /// Cause and remedy.
        detail: String,
    },
    /// Saved state belongs to another step than this worker joined with.
    #[error(
        "the checkpoint continues at step {state}, but this worker joined the job at step {joined}: connect with the checkpoint's step as start step"
    )]
    StartStep {
        /// As told to the shards.
        joined: Step,
        /// Of the checkpoint.
        state: Step,
    },
}

/// What the trainer knows about a finished step, for the status pages.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TrainReport {
    /// Step just finished.
    pub step: Step,
    /// Training loss.
    pub loss: f32,
    /// Seconds of the whole step.
    pub step_seconds: f32,
    /// Seconds of it in which the trainer waited for communication.
    pub wait_seconds: f32,
}

/// Averages gradients with the other workers of a job.
///
/// A step is [`begin`](Reducer::begin), [`push`](Reducer::push) for every tensor (in any order, best in that of
/// backward; tensors left out count as zeros), [`finish`](Reducer::finish), then
/// [`for_each_result`](Reducer::for_each_result) unless the outcome says `skipped`.
pub trait Reducer: Send {
    /// Rank of this worker.
    fn rank(&self) -> Rank;

    /// Number of workers that started the job.
    fn world(&self) -> u16;

    /// The plan.
    fn plan(&self) -> &Plan;

    /// Step at which this worker starts, as it told the shards when it joined; that of the state once one is imported.
    fn start_step(&self) -> Step;

    /// Opens a step.
    ///
    /// # Errors
    /// If the job has ended.
    fn begin(&mut self) -> Result<(), ReduceError>;

    /// Hands over a tensor's gradient. Its bucket is on its way as soon as it is complete.
    ///
    /// # Errors
    /// If the length is wrong, the tensor was pushed before, or the job has ended.
    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError>;

    /// Waits until every round of the step has closed, and commits.
    ///
    /// # Errors
    /// If the job has ended; feedback state is then that of the last finished step.
    fn finish(&mut self) -> Result<StepOutcome, ReduceError>;

    /// Calls `f` with every tensor's result of the step just finished, in the order of registration. Not at all after a skipped step.
    fn for_each_result(&mut self, f: &mut dyn FnMut(TensorResult<'_>));

    /// Step, update and feedback state, exactly, for a checkpoint.
    fn export_state(&mut self) -> WorkerState;

    /// Continues from a checkpoint. Before the first step only.
    ///
    /// # Errors
    /// If the state does not fit the plan; the error names the tensor.
    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError>;

    /// Passes a report on to the status page of shard 0. Best effort.
    fn report(&mut self, report: TrainReport);

    /// Leaves the job in order.
    fn leave(self: Box<Self>);
}
