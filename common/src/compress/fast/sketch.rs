//! P = A V / √r, and exact row energies.
//!
//! V is expanded once per call: for every 16 columns and every column of V, 16 words that are either sign bits, to be
//! XORed into the values, or Gaussian entries, to be multiplied. A row's sum is then one streaming pass over the row
//! with 16 lanes per column of V in registers. Ranks are taken in groups of 8, 4, 2 and 1, so that the lanes fit.

use super::{LANES, PARALLEL_FROM, multiversion, rows_per_chunk};
use crate::compress::{ProjectionKey, SketchShape, projection};
use crate::config::algorithm::ProjectionKind;
use rayon::prelude::*;

/// One vector of words.
type Words = [u32; LANES];

/// Columns `first..first + ranks` of V, laid out as [16 columns of A][rank][lane].
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
        match group.ranks {
            8 => rows::<8>(block.values, block.estimate, shape, group, block.out),
            4 => rows::<4>(block.values, block.estimate, shape, group, block.out),
            2 => rows::<2>(block.values, block.estimate, shape, group, block.out),
            _ => rows::<1>(block.values, block.estimate, shape, group, block.out),
        }
    }
}

multiversion! {
fn rows<const R: usize>(values: &[f32], estimate: Option<&[f32]>, shape: SketchShape, group: &Group, out: &mut [f32]) {
    // The choices are made out here, so that the loops over a row have none.
    match (shape.kind, estimate) {
        (ProjectionKind::Rademacher, None) => each_row::<R>(values, values, shape, group, out, |x, _| x, flip),
        (ProjectionKind::Rademacher, Some(h)) => each_row::<R>(values, h, shape, group, out, |x, h| x - h, flip),
        (ProjectionKind::Gaussian, None) => each_row::<R>(values, values, shape, group, out, |x, _| x, multiply),
        (ProjectionKind::Gaussian, Some(h)) => each_row::<R>(values, h, shape, group, out, |x, h| x - h, multiply),
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
    shape: SketchShape,
    group: &Group,
    out: &mut [f32],
    input: impl Fn(f32, f32) -> f32 + Copy,
    apply: impl Fn(f32, u32) -> f32 + Copy,
) {
    let scale = 1.0 / (shape.rank as f32).sqrt();
    let rows = values
        .chunks_exact(shape.width)
        .zip(estimates.chunks_exact(shape.width));
    for ((values, estimates), out) in rows.zip(out.chunks_exact_mut(shape.rank)) {
        let lanes = one_row::<R>(values, estimates, &group.words, input, apply);
        for (p, lanes) in out[group.first..].iter_mut().zip(lanes) {
            *p = tree_sum(lanes) * scale;
        }
    }
}

#[inline(always)]
fn one_row<const R: usize>(
    values: &[f32],
    estimates: &[f32],
    words: &[Words],
    input: impl Fn(f32, f32) -> f32,
    apply: impl Fn(f32, u32) -> f32,
) -> [[f32; LANES]; R] {
    let mut lanes = [[0f32; LANES]; R];
    let ((values, tail), (estimates, estimates_tail)) =
        (values.as_chunks::<LANES>(), estimates.as_chunks::<LANES>());
    let (words, last) = words.as_chunks::<R>();
    debug_assert!(last.is_empty());
    for ((x, h), words) in values.iter().zip(estimates).zip(words) {
        for k in 0..R {
            for l in 0..LANES {
                lanes[k][l] += apply(input(x[l], h[l]), words[k][l]);
            }
        }
    }
    if !tail.is_empty() {
        let (mut x, words) = ([0f32; LANES], &words[values.len()]);
        for ((x, value), h) in x.iter_mut().zip(tail).zip(estimates_tail) {
            *x = input(*value, *h);
        }
        for k in 0..R {
            for l in 0..LANES {
                lanes[k][l] += apply(x[l], words[k][l]);
            }
        }
    }
    lanes
}

/// 16 → 8 → 4 → 2 → 1.
#[inline(always)]
fn tree_sum(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

/// V, cut into groups of ranks.
fn groups(shape: SketchShape, key: ProjectionKey) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut first = 0;
    while first < shape.rank {
        let ranks = [8, 4, 2, 1]
            .into_iter()
            .find(|r| *r <= shape.rank - first)
            .unwrap_or(1);
        groups.push(Group {
            first,
            ranks,
            words: vec![[0; LANES]; shape.width.div_ceil(LANES) * ranks],
        });
        first += ranks;
    }
    let mut put = |entry: usize, word: u32| {
        let (column, rank) = (entry / shape.rank, entry % shape.rank);
        // Groups of 8 come first, so that rank / 8 finds those; at most three smaller ones follow.
        let group = groups[(rank / 8).min(shape.rank / 8)..]
            .iter_mut()
            .find(|g| rank < g.first + g.ranks);
        let group = group.expect("groups cover all ranks");
        group.words[column / LANES * group.ranks + rank - group.first][column % LANES] = word;
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
