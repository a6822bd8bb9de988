#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

const SMALL: LlamaConfig = LlamaConfig {
    vocab: 11,
    hidden: 16,
    intermediate: 20,
    layers: 2,
    heads: 2,
    tied: false,
};

fn tokens() -> Batch {
    let inputs: Vec<u32> = (0..12).map(|i| i * 5 % 11).collect();
    let targets = inputs.iter().map(|token| (token * 3 + 1) % 11).collect();
    Batch::Tokens {
        inputs,
        targets,
        windows: 2,
    }
}

fn images() -> Batch {
    let pixels = (0..2 * 784)
        .map(|i| ((i * 37) % 101) as f32 / 101.0)
        .collect();
    Batch::Images {
        pixels,
        labels: vec![3, 7],
    }
}

fn gradients(model: &dyn Model, batch: &Batch) -> Vec<Vec<f32>> {
    let mut order = Vec::new();
    let mut gradients = vec![Vec::new(); model.specs().len()];
    model
        .forward_backward(batch, &mut |index, gradient| {
            order.push(index);
            gradients[index] = gradient.to_vec();
        })
        .unwrap();
    assert_eq!(
        order,
        (0..gradients.len()).rev().collect::<Vec<_>>(),
        "each once, in reverse registration order"
    );
    gradients
}

/// Central differences along a few elements of every parameter, in f32: h is chosen so that rounding of the loss
/// (about 1e-7) stays below 1e-4 of the difference quotient.
fn check_gradients(model: &dyn Model, batch: &Batch, tolerance: f32) {
    let gradients = gradients(model, batch);
    for (index, gradient) in gradients.iter().enumerate() {
        let largest = gradient.iter().fold(0f32, |a, g| a.max(g.abs()));
        let strongest = gradient.iter().position(|g| g.abs() == largest).unwrap();
        for at in [strongest, 0, gradient.len() / 2, gradient.len() - 1] {
            let h = 1e-2;
            let shifted = |by: f32| {
                write_parameter(model.vars()[index].as_tensor(), |values| values[at] += by)
                    .unwrap();
                model.evaluate(batch).unwrap().loss
            };
            let (up, down) = (shifted(h), shifted(-2.0 * h));
            shifted(h);
            let difference = (up - down) / (2.0 * h);
            let error = (difference - gradient[at]).abs();
            let name = &model.specs()[index].name;
            assert!(
                error < tolerance * (largest + 0.01),
                "{name}[{at}]: {} against {difference}",
                gradient[at]
            );
        }
    }
}

/// Larger weights than training starts from, so that nothing hides in the linear regime.
fn enlarge(model: &dyn Model) {
    for var in model.vars() {
        write_parameter(var.as_tensor(), |values| {
            values.iter_mut().for_each(|x| *x *= 1.5)
        })
        .unwrap();
    }
}

#[test]
fn llama_gradients_agree_with_finite_differences() {
    for tied in [false, true] {
        let model = Llama::new(LlamaConfig { tied, ..SMALL }, 6, 1).unwrap();
        enlarge(&model);
        check_gradients(&model, &tokens(), 0.03);
    }
}

#[test]
fn conv_gradients_agree_with_finite_differences() {
    // A difference that crosses a corner of ReLU or max-pooling is off by more than rounding.
    check_gradients(&ConvNet::new(2).unwrap(), &images(), 0.1);
}

#[test]
fn evaluation_agrees_with_training_loss() {
    let model = Llama::new(SMALL, 6, 1).unwrap();
    let loss = model.forward_backward(&tokens(), &mut |_, _| ()).unwrap();
    assert_eq!(loss, model.evaluate(&tokens()).unwrap().loss);
    assert!(
        (loss - 11f32.ln()).abs() < 0.6,
        "near the uniform guess at the start: {loss}"
    );
}

/// Positions that follow change nothing: the first three losses are those of the window cut after them.
#[test]
fn attention_is_causal() {
    let model = Llama::new(SMALL, 6, 1).unwrap();
    let loss = |inputs: &[u32], targets: &[u32]| {
        let batch = Batch::Tokens {
            inputs: inputs.to_vec(),
            targets: targets.to_vec(),
            windows: 1,
        };
        model.evaluate(&batch).unwrap().loss * inputs.len() as f32
    };
    // Two sets of targets that differ in the first three alone: the other losses cancel.
    let first_three = |rest: [u32; 3]| {
        let inputs = [&[1, 2, 3][..], &rest].concat();
        loss(&inputs, &[4, 5, 6, 1, 1, 1]) - loss(&inputs, &[7, 8, 9, 1, 1, 1])
    };
    let cut = loss(&[1, 2, 3], &[4, 5, 6]) - loss(&[1, 2, 3], &[7, 8, 9]);
    assert!(cut.abs() > 0.01, "{cut}");
    for rest in [[9, 9, 9], [8, 7, 6], [0, 1, 2]] {
        assert!(
            (first_three(rest) - cut).abs() < 1e-4,
            "{rest:?}: {} against {cut}",
            first_three(rest)
        );
    }
    // What came before does matter.
    let changed = loss(&[8, 2, 3], &[4, 5, 6]) - loss(&[8, 2, 3], &[7, 8, 9]);
    assert!((changed - cut).abs() > 1e-3, "{changed} against {cut}");
}

#[test]
fn starts_are_equal_for_equal_seeds() {
    let digest = |seed| {
        let model = Llama::new(SMALL, 6, seed).unwrap();
        let values: Vec<Vec<f32>> = model
            .vars()
            .iter()
            .map(|var| read_parameter(var.as_tensor(), <[f32]>::to_vec).unwrap())
            .collect();
        values
    };
    assert_eq!(digest(1), digest(1));
    assert_ne!(digest(1), digest(2));
}

#[test]
fn a_batch_of_another_task_is_refused() {
    assert!(matches!(
        ConvNet::new(0).unwrap().evaluate(&tokens()),
        Err(ModelError::WrongBatch)
    ));
    assert!(matches!(
        Llama::new(SMALL, 6, 0).unwrap().evaluate(&images()),
        Err(ModelError::WrongBatch)
    ));
    let odd = LlamaConfig { heads: 3, ..SMALL };
    assert!(matches!(Llama::new(odd, 6, 0), Err(ModelError::Sizes(_))));
}
