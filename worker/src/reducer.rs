//! What a trainer sees: gradients in, results out, wherever the shards are.

use crate::backend::{DeviceFault, DeviceGradient, Lent};
use crate::step::{ImportError, SHARED_ARRAY, StepError, StepOutcome, TensorResult, WorkerState};
use arc_topk_common::ids::{Rank, RunId, Step, TensorId};
use arc_topk_common::plan::Plan;
use std::sync::Arc;

/// Tells, on whichever thread, which ranks are in the job and connected at that moment, by the latest news; ascending.
pub type LiveRanks = Arc<dyn Fn() -> Vec<Rank> + Send + Sync>;

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
    #[error("shard {shard} goes on without this worker: {detail} (with the state of a snapshot)")]
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

/// How a step begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepStart {
    /// The job has closed this step already, without this worker: its results come without gradients, so the trainer
    /// pushes none and calls [`Reducer::finish`] at once.
    pub behind: bool,
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

    /// The start of the job that this worker is a member of; `None` where jobs have no name.
    fn run(&self) -> Option<RunId> {
        None
    }

    /// Ranks that are in the job now, ascending, by the latest news. Those that are away for a moment are among them.
    fn members(&self) -> Vec<Rank> {
        (0..self.world()).map(Rank).collect()
    }

    /// A way to ask who is there while training goes on.
    fn live_ranks(&self) -> LiveRanks {
        let members = self.members();
        Arc::new(move || members.clone())
    }

    /// How many workers the steps wait for now.
    fn live_workers(&self) -> u16 {
        self.world()
    }

    /// Whether this worker does what one must do for all: validate, and complete a snapshot. It is the one of the lowest
    /// live rank. For a moment after a change two workers may hold themselves for it, or none.
    fn is_leader(&self) -> bool {
        self.rank() == Rank(0)
    }

    /// The plan.
    fn plan(&self) -> &Plan;

    /// Step at which this worker starts, as it told the shards when it joined; that of the state once one is imported.
    fn start_step(&self) -> Step;

    /// Opens a step.
    ///
    /// # Errors
    /// If the job has ended, or went on without this worker ([`ReduceError::Superseded`]).
    fn begin(&mut self) -> Result<StepStart, ReduceError>;

    /// Hands over a tensor's gradient. Its bucket is on its way as soon as it is complete.
    ///
    /// # Errors
    /// If the length is wrong, the tensor was pushed before, or the job has ended.
    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError>;

    /// [`push`](Reducer::push) without a copy, where the reducer can: while the step is open, the feedback state that a step which
    /// is skipped or breaks off falls back on lies in the gradient's own memory, and afterwards the result of
    /// [`for_each_result`](Reducer::for_each_result). Until [`give_back`](Reducer::give_back) the memory is the reducer's; after a
    /// skipped step, or an error, its content is of no use.
    ///
    /// # Errors
    /// As [`push`](Reducer::push).
    fn lend(&mut self, tensor: TensorId, gradient: Lent) -> Result<(), ReduceError> {
        self.push(tensor, gradient.values())
    }

    /// [`lend`](Reducer::lend) for a gradient on the GPU that this worker computes on. Its result lies there once the device has
    /// reached [`finished`](Reducer::finished), unless [`for_each_result`](Reducer::for_each_result) has values for it.
    ///
    /// # Errors
    /// As [`push`](Reducer::push), and if this worker does not compute on a GPU.
    fn lend_on_device(
        &mut self,
        tensor: TensorId,
        gradient: DeviceGradient,
    ) -> Result<(), ReduceError> {
        let _ = (tensor, gradient);
        Err(ReduceError::Step(StepError::Device(DeviceFault(
            "this worker takes no gradients on a GPU: copy them to main memory and push them"
                .to_owned(),
        ))))
    }

    /// After a step: an event of the device (a `CUevent`) that happens once the results lie where gradients were lent; `None`:
    /// they do already. It is good until the next call.
    fn finished(&mut self) -> Option<u64> {
        None
    }

    /// Whether the device that this worker computes on still works: what was read with
    /// [`for_each_result`](Reducer::for_each_result), [`finished`](Reducer::finished) or
    /// [`export_state`](Reducer::export_state) means nothing if it does not.
    ///
    /// # Errors
    /// If it does not.
    fn check_device(&self) -> Result<(), ReduceError> {
        Ok(())
    }

    /// Ends all loans of [`lend`](Reducer::lend). Call it after `for_each_result`, or a skipped step. False: a step is open, and
    /// they go on.
    fn give_back(&mut self) -> bool {
        true
    }

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

    /// Step, update and the part of the feedback state that is equal on all workers: the estimate H of ef21 and ef21m
    /// ([`SHARED_ARRAY`]), nothing under the other rules. Between steps only.
    fn export_shared(&mut self) -> WorkerState {
        let mut state = self.export_state();
        state
            .arrays
            .retain(|(name, _)| name.split('/').next() == Some(SHARED_ARRAY));
        state
    }

    /// The replica that this worker must [import](Reducer::import_state) before its first step, because it joined a job
    /// that runs: that of this run, at this step. `None` for those that start the job, and after the import.
    fn needs_snapshot(&self) -> Option<(RunId, Step)> {
        None
    }

    /// Whether shard 0 has asked this worker to upload its replica for one that joins. Ask between steps, after the
    /// results were applied; stays true until [`Reducer::donating`].
    fn donation_due(&self) -> bool {
        false
    }

    /// A copy of the replica before `step` is made and is being uploaded.
    fn donating(&mut self, step: Step) {
        let _ = step;
    }

    /// The upload of the replica before `step` has ended. `stored`: it is in the shards' store, and shard 0 is told so;
    /// otherwise a donation is due again.
    fn donation_ended(&mut self, step: Step, stored: bool) {
        let _ = (step, stored);
    }

    /// No more steps come from this worker, which may take a while to leave: the others are told not to wait for it.
    fn step_aside(&mut self) {}

    /// SHA-256 of all parameters before `step`, the next one, for shard 0 to compare with those of the others. Best effort.
    fn digest(&mut self, step: Step, digest: [u8; 32]) {
        let _ = (step, digest);
    }

    /// Passes a report on to the status page of shard 0. Best effort.
    fn report(&mut self, report: TrainReport);

    /// Leaves the job in order.
    fn leave(self: Box<Self>);
}
