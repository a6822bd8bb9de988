//! The scalar reference: reads like ALGORITHM.md, one loop per formula, sums in f64. Not for daily use.

use super::{
    FeedbackParams, Kernels, ProjectionKey, SketchShape, TensorState, ValueCodec, projection,
};
use crate::config::algorithm::Feedback;
use core::ops::Range;

/// [`Kernels`] as plainly as they can be written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

/// A\[row, column\] = U − h; h is absent under none and ef14, and in dense rounds.
fn a(state: &TensorState, dense_round: bool, buffer: &[f32], row: usize, column: usize) -> f32 {
    let at = row * state.width + column;
    let u = state.formed(buffer)[at];
    if dense_round || state.local.is_empty() {
        u
    } else {
        u - state.local[at]
    }
}

/// Values of some rows with their row numbers: (position in the tensor, value).
fn scattered<'a>(
    rows: &'a [u32],
    values: &'a [f32],
    width: usize,
) -> impl Iterator<Item = (usize, f32)> + 'a {
    assert_eq!(values.len(), rows.len() * width, "values of the rows");
    values
        .iter()
        .enumerate()
        .map(move |(i, x)| (rows[i / width] as usize * width + i % width, *x))
}

impl Kernels for Reference {
    fn input(
        &self,
        state: &mut TensorState,
        params: FeedbackParams,
        dense_round: bool,
        buffer: &mut [f32],
        rows: Range<usize>,
    ) -> bool {
        let mut finite = true;
        let elements = rows.start * state.width..rows.end * state.width;
        let feedback = state.feedback;
        for (i, x) in elements.clone().zip(&mut buffer[elements]) {
            let g = *x;
            let u = match feedback {
                Feedback::Ef14 => g + params.decay * state.residual[i],
                Feedback::Ef21m if !dense_round => {
                    (1.0 - params.eta) * state.momentum[i] + params.eta * g
                }
                Feedback::None | Feedback::Ef21 | Feedback::Ef21m => g,
            };
            finite &= u.is_finite();
            // U where the rule keeps it, and the old value where g was.
            match state.kept_mut() {
                [] => *x = u,
                kept => *x = core::mem::replace(&mut kept[i], u),
            }
        }
        finite
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
        let v = projection(shape, key);
        for (p, row) in out.chunks_exact_mut(shape.rank).zip(rows) {
            for (j, p) in p.iter_mut().enumerate() {
                let sum: f64 = (0..shape.width)
                    .map(|c| {
                        f64::from(a(state, false, buffer, row, c))
                            * f64::from(v[c * shape.rank + j])
                    })
                    .sum();
                *p = (sum / (shape.rank as f64).sqrt()) as f32;
            }
        }
    }

    fn energy(&self, state: &TensorState, buffer: &[f32], rows: Range<usize>, out: &mut [f64]) {
        for (energy, row) in out.iter_mut().zip(rows) {
            *energy = (0..state.width)
                .map(|c| f64::from(a(state, false, buffer, row, c)).powi(2))
                .sum();
        }
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
        let mut values = Vec::new();
        for row in selected {
            values
                .extend((0..state.width).map(|c| a(state, dense_round, buffer, *row as usize, c)));
        }
        codec.encode(&values, out);
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
        if !dense_round {
            return self.commit_own_rows(
                state, buffer, rows, selected, sent, codec_up, selected, mean,
            );
        }
        let all = rows.start * state.width..rows.end * state.width;
        assert_eq!(mean.len(), all.len(), "mean of all rows");
        let mut sent_values = vec![0.0; mean.len()];
        if let Some(bytes) = sent {
            codec_up.decode(bytes, &mut sent_values);
        }
        for (k, i) in all.enumerate() {
            match state.feedback {
                Feedback::None => {}
                Feedback::Ef14 => state.residual[i] -= sent_values[k],
                Feedback::Ef21 | Feedback::Ef21m => {
                    state.local[i] = if sent.is_some() {
                        sent_values[k]
                    } else {
                        mean[k]
                    };
                    state.global[i] = mean[k];
                }
            }
            buffer[i] = mean[k];
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
        let all = rows.start * width..rows.end * width;
        let sent_rows = if sent.is_some() { selected } else { &[] };
        let mut sent_values = vec![0.0; sent_rows.len() * width];
        if let Some(bytes) = sent {
            codec_up.decode(bytes, &mut sent_values);
        }
        match state.feedback {
            Feedback::None => {}
            Feedback::Ef14 => {
                for (i, x) in scattered(sent_rows, &sent_values, width) {
                    state.residual[i] -= x;
                }
            }
            Feedback::Ef21 | Feedback::Ef21m => {
                for (i, x) in scattered(sent_rows, &sent_values, width) {
                    state.local[i] += x;
                }
                for (i, x) in scattered(mean_rows, mean, width) {
                    state.global[i] += x;
                }
                if sent.is_none() {
                    state.local[all.clone()].copy_from_slice(&state.global[all.clone()]);
                }
                buffer[all.clone()].copy_from_slice(&state.global[all]);
                return;
            }
        }
        buffer[all].fill(0.0);
        for (i, x) in scattered(mean_rows, mean, width) {
            buffer[i] = x;
        }
    }
}
