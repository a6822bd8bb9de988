//! Squared norms for the measurements. Sums are made in blocks of fixed size in f64, so that they do not depend on threads.

use rayon::prelude::*;

/// Elements per block.
const BLOCK: usize = 1 << 16;

/// Σ x², at most one pass.
pub(super) fn energy(values: &[f32]) -> f64 {
    let blocks: Vec<f64> = values.par_chunks(BLOCK).map(block_energy).collect();
    blocks.iter().sum()
}

fn block_energy(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let mut chunks = values.chunks_exact(8);
    for chunk in &mut chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    let rest: f64 = chunks
        .remainder()
        .iter()
        .map(|x| f64::from(*x) * f64::from(*x))
        .sum();
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_of_a_long_vector() {
        let values = vec![2.0; 3 * BLOCK + 5];
        assert_eq!(energy(&values), 4.0 * values.len() as f64);
        assert_eq!(energy(&[]), 0.0);
    }
}
