//! Elementwise loops.

use crate::compress::simd::multiversion;
use half::bf16;

/// Numbers of one AdamW update, the same for all its elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdamCoefficients {
    /// Clip factor over τ.
    pub(super) grad: f32,
    /// β₁^τ.
    pub(super) keep1: f32,
    /// 1 − β₁^τ.
    pub(super) take1: f32,
    /// β₂^τ.
    pub(super) keep2: f32,
    /// 1 − β₂^τ.
    pub(super) take2: f32,
    /// 1/(1 − β₁^T).
    pub(super) correct1: f32,
    /// 1/(1 − β₂^T).
    pub(super) correct2: f32,
    /// Sum of τ learning rates.
    pub(super) lr: f32,
    /// ε.
    pub(super) eps: f32,
}

multiversion! {
pub(super) fn adam(x: &mut [f32], g: &[f32], first: &mut [f32], second: &mut [f32], c: AdamCoefficients) {
    for (((x, g), m), v) in x.iter_mut().zip(g).zip(first).zip(second) {
        let g = g * c.grad;
        *m = c.keep1 * *m + c.take1 * g;
        *v = c.keep2 * *v + c.take2 * (g * g);
        *x -= c.lr * ((*m * c.correct1) / ((*v * c.correct2).sqrt() + c.eps));
    }
}
}

multiversion! {
pub(super) fn momentum(x: &mut [f32], g: &[f32], first: &mut [f32], momentum: f32, lr: f32, scale: f32) {
    for ((x, g), u) in x.iter_mut().zip(g).zip(first) {
        *u = momentum * *u + g * scale;
        *x -= lr * *u;
    }
}
}

multiversion! {
pub(super) fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}
}

multiversion! {
/// In f64, eight striped partial sums.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    for values in values.chunks(8) {
        for (lane, x) in lanes.iter_mut().zip(values) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    lanes.iter().sum()
}
}

multiversion! {
/// A loop of our own: `half` converts slices of bf16 an element at a time, and the whole step takes three times as long.
pub(super) fn widen(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}
}

multiversion! {
/// To the nearest, as above.
pub(super) fn narrow(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::from_f32(*from);
    }
}
}
