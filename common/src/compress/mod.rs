//! Compression: what a worker does to a gradient before it travels and what a shard does to what came.
//!
//! `reference` reads like the paper; `fast` is what runs. Both implement [`Kernels`]
//! and pass the same golden vectors.

use crate::config::algorithm::{Feedback, ProjectionKind, ValueType};
use core::ops::Range;

/// Names the projection V of one tensor and step (the same on every worker, without communication).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProjectionKey {
    /// Seed of the job.
    pub seed: u64,
    /// Tensor id: position in the registered list.
    pub tensor: u32,
    /// Step.
    pub step: u64,
}

/// Shape of the sketching problem of one tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SketchShape {
    /// Row width n.
    pub width: usize,
    /// Rank r.
    pub rank: usize,
    /// Distribution of V.
    pub kind: ProjectionKind,
}

/// How values become bytes: the type and, for int8 and int4, the number of values per scale.
///
/// Layout (little endian): f32/bf16/f16 are arrays. int8/int4: an f16... see `codec`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ValueCodec {
    /// Wire type.
    pub value_type: ValueType,
    /// Values that share a scale (int8, int4).
    pub quant_block: usize,
}

impl ValueCodec {
    /// Encoded bytes of `values` values. Exact: receivers check lengths by it.
    #[must_use]
    pub fn encoded_bytes(&self, values: usize) -> usize {
        let _ = values;
        todo!()
    }

    /// Appends the encoding of `values` to `out`.
    pub fn encode(&self, values: &[f32], out: &mut Vec<u8>) {
        let _ = (values, out);
        todo!()
    }

    /// Decodes exactly `out.len()` values. `bytes.len()` must be `encoded_bytes(out.len())`.
    ///
    /// # Panics
    /// If the lengths disagree; the wire checks them first.
    pub fn decode(&self, bytes: &[u8], out: &mut [f32]) {
        let _ = (bytes, out);
        todo!()
    }

    /// `acc[i] += decoded[i]`, the shard's hot loop (no intermediate buffer).
    pub fn decode_add(&self, bytes: &[u8], acc: &mut [f32]) {
        let _ = (bytes, acc);
        todo!()
    }
}

/// Feedback state of one tensor on one worker; f32 whatever the gradient's type.
///
/// Vectors are empty where the rule does not need them: ef14 uses `residual`; ef21 `local` (h) and
/// `global` (H); ef21m also `momentum` (v).
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TensorState {
    /// Rule.
    pub feedback: Feedback,
    /// Rows m.
    pub rows: usize,
    /// Width n.
    pub width: usize,
    /// e_i of ef14 (m·n).
    pub residual: Vec<f32>,
    /// v_i of ef21m.
    pub momentum: Vec<f32>,
    /// h_i of ef21 and ef21m.
    pub local: Vec<f32>,
    /// H of ef21 and ef21m.
    pub global: Vec<f32>,
}

/// Parameters of the feedback rule.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FeedbackParams {
    /// η of ef21m.
    pub eta: f32,
    /// Decay of ef14's residual.
    pub decay: f32,
}

/// The hot loops of a worker, for one tensor and a contiguous range of its rows (a shard's segment).
///
/// A round of one tensor, in order:
/// 1. [`Kernels::input`] turns the gradient buffer into U, where A = U − h (h = 0 for none and ef14):
///    ef14: U = g + decay·e; ef21: U = g; ef21m: U = (1−η)v + ηg. State is **not** changed: a round that
///    is skipped (trap 6) just forgets U.
/// 2. [`Kernels::sketch`] P = A V / √r.
/// 3. [`Kernels::gather`] encodes A[I,:].
/// 4. [`Kernels::commit`] changes the state and replaces the buffer by the result.
///
/// In a dense round A is U for ef14/none, and g for ef21/ef21m (the estimate restarts: v = h = sent, H = mean).
pub trait Kernels: Send + Sync {
    /// Step 1, for rows `rows`; `buffer` is the whole tensor (m·n, padded). `dense_round` as above.
    /// Returns false if any element of U is NaN or infinite.
    fn input(&self, state: &TensorState, params: FeedbackParams, dense_round: bool, buffer: &mut [f32], rows: Range<usize>) -> bool;

    /// Step 2: writes `rows.len() × r` sketch entries.
    fn sketch(&self, state: &TensorState, shape: SketchShape, key: ProjectionKey, buffer: &[f32], rows: Range<usize>, out: &mut [f32]);

    /// Step 3: appends the encoding of A[selected,:] (absolute row numbers), row after row as one array.
    fn gather(&self, state: &TensorState, dense_round: bool, buffer: &[f32], selected: &[u32], codec: ValueCodec, out: &mut Vec<u8>);

    /// Step 4 for rows `rows`, of which `selected` (absolute, ascending) were sent.
    /// `sent`: what this worker sent, as encoded by `gather` with `codec_up`; `None` if it did not count.
    /// `mean`: the decoded mean of the selected rows.
    #[allow(clippy::too_many_arguments, reason = "one call per segment; a struct would only rename them")]
    fn commit(&self, state: &mut TensorState, dense_round: bool, buffer: &mut [f32], rows: Range<usize>, selected: &[u32], sent: Option<&[u8]>, codec_up: ValueCodec, mean: &[f32]);
}
