//! Numbers that catch-up AdamW's rows multiply with, as the common crate computes them.

use crate::abi::AdamTau;

impl AdamTau {
    /// For τ = 1 to `cap`. `rates`: learning rates of the last steps, this one's first; the last of them stands for those before
    /// it. `scale` multiplies the gradient.
    ///
    /// # Panics
    /// If there is no rate.
    #[must_use]
    pub fn table(betas: (f64, f64), rates: &[f64], scale: f32, cap: u32) -> Vec<Self> {
        assert!(!rates.is_empty(), "a step has a rate");
        let sums: Vec<f64> = rates
            .iter()
            .scan(0.0, |sum, rate| {
                *sum += rate;
                Some(*sum)
            })
            .collect();
        let entry = |tau: u32| {
            let (decay1, decay2) = (power(betas.0, tau), power(betas.1, tau));
            Self {
                grad: scale / tau as f32,
                keep1: decay1 as f32,
                take1: (1.0 - decay1) as f32,
                keep2: decay2 as f32,
                take2: (1.0 - decay2) as f32,
                lr: sums[(tau as usize).min(sums.len()) - 1] as f32,
            }
        };
        (1..=cap.max(1)).map(entry).collect()
    }
}

/// base^exponent by squaring.
fn power(mut base: f64, mut exponent: u32) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}
