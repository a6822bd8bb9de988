//! P = A V / √r, and exact row energies.
//!
//! V is expanded once per call: for every 16 columns and every column of V, 16 words that are either sign bits, to be
//! XORed into the values, or Gaussian entries, to be multiplied. Ranks are taken in pairs, each one streaming pass over rows that
//! the first pass brought into the cache.
//!
//! The lanes of some rows are first stored and then summed by another function. In one function the compiler (LLVM 21) plans its
//! vectors backwards from the final sums and keeps the lanes in scalar registers: ten times slower, as is four ranks at once.

use super::{LANES, PARALLEL_FROM, multiversion, rows_per_chunk};
use crate::compress::{ProjectionKey, SketchShape, projection};
use crate::config::algorithm::ProjectionKind;
use rayon::prelude::*;

/// One vector of words.
type Words = [u32; LANES];
/// Rows whose lanes are stored before they are summed: 4 KiB of them.
const ROWS_AT_ONCE: usize = 32;

/// Columns `first..first + ranks` of V, one or two, laid out by 16 columns of A, then rank, then lane.
struct Group {
    first: usize,
    ranks: usize,
    words: Vec<Words>,
}

/// A row block of A, and where its sketch goes.
struct Block<'a> {
    values: &'a [f32],
    estimate: Option<&'a [f32]>,
    out: &'a mut [f32],
}

/// Writes the sketch of all rows of `values` (A = values − estimate).
pub(super) fn sketch(
    values: &[f32],
    estimate: Option<&[f32]>,
    shape: SketchShape,
    key: ProjectionKey,
    out: &mut [f32],
) {
    let groups = groups(shape, key);
    let rows = rows_per_chunk(shape.width);
    let (chunk, out_chunk) = (rows * shape.width, rows * shape.rank);
    let run = |(index, out): (usize, &mut [f32])| {
        let elements = index * chunk..(index * chunk + chunk).min(values.len());
        let estimate = estimate.map(|h| &h[elements.clone()]);
        sketch_block(
            &mut Block {
                values: &values[elements],
                estimate,
                out,
            },
            shape,
            &groups,
        );
    };
    if values.len() >= PARALLEL_FROM {
        out.par_chunks_mut(out_chunk).enumerate().for_each(run);
    } else {
        out.chunks_mut(out_chunk).enumerate().for_each(run);
    }
}

fn sketch_block(block: &mut Block<'_>, shape: SketchShape, groups: &[Group]) {
    for group in groups {
        if group.ranks == 2 {
            block.sketch::<2>(shape, group)
        } else {
            block.sketch::<1>(shape, group)
        }
    }
}

impl Block<'_> {
    fn sketch<const R: usize>(&mut self, shape: SketchShape, group: &Group) {
        let mut lanes = [[[0f32; LANES]; R]; ROWS_AT_ONCE];
        let chunk = ROWS_AT_ONCE * shape.width;
        for (index, out) in self.out.chunks_mut(ROWS_AT_ONCE * shape.rank).enumerate() {
            let elements = index * chunk..(index * chunk + chunk).min(self.values.len());
            let estimate = self.estimate.map(|h| &h[elements.clone()]);
            fill_lanes::<R>(
                &self.values[elements],
                estimate,
                shape,
                &group.words,
                &mut lanes,
            );
            sum_lanes::<R>(&lanes, shape.rank, group.first, out);
        }
    }
}

multiversion! {
fn fill_lanes<const R: usize>(values: &[f32], estimate: Option<&[f32]>, shape: SketchShape, words: &[Words], lanes: &mut [[[f32; LANES]; R]]) {
    let width = shape.width;
    // The choices are made out here, so that the loops over a row have none.
    match (shape.kind, estimate) {
        (ProjectionKind::Rademacher, None) => each_row::<R>(values, values, width, words, lanes, |x, _| x, flip),
        (ProjectionKind::Rademacher, Some(h)) => each_row::<R>(values, h, width, words, lanes, |x, h| x - h, flip),
        (ProjectionKind::Gaussian, None) => each_row::<R>(values, values, width, words, lanes, |x, _| x, multiply),
        (ProjectionKind::Gaussian, Some(h)) => each_row::<R>(values, h, width, words, lanes, |x, h| x - h, multiply),
    }
}
}

multiversion! {
/// Columns `first..first + R` of the sketch, from the lanes of its rows.
fn sum_lanes<const R: usize>(lanes: &[[[f32; LANES]; R]], rank: usize, first: usize, out: &mut [f32]) {
    let scale = 1.0 / (rank as f32).sqrt();
    for (lanes, out) in lanes.iter().zip(out.chunks_exact_mut(rank)) {
        for (lanes, p) in lanes.iter().zip(&mut out[first..first + R]) {
            *p = tree_sum(*lanes) * scale;
        }
    }
}
}

#[inline(always)]
fn flip(x: f32, word: u32) -> f32 {
    f32::from_bits(x.to_bits() ^ word)
}

#[inline(always)]
fn multiply(x: f32, word: u32) -> f32 {
    x * f32::from_bits(word)
}

#[inline(always)]
fn each_row<const R: usize>(
    values: &[f32],
    estimates: &[f32],
    width: usize,
    words: &[Words],
    out: &mut [[[f32; LANES]; R]],
    input: impl Fn(f32, f32) -> f32 + Copy,
    apply: impl Fn(f32, u32) -> f32 + Copy,
) {
    let (words, _) = words.as_chunks::<R>();
    for ((values, estimates), out) in values
        .chunks_exact(width)
        .zip(estimates.chunks_exact(width))
        .zip(out)
    {
        let (values, values_tail) = values.as_chunks::<LANES>();
        let (estimates, estimates_tail) = estimates.as_chunks::<LANES>();
        let mut lanes = [[0f32; LANES]; R];
        for ((x, h), words) in values.iter().zip(estimates).zip(words) {
            for l in 0..LANES {
                for k in 0..R {
                    lanes[k][l] += apply(input(x[l], h[l]), words[k][l]);
                }
            }
        }
        *out = lanes;
        if !values_tail.is_empty() {
            for (lanes, words) in out.iter_mut().zip(&words[values.len()]) {
                for (((lane, x), h), word) in lanes
                    .iter_mut()
                    .zip(values_tail)
                    .zip(estimates_tail)
                    .zip(words)
                {
                    *lane += apply(input(*x, *h), *word);
                }
            }
        }
    }
}

/// 16 → 8 → 4 → 2 → 1.
#[inline(always)]
fn tree_sum(lanes: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|l| lanes[l] + lanes[l + 8]);
    let four: [f32; 4] = std::array::from_fn(|l| eight[l] + eight[l + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// V, cut into groups of ranks.
fn groups(shape: SketchShape, key: ProjectionKey) -> Vec<Group> {
    let group = |first: usize| {
        let ranks = (shape.rank - first).min(2);
        Group {
            first,
            ranks,
            words: vec![[0; LANES]; shape.width.div_ceil(LANES) * ranks],
        }
    };
    let mut groups: Vec<Group> = (0..shape.rank).step_by(2).map(group).collect();
    let mut put = |entry: usize, word: u32| {
        let (column, rank) = (entry / shape.rank, entry % shape.rank);
        let group = &mut groups[rank / 2];
        group.words[column / LANES * group.ranks + rank % 2][column % LANES] = word;
    };
    match shape.kind {
        ProjectionKind::Rademacher => {
            for (entry, bit) in projection::sign_bits(key, shape.width * shape.rank).enumerate() {
                put(entry, bit << 31);
            }
        }
        ProjectionKind::Gaussian => {
            for (entry, v) in projection::gaussian(key, shape.width * shape.rank)
                .into_iter()
                .enumerate()
            {
                put(entry, v.to_bits());
            }
        }
    }
    groups
}

/// Writes ‖A_j‖² of every row.
pub(super) fn energy(values: &[f32], estimate: Option<&[f32]>, width: usize, out: &mut [f64]) {
    let rows = rows_per_chunk(width);
    let chunk = rows * width;
    let run = |(index, out): (usize, &mut [f64])| {
        let elements = index * chunk..(index * chunk + chunk).min(values.len());
        energy_block(
            &values[elements.clone()],
            estimate.map(|h| &h[elements]),
            width,
            out,
        );
    };
    if values.len() >= PARALLEL_FROM {
        out.par_chunks_mut(rows).enumerate().for_each(run);
    } else {
        out.chunks_mut(rows).enumerate().for_each(run);
    }
}

multiversion! {
fn energy_block(values: &[f32], estimate: Option<&[f32]>, width: usize, out: &mut [f64]) {
    for (row, energy) in out.iter_mut().enumerate() {
        let elements = row * width..(row + 1) * width;
        *energy = match estimate {
            None => row_energy(&values[elements.clone()], &values[elements], |x, _| x),
            Some(h) => row_energy(&values[elements.clone()], &h[elements], |x, h| x - h),
        };
    }
}
}

#[inline(always)]
fn row_energy(values: &[f32], estimates: &[f32], input: impl Fn(f32, f32) -> f32) -> f64 {
    let mut lanes = [0f64; LANES];
    for (values, estimates) in values.chunks(LANES).zip(estimates.chunks(LANES)) {
        for ((lane, x), h) in lanes.iter_mut().zip(values).zip(estimates) {
            let x = f64::from(input(*x, *h));
            *lane += x * x;
        }
    }
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}
