//! What can go wrong in a step.

use crate::backend::DeviceFault;
use arc_topk_common::ids::{BucketId, ShardId, Step};
use arc_topk_common::wire::{FrameKind, WireError};

/// A call or a frame that does not fit the step. Feedback state is untouched by any of them.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum StepError {
    /// The gradient has another number of elements than the registered tensor.
    #[error(
        "gradient of {tensor} has {actual} elements, but {expected} were registered: push the gradient of the parameter that was registered under this name"
    )]
    GradientLength {
        /// Tensor.
        tensor: String,
        /// Registered elements.
        expected: usize,
        /// Given elements.
        actual: usize,
    },
    /// The tensor has already been pushed in this step, or counted as absent.
    #[error(
        "{tensor} was pushed twice in step {step}: sum the gradients of micro-batches and push once per update, before flush"
    )]
    FilledTwice {
        /// Tensor.
        tensor: String,
        /// Step.
        step: Step,
    },
    /// A tensor id beyond the plan.
    #[error(
        "tensor {tensor} was pushed, but the plan has {tensors}: register every parameter before the first step"
    )]
    UnknownTensor {
        /// Id.
        tensor: u32,
        /// Tensors of the plan.
        tensors: usize,
    },
    /// Called outside of a step.
    #[error(
        "no step is open: call begin before pushing gradients, and commit after the last round"
    )]
    NotBegun,
    /// A frame of another step or update.
    #[error(
        "shard {shard} answered for step {got_step} (update {got_update}) in step {step} (update {update}): it is out of step with this worker; restart the job from a checkpoint"
    )]
    WrongStep {
        /// Shard.
        shard: ShardId,
        /// Current.
        step: Step,
        /// Current.
        update: u64,
        /// Received.
        got_step: Step,
        /// Received.
        got_update: u64,
    },
    /// A frame for a round that is not held, or not in this state.
    #[error(
        "shard {shard} sent {kind:?} for bucket {bucket}, whose round is {state}: the peers' versions differ, or a frame was sent twice"
    )]
    UnexpectedFrame {
        /// Shard.
        shard: ShardId,
        /// Bucket.
        bucket: BucketId,
        /// Kind.
        kind: FrameKind,
        /// State of the round.
        state: &'static str,
    },
    /// A second answer to the same frame, with other bytes.
    #[error(
        "shard {shard} answered {kind:?} of step {step}, bucket {bucket} twice and differently: the job has gone two ways; restart this worker, it takes the state of a snapshot"
    )]
    AnswerDiffers {
        /// Shard.
        shard: ShardId,
        /// Bucket.
        bucket: BucketId,
        /// Kind.
        kind: FrameKind,
        /// Step.
        step: Step,
    },
    /// The body cannot be read.
    #[error("answer of shard {shard} for bucket {bucket}: {source}")]
    Body {
        /// Shard.
        shard: ShardId,
        /// Bucket.
        bucket: BucketId,
        /// Cause.
        source: WireError,
    },
    /// The device that this worker computes on does not work any more.
    #[error(transparent)]
    Device(DeviceFault),
}

/// Saved feedback state that does not fit the plan. Nothing was imported.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum ImportError {
    /// A tensor's array is not there.
    #[error(
        "saved state has no {array} of {tensor}: it was made with another feedback rule or model; start without it, or use the settings that made it"
    )]
    Missing {
        /// Array.
        array: &'static str,
        /// Tensor.
        tensor: String,
    },
    /// A tensor's array has another length.
    #[error(
        "saved {array} of {tensor} has {actual} elements, but {expected} are needed: the model or block_width changed; use the settings that made it"
    )]
    Length {
        /// Array.
        array: &'static str,
        /// Tensor.
        tensor: String,
        /// By the plan.
        expected: usize,
        /// Saved.
        actual: usize,
    },
    /// An array that no tensor of the plan has.
    #[error(
        "saved state holds {name}, which this plan does not have: it was made for another model or feedback rule"
    )]
    Unknown {
        /// Full name.
        name: String,
    },
    /// A step is open.
    #[error("state can be imported only between steps: commit the open step first")]
    StepOpen,
}
