//! What runs: fused passes, vector instructions chosen at run time, rayon over row chunks of large tensors.
//!
//! Bits do not depend on the vector width nor on the number of threads: what is elementwise has one order of
//! operations, and every sum over a row has 16 striped partial sums, combined in a fixed tree.
//! The sketch agrees with `reference` (which sums in f64) within f32 rounding, all else to the bit.

mod commit;
mod gather;
mod sketch;

use super::simd::multiversion;
use super::{FeedbackParams, Kernels, ProjectionKey, SketchShape, TensorState, ValueCodec};
use crate::config::algorithm::Feedback;
use core::ops::Range;
use rayon::prelude::*;

/// Partial sums of a row: lane l holds the columns c with c mod 16 = l.
const LANES: usize = 16;
/// Elements per piece of work: with two or three arrays it stays inside a core's second-level cache.
const CHUNK: usize = 1 << 14;
/// Below this many elements, handing work to other threads costs more than it saves.
const PARALLEL_FROM: usize = 1 << 17;
/// From this many elements of a segment on, results are written past the caches: 128 KiB, of which a model has many.
const STREAM_FROM: usize = 1 << 15;

/// [`Kernels`] for daily use on the CPU. Large tensors use the rayon pool that the caller runs in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fast;

/// Rows per piece of work.
fn rows_per_chunk(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

/// h for the rows of `elements`, if A = U − h.
fn estimate(state: &TensorState, elements: Range<usize>) -> Option<&[f32]> {
    if state.local.is_empty() {
        None
    } else {
        Some(&state.local[elements])
    }
}

impl Kernels for Fast {
    fn input(
        &self,
        state: &mut TensorState,
        params: FeedbackParams,
        dense_round: bool,
        buffer: &mut [f32],
        rows: Range<usize>,
    ) -> bool {
        let elements = rows.start * state.width..rows.end * state.width;
        let values = &mut buffer[elements.clone()];
        let blends = match state.feedback {
            Feedback::Ef14 => Some((params.decay, 1.0)),
            Feedback::Ef21m if !dense_round => Some((1.0 - params.eta, params.eta)),
            Feedback::None | Feedback::Ef21 | Feedback::Ef21m => None,
        };
        let form = |values: &mut [f32], kept: &mut [f32]| match blends {
            Some((old, g)) => blend(values, kept, old, g),
            None => swap(values, kept),
        };
        let large = values.len() >= PARALLEL_FROM;
        let kept = state.kept_mut();
        if kept.is_empty() {
            return if large {
                let chunks = values.par_chunks(CHUNK).map(finite);
                chunks.reduce(|| true, |a, b| a & b)
            } else {
                finite(values)
            };
        }
        let kept = &mut kept[elements];
        if large {
            let chunks = values.par_chunks_mut(CHUNK).zip(kept.par_chunks_mut(CHUNK));
            chunks
                .map(|(values, kept)| form(values, kept))
                .reduce(|| true, |a, b| a & b)
        } else {
            form(values, kept)
        }
    }

    fn sketch(
        &self,
        state: &TensorState,
        shape: SketchShape,
        key: ProjectionKey,
        buffer: &[f32],
        rows: Range<usize>,
        out: &mut [f32],
    ) {
        assert_eq!(out.len(), rows.len() * shape.rank, "sketch of the rows");
        let elements = rows.start * shape.width..rows.end * shape.width;
        sketch::sketch(
            &state.formed(buffer)[elements.clone()],
            estimate(state, elements),
            shape,
            key,
            out,
        );
    }

    fn energy(&self, state: &TensorState, buffer: &[f32], rows: Range<usize>, out: &mut [f64]) {
        assert_eq!(out.len(), rows.len(), "energy of the rows");
        let elements = rows.start * state.width..rows.end * state.width;
        sketch::energy(
            &state.formed(buffer)[elements.clone()],
            estimate(state, elements),
            state.width,
            out,
        );
    }

    fn gather(
        &self,
        state: &TensorState,
        dense_round: bool,
        buffer: &[f32],
        selected: &[u32],
        codec: ValueCodec,
        out: &mut Vec<u8>,
    ) {
        let estimate = if dense_round || state.local.is_empty() {
            None
        } else {
            Some(&state.local[..])
        };
        gather::gather(
            gather::Source {
                values: state.formed(buffer),
                estimate,
                width: state.width,
                codec,
            },
            selected,
            out,
        );
    }

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
    ) {
        if dense_round {
            let values = rows.len() * state.width;
            let sent = sent.map(|bytes| commit::Sent::new(bytes, codec_up, values));
            commit::dense(state, buffer, rows, sent, mean);
        } else {
            self.commit_own_rows(
                state, buffer, rows, selected, sent, codec_up, selected, mean,
            );
        }
    }

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
    ) {
        let width = state.width;
        // Without feedback nobody asks what was sent.
        let wanted = sent.filter(|_| state.feedback != Feedback::None);
        let sent = wanted.map(|bytes| {
            let values = selected.len() * width;
            (selected, commit::Sent::new(bytes, codec_up, values))
        });
        commit::sparse(
            state,
            buffer,
            rows,
            sent,
            commit::Rows {
                numbers: mean_rows,
                values: mean,
                width,
            },
        );
    }
}

multiversion! {
/// Whether no element is NaN or infinite.
fn finite(values: &[f32]) -> bool {
    let mut largest = 0u32;
    for x in values {
        largest = largest.max(x.to_bits() & 0x7fff_ffff);
    }
    largest < f32::INFINITY.to_bits()
}
}

multiversion! {
/// `kept[i] ← old·kept[i] + g·values[i]`, written so that a factor of 1 is exact, and `values[i]` ← what `kept[i]` was.
/// Returns whether all that was formed is finite.
fn blend(values: &mut [f32], kept: &mut [f32], old: f32, g: f32) -> bool {
    let mut largest = 0u32;
    for (x, kept) in values.iter_mut().zip(kept) {
        let before = *kept;
        let u = old * before + g * *x;
        *kept = u;
        *x = before;
        largest = largest.max(u.to_bits() & 0x7fff_ffff);
    }
    largest < f32::INFINITY.to_bits()
}
}

multiversion! {
/// Exchanges them. Returns whether all of `kept` is finite then.
fn swap(values: &mut [f32], kept: &mut [f32]) -> bool {
    let mut largest = 0u32;
    for (x, kept) in values.iter_mut().zip(kept) {
        core::mem::swap(x, kept);
        largest = largest.max(kept.to_bits() & 0x7fff_ffff);
    }
    largest < f32::INFINITY.to_bits()
}
}

#[cfg(test)]
mod tests;
