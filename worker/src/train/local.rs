//! One worker without shards: the result is its own gradient.

use crate::reducer::{ReduceError, Reducer, StepStart, TrainReport};
use crate::step::{
    ImportError, RowsCame, StepError, StepOutcome, StepStats, TensorResult, WorkerState,
};
use arc_topk_common::config::algorithm::RoundKind;
use arc_topk_common::ids::{Rank, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanError, PlanSpec};
use std::sync::Arc;

/// Trains alone: nothing is compressed and nothing is sent. For single-machine runs and as a control in tests.
#[derive(Debug)]
pub struct LocalReducer {
    plan: Arc<Plan>,
    gradients: Vec<Vec<f32>>,
    open: bool,
    finite: bool,
    step: Step,
    update: u64,
}

impl LocalReducer {
    /// A reducer for the tensors of `spec`.
    ///
    /// # Errors
    /// If the spec gives no plan.
    pub fn new(spec: PlanSpec) -> Result<Self, PlanError> {
        let plan = Arc::new(Plan::build(spec)?);
        let gradients = plan
            .tensors
            .iter()
            .map(|tensor| vec![0.0; tensor.elements])
            .collect();
        Ok(Self {
            plan,
            gradients,
            open: false,
            finite: true,
            step: Step(0),
            update: 0,
        })
    }
}

impl Reducer for LocalReducer {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn world(&self) -> u16 {
        1
    }

    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn start_step(&self) -> Step {
        self.step
    }

    fn begin(&mut self) -> Result<StepStart, ReduceError> {
        self.gradients
            .iter_mut()
            .for_each(|gradient| gradient.fill(0.0));
        (self.open, self.finite) = (true, true);
        Ok(StepStart::default())
    }

    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
        if !self.open {
            return Err(StepError::NotBegun.into());
        }
        let tensors = self.gradients.len();
        let Some(kept) = self.gradients.get_mut(tensor.index()) else {
            return Err(StepError::UnknownTensor {
                tensor: tensor.0,
                tensors,
            }
            .into());
        };
        if kept.len() != gradient.len() {
            let (name, expected) = (
                self.plan.tensors[tensor.index()].spec.name.clone(),
                kept.len(),
            );
            return Err(StepError::GradientLength {
                tensor: name,
                expected,
                actual: gradient.len(),
            }
            .into());
        }
        kept.copy_from_slice(gradient);
        self.finite &= gradient.iter().all(|value| value.is_finite());
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutcome, ReduceError> {
        if !std::mem::take(&mut self.open) {
            return Err(StepError::NotBegun.into());
        }
        let elements: usize = self.gradients.iter().map(Vec::len).sum();
        let stats = StepStats {
            dense_equivalent_bytes: 4 * elements as u64,
            density: 1.0,
            ..StepStats::default()
        };
        let (step, update, skipped) = (self.step, self.update, !self.finite);
        self.step = Step(self.step.0 + 1);
        self.update += u64::from(!skipped);
        Ok(StepOutcome {
            step,
            update,
            skipped,
            kind: RoundKind::Dense,
            stats,
        })
    }

    fn for_each_result(&mut self, f: &mut dyn FnMut(TensorResult<'_>)) {
        if self.finite {
            for (tensor, values) in self.plan.tensors.iter().zip(&self.gradients) {
                f(TensorResult {
                    tensor: tensor.id,
                    values,
                    rows: RowsCame::All,
                    width: tensor.width,
                });
            }
        }
    }

    fn export_state(&mut self) -> WorkerState {
        WorkerState {
            step: self.step,
            update: self.update,
            arrays: Vec::new(),
        }
    }

    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError> {
        if let Some((name, _)) = state.arrays.first() {
            return Err(ImportError::Unknown { name: name.clone() }.into());
        }
        (self.step, self.update) = (state.step, state.update);
        Ok(())
    }

    fn report(&mut self, _report: TrainReport) {}

    fn leave(self: Box<Self>) {}
}
