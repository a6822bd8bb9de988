//! Learning rates.

/// A linear rise to the peak, then half a cosine down to a share of it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Schedule {
    /// Highest rate.
    pub peak: f32,
    /// Last rate, as a share of the peak.
    pub min_ratio: f32,
    /// Steps of the rise.
    pub warmup: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// Rate of step `step`, from 0. Computed in f64: the same on all machines after rounding to f32.
    #[must_use]
    pub fn rate(&self, step: u64) -> f32 {
        let peak = f64::from(self.peak);
        if step < self.warmup {
            return (peak * (step + 1) as f64 / self.warmup as f64) as f32;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let progress = ((step - self.warmup) as f64 / span).min(1.0);
        let min = f64::from(self.min_ratio);
        let share = min + (1.0 - min) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        (peak * share) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_then_falls_to_its_minimum() {
        let schedule = Schedule {
            peak: 1.0,
            min_ratio: 0.1,
            warmup: 10,
            steps: 110,
        };
        assert_eq!(schedule.rate(0), 0.1);
        assert_eq!(schedule.rate(9), 1.0);
        assert_eq!(schedule.rate(10), 1.0);
        assert!((schedule.rate(60) - 0.55).abs() < 1e-6);
        assert!((schedule.rate(110) - 0.1).abs() < 1e-6 && (schedule.rate(999) - 0.1).abs() < 1e-6);
        assert!(
            (0..109)
                .skip(10)
                .all(|step| schedule.rate(step) >= schedule.rate(step + 1))
        );
    }

    #[test]
    fn no_warmup_and_no_steps_are_harmless() {
        let schedule = Schedule {
            peak: 0.5,
            min_ratio: 1.0,
            warmup: 0,
            steps: 0,
        };
        assert_eq!(schedule.rate(0), 0.5);
        assert_eq!(schedule.rate(5), 0.5);
    }
}
