//! A worker's feedback state outside of the machine, for checkpoints.

use arc_topk_common::ids::Step;

/// Everything that a worker must keep to continue to the bit.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct WorkerState {
    /// Next step.
    pub step: Step,
    /// Next update (skipped steps not counted).
    pub update: u64,
    /// Feedback state as `array/tensor name` (`residual/embed.weight`), each rows·width long, in the order of the plan.
    pub arrays: Vec<(String, Vec<f32>)>,
}

/// Name of a tensor's array.
pub(super) fn array_name(array: &str, tensor: &str) -> String {
    format!("{array}/{tensor}")
}
