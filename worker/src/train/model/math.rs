//! Scalar kernels of the fused operations. Written so that the compiler vectorises them, and so that a result
//! depends neither on the number of threads nor on the machine's libm.

use rayon::prelude::*;

/// Below this many elements a second thread costs more than it saves.
const PARALLEL_ELEMENTS: usize = 1 << 15;

/// Calls `f(row index, row)` for every row of `width` elements, on several threads when that pays.
///
/// Rows are independent, so the result does not depend on the number of threads.
pub(super) fn for_rows(
    data: &mut [f32],
    width: usize,
    f: impl Fn(usize, &mut [f32]) + Sync + Send,
) {
    if rayon::current_num_threads() == 1 || data.len() < PARALLEL_ELEMENTS {
        data.chunks_exact_mut(width)
            .enumerate()
            .for_each(|(index, row)| f(index, row));
    } else {
        let rows_per_task = (PARALLEL_ELEMENTS / 4 / width).max(1);
        data.par_chunks_mut(width * rows_per_task)
            .enumerate()
            .for_each(|(task, rows)| {
                for (index, row) in rows.chunks_exact_mut(width).enumerate() {
                    f(task * rows_per_task + index, row);
                }
            });
    }
}

/// eˣ within 2 ulp: Cody–Waite reduction and a degree-6 polynomial (coefficients of Cephes `expf`).
/// Inputs are clamped to ±87, so the result is always finite; NaN stays NaN.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = core::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5·2²³ rounds to the nearest integer without a call.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 87.0);
    let rounded = x * LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let value = p * r * r + r + 1.0;
    // The low bits of `rounded` are those of n: shifted into the exponent, the rest falls off.
    let scale = f32::from_bits(rounded.to_bits().wrapping_shl(23).wrapping_add(127 << 23));
    value * scale
}

/// Defines `fn name(to, from)` that writes f(from[i]) to to[i], compiled for AVX2 and for the baseline.
///
/// Both do the same operations in the same order and without contraction, so results are equal to the bit.
/// A training step spends a tenth of its time in these two loops without AVX2.
macro_rules! elementwise {
    ($(#[$meta:meta])* $name:ident, $f:expr) => {
        $(#[$meta])*
        #[allow(unsafe_code, reason = "calling a function compiled for instructions that were detected")]
        pub(super) fn $name(to: &mut [f32], from: &[f32]) {
            #[inline(always)]
            fn body(to: &mut [f32], from: &[f32]) {
                to.iter_mut().zip(from).for_each(|(to, from)| *to = $f(*from));
            }
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2(to: &mut [f32], from: &[f32]) {
                    body(to, from);
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the CPU has just reported AVX2.
                    return unsafe { avx2(to, from) };
                }
            }
            body(to, from);
        }
    };
}

elementwise!(
    /// toᵢ = e^fromᵢ.
    exp_into,
    exp
);
elementwise!(
    /// toᵢ = 1/(1 + e^−fromᵢ).
    sigmoid_into,
    |x: f32| 1.0 / (1.0 + exp(-x))
);

/// Σ aᵢbᵢ in sixteen striped lanes, combined in a fixed tree.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (a_blocks, a_rest) = a.as_chunks::<16>();
    let (b_blocks, b_rest) = b.as_chunks::<16>();
    for (x, y) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..16 {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    for (lane, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] += x * y;
    }
    tree(lanes)
}

/// Σ aᵢ in sixteen striped lanes, combined in a fixed tree.
#[inline(always)]
pub(super) fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (blocks, rest) = a.as_chunks::<16>();
    for x in blocks {
        for lane in 0..16 {
            lanes[lane] += x[lane];
        }
    }
    for (lane, x) in rest.iter().enumerate() {
        lanes[lane] += x;
    }
    tree(lanes)
}

#[inline(always)]
fn tree(lanes: [f32; 16]) -> f32 {
    let mut width = 8;
    let mut lanes = lanes;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest element; NaN when there is one, so that a bad gradient is not hidden. −∞ when empty.
#[inline(always)]
pub(super) fn max(a: &[f32]) -> f32 {
    a.iter().fold(f32::NEG_INFINITY, |best, &x| {
        if x > best || x.is_nan() { x } else { best }
    })
}

/// Replaces `row` by softmax(row).
pub(super) fn softmax(row: &mut [f32]) {
    let scale = 1.0 / exp_from_top(row).0;
    row.iter_mut().for_each(|x| *x *= scale);
}

/// Replaces every x of `row` by e^(x − max); returns their sum, and max.
pub(super) fn exp_from_top(row: &mut [f32]) -> (f32, f32) {
    let top = max(row);
    for piece in row.chunks_mut(64) {
        let mut shifted = [0f32; 64];
        let shifted = &mut shifted[..piece.len()];
        shifted
            .iter_mut()
            .zip(piece.iter())
            .for_each(|(shifted, x)| *shifted = x - top);
        exp_into(piece, shifted);
    }
    (sum(row), top)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_libm() {
        for i in -8700..8700 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            let relative = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(relative < 3e-7, "exp({x}): {relative}");
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_agree_with_the_plain_form() {
        let a: Vec<f32> = (0..77).map(|i| (i as f32).sin()).collect();
        let b: Vec<f32> = (0..77).map(|i| (i as f32).cos()).collect();
        let plain: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(x * y)).sum();
        assert!((f64::from(dot(&a, &b)) - plain).abs() < 1e-5);
        assert!((sum(&a) - a.iter().sum::<f32>()).abs() < 1e-5);
    }

    #[test]
    fn softmax_sums_to_one_and_keeps_nan() {
        let mut row = vec![1.0, 2.0, 3.0, -1e9];
        softmax(&mut row);
        assert!((sum(&row) - 1.0).abs() < 1e-6, "{row:?}");
        assert!(row[3] < 1e-30, "{row:?}");
        let mut bad = vec![1.0, f32::NAN];
        softmax(&mut bad);
        assert!(bad[0].is_nan());
    }
}
