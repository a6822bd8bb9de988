//! Logarithm and exponential of additions, multiplications and divisions in f64 alone. The system's own may differ in the
//! last bit from one machine to the next, and what all workers must compute alike (I3) may not.

/// Natural logarithm of a normal number in (0, 1], to about 1e-16 of 1 + |ln x|.
pub(crate) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits(bits & ((1 << 52) - 1) | (1023 << 52));
    if mantissa > core::f64::consts::SQRT_2 {
        mantissa /= 2.0;
        exponent += 1;
    }
    // ln m = 2 artanh s; |s| ≤ 0.172, so that 13 terms leave less than 1e-20.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let series = (0..13)
        .rev()
        .fold(0.0, |sum, k| sum * (s * s) + 1.0 / f64::from(2 * k + 1));
    exponent as f64 * core::f64::consts::LN_2 + 2.0 * s * series
}

/// e to the power of a number in [−700, 0], to about 1e-16 of (1 + |x|) times the result.
pub(crate) fn exp(x: f64) -> f64 {
    let twos = (x / core::f64::consts::LN_2).round();
    let rest = x - twos * core::f64::consts::LN_2;
    // |rest| ≤ 0.35: the first term left out is below 1e-20.
    let series = (1..=15)
        .rev()
        .fold(1.0, |sum, k| 1.0 + rest / f64::from(k) * sum);
    // At least 2^−1010, so a normal number.
    series * f64::from_bits(((1023 + twos as i64) as u64) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_agree_with_the_system() {
        for i in 0..20_000u32 {
            let word = i.wrapping_mul(2_654_435_761);
            let x = (f64::from(word) + 1.0) / 4_294_967_296.0;
            assert!(
                (ln(x) - x.ln()).abs() <= 1e-15 * (1.0 + x.ln().abs()),
                "ln {x}"
            );
            let y = -700.0 * x * x * x;
            let expected = y.exp();
            assert!(
                (exp(y) - expected).abs() <= 1e-15 * (1.0 + y.abs()) * expected,
                "exp {y}"
            );
        }
        assert_eq!((ln(1.0), exp(0.0)), (0.0, 1.0));
    }
}
