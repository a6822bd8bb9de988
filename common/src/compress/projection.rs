//! The projection V (n×r) of one tensor and step.
//!
//! Rademacher: bit b = c·r + j of the tensor's Philox blocks (word (b mod 128)/32, bit b mod 32 from the low
//! end) gives V\[c,j\]: 0 → +1, 1 → −1.
//!
//! Gaussian: entry e = c·r + j comes from block e / 4. Its words are two pairs (a, b); a pair gives two standard
//! normal values by Box–Muller with u = (a + 1)/2³² and the angle 2π·b/2³²: √(−2 ln u)·cos, then √(−2 ln u)·sin.
//! Logarithm, sine and cosine are computed here from additions, multiplications and divisions in f64, because the system's
//! own may differ in the last bit from one machine to the next, and V must not.

use super::{ProjectionKey, SketchShape, philox};
use crate::config::algorithm::ProjectionKind;
use crate::elementary::ln;

/// V as n×r floats, row-major. The hot path uses sign masks instead; see `fast`.
#[must_use]
pub fn projection(shape: SketchShape, key: ProjectionKey) -> Vec<f32> {
    let entries = shape.width * shape.rank;
    match shape.kind {
        ProjectionKind::Rademacher => sign_bits(key, entries)
            .map(|bit| if bit == 1 { -1.0 } else { 1.0 })
            .collect(),
        ProjectionKind::Gaussian => gaussian(key, entries),
    }
}

/// The first `entries` bits of the tensor's stream: 1 means −1.
pub(crate) fn sign_bits(key: ProjectionKey, entries: usize) -> impl Iterator<Item = u32> {
    (0..entries.div_ceil(128) as u32)
        .flat_map(move |block| philox::block(key, block))
        .flat_map(|word| (0..32).map(move |bit| (word >> bit) & 1))
        .take(entries)
}

/// The first `entries` normal values of the tensor's stream.
pub(crate) fn gaussian(key: ProjectionKey, entries: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(entries + 3);
    for block in 0..entries.div_ceil(4) as u32 {
        let [a, b, c, d] = philox::block(key, block);
        out.extend(box_muller(a, b));
        out.extend(box_muller(c, d));
    }
    out.truncate(entries);
    out
}

fn box_muller(a: u32, b: u32) -> [f32; 2] {
    let radius = (-2.0 * ln((f64::from(a) + 1.0) / 4_294_967_296.0)).sqrt();
    let (sin, cos) = sin_cos_turn(b);
    [(radius * cos) as f32, (radius * sin) as f32]
}

/// Sine and cosine of `turn`/2³² of a full turn.
fn sin_cos_turn(turn: u32) -> (f64, f64) {
    // Nearest quarter turn, and what is left of it: at most an eighth either way.
    let quarter = turn.wrapping_add(1 << 29) >> 30;
    let rest = f64::from(turn.wrapping_sub(quarter << 30) as i32) / 4_294_967_296.0;
    let x = rest * core::f64::consts::TAU;
    // |x| ≤ π/4: the first term left out is below 1e-18.
    let square = x * x;
    let (mut sin, mut cos) = (0.0, 0.0);
    for k in (0..9).rev() {
        let k = f64::from(k);
        sin = 1.0 - square / ((2.0 * k + 2.0) * (2.0 * k + 3.0)) * sin;
        cos = 1.0 - square / ((2.0 * k + 1.0) * (2.0 * k + 2.0)) * cos;
    }
    let sin = x * sin;
    match quarter {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: ProjectionKey = ProjectionKey {
        seed: 5,
        tensor: 3,
        step: 9,
    };

    #[test]
    fn sine_and_cosine_agree_with_the_system() {
        for i in 0..20_000u32 {
            let word = i.wrapping_mul(2_654_435_761);
            let (sin, cos) = sin_cos_turn(word);
            let angle = f64::from(word) / 4_294_967_296.0 * core::f64::consts::TAU;
            assert!(
                (sin - angle.sin()).abs() < 2e-15 && (cos - angle.cos()).abs() < 2e-15,
                "{word}"
            );
        }
    }

    #[test]
    fn gaussian_entries_have_the_moments_of_a_normal() {
        let v = gaussian(KEY, 200_001);
        assert_eq!(v.len(), 200_001);
        let moment = |p: i32| v.iter().map(|x| f64::from(*x).powi(p)).sum::<f64>() / v.len() as f64;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02);
        assert!(moment(3).abs() < 0.03 && (moment(4) - 3.0).abs() < 0.1);
    }

    #[test]
    fn a_longer_projection_starts_with_the_shorter_one() {
        for kind in [ProjectionKind::Rademacher, ProjectionKind::Gaussian] {
            let v = |width| {
                projection(
                    SketchShape {
                        width,
                        rank: 3,
                        kind,
                    },
                    KEY,
                )
            };
            assert_eq!(v(200)[..99], v(33)[..]);
        }
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let shape = SketchShape {
            width: 64,
            rank: 4,
            kind: ProjectionKind::Rademacher,
        };
        let keys = [
            KEY,
            ProjectionKey {
                seed: KEY.seed + (1 << 32),
                ..KEY
            },
            ProjectionKey { tensor: 4, ..KEY },
            ProjectionKey {
                step: KEY.step + (1 << 32),
                ..KEY
            },
        ];
        for (i, a) in keys.iter().enumerate() {
            for b in &keys[..i] {
                assert_ne!(projection(shape, *a), projection(shape, *b));
            }
        }
    }
}
