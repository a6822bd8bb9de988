//! What a step did, in numbers.

use crate::backend::DeviceStats;
use arc_topk_common::config::algorithm::RoundKind;
use arc_topk_common::ids::Step;

/// Bytes by kind, one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ByteCounts {
    /// Sketches.
    pub sketch: u64,
    /// Chosen rows (and topk's indices).
    pub selection: u64,
    /// Values of chosen rows.
    pub values: u64,
    /// Dense tensors, and everything in dense rounds.
    pub dense: u64,
    /// Frame headers; a session adds its control messages to the step in which they went.
    pub control: u64,
}

impl ByteCounts {
    /// All kinds together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.sketch + self.selection + self.values + self.dense + self.control
    }
}

impl core::ops::AddAssign for ByteCounts {
    fn add_assign(&mut self, other: Self) {
        self.sketch += other.sketch;
        self.selection += other.selection;
        self.values += other.values;
        self.dense += other.dense;
        self.control += other.control;
    }
}

/// Measurements of one step on one worker.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct StepStats {
    /// Bytes that this worker sent.
    pub sent: ByteCounts,
    /// Bytes that it received.
    pub received: ByteCounts,
    /// Bytes of all gradients as f32: what dense averaging would have sent, one direction.
    pub dense_equivalent_bytes: u64,
    /// ‖A\[I\]‖²/‖A‖² of this worker's own A over the compressible tensors; `None` in dense rounds and between measurements.
    pub captured_energy: Option<f32>,
    /// Elements of compressible tensors that came over all of them (1 in dense rounds).
    pub density: f32,
    /// ‖g‖ of this worker over all tensors; `None` between measurements.
    pub gradient_norm: Option<f32>,
    /// ‖A − C(A)‖ over all tensors after the step; `None` between measurements.
    pub residual_norm: Option<f32>,
    /// Rounds of the step, 0 if it was skipped.
    pub rounds: u32,
    /// Those that hold all of this worker's contribution. Fewer than `rounds`: it was late, or abstained.
    pub rounds_counted: u32,
    /// Seconds spent in compression; the driver of the machine fills it in.
    pub compress_seconds: f64,
    /// Seconds spent waiting for shards after the last gradient was pushed; the driver fills it in.
    pub wait_seconds: f64,
    /// What the device did since the last step ended, and what lies on it; `None` on the CPU. Times are of kernels whose end is
    /// known: those of this commit come with the next step.
    pub device: Option<DeviceStats>,
}

impl StepStats {
    /// ‖residual‖/‖gradient‖, when both were measured and the gradient is not zero.
    #[must_use]
    pub fn residual_ratio(&self) -> Option<f32> {
        match (self.residual_norm, self.gradient_norm) {
            (Some(residual), Some(gradient)) if gradient > 0.0 => Some(residual / gradient),
            _ => None,
        }
    }
}

/// How a step ended. The same on every worker but for `stats`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StepOutcome {
    /// The step that ended.
    pub step: Step,
    /// Its update number (skipped ones not counted).
    pub update: u64,
    /// Some worker's gradient was not finite: nothing changed, there is no result.
    pub skipped: bool,
    /// What the compressible tensors did.
    pub kind: RoundKind,
    /// Measurements.
    pub stats: StepStats,
}
