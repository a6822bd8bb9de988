//! Parameters: names, shapes, and a start that depends on the seed alone.
//!
//! candle's own generator cannot be seeded on the CPU, so values come from ChaCha8, one stream per parameter:
//! adding a parameter does not change the others, and all workers start alike.

use candle_core::{Device, Result, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How a parameter starts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Start {
    /// Normal with this standard deviation.
    Normal(f32),
    /// All ones (gains of a norm).
    Ones,
    /// All zeros (biases).
    Zeros,
}

/// One parameter's registration.
#[derive(Clone, PartialEq, Debug)]
pub struct ParameterSpec {
    /// Unique name.
    pub name: String,
    /// Shape; the first dimension counts the rows.
    pub shape: Vec<usize>,
    /// How it starts.
    pub(crate) start: Start,
}

impl ParameterSpec {
    pub(super) fn new(name: impl Into<String>, shape: &[usize], start: Start) -> Self {
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            start,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its starting values. `index` is the position in the registered list.
    pub(crate) fn values(&self, seed: u64, index: usize) -> Vec<f32> {
        match self.start {
            Start::Ones => vec![1.0; self.elements()],
            Start::Zeros => vec![0.0; self.elements()],
            Start::Normal(deviation) => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(index as u64 + 1);
                normal(&mut rng, self.elements(), deviation)
            }
        }
    }

    pub(super) fn var(&self, seed: u64, index: usize) -> Result<Var> {
        Var::from_tensor(&Tensor::from_vec(
            self.values(seed, index),
            self.shape.as_slice(),
            &Device::Cpu,
        )?)
    }
}

/// Normal values by Box and Muller, two of them per pair of uniform draws; f64 inside, so that rounding to f32
/// hides the last-bit differences between libms.
fn normal(rng: &mut ChaCha8Rng, count: usize, deviation: f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        // (0, 1]: the logarithm stays finite.
        let u = ((rng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        let angle = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * std::f64::consts::TAU;
        let radius = (-2.0 * u.ln()).sqrt() * f64::from(deviation);
        values.push((radius * angle.cos()) as f32);
        values.push((radius * angle.sin()) as f32);
    }
    values.truncate(count);
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_depend_on_seed_and_position_alone() {
        let spec = ParameterSpec::new("w", &[300, 301], Start::Normal(0.02));
        let a = spec.values(1, 0);
        assert_eq!(a, spec.values(1, 0));
        assert_ne!(a, spec.values(2, 0));
        assert_ne!(a, spec.values(1, 1));
        let count = a.len() as f32;
        let mean = a.iter().sum::<f32>() / count;
        let deviation = (a.iter().map(|x| x * x).sum::<f32>() / count).sqrt();
        assert!(
            mean.abs() < 5e-4 && (deviation - 0.02).abs() < 5e-4,
            "{mean} {deviation}"
        );
    }
}
