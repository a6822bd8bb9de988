//! Catch-up AdamW, step by step, beside the common crate's optimizer: to the bit.

use crate::device::{launch, rounded, stored};
use crate::memory::Memory;
use arc_topk_common::optim::{Optimizer, OptimizerConfig, OptimizerKind, RowsCame};
use arc_topk_kernels::{AdamArgs, AdamTau, AdamTensor, Element, adam_tiles, names};
use proptest::prelude::*;
use proptest::sample::select;

#[derive(Clone, Debug)]
struct Shape {
    rows: usize,
    width: usize,
    missing: usize,
    element: Element,
    shift: usize,
}

impl Shape {
    fn elements(&self) -> usize {
        self.rows * self.width - self.missing
    }
}

/// One tensor on the emulated device.
struct Slot {
    parameter: Memory,
    gradient: Memory,
    first: Memory,
    second: Memory,
    last: Memory,
    seen: Memory,
}

impl Slot {
    fn new(shape: &Shape, start: &[f32]) -> Self {
        let size = shape.element.bytes();
        let moments = || Memory::new(&vec![0f32; shape.rows * shape.width], shape.shift * 4);
        Self {
            parameter: Memory::new(&stored(start, shape.element), shape.shift * size),
            gradient: Memory::new(&stored(start, shape.element), shape.shift * size),
            first: moments(),
            second: moments(),
            last: Memory::zeros::<i64>(shape.rows),
            seen: Memory::zeros::<i64>(shape.rows),
        }
    }

    fn describe(
        &mut self,
        shape: &Shape,
        step: i64,
        came: Option<&[u32]>,
        keep: f32,
        lanes_log2: u32,
    ) -> AdamTensor {
        AdamTensor {
            parameter: self.parameter.address(),
            gradient: self.gradient.address(),
            first: self.first.address(),
            second: self.second.address(),
            last: self.last.address(),
            seen: self.seen.address(),
            // Never null: no rows is not all rows.
            came: came.map_or(0, |rows| rows.as_ptr() as u64),
            step,
            came_count: came.map_or(0, <[u32]>::len) as u32,
            elements: shape.elements() as u32,
            width: shape.width as u32,
            lanes_log2,
            element: shape.element,
            keep,
        }
    }
}

/// A smooth, never repeating stand-in for gradients.
fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 7 + seed * 13) as f32 * 0.37).sin() * (1.0 + (i % 5) as f32))
        .collect()
}

/// Rows of a tensor that come in a step; `None` for all.
fn rows_of_step(shape: &Shape, step: usize) -> Option<Vec<u32>> {
    let came = |row: &u32| (*row as usize * 5 + step * 3) % 7 < 2;
    (!step.is_multiple_of(4)).then(|| (0..shape.rows as u32).filter(came).collect())
}

fn run(shapes: &[Shape], decay: f32, cap: u32, seed: u64) {
    let config = OptimizerConfig {
        kind: OptimizerKind::CatchUpAdamW,
        weight_decay: decay,
        catch_up_cap: cap,
        ..OptimizerConfig::default()
    };
    let plain: Vec<_> = shapes
        .iter()
        .map(|s| (s.rows, s.width, s.elements()))
        .collect();
    let mut optimizer = Optimizer::new(config.clone(), &plain);
    let round = |values: Vec<f32>, shape: &Shape| -> Vec<f32> {
        values.iter().map(|x| rounded(*x, shape.element)).collect()
    };
    let mut parameters: Vec<Vec<f32>> = shapes
        .iter()
        .map(|s| round(numbers(99, s.elements()), s))
        .collect();
    let mut slots: Vec<Slot> = shapes
        .iter()
        .zip(&parameters)
        .map(|(s, x)| Slot::new(s, x))
        .collect();
    let (tiles, lanes) = adam_tiles(
        &shapes
            .iter()
            .map(|s| (s.rows as u32, s.width as u32))
            .collect::<Vec<_>>(),
    );
    let betas = (f64::from(config.beta1), f64::from(config.beta2));
    let mut rates: Vec<f64> = Vec::new();
    for step in 1..=9usize {
        let lr = 0.01 / step as f32;
        rates.insert(0, f64::from(lr));
        rates.truncate(cap as usize);
        let taus = AdamTau::table(betas, &rates, 0.7, rates.len() as u32);
        optimizer.begin_step(lr);
        let came: Vec<_> = shapes
            .iter()
            .map(|shape| rows_of_step(shape, step))
            .collect();
        let mut tensors = Vec::new();
        for (index, shape) in shapes.iter().enumerate() {
            let gradient = round(numbers(step * 3 + index, shape.elements()), shape);
            let rows = came[index].as_deref();
            optimizer.update(
                index,
                &mut parameters[index],
                &gradient,
                rows.map_or(RowsCame::All, RowsCame::Rows),
                0.7,
            );
            parameters[index] = round(parameters[index].clone(), shape);
            slots[index]
                .gradient
                .write(&stored(&gradient, shape.element));
            let keep = 1.0 - lr * decay;
            tensors.push(slots[index].describe(shape, step as i64, rows, keep, lanes[index]));
        }
        let arguments = AdamArgs {
            tensors: tensors.as_ptr() as u64,
            tiles: tiles.as_ptr() as u64,
            taus: taus.as_ptr() as u64,
            beta1: betas.0,
            beta2: betas.1,
            eps: config.eps,
            cap: taus.len() as u32,
        };
        launch(names::ADAMW, &tiles, &arguments, seed);
        for ((slot, shape), parameter) in slots.iter().zip(shapes).zip(&parameters) {
            assert!(
                slot.parameter.read::<u8>() == stored(parameter, shape.element),
                "step {step}: {shape:?}"
            );
        }
    }
    check_state(&optimizer, &slots, shapes);
}

fn check_state(optimizer: &Optimizer, slots: &[Slot], shapes: &[Shape]) {
    let exported = optimizer.export();
    let of = |name: String| &exported.iter().find(|(n, _)| *n == name).unwrap().1;
    // Counters are exported as pairs of 16 bits.
    let counters = |name: String| -> Vec<i64> {
        of(name)
            .chunks_exact(2)
            .map(|pair| (i64::from(pair[0] as u32) << 16) + i64::from(pair[1] as u32))
            .collect()
    };
    for (index, (slot, shape)) in slots.iter().zip(shapes).enumerate() {
        let elements = shape.elements();
        assert_eq!(
            slot.first.read::<f32>()[..elements],
            of(format!("{index}.first"))[..]
        );
        assert_eq!(
            slot.second.read::<f32>()[..elements],
            of(format!("{index}.second"))[..]
        );
        assert_eq!(slot.last.read::<i64>(), counters(format!("{index}.came")));
        assert_eq!(slot.seen.read::<i64>(), counters(format!("{index}.weight")));
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    (
        prop_oneof![1usize..70, select(vec![4usize, 64, 512, 1021, 5461])],
        1usize..60,
        0f32..1.0,
        select(vec![Element::F32, Element::Bf16, Element::F16]),
        prop_oneof![Just(0usize), Just(0), 1usize..4],
    )
        .prop_map(|(width, rows, missing, element, shift)| Shape {
            rows,
            width,
            missing: (missing * width as f32) as usize,
            element,
            shift,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn catch_up_adamw_is_the_optimizers(
        shapes in prop::collection::vec(shape(), 1..3),
        decay in select(vec![0f32, 0.1]),
        cap in 1u32..6,
        seed in 0u64..3,
    ) {
        run(&shapes, decay, cap, seed);
    }
}
