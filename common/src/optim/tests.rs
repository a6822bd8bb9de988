#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::compress::simd::at_every_level;
use proptest::prelude::*;

fn config(kind: OptimizerKind) -> OptimizerConfig {
    OptimizerConfig {
        kind,
        weight_decay: 0.1,
        catch_up_cap: 5,
        ..OptimizerConfig::default()
    }
}

/// A smooth, never repeating stand-in for gradients.
fn gradient(step: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 7 + step * 13) as f32 * 0.37).sin() * (1.0 + (i % 5) as f32))
        .collect()
}

/// AdamW as its paper has it, in f64.
fn plain_adamw(config: &OptimizerConfig, rates: &[f32], x: &mut [f64], gradients: &[Vec<f32>]) {
    let (mut m, mut v) = (vec![0f64; x.len()], vec![0f64; x.len()]);
    let (b1, b2) = (f64::from(config.beta1), f64::from(config.beta2));
    for (t, (lr, g)) in rates.iter().zip(gradients).enumerate() {
        let (lr, t) = (f64::from(*lr), t as i32 + 1);
        for i in 0..x.len() {
            let g = f64::from(g[i]);
            m[i] = b1 * m[i] + (1.0 - b1) * g;
            v[i] = b2 * v[i] + (1.0 - b2) * g * g;
            let (m, v) = (m[i] / (1.0 - b1.powi(t)), v[i] / (1.0 - b2.powi(t)));
            x[i] -= lr * f64::from(config.weight_decay) * x[i];
            x[i] -= lr * m / (v.sqrt() + f64::from(config.eps));
        }
    }
}

#[test]
fn adamw_is_the_papers() {
    let config = config(OptimizerKind::AdamW);
    let rates: Vec<f32> = (1..=30).map(|i| 1e-3 * i as f32).collect();
    let gradients: Vec<Vec<f32>> = (0..30).map(|step| gradient(step, 50)).collect();
    let mut expected = vec![1.0; 50];
    plain_adamw(&config, &rates, &mut expected, &gradients);
    let mut optimizer = Optimizer::new(config, &[(10, 5, 50)]);
    let mut x = vec![1f32; 50];
    for (lr, g) in rates.iter().zip(&gradients) {
        optimizer.begin_step(*lr);
        optimizer.update(0, &mut x, g, RowsCame::All, 1.0);
    }
    for (x, e) in x.iter().zip(&expected) {
        assert!((f64::from(*x) - e).abs() < 1e-5, "{x} {e}");
    }
}

#[test]
fn catch_up_with_every_row_every_step_is_adamw_to_the_bit() {
    let run = |kind, rows: RowsCame<'_>| {
        // The last row is short.
        let mut optimizer = Optimizer::new(config(kind), &[(10, 5, 48)]);
        let mut x = gradient(99, 48);
        for step in 0..40 {
            optimizer.begin_step(1e-2 / (step + 1) as f32);
            optimizer.update(0, &mut x, &gradient(step, 48), rows, 0.7);
        }
        x
    };
    let all: Vec<u32> = (0..10).collect();
    let adamw = run(OptimizerKind::AdamW, RowsCame::All);
    assert_eq!(adamw, run(OptimizerKind::CatchUpAdamW, RowsCame::All));
    assert_eq!(
        adamw,
        run(OptimizerKind::CatchUpAdamW, RowsCame::Rows(&all))
    );
    assert_eq!(
        adamw,
        run(OptimizerKind::AdamW, RowsCame::Rows(&[])),
        "AdamW does not ask which rows came"
    );
}

#[test]
fn rows_that_did_not_come_keep_their_moments_and_only_decay() {
    let mut optimizer = Optimizer::new(config(OptimizerKind::CatchUpAdamW), &[(3, 2, 6)]);
    let mut x = vec![1f32; 6];
    optimizer.begin_step(0.1);
    optimizer.update(0, &mut x, &[1.0; 6], RowsCame::All, 1.0);
    let (before, x_before) = (optimizer.clone(), x.clone());
    optimizer.begin_step(0.2);
    optimizer.update(0, &mut x, &[5.0; 6], RowsCame::Rows(&[1]), 1.0);
    for i in [0, 1, 4, 5] {
        assert_eq!(optimizer.tensors[0].first[i], before.tensors[0].first[i]);
        assert_eq!(optimizer.tensors[0].second[i], before.tensors[0].second[i]);
        assert_eq!(x[i], x_before[i] * (1.0 - 0.2 * 0.1));
    }
    assert_ne!(optimizer.tensors[0].first[2], before.tensors[0].first[2]);
}

#[test]
fn a_row_that_comes_after_tau_steps_takes_tau_steps_of_the_mean() {
    let (tau, lr) = (4, 0.01);
    let config = OptimizerConfig {
        weight_decay: 0.0,
        ..config(OptimizerKind::CatchUpAdamW)
    };
    let mut optimizer = Optimizer::new(config, &[(1, 1, 1)]);
    let mut x = [0f32];
    for _ in 0..tau - 1 {
        optimizer.begin_step(lr);
        optimizer.update(0, &mut x, &[0.0], RowsCame::Rows(&[]), 1.0);
    }
    optimizer.begin_step(lr);
    assert!(
        (optimizer.norm_squared(0, &[8.0], RowsCame::All) - 4.0).abs() < 1e-12,
        "b/τ = 2"
    );
    optimizer.update(0, &mut x, &[8.0], RowsCame::All, 1.0);
    let moments = &optimizer.tensors[0];
    assert!((moments.first[0] - (1.0 - 0.9f32.powi(4)) * 2.0).abs() < 1e-6);
    assert!((moments.second[0] - (1.0 - 0.999f32.powi(4)) * 4.0).abs() < 1e-6);
    // A first gradient moves x by the rate whatever its size; here by four rates.
    assert!((x[0] + 4.0 * lr).abs() < 1e-6, "{}", x[0]);
}

#[test]
fn tau_and_the_sum_of_rates_stop_at_the_cap() {
    let config = OptimizerConfig {
        weight_decay: 0.0,
        ..config(OptimizerKind::CatchUpAdamW)
    };
    let mut optimizer = Optimizer::new(config, &[(1, 1, 1)]);
    let mut x = [0f32];
    for step in 1..=12 {
        optimizer.begin_step(step as f32);
    }
    assert!(
        (optimizer.norm_squared(0, &[10.0], RowsCame::All) - 4.0).abs() < 1e-12,
        "10/5"
    );
    optimizer.update(0, &mut x, &[10.0], RowsCame::All, 1.0);
    assert_eq!(optimizer.tensors[0].weight, [5]);
    let sum = 12.0 + 11.0 + 10.0 + 9.0 + 8.0;
    assert!((x[0] + sum).abs() < 1e-3, "{}", x[0]);
}

#[test]
fn sgd_with_momentum_is_linear_in_the_gradient() {
    let config = OptimizerConfig {
        momentum: 0.5,
        weight_decay: 0.0,
        ..config(OptimizerKind::Sgd)
    };
    let mut optimizer = Optimizer::new(config, &[(1, 2, 2)]);
    let mut x = [1f32, 1.0];
    for g in [[1.0, 0.0], [0.0, 2.0]] {
        optimizer.begin_step(0.1);
        optimizer.update(0, &mut x, &g, RowsCame::All, 1.0);
    }
    assert!((x[0] - (1.0 - 0.1 - 0.05)).abs() < 1e-6 && (x[1] - 0.8).abs() < 1e-6);
}

#[test]
fn a_tensor_may_have_its_own_weight_decay() {
    let mut optimizer = Optimizer::new(config(OptimizerKind::AdamW), &[(1, 1, 1), (1, 1, 1)]);
    optimizer.set_weight_decay(1, 0.0);
    let mut x = [1f32, 1.0];
    optimizer.begin_step(0.5);
    optimizer.update(0, &mut x[..1], &[0.0], RowsCame::All, 1.0);
    optimizer.update(1, &mut x[1..], &[0.0], RowsCame::All, 1.0);
    assert_eq!(x, [0.95, 1.0]);
}

#[test]
fn any_number_of_threads_and_any_instruction_set_give_the_same_bits() {
    let shape = (700, 130, 700 * 130 - 3);
    let run = || {
        let mut optimizer = Optimizer::new(config(OptimizerKind::CatchUpAdamW), &[shape]);
        let mut x = gradient(99, shape.2);
        let mut norm = 0.0;
        for step in 0..6 {
            let rows: Vec<u32> = (0..700).filter(|r| (r + step) % 3 == 0).collect();
            let g = gradient(step as usize, shape.2);
            optimizer.begin_step(1e-2);
            norm += optimizer.norm_squared(0, &g, RowsCame::Rows(&rows));
            optimizer.update(0, &mut x, &g, RowsCame::Rows(&rows), 0.9);
        }
        (x, norm, optimizer)
    };
    let expected = run();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        assert!(pool.install(run) == expected);
    }
    // One thread, so that the forced level holds for all loops.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .unwrap();
    assert!(
        pool.install(|| at_every_level(run))
            .iter()
            .all(|result| *result == expected)
    );
}

fn rows_of_steps() -> impl Strategy<Value = Vec<Vec<bool>>> {
    prop::collection::vec(prop::collection::vec(any::<bool>(), 6), 1..25)
}

proptest! {
    /// Each row against its own loop over the formulas of the module's head, in f64.
    #[test]
    fn catch_up_follows_its_formulas(steps in rows_of_steps(), cap in 1u32..8) {
        let config = OptimizerConfig { catch_up_cap: cap, ..config(OptimizerKind::CatchUpAdamW) };
        let (b1, b2) = (f64::from(config.beta1), f64::from(config.beta2));
        let mut optimizer = Optimizer::new(config.clone(), &[(6, 1, 6)]);
        let mut x = [0.5f32; 6];
        let mut rates = Vec::new();
        let mut expected = [(0.5f64, 0f64, 0f64, 0usize, 0i32); 6];
        for (t, came) in steps.iter().enumerate() {
            let lr = 0.01 / (t + 1) as f32;
            rates.push(f64::from(lr));
            let g = gradient(t, 6);
            let rows: Vec<u32> = (0..6).filter(|r| came[*r as usize]).collect();
            optimizer.begin_step(lr);
            optimizer.update(0, &mut x, &g, RowsCame::Rows(&rows), 1.0);
            for (r, (x, m, v, last, weight)) in expected.iter_mut().enumerate() {
                *x *= 1.0 - f64::from(lr) * f64::from(config.weight_decay);
                if came[r] {
                    let tau = (t + 1 - *last).min(cap as usize);
                    *last = t + 1;
                    *weight += tau as i32;
                    let (d1, d2, g) = (b1.powi(tau as i32), b2.powi(tau as i32), f64::from(g[r]) / tau as f64);
                    *m = d1 * *m + (1.0 - d1) * g;
                    *v = d2 * *v + (1.0 - d2) * g * g;
                    let step = (*m / (1.0 - b1.powi(*weight))) / ((*v / (1.0 - b2.powi(*weight))).sqrt() + f64::from(config.eps));
                    *x -= rates[t + 1 - tau..].iter().sum::<f64>() * step;
                }
            }
        }
        for (x, e) in x.iter().zip(&expected) {
            prop_assert!((f64::from(*x) - e.0).abs() < 1e-5, "{} {}", x, e.0);
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_to_the_bit(steps in rows_of_steps(), kind in prop::sample::select(vec![OptimizerKind::Sgd, OptimizerKind::AdamW, OptimizerKind::CatchUpAdamW])) {
        let shapes = [(6, 3, 17), (2, 1, 2)];
        let mut optimizer = Optimizer::new(config(kind), &shapes);
        let mut restored = Optimizer::new(config(kind), &shapes);
        let (mut x, mut y) = (vec![0.3f32; 17], vec![0.3f32; 17]);
        for (t, came) in steps.iter().enumerate() {
            let rows: Vec<u32> = (0..6).filter(|r| came[*r as usize]).collect();
            restored.import(&optimizer.export()).unwrap();
            prop_assert_eq!(&optimizer, &restored);
            for (optimizer, x) in [(&mut optimizer, &mut x), (&mut restored, &mut y)] {
                optimizer.begin_step(0.01);
                optimizer.update(0, x, &gradient(t, 17), RowsCame::Rows(&rows), 1.0);
            }
        }
        prop_assert_eq!(x, y);
    }
}

#[test]
fn large_counters_survive_export() {
    let mut optimizer = Optimizer::new(config(OptimizerKind::CatchUpAdamW), &[(1, 1, 1)]);
    optimizer.step = 0xfedc_ba98;
    optimizer.rates = [0.1, 0.2, 0.3, 0.4, 0.5].into();
    optimizer.tensors[0].came = vec![0xfedc_ba97];
    let mut restored = Optimizer::new(config(OptimizerKind::CatchUpAdamW), &[(1, 1, 1)]);
    restored.import(&optimizer.export()).unwrap();
    assert_eq!(restored, optimizer);
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_changes_nothing() {
    let sgd = Optimizer::new(config(OptimizerKind::Sgd), &[(2, 2, 4)]);
    let mut adam = Optimizer::new(config(OptimizerKind::AdamW), &[(2, 2, 4)]);
    adam.begin_step(0.1);
    let before = adam.clone();
    let error = adam.import(&sgd.export()).unwrap_err();
    assert_eq!(
        error,
        OptimizerStateError::Missing {
            name: "0.second".into()
        }
    );
    let other = Optimizer::new(config(OptimizerKind::AdamW), &[(3, 2, 6)]);
    let error = adam.import(&other.export()).unwrap_err();
    assert_eq!(
        error,
        OptimizerStateError::Length {
            name: "0.first".into(),
            expected: 4,
            found: 6
        }
    );
    assert_eq!(adam, before);
}
