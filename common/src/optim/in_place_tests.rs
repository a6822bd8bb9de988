use super::super::{Optimizer, OptimizerConfig, RowsCame};
use super::*;

const SHAPE: (usize, usize, usize) = (7, 5, 33);

/// Parameters, state and counts of one tensor, as somebody else would keep them.
struct Kept<T> {
    values: Vec<T>,
    first: Vec<f32>,
    second: Vec<f32>,
    last: Vec<i64>,
    seen: Vec<i64>,
}

impl<T> Kept<T> {
    fn new(values: Vec<T>) -> Self {
        let (rows, width, _) = SHAPE;
        Self {
            values,
            first: vec![0.0; rows * width],
            second: vec![0.0; rows * width],
            last: vec![0; rows],
            seen: vec![0; rows],
        }
    }
}

fn stepped<'a, T>(
    kept: &'a mut Kept<T>,
    elements: impl FnOnce(&'a mut [T]) -> Elements<'a>,
    rows: Option<&'a [i64]>,
    step: i64,
) -> AdamTensor<'a> {
    AdamTensor {
        elements: elements(&mut kept.values),
        width: SHAPE.1,
        first: &mut kept.first,
        second: &mut kept.second,
        last: &mut kept.last,
        seen: &mut kept.seen,
        rows,
        step,
    }
}

fn rule(rates: &[f64]) -> AdamStep<'_> {
    AdamStep {
        betas: (f64::from(0.9f32), f64::from(0.999f32)),
        eps: f64::from(1e-8f32),
        weight_decay: 0.5,
        rates,
        cap: 3,
        maximize: false,
    }
}

fn gradient(step: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 7 + step * 13) as f32 * 0.37).sin();
    (0..SHAPE.2).map(value).collect()
}

/// Which rows come in a step: all, none, some, with gaps of all lengths up to the cap and beyond.
fn rows(step: usize) -> Option<Vec<i64>> {
    match step % 4 {
        1 => None,
        2 => Some(vec![]),
        3 => Some(vec![1, 2, 6]),
        _ => Some(vec![2, 3]),
    }
}

#[test]
fn it_is_the_optimizers_rule_to_the_bit() {
    let config = OptimizerConfig {
        weight_decay: 0.5,
        catch_up_cap: 3,
        ..OptimizerConfig::default()
    };
    for parallel in [false, true] {
        let mut own = Optimizer::new(config.clone(), &[SHAPE]);
        let mut kept = Kept::new(vec![1f32; SHAPE.2]);
        let mut values = kept.values.clone();
        let mut rates = Vec::new();
        for step in 1..30 {
            // Exact in f32, so that both round alike.
            let rate = 0.5f64.powi(3 + (step % 5) as i32);
            rates.insert(0, rate);
            rates.truncate(3);
            let (came, gradient) = (rows(step), gradient(step));
            own.begin_step(rate as f32);
            let few: Option<Vec<u32>> = came
                .as_ref()
                .map(|came| came.iter().map(|row| *row as u32).collect());
            let asked = few.as_deref().map_or(RowsCame::All, RowsCame::Rows);
            own.update(0, &mut values, &gradient, asked, 1.0);
            let elements = |values| Elements::F32(values, &gradient);
            let tensor = stepped(&mut kept, elements, came.as_deref(), step as i64);
            catch_up_adamw(&rule(&rates), vec![tensor], parallel).unwrap();
            assert_eq!(values, kept.values, "step {step}");
        }
    }
}

#[test]
fn bf16_parameters_are_those_of_f32_rounded_in_every_step() {
    let mut half = Kept::new(vec![bf16::ONE; SHAPE.2]);
    let mut full = Kept::new(vec![1f32; SHAPE.2]);
    for step in 1..12 {
        let came = rows(step);
        let narrow: Vec<bf16> = gradient(step).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = narrow.iter().map(|v| v.to_f32()).collect();
        let narrow = |values| Elements::Bf16(values, &narrow);
        let wide = |values| Elements::F32(values, &wide);
        let tensors = vec![
            stepped(&mut half, narrow, came.as_deref(), step as i64),
            stepped(&mut full, wide, came.as_deref(), step as i64),
        ];
        catch_up_adamw(&rule(&[0.125]), tensors, false).unwrap();
        for value in &mut full.values {
            *value = bf16::from_f32(*value).to_f32();
        }
        let got: Vec<f32> = half.values.iter().map(|v| v.to_f32()).collect();
        assert_eq!(got, full.values, "step {step}");
    }
}

#[test]
fn state_of_another_model_is_refused() {
    let gradient = gradient(1);
    let mut kept = Kept::new(vec![1f32; SHAPE.2]);
    kept.first.pop();
    let tensor = stepped(
        &mut kept,
        |values| Elements::F32(values, &gradient),
        None,
        1,
    );
    let refused = catch_up_adamw(&rule(&[0.1]), vec![tensor], false);
    assert!(matches!(refused, Err(InPlaceError::Shape { .. })));
    for came in [vec![2, 1], vec![1, 1], vec![-1], vec![7]] {
        let mut kept = Kept::new(vec![1f32; SHAPE.2]);
        let elements = |values| Elements::F32(values, &gradient);
        let tensor = stepped(&mut kept, elements, Some(&came), 1);
        let refused = catch_up_adamw(&rule(&[0.1]), vec![tensor], false);
        assert_eq!(refused, Err(InPlaceError::Rows { rows: 7 }), "{came:?}");
        assert_eq!(kept.values, vec![1f32; SHAPE.2]);
    }
}
