//! Export and import of the optimizer's state, as named f32 arrays for checkpoints.
//!
//! Counters are written as pairs of floats (high 16 bits, low 16 bits), which f32 holds exactly.

use super::Optimizer;
use std::collections::HashMap;

/// Why a saved state does not fit.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OptimizerStateError {
    /// An array is not there.
    #[error(
        "the saved optimizer state has no array {name:?}: it was saved by another optimizer kind or for another model; resume with the settings it was saved with"
    )]
    Missing {
        /// Its name.
        name: String,
    },
    /// An array has another length.
    #[error(
        "the saved optimizer array {name:?} has {found} values where {expected} are expected: it was saved for another model, or the file is damaged"
    )]
    Length {
        /// Its name.
        name: String,
        /// Values expected.
        expected: usize,
        /// Values found.
        found: usize,
    },
}

impl Optimizer {
    /// The whole state. [`Optimizer::import`] restores it to the bit.
    #[must_use]
    pub fn export(&self) -> Vec<(String, Vec<f32>)> {
        let mut arrays = vec![
            ("step".to_owned(), to_floats(&[self.step])),
            ("rates".to_owned(), self.rates.iter().copied().collect()),
        ];
        for (index, tensor) in self.tensors.iter().enumerate() {
            arrays.push((format!("{index}.first"), tensor.first.clone()));
            arrays.push((format!("{index}.second"), tensor.second.clone()));
            arrays.push((format!("{index}.came"), to_floats(&tensor.came)));
            arrays.push((format!("{index}.weight"), to_floats(&tensor.weight)));
        }
        arrays.retain(|(_, values)| !values.is_empty());
        arrays
    }

    /// Replaces the state by an exported one. Nothing changes on an error. Arrays of other names are ignored.
    ///
    /// # Errors
    /// If an array is missing or has another length.
    pub fn import(&mut self, arrays: &[(String, Vec<f32>)]) -> Result<(), OptimizerStateError> {
        let arrays: HashMap<&str, &[f32]> = arrays
            .iter()
            .map(|(name, values)| (&name[..], &values[..]))
            .collect();
        let take = |name: String, expected: usize| {
            if expected == 0 {
                return Ok(&[][..]);
            }
            let found = *arrays
                .get(&name[..])
                .ok_or_else(|| OptimizerStateError::Missing { name: name.clone() })?;
            if found.len() == expected {
                Ok(found)
            } else {
                Err(OptimizerStateError::Length {
                    name,
                    expected,
                    found: found.len(),
                })
            }
        };
        let step = from_floats(take("step".to_owned(), 2)?)[0];
        // As many rates as there were steps, up to the cap.
        let rates = take(
            "rates".to_owned(),
            step.min(self.config.catch_up_cap.max(1)) as usize,
        )?;
        let mut tensors = self.tensors.clone();
        for (index, tensor) in tensors.iter_mut().enumerate() {
            tensor.first = take(format!("{index}.first"), tensor.first.len())?.to_vec();
            tensor.second = take(format!("{index}.second"), tensor.second.len())?.to_vec();
            tensor.came = from_floats(take(format!("{index}.came"), 2 * tensor.came.len())?);
            tensor.weight = from_floats(take(format!("{index}.weight"), 2 * tensor.weight.len())?);
            // A damaged counter must not make "steps since" negative.
            tensor
                .came
                .iter_mut()
                .for_each(|came| *came = (*came).min(step));
        }
        self.step = step;
        self.rates = rates.iter().copied().collect();
        self.tensors = tensors;
        Ok(())
    }
}

fn to_floats(counters: &[u32]) -> Vec<f32> {
    counters
        .iter()
        .flat_map(|c| [(c >> 16) as f32, (c & 0xffff) as f32])
        .collect()
}

fn from_floats(values: &[f32]) -> Vec<u32> {
    values
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[high, low]| ((*high as u32) << 16) | *low as u32)
        .collect()
}
