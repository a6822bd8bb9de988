//! What a run tells while it goes on.

use crate::record::StepRecord;
use arc_topk_common::metrics::SnapshotEnd;

/// A validation pass.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Validation {
    /// Mean loss (nats per token or image).
    pub loss: f32,
    /// Share classified rightly (image tasks).
    pub accuracy: Option<f32>,
}

/// Watches a run: progress bars, logs.
pub trait Observer {
    /// A step is done. Its validation, if any, was announced before.
    fn on_step(&mut self, record: &StepRecord);

    /// The model was validated after this step.
    fn on_validation(&mut self, step: u64, validation: Validation) {
        let _ = (step, validation);
    }

    /// Something a person should know: the data used, a skipped update, a damaged checkpoint.
    fn on_message(&mut self, text: &str) {
        let _ = text;
    }

    /// A snapshot that was due, or a replica for a worker that joins, was uploaded (`bytes` in `seconds`), skipped or failed.
    fn on_snapshot(&mut self, end: SnapshotEnd, bytes: u64, seconds: f64) {
        let _ = (end, bytes, seconds);
    }

    /// Asked between steps: true ends the run in order, with a checkpoint if those are kept.
    fn should_stop(&mut self) -> bool {
        false
    }
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Observer for Quiet {
    fn on_step(&mut self, _record: &StepRecord) {}
}
