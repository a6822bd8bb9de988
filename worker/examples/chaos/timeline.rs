//! When which worker did which step, and how long steps stood still.

use std::time::{Duration, Instant};

/// A step that one worker reported.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) at: Instant,
    pub(crate) step: u64,
    /// It computed a gradient, and did not only take the result of a step that had closed without it.
    pub(crate) live: bool,
}

/// The longest time between two steps of a worker that touches the time `from..to`.
pub(crate) fn longest_gap(steps: &[Seen], from: Instant, to: Instant) -> Option<Duration> {
    let touching = steps
        .windows(2)
        .filter(|pair| pair[1].at > from && pair[0].at < to);
    touching.map(|pair| pair[1].at - pair[0].at).max()
}

/// Live steps since `since`.
pub(crate) fn live_since(steps: &[Seen], since: Instant) -> usize {
    let recent = steps.iter().rev().take_while(|seen| seen.at > since);
    recent.filter(|seen| seen.live).count()
}

/// The usual time between two steps.
pub(crate) fn median_gap<'a>(workers: impl Iterator<Item = &'a [Seen]>) -> Duration {
    let mut gaps: Vec<f64> = workers
        .flat_map(|steps| steps.windows(2))
        .map(|pair| (pair[1].at - pair[0].at).as_secs_f64())
        .collect();
    Duration::from_secs_f64(median(&mut gaps).unwrap_or(0.0))
}

/// The middle one; of an even number the lower.
pub(crate) fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(at: &[u64]) -> (Instant, Vec<Seen>) {
        let start = Instant::now();
        let seen = |(step, ms): (usize, &u64)| Seen {
            at: start + Duration::from_millis(*ms),
            step: step as u64,
            live: step % 2 == 0,
        };
        (start, at.iter().enumerate().map(seen).collect())
    }

    #[test]
    fn a_gap_counts_where_it_touches_the_fault() {
        let (start, steps) = steps(&[0, 500, 510, 520, 900, 910]);
        let at = |ms| start + Duration::from_millis(ms);
        let gap = |from, to| longest_gap(&steps, at(from), at(to)).map(|gap| gap.as_millis());
        assert_eq!(gap(515, 905), Some(380));
        assert_eq!(gap(600, 700), Some(380), "the fault lies within the gap");
        assert_eq!(gap(901, 950), Some(10));
        assert_eq!(gap(950, 999), None);
        assert_eq!(live_since(&steps, at(505)), 2);
        assert_eq!(
            median_gap([&steps[..]].into_iter()),
            Duration::from_millis(10)
        );
        assert_eq!(median(&mut []), None);
    }
}
