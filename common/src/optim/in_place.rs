//! Catch-up AdamW on parameters and state that lie in the caller's memory, in the caller's element type.
//!
//! The rule, and the loops, are those of [`Optimizer`](super::Optimizer); who has tensors of his own need not copy them.

use super::kernels::{AdamCoefficients, adam, narrow, scale as decay, widen};
use super::{CHUNK, Run, adam_coefficients};
use core::ops::Range;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

#[cfg(test)]
#[path = "in_place_tests.rs"]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests;

/// Elements that are worked on as f32 at a time: few enough to stay in the first cache.
const BLOCK: usize = 1 << 10;

/// What all tensors of one step have in common.
#[derive(Clone, Copy, Debug)]
pub struct AdamStep<'a> {
    /// Decays of the moments, each in [0, 1).
    pub betas: (f64, f64),
    /// ε.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Learning rates of the last steps, this one's first; steps before them add nothing.
    pub rates: &'a [f64],
    /// Largest τ, at least 1.
    pub cap: u32,
    /// Go up, not down.
    pub maximize: bool,
}

/// A parameter and its gradient, row-major.
#[derive(Debug)]
pub enum Elements<'a> {
    /// IEEE single.
    F32(&'a mut [f32], &'a [f32]),
    /// bfloat16; the update is computed in f32 and rounded once.
    Bf16(&'a mut [bf16], &'a [bf16]),
    /// IEEE half; as above.
    F16(&'a mut [f16], &'a [f16]),
}

/// A tensor that takes a step.
#[derive(Debug)]
pub struct AdamTensor<'a> {
    /// Parameter and gradient.
    pub elements: Elements<'a>,
    /// Elements of a row; the last row may be shorter.
    pub width: usize,
    /// m, by rows of the width.
    pub first: &'a mut [f32],
    /// v, by rows of the width.
    pub second: &'a mut [f32],
    /// Number of the step in which each row came last; 0 is the start.
    pub last: &'a mut [i64],
    /// T: sum of each row's τ.
    pub seen: &'a mut [i64],
    /// Rows that came, ascending; `None` for all.
    pub rows: Option<&'a [i64]>,
    /// Number of this step, from 1 on.
    pub step: i64,
}

/// Why a tensor cannot take a step.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InPlaceError {
    /// Lengths do not belong together.
    #[error(
        "the optimizer's state of a tensor of {elements} elements in rows of {width} does not fit it: it was saved for another model"
    )]
    Shape {
        /// Elements of the parameter.
        elements: usize,
        /// Elements of a row.
        width: usize,
    },
    /// Rows are not ascending, or there are not so many.
    #[error("the rows that came are not ascending numbers below {rows}")]
    Rows {
        /// Rows of the tensor.
        rows: usize,
    },
}

/// Takes one step with every tensor; on rayon's threads if `parallel`. The result is the same to the bit.
///
/// # Errors
/// If state does not fit its tensor. Nothing has changed then.
///
/// # Panics
/// If there is no rate.
pub fn catch_up_adamw(
    step: &AdamStep<'_>,
    tensors: Vec<AdamTensor<'_>>,
    parallel: bool,
) -> Result<(), InPlaceError> {
    tensors.iter().try_for_each(AdamTensor::check)?;
    let plan = Plan::new(step);
    let pieces: Vec<Piece<'_>> = tensors
        .into_iter()
        .flat_map(AdamTensor::into_pieces)
        .collect();
    if parallel {
        pieces.into_par_iter().for_each(|piece| piece.update(&plan));
    } else {
        pieces.into_iter().for_each(|piece| piece.update(&plan));
    }
    Ok(())
}

impl Elements<'_> {
    /// Of the parameter, and of the gradient.
    fn lengths(&self) -> (usize, usize) {
        match self {
            Self::F32(values, gradient) => (values.len(), gradient.len()),
            Self::Bf16(values, gradient) => (values.len(), gradient.len()),
            Self::F16(values, gradient) => (values.len(), gradient.len()),
        }
    }
}

impl<'a> Elements<'a> {
    fn chunks(self, size: usize) -> Vec<Self> {
        fn zipped<'a, T>(
            values: &'a mut [T],
            gradient: &'a [T],
            size: usize,
            make: fn(&'a mut [T], &'a [T]) -> Elements<'a>,
        ) -> Vec<Elements<'a>> {
            let both = values.chunks_mut(size).zip(gradient.chunks(size));
            both.map(|(values, gradient)| make(values, gradient))
                .collect()
        }
        match self {
            Self::F32(values, gradient) => zipped(values, gradient, size, Elements::F32),
            Self::Bf16(values, gradient) => zipped(values, gradient, size, Elements::Bf16),
            Self::F16(values, gradient) => zipped(values, gradient, size, Elements::F16),
        }
    }
}

impl<'a> AdamTensor<'a> {
    fn check(&self) -> Result<(), InPlaceError> {
        let (elements, of_gradient) = self.elements.lengths();
        let rows = self.last.len();
        let padded = rows.checked_mul(self.width);
        let fits = of_gradient == elements
            && rows == elements.div_ceil(self.width.max(1))
            && self.seen.len() == rows
            && padded == Some(self.first.len())
            && padded == Some(self.second.len());
        if !fits {
            let width = self.width;
            return Err(InPlaceError::Shape { elements, width });
        }
        let came = self.rows.unwrap_or_default();
        let ascending = came.is_sorted_by(|a, b| a < b);
        let within = |row: &i64| usize::try_from(*row).is_ok_and(|row| row < rows);
        if !ascending || !came.first().is_none_or(within) || !came.last().is_none_or(within) {
            return Err(InPlaceError::Rows { rows });
        }
        Ok(())
    }

    /// Whole rows each, small enough for a cache where rows are.
    fn into_pieces(self) -> Vec<Piece<'a>> {
        let width = self.width.max(1);
        let rows_each = (CHUNK / width).max(1);
        let size = rows_each * width;
        let moments = self
            .first
            .chunks_mut(size)
            .zip(self.second.chunks_mut(size));
        let counts = self
            .last
            .chunks_mut(rows_each)
            .zip(self.seen.chunks_mut(rows_each));
        let elements = self.elements.chunks(size).into_iter();
        let pieces = elements.zip(moments.zip(counts)).enumerate().map(
            |(index, (elements, ((first, second), (last, seen))))| {
                let start = index * rows_each;
                let of = |rows: &'a [i64]| within(rows, start, start + last.len());
                Piece {
                    elements,
                    width,
                    rows: self.rows.map(of),
                    start,
                    first,
                    second,
                    last,
                    seen,
                    step: self.step,
                }
            },
        );
        pieces.collect()
    }
}

/// Those of ascending `rows` in [start, end).
fn within(rows: &[i64], start: usize, end: usize) -> &[i64] {
    let at = |row: usize| rows.partition_point(|r| (*r as usize) < row);
    &rows[at(start)..at(end)]
}

/// Some rows of a tensor.
struct Piece<'a> {
    elements: Elements<'a>,
    width: usize,
    /// In numbers of the tensor, of which `start` is the first here.
    rows: Option<&'a [i64]>,
    start: usize,
    first: &'a mut [f32],
    second: &'a mut [f32],
    last: &'a mut [i64],
    seen: &'a mut [i64],
    step: i64,
}

impl Piece<'_> {
    fn update(mut self, plan: &Plan) {
        let runs = self.runs(plan.cap);
        let (first, second, width) = (self.first, self.second, self.width);
        match &mut self.elements {
            Elements::F32(x, g) => apply(plan, &runs, width, x, g, first, second),
            Elements::Bf16(x, g) => apply(plan, &runs, width, x, g, first, second),
            Elements::F16(x, g) => apply(plan, &runs, width, x, g, first, second),
        }
    }

    /// The rows that came, as runs of this piece's rows; counts them.
    fn runs(&mut self, cap: u32) -> Vec<Run> {
        let (rows, mut runs) = (self.last.len(), Vec::<Run>::new());
        let (wanted, start) = (self.rows, self.start);
        let mut add = |row: usize| {
            let tau = (self.step - self.last[row]).clamp(1, i64::from(cap));
            self.last[row] = self.step;
            self.seen[row] = self.seen[row].max(0).saturating_add(tau);
            let tau = tau as u32;
            let weight = u32::try_from(self.seen[row]).unwrap_or(u32::MAX);
            match runs.last_mut() {
                Some(run) if run.end == row && run.tau == tau && run.weight == weight => {
                    run.end += 1;
                }
                _ => runs.push(Run {
                    start: row,
                    end: row + 1,
                    tau,
                    weight,
                }),
            }
        };
        match wanted {
            None => (0..rows).for_each(&mut add),
            Some(wanted) => wanted.iter().for_each(|row| add(*row as usize - start)),
        }
        runs
    }
}

/// Decays the elements, and updates those of the runs.
fn apply<T: Stored>(
    plan: &Plan,
    runs: &[Run],
    width: usize,
    x: &mut [T],
    g: &[T],
    first: &mut [f32],
    second: &mut [f32],
) {
    let keep = plan.keep;
    let alone = |x: &mut [T]| {
        if keep != 1.0 {
            T::with(x, &[], |_, x, _| decay(x, keep));
        }
    };
    let mut done = 0;
    for run in runs {
        let at = run.start * width..(run.end * width).min(x.len());
        alone(&mut x[done..at.start]);
        done = at.end;
        let c = plan.coefficients(run);
        let (first, second) = (&mut first[at.clone()], &mut second[at.clone()]);
        T::with(&mut x[at.clone()], &g[at], |block, x, g| {
            if keep != 1.0 {
                decay(x, keep);
            }
            adam(x, g, &mut first[block.clone()], &mut second[block], c);
        });
    }
    alone(&mut x[done..]);
}

/// What turns a run into the numbers of its update.
struct Plan {
    betas: (f64, f64),
    eps: f32,
    keep: f32,
    /// Sums of the newest 1, 2, … learning rates.
    sums: Vec<f64>,
    cap: u32,
    scale: f32,
}

impl Plan {
    fn new(step: &AdamStep<'_>) -> Self {
        assert!(!step.rates.is_empty(), "a step has a rate");
        let sums = step.rates.iter().scan(0.0, |sum, lr| {
            *sum += lr;
            Some(*sum)
        });
        Self {
            betas: step.betas,
            eps: step.eps as f32,
            keep: (1.0 - step.rates[0] * step.weight_decay) as f32,
            sums: sums.collect(),
            cap: step.cap.max(1),
            scale: if step.maximize { -1.0 } else { 1.0 },
        }
    }

    fn coefficients(&self, run: &Run) -> AdamCoefficients {
        let known = (run.tau as usize).min(self.sums.len());
        adam_coefficients(
            self.betas,
            self.eps,
            self.sums[known - 1] as f32,
            self.scale,
            run,
        )
    }
}

/// An element type of parameters.
trait Stored: Copy + Send + Sync {
    /// Calls `f` with parameters and gradients (or none) as f32, a block at a time, and keeps what it makes of the parameters.
    fn with(x: &mut [Self], g: &[Self], f: impl FnMut(Range<usize>, &mut [f32], &[f32]));
}

impl Stored for f32 {
    fn with(x: &mut [Self], g: &[Self], mut f: impl FnMut(Range<usize>, &mut [f32], &[f32])) {
        for (index, x) in x.chunks_mut(BLOCK).enumerate() {
            let at = index * BLOCK..index * BLOCK + x.len();
            f(at.clone(), x, g.get(at).unwrap_or_default());
        }
    }
}

impl Stored for bf16 {
    fn with(x: &mut [Self], g: &[Self], f: impl FnMut(Range<usize>, &mut [f32], &[f32])) {
        widened(x, g, widen, narrow, f);
    }
}

impl Stored for f16 {
    fn with(x: &mut [Self], g: &[Self], f: impl FnMut(Range<usize>, &mut [f32], &[f32])) {
        let widen = |from: &[Self], to: &mut [f32]| from.convert_to_f32_slice(to);
        let narrow = |from: &[f32], to: &mut [Self]| to.convert_from_f32_slice(from);
        widened(x, g, widen, narrow, f);
    }
}

fn widened<T>(
    x: &mut [T],
    g: &[T],
    widen: impl Fn(&[T], &mut [f32]),
    narrow: impl Fn(&[f32], &mut [T]),
    mut f: impl FnMut(Range<usize>, &mut [f32], &[f32]),
) {
    let (mut wide_x, mut wide_g) = ([0f32; BLOCK], [0f32; BLOCK]);
    for (index, x) in x.chunks_mut(BLOCK).enumerate() {
        let at = index * BLOCK..index * BLOCK + x.len();
        let wide_x = &mut wide_x[..x.len()];
        widen(x, wide_x);
        // None where there is only decay.
        let g = g.get(at.clone()).unwrap_or_default();
        let wide_g = &mut wide_g[..g.len()];
        widen(g, wide_g);
        f(at, wide_x, wide_g);
        narrow(wide_x, x);
    }
}
