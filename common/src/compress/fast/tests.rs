#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::reference::Reference;
use super::super::simd::at_every_level;
use super::*;
use crate::config::algorithm::{ProjectionKind, ValueType};
use proptest::prelude::*;

const KEY: ProjectionKey = ProjectionKey {
    seed: 11,
    tensor: 2,
    step: 5,
};
const PARAMS: FeedbackParams = FeedbackParams {
    eta: 0.3,
    decay: 0.9,
};

const RULES: [Feedback; 4] = [
    Feedback::None,
    Feedback::Ef14,
    Feedback::Ef21,
    Feedback::Ef21m,
];

/// Numbers in (−1, 1), the same for the same seed.
fn noise(seed: u32, len: usize) -> Vec<f32> {
    let key = ProjectionKey {
        seed: 1,
        tensor: seed,
        step: 0,
    };
    let blocks = (0..len.div_ceil(4) as u32).flat_map(|b| crate::compress::philox::block(key, b));
    blocks
        .take(len)
        .map(|w| (w as i32) as f32 / 2_147_483_648.0)
        .collect()
}

fn state(feedback: Feedback, rows: usize, width: usize) -> TensorState {
    let mut state = TensorState::new(feedback, rows, width);
    for (seed, vector) in [
        &mut state.residual,
        &mut state.momentum,
        &mut state.local,
        &mut state.global,
    ]
    .into_iter()
    .enumerate()
    {
        let len = vector.len();
        vector.copy_from_slice(&noise(100 + seed as u32, len));
    }
    state
}

/// Everything a round computes on one worker for the rows `part`.
fn round(
    kernels: &dyn Kernels,
    feedback: Feedback,
    dense: bool,
    shape: SketchShape,
    part: Range<usize>,
    counted: bool,
    codec: ValueCodec,
) -> (TensorState, Vec<f32>, Vec<f32>, Vec<f64>, Vec<u8>) {
    let rows = part.end + 1;
    let mut state = state(feedback, rows, shape.width);
    let mut buffer = noise(1, rows * shape.width);
    assert!(kernels.input(&mut state, PARAMS, dense, &mut buffer, part.clone()));
    let mut sketch = vec![0.0; part.len() * shape.rank];
    let mut energy = vec![0.0; part.len()];
    kernels.sketch(&state, shape, KEY, &buffer, part.clone(), &mut sketch);
    kernels.energy(&state, &buffer, part.clone(), &mut energy);
    let selected: Vec<u32> = part
        .clone()
        .filter(|r| dense || r % 5 < 2)
        .map(|r| r as u32)
        .collect();
    let mut sent = vec![7];
    kernels.gather(&state, dense, &buffer, &selected, codec, &mut sent);
    let mean = noise(3, selected.len() * shape.width);
    let counted = counted.then_some(&sent[1..]);
    kernels.commit(
        &mut state,
        dense,
        &mut buffer,
        part,
        &selected,
        counted,
        codec,
        &mean,
    );
    (state, buffer, sketch, energy, sent)
}

fn close(a: &[f32], b: &[f32]) -> bool {
    let scale = b.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * scale)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn fast_agrees_with_the_reference(
        feedback in prop::sample::select(RULES.to_vec()),
        value_type in prop::sample::select(vec![ValueType::F32, ValueType::Bf16, ValueType::F16, ValueType::Int8, ValueType::Int4]),
        gaussian: bool, dense: bool, counted: bool,
        width in 1usize..80, rank in 1usize..20, start in 0usize..3, rows in 1usize..60, quant_block in 1usize..40,
    ) {
        let kind = if gaussian { ProjectionKind::Gaussian } else { ProjectionKind::Rademacher };
        let shape = SketchShape { width, rank, kind };
        let codec = ValueCodec { value_type, quant_block };
        let part = start..start + rows;
        let expected = round(&Reference, feedback, dense, shape, part.clone(), counted, codec);
        let actual = at_every_level(|| round(&Fast, feedback, dense, shape, part.clone(), counted, codec));
        prop_assert!(actual.windows(2).all(|w| w[0] == w[1]), "instruction sets differ");
        let (state, buffer, sketch, energy, sent) = &actual[0];
        prop_assert_eq!(state, &expected.0);
        prop_assert_eq!(buffer, &expected.1);
        prop_assert!(close(sketch, &expected.2));
        prop_assert!(energy.iter().zip(&expected.3).all(|(a, b)| (a - b).abs() <= 1e-12 * b));
        prop_assert_eq!(sent, &expected.4);
    }
}

#[test]
fn large_tensors_are_the_same_on_any_number_of_threads() {
    let codec = ValueCodec {
        value_type: ValueType::Int4,
        quant_block: 24,
    };
    let shape = SketchShape {
        width: 200,
        rank: 5,
        kind: ProjectionKind::Rademacher,
    };
    for feedback in [Feedback::None, Feedback::Ef14, Feedback::Ef21m] {
        let expected = round(&Reference, feedback, false, shape, 1..4000, true, codec);
        let mut results = Vec::new();
        for threads in [1, 2, 4] {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            results
                .push(pool.install(|| round(&Fast, feedback, false, shape, 1..4000, true, codec)));
        }
        assert!(results[0] == results[1] && results[1] == results[2]);
        assert!(
            results[0].0 == expected.0 && results[0].1 == expected.1 && results[0].4 == expected.4
        );
        assert!(close(&results[0].2, &expected.2));
    }
}

/// Segments whose results go past the caches, with rows that begin anywhere.
#[test]
fn large_segments_are_the_references() {
    let codec = ValueCodec {
        value_type: ValueType::Bf16,
        quant_block: 64,
    };
    for feedback in RULES {
        for width in [1, 15, 16, 37, 130] {
            for (dense, counted) in [(false, true), (false, false), (true, true), (true, false)] {
                let shape = SketchShape {
                    width,
                    rank: 2,
                    kind: ProjectionKind::Rademacher,
                };
                let part = 3..3 + (STREAM_FROM + 77).div_ceil(width);
                let run = |kernels| {
                    let (state, buffer, ..) = round(
                        kernels,
                        feedback,
                        dense,
                        shape,
                        part.clone(),
                        counted,
                        codec,
                    );
                    (state, buffer)
                };
                assert!(run(&Fast) == run(&Reference), "{feedback:?}, {width}");
            }
        }
    }
}

/// A round that does not end: rows that were formed are withdrawn, whatever they hold.
#[test]
fn what_was_formed_is_withdrawn_to_the_bit() {
    for kernels in [&Fast as &dyn Kernels, &Reference] {
        for feedback in RULES {
            for (dense, width, bad) in [
                (false, 7, 1.0),
                (true, 7, f32::NAN),
                (false, 40_000, f32::INFINITY),
                (true, 40_000, 1e30),
            ] {
                let before = state(feedback, 6, width);
                let (mut open, mut buffer) = (before.clone(), noise(9, 6 * width));
                buffer[2 * width] = bad;
                let finite = kernels.input(&mut open, PARAMS, dense, &mut buffer, 1..5);
                assert_eq!(finite, bad.is_finite());
                assert_eq!(
                    open == before,
                    before.kept().is_empty(),
                    "U is in its place"
                );
                open.withdraw(&buffer, 1..3);
                open.withdraw(&buffer, 3..5);
                assert_eq!(open, before);
            }
        }
    }
}

#[test]
fn input_sees_what_is_not_finite_only_in_its_rows() {
    for kernels in [&Fast as &dyn Kernels, &Reference] {
        for feedback in [Feedback::None, Feedback::Ef14, Feedback::Ef21m] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let state = TensorState::new(feedback, 4, 50_000);
                let mut buffer = vec![1.0; 200_000];
                buffer[50_001] = bad;
                for (rows, finite) in [(2..4, true), (0..4, false)] {
                    let (mut state, mut buffer) = (state.clone(), buffer.clone());
                    let found = kernels.input(&mut state, PARAMS, false, &mut buffer, rows);
                    assert_eq!(found, finite);
                }
            }
        }
    }
}
