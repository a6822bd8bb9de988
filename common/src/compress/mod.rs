//! Compression: what a worker does to a gradient before it travels and what a shard does to what came.
//!
//! `reference` reads like the paper; `fast` is what runs. Both implement [`Kernels`]
//! and pass the same golden vectors.

pub mod codec;
pub mod fast;
pub mod philox;
pub mod projection;
pub mod reference;
pub mod round;
pub mod select;
pub(crate) mod simd;

#[cfg(test)]
mod properties;

pub use projection::projection;
pub use select::{
    PooledSegment, pooled_budget, randk_rows, rows_to_keep, score, select_energy, select_pooled,
    select_top_k,
};

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
/// The layout, what each type loses and what happens at the ends of the range are in [`codec`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ValueCodec {
    /// Wire type.
    pub value_type: ValueType,
    /// Values that share a scale (int8, int4).
    pub quant_block: usize,
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

impl TensorState {
    /// The state before the first round: zeros where the rule keeps anything.
    #[must_use]
    pub fn new(feedback: Feedback, rows: usize, width: usize) -> Self {
        let zeros = |needed: bool| {
            if needed {
                vec![0.0; rows * width]
            } else {
                Vec::new()
            }
        };
        let estimate = matches!(feedback, Feedback::Ef21 | Feedback::Ef21m);
        Self {
            feedback,
            rows,
            width,
            residual: zeros(feedback == Feedback::Ef14),
            momentum: zeros(feedback == Feedback::Ef21m),
            local: zeros(estimate),
            global: zeros(estimate),
        }
    }

    /// State of a tensor that always travels whole (1-D or small), seen as `elements` rows of width 1.
    ///
    /// Nothing is left unsent, so an exact wire needs no state. A `lossy` one loses the rounding, which is part of C
    /// (trap 10): an ef14 residual catches it whatever the job's rule, unless that is `none`.
    #[must_use]
    pub fn for_dense_tensor(feedback: Feedback, elements: usize, lossy: bool) -> Self {
        let needed = feedback != Feedback::None && lossy;
        Self::new(
            if needed {
                Feedback::Ef14
            } else {
                Feedback::None
            },
            elements,
            1,
        )
    }

    /// The array whose place U takes ([`Kernels::input`]): e of ef14, v of ef21m. Empty under the other rules.
    #[must_use]
    pub fn kept(&self) -> &[f32] {
        match self.feedback {
            Feedback::Ef14 => &self.residual,
            Feedback::Ef21m => &self.momentum,
            Feedback::None | Feedback::Ef21 => &[],
        }
    }

    /// [`TensorState::kept`], to be written.
    pub(crate) fn kept_mut(&mut self) -> &mut [f32] {
        match self.feedback {
            Feedback::Ef14 => &mut self.residual,
            Feedback::Ef21m => &mut self.momentum,
            Feedback::None | Feedback::Ef21 => &mut [],
        }
    }

    /// U, once [`Kernels::input`] has formed it: in the place of what the rule keeps, or else in the buffer.
    #[must_use]
    pub fn formed<'a>(&'a self, buffer: &'a [f32]) -> &'a [f32] {
        if self.kept().is_empty() {
            buffer
        } else {
            self.kept()
        }
    }

    /// Undoes [`Kernels::input`] for rows that were not committed: what lay in U's place is copied back from the buffer, so that
    /// the state is what it was, to the bit.
    ///
    /// # Panics
    /// If the buffer is shorter than the rows ask for.
    pub fn withdraw(&mut self, buffer: &[f32], rows: Range<usize>) {
        let elements = rows.start * self.width..rows.end * self.width;
        let kept = self.kept_mut();
        if !kept.is_empty() {
            kept[elements.clone()].copy_from_slice(&buffer[elements]);
        }
    }
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
/// 1. [`Kernels::input`] forms U, where A = U − h (h = 0 for none and ef14): ef14: U = g + decay·e; ef21: U = g; ef21m:
///    U = (1−η)v + ηg. ef14 and ef21m keep all of U that is not sent: U takes the place of e or v, and the old e or v that of g in
///    the buffer. Then the end of the round need touch nothing but the rows that were sent, and a round that is skipped (trap 6) or
///    breaks off is undone to the bit by [`TensorState::withdraw`]. Under none and ef21 U = g stays where it is.
/// 2. [`Kernels::sketch`] P = A V / √r. (topk: [`Kernels::energy`] instead.)
/// 3. [`Kernels::gather`] encodes A\[I,:\].
/// 4. [`Kernels::commit`] takes what was sent off the state and replaces the buffer by the result.
///    (topk: [`Kernels::commit_own_rows`], whose result rows differ from the sent ones.)
///
/// A worker that only takes the result ends the round with step 4 alone, without [`Kernels::input`] or after
/// [`TensorState::withdraw`]: e and v stay as they are then.
///
/// In a dense round all rows travel, and A = U, which is g for ef21/ef21m (the estimate restarts:
/// v = g, h = sent, H = mean; without rounding on the wire v = h).
///
/// A worker that missed a round ("did not count") keeps everything under ef14: e = U. Under ef21/ef21m it takes H, as it is
/// after the round, for its h, so that H = mean hᵢ, over those who were counted, still holds when it is counted again.
///
/// Results are the same bits for every implementation of the machine's vector width and for every number of threads.
///
/// # Panics
/// All methods: if a slice is shorter than the state's shape or the rows ask for, or `selected` leaves `rows`.
pub trait Kernels: Send + Sync {
    /// Step 1, for rows `rows`; `buffer` is the whole tensor (m·n, padded). `dense_round` as above.
    /// Returns false if any element of U is NaN or infinite.
    fn input(
        &self,
        state: &mut TensorState,
        params: FeedbackParams,
        dense_round: bool,
        buffer: &mut [f32],
        rows: Range<usize>,
    ) -> bool;

    /// Step 2: writes `rows.len() × r` sketch entries. Sparse rounds only.
    fn sketch(
        &self,
        state: &TensorState,
        shape: SketchShape,
        key: ProjectionKey,
        buffer: &[f32],
        rows: Range<usize>,
        out: &mut [f32],
    );

    /// Step 2 of topk: writes ‖A_j‖² of every row of `rows`, to be handed to [`select_top_k`]. Sparse rounds only.
    fn energy(&self, state: &TensorState, buffer: &[f32], rows: Range<usize>, out: &mut [f64]);

    /// Step 3: appends the encoding of A\[selected,:\] (absolute row numbers), row after row as one array.
    /// In a dense round `selected` must list every row of the segment.
    fn gather(
        &self,
        state: &TensorState,
        dense_round: bool,
        buffer: &[f32],
        selected: &[u32],
        codec: ValueCodec,
        out: &mut Vec<u8>,
    );

    /// Step 4 for rows `rows`, of which `selected` (absolute, ascending) were sent; in a dense round `selected` is
    /// not looked at, since all of them were.
    /// `sent`: what this worker sent, as encoded by `gather` with `codec_up`; `None` if it did not count.
    /// `mean`: the decoded mean of the selected rows.
    #[allow(
        clippy::too_many_arguments,
        reason = "one call per segment; a struct would only rename them"
    )]
    fn commit(
        &self,
        state: &mut TensorState,
        dense_round: bool,
        buffer: &mut [f32],
        rows: Range<usize>,
        selected: &[u32],
        sent: Option<&[u8]>,
        codec_up: ValueCodec,
        mean: &[f32],
    );

    /// Step 4 of topk (sparse rounds): this worker sent the rows `selected`, the mean came for the rows
    /// `mean_rows` (the union over workers); both absolute and ascending. Otherwise as [`Kernels::commit`].
    #[allow(
        clippy::too_many_arguments,
        reason = "one call per segment; a struct would only rename them"
    )]
    fn commit_own_rows(
        &self,
        state: &mut TensorState,
        buffer: &mut [f32],
        rows: Range<usize>,
        selected: &[u32],
        sent: Option<&[u8]>,
        codec_up: ValueCodec,
        mean_rows: &[u32],
        mean: &[f32],
    );
}
