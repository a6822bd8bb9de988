//! Models on candle's autograd, on the CPU, in f32.
//!
//! A model hands its gradients over in reverse registration order as its backward pass produces them, so that
//! they travel while the rest is still computed. Parameters start from a seed and are the same on all workers.

mod conv;
mod init;
mod llama;
mod math;
mod ops;
#[cfg(test)]
mod tests;

pub use conv::ConvNet;
pub(crate) use conv::SIDE as IMAGE_SIDE;
pub use init::ParameterSpec;
pub use llama::{Llama, LlamaConfig};

use super::data::Batch;
use arc_topk_common::plan::{DType, TensorSpec};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor, Var};
use ops::with_slice;
use std::sync::Mutex;

/// Why a model cannot be made or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Sizes that do not fit each other.
    #[error("model: {0}")]
    Sizes(String),
    /// A batch of images for a text model, or the other way round.
    #[error("model: this batch is for another task; choose the model that belongs to the data")]
    WrongBatch,
    /// candle failed.
    #[error("model: {0}")]
    Candle(#[from] candle_core::Error),
}

/// Loss of one batch.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Evaluation {
    /// Mean loss (nats).
    pub loss: f32,
    /// Examples classified rightly (image tasks).
    pub correct: Option<usize>,
    /// Tokens or images.
    pub examples: usize,
}

/// A model with its parameters.
pub trait Model: Send {
    /// Parameters in registration order.
    fn specs(&self) -> &[ParameterSpec];

    /// Their values, in the same order.
    fn vars(&self) -> &[Var];

    /// Loss of a batch; every parameter's gradient goes to `sink(index, gradient)`, once each, in reverse
    /// registration order, while the backward pass goes on.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    fn forward_backward(
        &self,
        batch: &Batch,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<f32, ModelError>;

    /// Loss of a batch, without gradients.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    fn evaluate(&self, batch: &Batch) -> Result<Evaluation, ModelError>;
}

/// Registration of parameters with a plan.
#[must_use]
pub fn tensor_specs(parameters: &[ParameterSpec]) -> Vec<TensorSpec> {
    let spec = |p: &ParameterSpec| TensorSpec {
        name: p.name.clone(),
        shape: p.shape.iter().map(|&d| d as u64).collect(),
        dtype: DType::F32,
        density: None,
    };
    parameters.iter().map(spec).collect()
}

/// Takes a parameter's gradient out of the store and passes it on; zeros if the loss does not depend on it.
fn hand_over(
    vars: &[Var],
    index: usize,
    grads: &mut GradStore,
    sink: &mut dyn FnMut(usize, &[f32]),
) -> candle_core::Result<()> {
    match grads.remove(vars[index].as_tensor()) {
        Some(gradient) => with_slice(&gradient, |values| sink(index, values)),
        None => {
            sink(index, &vec![0.0; vars[index].elem_count()]);
            Ok(())
        }
    }
}

/// Calls `f` with a parameter's elements.
///
/// # Errors
/// Only if the tensor is not f32 on the CPU.
pub fn read_parameter<R>(parameter: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R, ModelError> {
    Ok(with_slice(parameter, f)?)
}

/// Lets `f` change a parameter's elements in place, without a copy.
///
/// # Errors
/// Only if the tensor is not contiguous f32 on the CPU.
pub fn write_parameter(parameter: &Tensor, f: impl FnMut(&mut [f32])) -> Result<(), ModelError> {
    Ok(parameter.inplace_op1(&InPlace(Mutex::new(f)))?)
}

/// candle hands out mutable storage to operations only; the lock turns its `&self` into the closure's `&mut`.
struct InPlace<F>(Mutex<F>);

impl<F: FnMut(&mut [f32])> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "write-parameter"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(data) = storage else {
            candle_core::bail!("the trainer computes in f32")
        };
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a parameter is contiguous")
        };
        (self
            .0
            .lock()
            .expect("no thread panics while it holds this lock"))(&mut data[start..end]);
        Ok(())
    }
}
