//! A gradient for benchmarks.

/// Numbers that look random (xorshift), the same every time.
pub(crate) fn gradient(elements: usize, seed: u32) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..elements).map(|_| next()).collect()
}
