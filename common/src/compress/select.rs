//! Which rows travel.

use super::{ProjectionKey, philox};
use core::ops::Range;

/// K = max(1, ceil(μ·m)), at most m; 0 of no rows.
///
/// A product within f32's rounding of an integer is that integer: 0.2f32 is a little more than 1/5,
/// and 0.2 of 5 rows must be one row, not two.
#[must_use]
pub fn rows_to_keep(density: f32, rows: usize) -> usize {
    let exact = f64::from(density) * rows as f64;
    let nearest = exact.round();
    let guarded = if (exact - nearest).abs() <= exact * f64::from(f32::EPSILON) {
        nearest
    } else {
        exact.ceil()
    };
    (guarded as usize).max(1).min(rows)
}

/// Score ‖P_j‖² of every row of an averaged sketch (rows × `rank`, row-major).
///
/// In f64, so that squares of very small or large gradients neither vanish nor overflow.
///
/// # Panics
/// If `rank` is 0 or does not divide the length.
#[must_use]
pub fn score(sketch: &[f32], rank: usize) -> Vec<f64> {
    assert!(
        rank > 0 && sketch.len().is_multiple_of(rank),
        "sketch of {} values, rank {rank}",
        sketch.len()
    );
    sketch
        .chunks_exact(rank)
        .map(|row| row.iter().map(|p| f64::from(*p) * f64::from(*p)).sum())
        .collect()
}

/// The `k` rows of highest score, ascending; a tie goes to the lower row. NaN is lower than every number.
/// All rows if there are no more than `k`. Row numbers are positions in `scores`.
#[must_use]
pub fn select_top_k(scores: &[f64], k: usize) -> Vec<u32> {
    lowest(scores.iter().map(|score| descending(*score)), k)
}

/// The fewest rows of highest score that hold the share `energy` of the sum of all scores: one at least, `k` at most, ascending.
/// With an energy of 1 always `k` rows, as [`select_top_k`] has them; ties and NaN are as there.
///
/// Scores are added in the order of rows for their sum, and from the highest down (of equal ones, from the lower row) for the
/// share, in f64: the result depends on the scores alone. All zero: one row holds all there is. NaN among them: `k` rows.
#[must_use]
pub fn select_energy(scores: &[f64], k: usize, energy: f32) -> Vec<u32> {
    if energy >= 1.0 {
        return select_top_k(scores, k);
    }
    let mut best = lowest_keys(scores.iter().map(|score| descending(*score)), k);
    best.sort_unstable();
    let mut goal = Goal::new(energy, scores.iter());
    let reached = |(_, row): &(u64, u32)| goal.reached_with(scores[*row as usize]);
    if let Some(last) = best.iter().position(reached) {
        best.truncate(last + 1);
    }
    ascending_rows(best)
}

/// A share of the energy, and what of it is chosen.
struct Goal {
    /// `None`: whatever is chosen is not enough.
    wanted: Option<f64>,
    chosen: f64,
}

impl Goal {
    fn new<'a>(energy: f32, scores: impl Iterator<Item = &'a f64>) -> Self {
        Self {
            wanted: (energy < 1.0).then(|| f64::from(energy) * scores.sum::<f64>()),
            chosen: 0.0,
        }
    }

    /// Counts a row of this score in; whether that is enough.
    fn reached_with(&mut self, score: f64) -> bool {
        self.chosen += score;
        self.wanted.is_some_and(|wanted| self.chosen >= wanted)
    }
}

/// One tensor segment in a pooled selection.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PooledSegment<'a> {
    /// Scores of its rows.
    pub scores: &'a [f64],
    /// Row width n, elements.
    pub width: usize,
}

/// Elements that [`select_pooled`] may pick: as many as the per-tensor rule would.
#[must_use]
pub fn pooled_budget(density: f32, segments: &[PooledSegment<'_>]) -> usize {
    segments
        .iter()
        .map(|s| rows_to_keep(density, s.scores.len()) * s.width)
        .sum()
}

/// Rows of all segments in order of score per element, as long as they fit into `budget` elements; a row that
/// no longer fits is passed over. With an `energy` below 1 no more once they hold that share of the sum of all scores, which is
/// added as in [`select_energy`], segment by segment. A tie goes to the earlier segment, then to the lower row. At least one row
/// in all, if there is any. Ascending rows per segment, numbered within it; a segment may get none.
#[must_use]
pub fn select_pooled(segments: &[PooledSegment<'_>], budget: usize, energy: f32) -> Vec<Vec<u32>> {
    let mut candidates = Vec::with_capacity(segments.iter().map(|s| s.scores.len()).sum());
    for (index, segment) in segments.iter().enumerate() {
        let rows = segment.scores.iter().enumerate();
        candidates.extend(
            rows.map(|(row, score)| (descending(score / segment.width as f64), index, row as u32)),
        );
    }
    candidates.sort_unstable();
    let mut chosen = vec![Vec::new(); segments.len()];
    let mut left = budget;
    let mut goal = Goal::new(energy, segments.iter().flat_map(|s| s.scores));
    for (position, (_, index, row)) in candidates.into_iter().enumerate() {
        let PooledSegment { scores, width } = segments[index];
        if width <= left || position == 0 {
            left = left.saturating_sub(width);
            chosen[index].push(row);
            if goal.reached_with(scores[row as usize]) {
                break;
            }
        }
    }
    for rows in &mut chosen {
        rows.sort_unstable();
    }
    chosen
}

/// randk: `k` of the rows `rows` of a tensor, ascending **absolute** row numbers, uniformly at random and the same on
/// every peer. Row j's key is word j mod 4 of Philox block 2³¹ + j / 4 of the tensor and step (a counter space that the
/// projection never enters); the lowest keys win, a tie goes to the lower row.
#[must_use]
pub fn randk_rows(key: ProjectionKey, rows: Range<usize>, k: usize) -> Vec<u32> {
    let start = rows.start as u32;
    let mut block = (u32::MAX, [0; 4]);
    let keys = rows.map(|row| {
        let number = philox::ROW_KEY_SPACE | (row / 4) as u32;
        if block.0 != number {
            block = (number, philox::block(key, number));
        }
        u64::from(block.1[row % 4])
    });
    let mut chosen = lowest(keys, k);
    for row in &mut chosen {
        *row += start;
    }
    chosen
}

/// Maps a score to an integer that is smaller the higher the score; NaN comes last, −0 equals +0.
fn descending(score: f64) -> u64 {
    if score.is_nan() {
        return u64::MAX;
    }
    let bits = (score + 0.0).to_bits();
    let ascending = if bits >> 63 == 1 {
        !bits
    } else {
        bits | 1 << 63
    };
    !ascending
}

/// Positions of the `k` lowest keys, ascending; ties go to the lower position.
fn lowest(keys: impl Iterator<Item = u64>, k: usize) -> Vec<u32> {
    ascending_rows(lowest_keys(keys, k))
}

/// The `k` lowest keys with their positions, in no order; ties go to the lower position.
fn lowest_keys(keys: impl Iterator<Item = u64>, k: usize) -> Vec<(u64, u32)> {
    let mut order: Vec<(u64, u32)> = keys.zip(0u32..).collect();
    if k == 0 {
        return Vec::new();
    }
    if k < order.len() {
        order.select_nth_unstable(k - 1);
        order.truncate(k);
    }
    order
}

fn ascending_rows(order: Vec<(u64, u32)>) -> Vec<u32> {
    let mut rows: Vec<u32> = order.into_iter().map(|(_, row)| row).collect();
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_to_keep_does_not_trip_over_rounding() {
        assert_eq!(rows_to_keep(0.2, 5), 1);
        assert_eq!(rows_to_keep(0.2, 6), 2);
        assert_eq!(rows_to_keep(0.1, 30), 3);
        assert_eq!(rows_to_keep(0.3, 1_000_000), 300_000);
        assert_eq!(rows_to_keep(0.05, 1), 1);
        assert_eq!(rows_to_keep(1e-9, 100), 1);
        assert_eq!(rows_to_keep(1.0, 7), 7);
        assert_eq!(rows_to_keep(0.5, 0), 0);
        for rows in 1..2000usize {
            for percent in 1..=100 {
                let expected = (rows * percent).div_ceil(100);
                assert_eq!(
                    rows_to_keep(percent as f32 / 100.0, rows),
                    expected,
                    "{percent} % of {rows}"
                );
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_row_and_nan_loses() {
        assert_eq!(select_top_k(&[1.0, 3.0, 3.0, 3.0], 2), [1, 2]);
        assert_eq!(select_top_k(&[f64::NAN, 0.0, -0.0, 0.0], 2), [1, 2]);
        assert_eq!(select_top_k(&[f64::NAN, -1.0, f64::INFINITY], 2), [1, 2]);
        assert_eq!(select_top_k(&[f64::NAN, f64::NAN], 1), [0]);
        assert_eq!(select_top_k(&[1.0], 5), [0]);
        assert_eq!(select_top_k(&[1.0], 0), [0u32; 0]);
        assert_eq!(select_top_k(&[], 3), [0u32; 0]);
    }

    #[test]
    fn scores_of_tiny_and_huge_sketches_stay_apart() {
        assert_eq!(select_top_k(&score(&[1e-30, 2e-30, 1e30, 2e30], 1), 1), [3]);
        assert_eq!(select_top_k(&score(&[1e-30, 0.0, 2e-30, 0.0], 2), 1), [1]);
    }

    #[test]
    fn pooled_rows_compete_per_element() {
        // Per element: 1, 3 | 4, 1 (widths 2 and 1).
        let segments = [
            PooledSegment {
                scores: &[2.0, 6.0],
                width: 2,
            },
            PooledSegment {
                scores: &[4.0, 1.0],
                width: 1,
            },
        ];
        assert_eq!(pooled_budget(0.5, &segments), 3);
        assert_eq!(select_pooled(&segments, 3, 1.0), [vec![1], vec![0]]);
        // The wide row does not fit into what is left, a narrow one after it does.
        assert_eq!(select_pooled(&segments, 2, 1.0), [vec![], vec![0, 1]]);
        assert_eq!(
            select_pooled(&segments[..1], 1, 1.0),
            [vec![1]],
            "one row even beyond the budget"
        );
        assert_eq!(select_pooled(&[], 1, 1.0), [[0u32; 0]; 0]);
    }

    #[test]
    fn as_few_rows_as_hold_the_energy() {
        let scores = [1.0, 5.0, 0.0, 3.0, 1.0];
        let selected = |k, energy| select_energy(&scores, k, energy);
        assert_eq!(selected(4, 0.5), [1], "exactly the share is enough");
        assert_eq!(selected(4, 0.51), [1, 3]);
        assert_eq!(selected(4, 0.81), [0, 1, 3], "a tie goes to the lower row");
        assert_eq!(selected(4, 0.99), [0, 1, 3, 4], "4 rows hold all of it");
        assert_eq!(selected(5, 0.99), [0, 1, 3, 4]);
        assert_eq!(selected(2, 0.99), [1, 3], "no more than the cap");
        assert_eq!(selected(5, 1.0), [0, 1, 2, 3, 4], "1 is the whole budget");
        assert_eq!(selected(4, 1e-9), [1]);
        assert_eq!(selected(0, 0.5), [0u32; 0]);
        assert_eq!(select_energy(&[], 3, 0.5), [0u32; 0]);
        assert_eq!(select_energy(&[0.0; 4], 3, 0.9), [0], "a sketch of zeros");
        assert_eq!(select_energy(&[0.0; 4], 3, 1.0), [0, 1, 2]);
        assert_eq!(select_energy(&[1.0, f64::NAN, 2.0], 2, 0.1), [0, 2]);
    }

    #[test]
    fn pooled_rows_end_with_the_energy_or_the_budget() {
        let segments = [
            PooledSegment {
                scores: &[2.0, 6.0, 0.0],
                width: 2,
            },
            PooledSegment {
                scores: &[4.0, 1.0],
                width: 1,
            },
        ];
        // Per element: 1, 3, 0 | 4, 1; 13 in all.
        let selected = |budget, energy| select_pooled(&segments, budget, energy);
        assert_eq!(selected(8, 0.3), [vec![], vec![0]]);
        assert_eq!(selected(8, 0.5), [vec![1], vec![0]]);
        assert_eq!(selected(8, 0.9), [vec![0, 1], vec![0]]);
        assert_eq!(selected(8, 0.99), [vec![0, 1], vec![0, 1]]);
        assert_eq!(selected(8, 1.0), [vec![0, 1, 2], vec![0, 1]]);
        // What does not fit does not count.
        assert_eq!(selected(2, 0.38), [vec![], vec![0, 1]]);
        let zeros = [PooledSegment {
            scores: &[0.0; 3],
            width: 2,
        }];
        assert_eq!(select_pooled(&zeros, 4, 0.9), [vec![0]]);
    }

    #[test]
    fn randk_depends_on_step_tensor_and_seed_but_not_on_how_rows_are_split() {
        let key = ProjectionKey {
            seed: 1,
            tensor: 2,
            step: 3,
        };
        let rows = randk_rows(key, 0..100, 20);
        assert!(rows.len() == 20 && rows.is_sorted());
        assert_ne!(
            rows,
            randk_rows(ProjectionKey { step: 4, ..key }, 0..100, 20)
        );
        // The lowest keys of a part are those of the whole that lie in it.
        let part = randk_rows(key, 37..100, 63 - 20);
        for row in rows.iter().filter(|row| **row >= 37) {
            assert!(part.contains(row));
        }
    }

    #[test]
    fn randk_takes_every_row_equally_often() {
        let mut counts = [0u32; 10];
        for step in 0..4000 {
            for row in randk_rows(
                ProjectionKey {
                    seed: 7,
                    tensor: 0,
                    step,
                },
                0..10,
                3,
            ) {
                counts[row as usize] += 1;
            }
        }
        assert!(
            counts.iter().all(|c| (1080..1320).contains(c)),
            "{counts:?}"
        );
    }

    fn scores() -> impl Strategy<Value = Vec<f64>> {
        // Some equal, some zero, some far above the others.
        let score = prop_oneof![0f64..3.0, (0u8..3).prop_map(f64::from), 100f64..1e4];
        prop::collection::vec(score, 1..60)
    }

    fn shares() -> impl Strategy<Value = f32> {
        prop_oneof![0.01f32..1.0, Just(0.5), Just(0.999), Just(1.0)]
    }

    fn from_the_highest(scores: &[f64], rows: &[u32]) -> Vec<f64> {
        let mut own: Vec<f64> = rows.iter().map(|row| scores[*row as usize]).collect();
        own.sort_by(|a, b| b.total_cmp(a));
        own
    }

    proptest! {
        #[test]
        fn select_top_k_is_a_stable_sort(scores in prop::collection::vec(prop_oneof![0f64..3.0, (0u8..3).prop_map(f64::from)], 0..60), k in 0usize..70) {
            let mut order: Vec<u32> = (0..scores.len() as u32).collect();
            order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
            order.truncate(k);
            order.sort_unstable();
            prop_assert_eq!(select_top_k(&scores, k), order);
        }

        #[test]
        fn a_pool_of_one_tensor_is_the_per_tensor_rule(scores in prop::collection::vec(0f64..3.0, 1..60), width in 1usize..9, density in 0.01f32..1.0, energy in shares()) {
            let segments = [PooledSegment { scores: &scores, width }];
            let expected = select_energy(&scores, rows_to_keep(density, scores.len()), energy);
            prop_assert_eq!(select_pooled(&segments, pooled_budget(density, &segments), energy), [expected]);
        }

        /// The smallest K: one row fewer would miss the share, unless the cap comes first.
        #[test]
        fn no_row_more_than_the_energy_asks_for(scores in scores(), k in 1usize..70, energy in shares()) {
            let cap = select_top_k(&scores, k);
            let selected = select_energy(&scores, k, energy);
            prop_assert!(!selected.is_empty() && selected.is_sorted_by(|a, b| a < b));
            prop_assert!(selected.iter().all(|row| cap.contains(row)), "{selected:?} of {cap:?}");
            prop_assert_eq!(&selected, &select_top_k(&scores, selected.len()), "the highest of their number");
            let share = |rows: &[u32]| -> f64 { from_the_highest(&scores, rows).iter().sum() };
            let wanted = f64::from(energy) * scores.iter().sum::<f64>();
            prop_assert!(share(&selected) >= wanted || selected == cap, "{} of {wanted}", share(&selected));
            let fewer = select_top_k(&scores, selected.len() - 1);
            prop_assert!(energy == 1.0 || fewer.is_empty() || share(&fewer) < wanted, "{fewer:?} would do");
        }

        #[test]
        fn an_energy_of_1_is_the_whole_budget(scores in scores(), others in scores(), k in 0usize..70, budget in 0usize..200) {
            prop_assert_eq!(select_energy(&scores, k, 1.0), select_top_k(&scores, k));
            let segments = [PooledSegment { scores: &scores, width: 3 }, PooledSegment { scores: &others, width: 2 }];
            let all: usize = segments.iter().map(|s| s.scores.len() * s.width).sum();
            let elements = |rows: &[Vec<u32>]| rows[0].len() * 3 + rows[1].len() * 2;
            let whole = select_pooled(&segments, budget, 1.0);
            // A row of three elements may be left over.
            prop_assert!(elements(&whole) + 2 >= budget.min(all), "{} of {budget}", elements(&whole));
        }

        #[test]
        fn a_pool_ends_where_its_energy_is_reached(scores in scores(), others in scores(), budget in 3usize..200, energy in shares()) {
            let segments = [PooledSegment { scores: &scores, width: 3 }, PooledSegment { scores: &others, width: 2 }];
            let (whole, selected) = (select_pooled(&segments, budget, 1.0), select_pooled(&segments, budget, energy));
            let mut chosen = Vec::new();
            for (at, segment) in segments.iter().enumerate() {
                prop_assert!(selected[at].iter().all(|row| whole[at].contains(row)));
                chosen.extend(selected[at].iter().map(|row| (segment.scores[*row as usize] / segment.width as f64, segment.scores[*row as usize])));
            }
            chosen.sort_by(|a, b| b.0.total_cmp(&a.0));
            let wanted = f64::from(energy) * scores.iter().chain(&others).sum::<f64>();
            let share = |rows: &[(f64, f64)]| rows.iter().map(|row| row.1).sum::<f64>();
            // The sums here have another order where two rows tie, so a rounding's width is left to them.
            prop_assert!(share(&chosen) >= wanted * (1.0 - 1e-12) || selected == whole);
            let fewer = &chosen[..chosen.len() - 1];
            prop_assert!(energy == 1.0 || fewer.is_empty() || share(fewer) < wanted * (1.0 + 1e-12));
        }
    }
}
