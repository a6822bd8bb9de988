//! Feedback state of workers that take over from others: one that joins, or a job that goes on with another number.
//!
//! | rule | what is kept | how |
//! |---|---|---|
//! | ef14 | the mean pending residual, (1/N) Σ eᵢ | new worker j of M takes Σ eᵢ over the i-th old ones, i ≡ j (mod M), times M/N |
//! | ef21, ef21m | H = mean hᵢ | as many as before: each its own h and v; otherwise h = v = H on all |
//!
//! N counts all old workers, also those whose part of a snapshot did not come: their eᵢ count as 0.
//!
//! A worker that joins a running job takes e = 0, or h = v = H: neither the residual that is pending, as a sum, nor
//! H = mean h changes by it.

use super::checkpoint::Arrays;
use crate::step::SHARED_ARRAY;
use std::collections::BTreeMap;

const RESIDUAL: &str = "residual";

/// Splits an array's name into its kind and its tensor.
fn parts(name: &str) -> (&str, &str) {
    name.split_once('/').unwrap_or((name, ""))
}

/// The part of a worker's feedback state that is its own.
pub(super) fn own(mut arrays: Arrays) -> Arrays {
    arrays.retain(|(name, _)| parts(name).0 != SHARED_ARRAY);
    arrays
}

/// Positions, among `old` workers whose state is there, of those whose state new worker `new` of `world` goes on from.
pub(super) fn sources(old: usize, new: usize, world: usize) -> Vec<usize> {
    (new..old).step_by(world.max(1)).collect()
}

/// A worker's feedback state after a restart or a join, in the form of `template`, the state that it has so far.
///
/// `shared` is the part that is equal on all workers, `own` the own parts of [`sources`], and the job had `old` workers and
/// has `world`. One that joins a running job has no sources.
///
/// # Errors
/// An array that is not there or has another length, for people.
pub(super) fn taken_over(
    template: &Arrays,
    shared: &Arrays,
    own: &[Arrays],
    old: usize,
    world: usize,
) -> Result<Arrays, String> {
    let shared = index(shared);
    let own: Vec<_> = own.iter().map(index).collect();
    let scale = world as f64 / old.max(1) as f64;
    let mut arrays = Vec::with_capacity(template.len());
    for (name, like) in template {
        let (kind, tensor) = parts(name);
        let find = |arrays: &BTreeMap<&str, &Vec<f32>>, name: &str| {
            let found = arrays
                .get(name)
                .ok_or(format!("it has no {name}, which this feedback rule needs"))?;
            if found.len() != like.len() {
                let (found, needed) = (found.len(), like.len());
                return Err(format!("its {name} has {found} elements, not {needed}"));
            }
            Ok((*found).clone())
        };
        let values = match (kind, own.as_slice()) {
            (SHARED_ARRAY, _) => find(&shared, name)?,
            (_, [only]) if old == world => find(only, name)?,
            (RESIDUAL, own) => {
                let own = own.iter().map(|arrays| find(arrays, name));
                scaled_sum(like.len(), own.collect::<Result<Vec<_>, _>>()?, scale)
            }
            _ => find(&shared, &format!("{SHARED_ARRAY}/{tensor}"))?,
        };
        arrays.push((name.clone(), values));
    }
    Ok(arrays)
}

fn index(arrays: &Arrays) -> BTreeMap<&str, &Vec<f32>> {
    let named = arrays.iter();
    named
        .map(|(name, values)| (name.as_str(), values))
        .collect()
}

fn scaled_sum(elements: usize, arrays: Vec<Vec<f32>>, scale: f64) -> Vec<f32> {
    if arrays.is_empty() {
        return vec![0.0; elements];
    }
    let at = |index: usize| {
        arrays
            .iter()
            .map(|values| f64::from(values[index]))
            .sum::<f64>()
    };
    (0..elements)
        .map(|index| (at(index) * scale) as f32)
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn named(kind: &str, values: &[f32]) -> (String, Vec<f32>) {
        (format!("{kind}/w"), values.to_vec())
    }

    fn mean(all: &[Vec<f32>]) -> Vec<f64> {
        let at = |index: usize| {
            all.iter()
                .map(|values| f64::from(values[index]))
                .sum::<f64>()
        };
        let elements = all.first().map_or(0, Vec::len);
        (0..elements)
            .map(|index| at(index) / all.len() as f64)
            .collect()
    }

    proptest! {
        #[test]
        fn the_mean_pending_residual_is_conserved(
            old in prop::collection::vec(prop::collection::vec(-10.0f32..10.0, 5), 1..9),
            world in 1usize..12,
        ) {
            let template = vec![named(RESIDUAL, &[0.0; 5])];
            let new: Vec<Vec<f32>> = (0..world)
                .map(|j| {
                    let own: Vec<Arrays> = sources(old.len(), j, world)
                        .into_iter()
                        .map(|i| vec![named(RESIDUAL, &old[i])])
                        .collect();
                    let arrays = taken_over(&template, &Vec::new(), &own, old.len(), world);
                    arrays.unwrap().pop().unwrap().1
                })
                .collect();
            for (a, b) in mean(&old).iter().zip(mean(&new)) {
                prop_assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
            if world == old.len() {
                prop_assert_eq!(new, old);
            }
        }

        #[test]
        fn parts_that_did_not_come_count_as_zeros(
            there in prop::collection::vec(prop::collection::vec(-10.0f32..10.0, 5), 1..7),
            missing in 1usize..4,
            world in 1usize..9,
        ) {
            let (members, template) = (there.len() + missing, vec![named(RESIDUAL, &[0.0; 5])]);
            let new: Vec<Vec<f32>> = (0..world)
                .map(|j| {
                    let own: Vec<Arrays> = sources(there.len(), j, world)
                        .into_iter()
                        .map(|i| vec![named(RESIDUAL, &there[i])])
                        .collect();
                    let arrays = taken_over(&template, &Vec::new(), &own, members, world);
                    arrays.unwrap().pop().unwrap().1
                })
                .collect();
            let whole = [there, vec![vec![0.0; 5]; missing]].concat();
            for (a, b) in mean(&whole).iter().zip(mean(&new)) {
                prop_assert!((a - b).abs() < 1e-5, "{a} {b}");
            }
        }

        #[test]
        fn every_old_worker_has_one_heir(old in 1usize..40, world in 1usize..40) {
            let mut heirs = vec![0; old];
            for j in 0..world {
                sources(old, j, world).into_iter().for_each(|i| heirs[i] += 1);
            }
            prop_assert!(heirs.iter().all(|heirs| *heirs == 1));
        }
    }

    #[test]
    fn estimates_stay_with_their_worker_or_become_the_mean() {
        let template: Arrays = ["momentum", "local", "global"]
            .iter()
            .map(|kind| named(kind, &[0.0, 0.0]))
            .collect();
        let shared = vec![named("global", &[3.0, 4.0])];
        let own: Arrays = vec![named("momentum", &[1.0, 1.0]), named("local", &[2.0, 2.0])];
        let same = taken_over(&template, &shared, std::slice::from_ref(&own), 4, 4).unwrap();
        assert_eq!(same[0].1, [1.0, 1.0]);
        assert_eq!(same[1].1, [2.0, 2.0]);
        assert_eq!(same[2].1, [3.0, 4.0]);
        for (own, world) in [(vec![own], 3), (Vec::new(), 6)] {
            let other = taken_over(&template, &shared, &own, 4, world).unwrap();
            assert!(
                other.iter().all(|(_, values)| values == &[3.0, 4.0]),
                "{other:?}"
            );
        }
    }

    #[test]
    fn a_joiner_owes_nothing() {
        let template = vec![named(RESIDUAL, &[5.0, 5.0])];
        let taken = taken_over(&template, &Vec::new(), &[], 0, 1).unwrap();
        assert_eq!(taken, vec![named(RESIDUAL, &[0.0, 0.0])]);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let template = vec![named("global", &[0.0])];
        let error = taken_over(&template, &Vec::new(), &[], 0, 1).unwrap_err();
        assert!(error.contains("global/w"), "{error}");
        let shared = vec![named("global", &[0.0, 1.0])];
        let error = taken_over(&template, &shared, &[], 0, 1).unwrap_err();
        assert!(error.contains("2 elements, not 1"), "{error}");
    }

    #[test]
    fn own_is_what_is_not_shared() {
        let arrays = vec![named("local", &[1.0]), named("global", &[2.0])];
        assert_eq!(own(arrays), vec![named("local", &[1.0])]);
    }
}
