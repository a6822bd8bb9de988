//! Rounds: random ones, and those that are easily got wrong.

use crate::device::{Device, End, Spec, Wanted, stored};
use crate::round::{Case, Outcome, PARAMS, Shape, check, noise, same_bits, state_of};
use arc_topk_common::compress::{TensorState, ValueCodec};
use arc_topk_common::config::algorithm::{Feedback, ProjectionKind, ValueType};
use arc_topk_kernels::{CommitFlags, Element, PieceSource};
use proptest::prelude::*;
use proptest::sample::select;

/// ef21's H made anew: what CpuBackend::restore does.
#[test]
fn restore_replaces_the_estimates() {
    let codec = ValueCodec {
        value_type: ValueType::Int8,
        quant_block: 64,
    };
    for (feedback, counted, width) in [
        (Feedback::Ef21, true, 64),
        (Feedback::Ef21m, false, 64),
        (Feedback::Ef21m, true, 27),
        (Feedback::Ef21, false, 5461),
    ] {
        let shape = Shape {
            rows: 13,
            width,
            missing: 2,
            cut: 0.0,
            element: Element::Bf16,
            flat: false,
            shift: 0,
            absent: false,
        };
        let state = state_of(&shape, feedback, 3);
        let elements = 13 * width - 2;
        let spec = Spec {
            state: state.clone(),
            elements,
            element: shape.element,
            cuts: Vec::new(),
            flat: false,
            shift: 0,
        };
        let mut device = Device::new(&[spec], 4, PARAMS, 5);
        let values = 13 * width;
        let estimates = Wanted {
            segment: 0,
            source: PieceSource::Estimates,
            rows: None,
            values,
            codec,
            dense_round: false,
        };
        let mut bytes = Vec::new();
        codec.encode(&state.local, &mut bytes);
        assert!(
            device.encode(&[estimates], 0).0[0] == bytes,
            "encoded estimates"
        );

        let (mut mean, mut encoded) = (noise(4, values), Vec::new());
        codec.encode(&mean, &mut encoded);
        codec.decode(&encoded, &mut mean);
        let flags = CommitFlags::ALL.and(CommitFlags::RESTORE);
        let flags = if counted {
            flags.and(CommitFlags::COUNTED)
        } else {
            flags
        };
        device.commit(&[End {
            rows: &[],
            sent: &[],
            up: codec,
            mean: &encoded,
            down: codec,
            flags,
        }]);
        let local = if counted {
            state.local.clone()
        } else {
            mean.clone()
        };
        same_bits(
            &device.state(0, &state),
            &TensorState {
                local,
                global: mean.clone(),
                ..state
            },
        );
        assert!(
            device.gradient(0) == stored(&mean[..elements], shape.element),
            "result is H"
        );
    }
}

/// Rows so wide that they are cut into parts, with ranks that cut them more.
#[test]
fn wide_rows_are_cut_into_parts() {
    for (width, rank, element, kind) in [
        (20_000, 4, Element::F32, ProjectionKind::Rademacher),
        (9001, 8, Element::Bf16, ProjectionKind::Rademacher),
        (8200, 33, Element::F16, ProjectionKind::Rademacher),
        (8193, 4, Element::F32, ProjectionKind::Gaussian),
    ] {
        let shape = Shape {
            rows: 5,
            width,
            missing: 7,
            cut: 0.5,
            element,
            flat: false,
            shift: 0,
            absent: false,
        };
        check(&Case {
            shapes: vec![shape],
            feedback: Feedback::Ef14,
            rank,
            kind,
            up: ValueCodec {
                value_type: ValueType::Int4,
                quant_block: 64,
            },
            down: ValueCodec {
                value_type: ValueType::Int4,
                quant_block: 64,
            },
            dense_round: false,
            outcome: Outcome::Counted,
            unscale: 1.0,
            noise: 1,
            spoilt: None,
        });
    }
}

/// More rows than a tile has, of few columns, as convolution filters are.
#[test]
fn many_narrow_rows() {
    for (rows, width, feedback) in [
        (3000, 9, Feedback::Ef14),
        (2500, 1, Feedback::Ef21),
        (1500, 27, Feedback::Ef21m),
    ] {
        let shape = Shape {
            rows,
            width,
            missing: 0,
            cut: 0.3,
            element: Element::F32,
            flat: false,
            shift: 0,
            absent: false,
        };
        check(&Case {
            shapes: vec![
                shape.clone(),
                Shape {
                    flat: true,
                    ..shape
                },
            ],
            feedback,
            rank: 4,
            kind: ProjectionKind::Rademacher,
            up: ValueCodec {
                value_type: ValueType::Int4,
                quant_block: 64,
            },
            down: ValueCodec {
                value_type: ValueType::Int8,
                quant_block: 64,
            },
            dense_round: false,
            outcome: Outcome::Counted,
            unscale: 1.0,
            noise: 2,
            spoilt: None,
        });
    }
}

fn codec() -> impl Strategy<Value = ValueCodec> {
    let types = vec![
        ValueType::F32,
        ValueType::Bf16,
        ValueType::F16,
        ValueType::Int8,
        ValueType::Int4,
    ];
    let blocks = vec![8, 9, 64, 64, 64, 100, 130, 4096];
    (select(types), select(blocks)).prop_map(|(value_type, quant_block)| ValueCodec {
        value_type,
        quant_block,
    })
}

fn shape() -> impl Strategy<Value = Shape> {
    let widths = prop_oneof![
        1usize..70,
        select(vec![4usize, 8, 9, 27, 64, 128, 200, 512, 576, 1021, 1376]),
        select(vec![2048usize, 5461]),
    ];
    (
        widths,
        1usize..40,
        0f32..1.0,
        0f32..1.2,
        select(vec![Element::F32, Element::Bf16, Element::F16]),
        prop::bool::weighted(0.2),
        prop_oneof![Just(0usize), Just(0), 1usize..4],
        prop::bool::weighted(0.1),
    )
        .prop_map(
            |(width, rows, missing, cut, element, flat, shift, absent)| Shape {
                rows,
                width,
                missing: if missing < 0.3 {
                    (missing * 3.0 * width as f32) as usize
                } else {
                    0
                },
                cut,
                element,
                flat,
                shift,
                absent,
            },
        )
}

fn case() -> impl Strategy<Value = Case> {
    (
        (
            prop::collection::vec(shape(), 1..4),
            select(vec![
                Feedback::None,
                Feedback::Ef14,
                Feedback::Ef14,
                Feedback::Ef21,
                Feedback::Ef21m,
            ]),
            select(vec![1usize, 2, 3, 4, 4, 4, 5, 8, 13]),
            select(vec![
                ProjectionKind::Rademacher,
                ProjectionKind::Rademacher,
                ProjectionKind::Gaussian,
            ]),
        ),
        codec(),
        codec(),
        prop::bool::weighted(0.3),
        select(vec![
            Outcome::Counted,
            Outcome::Counted,
            Outcome::NotCounted,
            Outcome::Abstained,
        ]),
        select(vec![1.0f32, 1.0, 0.7]),
        any::<u16>(),
        prop::option::weighted(0.1, 0f32..1.0),
    )
        .prop_map(
            |(
                (shapes, feedback, rank, kind),
                up,
                down,
                dense_round,
                outcome,
                unscale,
                noise,
                spoilt,
            )| Case {
                shapes,
                feedback,
                rank,
                kind,
                up,
                down,
                dense_round,
                outcome,
                unscale,
                noise: noise.into(),
                spoilt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]
    #[test]
    fn a_round_is_the_references(case in case()) {
        check(&case);
    }
}
