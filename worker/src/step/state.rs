//! A worker's feedback state outside of the machine, for checkpoints.

use super::{ImportError, Progress, StepMachine};
use arc_topk_common::ids::{Step, TensorId};
use std::collections::BTreeMap;

/// The array of feedback state that is equal on all workers: H of ef21 and ef21m.
pub const SHARED_ARRAY: &str = "global";

/// The array of feedback state that holds what ef14 has not sent yet.
const RESIDUAL_ARRAY: &str = "residual";

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
fn array_name(array: &str, tensor: &str) -> String {
    format!("{array}/{tensor}")
}

impl StepMachine {
    /// Step, update and feedback state, exactly. In an open step: as it was when the step began.
    #[must_use]
    pub fn export_state(&self) -> WorkerState {
        let arrays = self.plan.tensors.iter().flat_map(|tensor| {
            let named = self.backend.export(tensor.id).into_iter();
            named.map(|(array, values)| (array_name(array, &tensor.spec.name), values))
        });
        WorkerState {
            step: self.step,
            update: self.update,
            arrays: arrays.collect(),
        }
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a step is open, or the state does not fit the plan. Nothing changes then; the error names the tensor.
    pub fn import_state(&mut self, state: WorkerState) -> Result<(), ImportError> {
        if self.progress == Progress::Open {
            return Err(ImportError::StepOpen);
        }
        let mut saved: BTreeMap<String, Vec<f32>> = state.arrays.into_iter().collect();
        let mut imports = Vec::new();
        for tensor in &self.plan.tensors {
            for (array, expected) in self.backend.state_lengths(tensor.id) {
                let name = tensor.spec.name.clone();
                let Some(values) = saved.remove(&array_name(array, &name)) else {
                    return Err(ImportError::Missing {
                        array,
                        tensor: name,
                    });
                };
                if values.len() != expected {
                    return Err(ImportError::Length {
                        array,
                        tensor: name,
                        expected,
                        actual: values.len(),
                    });
                }
                imports.push((tensor.id, array, values));
            }
            for (array, expected) in self.backend.optional_lengths(tensor.id) {
                let name = tensor.spec.name.clone();
                let values = saved.remove(&array_name(array, &name)).unwrap_or_default();
                if !values.is_empty() && values.len() != expected {
                    return Err(ImportError::Length {
                        array,
                        tensor: name,
                        expected,
                        actual: values.len(),
                    });
                }
                imports.push((tensor.id, array, values));
            }
        }
        if let Some((name, _)) = saved.pop_first() {
            return Err(ImportError::Unknown { name });
        }
        for (tensor, array, values) in imports {
            self.backend.import(tensor, array, &values);
        }
        self.step = state.step;
        self.update = state.update;
        self.progress = Progress::Idle;
        self.kept.clear();
        Ok(())
    }

    /// One update's gradients were averaged by other means: the update number moves on, which the warm-up and the ramp
    /// count, and the step number does not. All workers must do so between the same two steps.
    ///
    /// # Errors
    /// If a step is open. Nothing changes then.
    pub fn pass_update(&mut self) -> Result<(), ImportError> {
        if self.progress == Progress::Open {
            return Err(ImportError::StepOpen);
        }
        self.update += 1;
        Ok(())
    }

    /// Replaces what ef14 has not sent of a tensor by `values` (rows·width; none are zeros) and returns what there was; none
    /// where nothing is held back.
    ///
    /// # Errors
    /// If a step is open, or `values` are not as many as the tensor's, or it has no place for any. Nothing changes then.
    pub fn swap_residual(
        &mut self,
        tensor: TensorId,
        values: Vec<f32>,
    ) -> Result<Vec<f32>, ImportError> {
        if self.progress == Progress::Open {
            return Err(ImportError::StepOpen);
        }
        let of = |lengths: Vec<(&'static str, usize)>| {
            let mut residuals = lengths
                .into_iter()
                .filter(|(array, _)| *array == RESIDUAL_ARRAY);
            residuals.next().map(|(_, length)| length)
        };
        let always = of(self.backend.state_lengths(tensor));
        let sometimes = of(self.backend.optional_lengths(tensor));
        let expected = always.or(sometimes).unwrap_or(0);
        if !values.is_empty() && values.len() != expected {
            return Err(ImportError::Length {
                array: RESIDUAL_ARRAY,
                tensor: self.plan.tensors[tensor.index()].spec.name.clone(),
                expected,
                actual: values.len(),
            });
        }
        if expected == 0 {
            return Ok(Vec::new());
        }
        let held = self.backend.export(tensor).into_iter();
        let mut held = held.filter(|(array, _)| *array == RESIDUAL_ARRAY);
        let held = held.next().map(|(_, values)| values).unwrap_or_default();
        let values = match always {
            Some(length) if values.is_empty() => vec![0.0; length],
            _ => values,
        };
        self.backend.import(tensor, RESIDUAL_ARRAY, &values);
        Ok(held)
    }
}
