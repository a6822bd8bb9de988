//! Which rows travel, and what the result is made of, in whole steps of N workers and S shards.

use crate::support::{
    Gradients, algorithm, array, assert_close, cluster, gradients, mean, model, results, spec,
    step, tensor,
};
use arc_topk_common::compress::rows_to_keep;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, RoundKind, SelectionPolicy};
use arc_topk_common::plan::PlanSpec;
use std::collections::BTreeSet;

#[test]
fn topk_averages_each_workers_own_rows() {
    let algorithm = AlgorithmConfig {
        compressor: Compressor::Topk,
        ..algorithm(Feedback::Ef14, 0.1)
    };
    let spec = spec(algorithm, 1, vec![tensor("w", &[20, 4])]);
    let mut cluster = cluster(&spec, 2);
    let mut gradients = vec![vec![vec![0.01; 80]], vec![vec![0.01; 80]]];
    gradients[0][0][4..12].fill(2.0);
    gradients[1][0][8..16].fill(-3.0);
    step(&mut cluster, &gradients);
    let got = &results(&cluster, 1)[0];
    assert_eq!(got.rows.as_deref(), Some(&[1, 2, 3][..]));
    assert_eq!(
        got.values[4..16],
        [
            1.0, 1.0, 1.0, 1.0, -0.5, -0.5, -0.5, -0.5, -1.5, -1.5, -1.5, -1.5
        ]
    );
    // Worker 0 never sent row 3.
    assert_eq!(array(&cluster, 0, "residual/w").unwrap()[12..16], [0.01; 4]);
    assert_eq!(array(&cluster, 1, "residual/w").unwrap()[12..16], [0.0; 4]);
}

#[test]
fn pooled_rows_stay_within_the_budget_and_favour_the_strong_tensor() {
    let algorithm = AlgorithmConfig {
        selection: SelectionPolicy::Pooled,
        ..algorithm(Feedback::Ef14, 0.25)
    };
    let spec = spec(
        algorithm,
        1,
        vec![tensor("weak", &[16, 16]), tensor("strong", &[16, 16])],
    );
    let mut cluster = cluster(&spec, 2);
    let mut gradients = gradients(&spec, 2, 0);
    gradients
        .iter_mut()
        .for_each(|worker| worker[1].iter_mut().for_each(|x| *x *= 1000.0));
    step(&mut cluster, &gradients);
    let got = results(&cluster, 0);
    assert_eq!(got[0].rows.as_deref(), Some(&[][..]));
    assert_eq!(got[1].rows.as_ref().unwrap().len(), 8);
    assert!(got[0].values.iter().all(|x| *x == 0.0));
}

/// Gradients of which every tenth row holds nearly all.
fn concentrated(spec: &PlanSpec, workers: usize, number: u64) -> Gradients {
    let mut all = gradients(spec, workers, number);
    for worker in &mut all {
        for (tensor, values) in spec.tensors.iter().zip(worker) {
            let width = tensor.shape[1] as usize;
            let rows = values.chunks_mut(width).enumerate();
            rows.filter(|(row, _)| row % 10 != 0)
                .for_each(|(_, values)| values.iter_mut().for_each(|x| *x *= 1e-4));
        }
    }
    all
}

#[test]
fn fewer_rows_travel_where_the_energy_is_concentrated_and_workers_stay_equal() {
    for selection in [SelectionPolicy::PerTensor, SelectionPolicy::Pooled] {
        let with = |energy| AlgorithmConfig {
            energy,
            selection,
            ..algorithm(Feedback::Ef14, 0.4)
        };
        let tensors = vec![tensor("a", &[60, 8]), tensor("b", &[40, 16])];
        let whole = spec(with(1.0), 2, tensors.clone());
        let less = spec(with(0.9), 2, tensors);
        let (mut all, mut few) = (cluster(&whole, 3), cluster(&less, 3));
        for number in 0..6 {
            let given = if number < 3 {
                concentrated(&less, 3, number)
            } else {
                gradients(&less, 3, number)
            };
            let (most, least) = (step(&mut all, &given), step(&mut few, &given));
            let (most, least) = (most[0].unwrap().stats, least[0].unwrap().stats);
            assert!(
                least.sent.values <= most.sent.values && least.density <= most.density,
                "the density is the cap"
            );
            if number == 0 {
                assert!(most.density > 0.35 && least.density < 0.15, "{least:?}");
                assert!(least.sent.values * 2 < most.sent.values, "{least:?}");
                assert!(
                    least.received.values * 2 < most.received.values,
                    "{least:?}"
                );
            }
            for rank in 1..3 {
                assert_eq!(results(&few, 0), results(&few, rank));
            }
        }
    }
}

#[test]
fn an_energy_is_within_the_ramp_and_a_tensors_own_density() {
    let mut tensors = vec![tensor("a", &[40, 8]), tensor("b", &[40, 8])];
    tensors[1].density = Some(0.5);
    let algorithm = AlgorithmConfig {
        energy: 0.9999,
        ramp_updates: 1,
        warmup_updates: 1,
        ..algorithm(Feedback::Ef14, 0.1)
    };
    let spec = spec(algorithm.clone(), 1, tensors);
    let mut cluster = cluster(&spec, 2);
    for number in 0..4 {
        step(&mut cluster, &gradients(&spec, 2, number));
        let came: Vec<_> = results(&cluster, 1).into_iter().map(|r| r.rows).collect();
        if number == 0 {
            assert_eq!(came, [None, None], "the warm-up is dense");
            continue;
        }
        for (rows, density) in came.iter().zip([0.1, 0.5]) {
            let cap = rows_to_keep(algorithm.density_at(number, density), 40);
            let rows = rows.as_ref().unwrap().len();
            assert!((1..=cap).contains(&rows), "{rows} of {cap}");
        }
    }
}

#[test]
fn a_gradient_of_zeros_sends_a_row_of_every_tensor() {
    let algorithm = AlgorithmConfig {
        energy: 0.5,
        ..algorithm(Feedback::Ef14, 0.4)
    };
    let spec = spec(
        algorithm,
        1,
        vec![tensor("a", &[20, 8]), tensor("b", &[30, 4])],
    );
    let mut cluster = cluster(&spec, 2);
    step(&mut cluster, &vec![vec![vec![0.0; 160], vec![0.0; 120]]; 2]);
    for got in results(&cluster, 0) {
        assert_eq!(got.rows.as_deref(), Some(&[0][..]));
        assert!(got.values.iter().all(|x| *x == 0.0));
    }
}

#[test]
fn rows_of_a_fixed_width_may_be_padded() {
    for compressor in [Compressor::Arc, Compressor::Topk, Compressor::Randk] {
        let algorithm = AlgorithmConfig {
            compressor,
            block_width: 16,
            ..algorithm(Feedback::Ef14, 0.5)
        };
        let spec = spec(
            algorithm,
            2,
            vec![tensor("w", &[25, 7]), tensor("x", &[9, 9])],
        );
        let mut cluster = cluster(&spec, 2);
        for number in 0..5 {
            step(&mut cluster, &gradients(&spec, 2, number));
            let got = results(&cluster, 0);
            assert_eq!(got[0].values.len(), 175);
            assert!(got[0].rows.as_ref().unwrap().iter().all(|row| *row < 11));
        }
        // 175 = 10·16 + 15: the padding never holds anything.
        assert_eq!(array(&cluster, 0, "residual/w").unwrap()[175], 0.0);
    }
}

#[test]
fn a_tensor_may_have_a_density_of_its_own() {
    let mut tensors = vec![tensor("a", &[40, 8]), tensor("b", &[40, 8])];
    tensors[1].density = Some(0.5);
    let spec = spec(algorithm(Feedback::Ef14, 0.1), 1, tensors);
    let mut cluster = cluster(&spec, 1);
    let outcome = step(&mut cluster, &gradients(&spec, 1, 0))[0].unwrap();
    assert_eq!(results(&cluster, 0)[0].rows.as_ref().unwrap().len(), 4);
    assert_eq!(results(&cluster, 0)[1].rows.as_ref().unwrap().len(), 20);
    assert_eq!(outcome.stats.density, 24.0 / 80.0);
}

#[test]
fn every_shard_picks_among_its_own_rows() {
    let spec = spec(
        algorithm(Feedback::Ef14, 0.2),
        3,
        vec![tensor("a", &[300, 8]), tensor("b", &[200, 16])],
    );
    let mut cluster = cluster(&spec, 2);
    assert!(
        cluster
            .plan()
            .buckets
            .iter()
            .any(|b| b.segments.iter().filter(|s| !s.is_empty()).count() > 1)
    );
    step(&mut cluster, &gradients(&spec, 2, 0));
    let results = results(&cluster, 1);
    for segment in cluster
        .plan()
        .buckets
        .iter()
        .flat_map(|bucket| bucket.segments.iter().flatten())
    {
        let rows = results[segment.tensor.index()].rows.as_ref().unwrap();
        let own = rows
            .iter()
            .filter(|row| (segment.row_start..segment.row_end).contains(row))
            .count();
        assert_eq!(own, rows_to_keep(0.2, segment.rows()), "{segment:?}");
    }
}

#[test]
fn rows_that_did_not_come_are_zero_and_the_others_are_the_mean() {
    let spec = spec(algorithm(Feedback::Ef14, 0.25), 2, model());
    let mut cluster = cluster(&spec, 3);
    let gradients = gradients(&spec, 3, 0);
    step(&mut cluster, &gradients);
    for got in results(&cluster, 0) {
        let Some(rows) = got.rows else { continue };
        let width = cluster.plan().tensors[got.tensor.index()].width;
        let rows: BTreeSet<usize> = rows.iter().map(|row| *row as usize).collect();
        let mut expected = mean(&gradients, got.tensor.index());
        for (i, x) in expected.iter_mut().enumerate() {
            *x *= f32::from(rows.contains(&(i / width)));
        }
        assert_close(
            &format!("tensor {}", got.tensor),
            &got.values,
            &expected,
            1e-6,
        );
    }
}

#[test]
fn every_compressor_sends_dense_rounds_in_the_warm_up() {
    for compressor in [
        Compressor::Arc,
        Compressor::Randk,
        Compressor::Topk,
        Compressor::Dense,
    ] {
        let algorithm = AlgorithmConfig {
            compressor,
            warmup_updates: 2,
            ..algorithm(Feedback::Ef14, 0.2)
        };
        let spec = spec(algorithm, 2, model());
        let mut cluster = cluster(&spec, 2);
        for number in 0..4 {
            let gradients = gradients(&spec, 2, number);
            let outcome = step(&mut cluster, &gradients)[0].unwrap();
            let dense = number < 2 || compressor == Compressor::Dense;
            assert_eq!(outcome.kind == RoundKind::Dense, dense);
            assert_eq!(results(&cluster, 0)[0].rows.is_none(), dense);
            assert_eq!(outcome.stats.density == 1.0, dense);
            if dense {
                assert_close(
                    "warm-up",
                    &results(&cluster, 0)[0].values,
                    &mean(&gradients, 0),
                    1e-6,
                );
            }
        }
    }
}
