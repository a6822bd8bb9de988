//! The step machine alone, against shards made by hand: what it refuses, and what an answer's flags decide.

use crate::support::{algorithm, assert_close, gradients, model, shard, spec, tensor};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, ValueType};
use arc_topk_common::ids::{Epoch, ShardId, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec};
use arc_topk_common::wire::{FrameFlags, FrameHeader, FrameKind, HEADER_BYTES, WireError};
use arc_topk_worker::step::{ImportError, Outgoing, StepError, StepMachine};
use bytes::Bytes;
use std::sync::Arc;

fn machine(spec: &PlanSpec) -> StepMachine {
    let plan = Arc::new(Plan::build(spec.clone()).unwrap());
    StepMachine::new(plan, Arc::new(Fast), Epoch(3), Step(0), 0)
}

fn one_matrix(compressor: Compressor) -> PlanSpec {
    let algorithm = AlgorithmConfig {
        compressor,
        ..algorithm(Feedback::Ef14, 0.25)
    };
    spec(algorithm, 1, vec![tensor("w", &[8, 8])])
}

fn down(of: &Outgoing, kind: FrameKind, body: &Bytes) -> FrameHeader {
    FrameHeader {
        kind,
        flags: FrameFlags {
            counted: true,
            ..FrameFlags::default()
        },
        body_bytes: body.len() as u32,
        ..of.header
    }
}

/// Begins a step and hands over everything; returns the frames.
fn open(machine: &mut StepMachine, spec: &PlanSpec, step: u64) -> Vec<Outgoing> {
    let mut out = Vec::new();
    machine.begin();
    for (id, gradient) in gradients(spec, 1, step)[0].iter().enumerate() {
        machine
            .fill(TensorId(id as u32), gradient, &mut out)
            .unwrap();
    }
    out
}

#[test]
fn a_contribution_that_was_not_counted_stays_whole() {
    let spec = one_matrix(Compressor::Randk);
    let mut machine = machine(&spec);
    let frame = open(&mut machine, &spec, 0).pop().unwrap();
    let mean = Bytes::from(vec![0; frame.body.len()]);
    let mut header = down(&frame, FrameKind::Mean, &mean);
    header.flags.counted = false;
    machine
        .handle(ShardId(0), header, mean, &mut Vec::new())
        .unwrap();
    machine.commit();
    let (_, residual) = machine.export_state().arrays.pop().unwrap();
    assert_eq!(residual, gradients(&spec, 1, 0)[0][0]);
}

#[test]
fn dense_tensors_count_by_the_selection_and_values_by_the_mean() {
    let algorithm = AlgorithmConfig {
        wire_dense: ValueType::Bf16,
        ..algorithm(Feedback::Ef14, 1.0)
    };
    let spec = spec(
        algorithm,
        1,
        vec![tensor("w", &[8, 8]), tensor("bias", &[8])],
    );
    let mut machine = machine(&spec);
    let sketch = open(&mut machine, &spec, 0).pop().unwrap();
    assert_eq!(sketch.header.epoch, Epoch(3));
    assert!(!sketch.last);
    // A bitmap of all eight rows, then eight bf16 zeros.
    let mut selection = vec![0, 0xff];
    selection.resize(2 + 16, 0);
    let selection = Bytes::from(selection);
    let mut header = down(&sketch, FrameKind::Selection, &selection);
    header.flags.counted = false;
    let mut out = Vec::new();
    machine
        .handle(ShardId(0), header, selection, &mut out)
        .unwrap();
    let values = out.pop().unwrap();
    assert!(values.last && values.header.kind == FrameKind::Values);
    let mean = values.body.clone();
    machine
        .handle(
            ShardId(0),
            down(&values, FrameKind::Mean, &mean),
            mean,
            &mut out,
        )
        .unwrap();
    assert!(machine.is_complete());
    machine.commit();
    let arrays = machine.export_state().arrays;
    let of = |name: &str| arrays.iter().find(|(n, _)| n == name).unwrap().1.clone();
    assert_eq!(of("residual/bias"), gradients(&spec, 1, 0)[0][1]);
    assert_close("w", &of("residual/w"), &[0.0; 64], 1e-6);
}

#[test]
fn a_gradient_that_is_not_finite_is_announced_with_an_empty_frame() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let mut machine = machine(&spec);
    machine.begin();
    let mut out = Vec::new();
    machine
        .fill(TensorId(0), &[f32::NAN; 60 * 24], &mut out)
        .unwrap();
    machine.flush(&mut out).unwrap();
    let bucket = machine.plan().tensors[0].bucket;
    for frame in &out {
        assert_eq!(frame.header.flags.non_finite, frame.header.bucket == bucket);
        assert_eq!(frame.body.is_empty(), frame.header.flags.non_finite);
        // Where it is late, it still asks for the mean.
        assert_eq!(frame.last, frame.header.kind == FrameKind::Dense);
    }
}

#[test]
fn frames_that_do_not_belong_are_refused_and_change_nothing() {
    let spec = one_matrix(Compressor::Arc);
    let mut machine = machine(&spec);
    let frame = open(&mut machine, &spec, 0).pop().unwrap();
    // Deltas: two rows, the first is row 1, the other row 3.
    let body = Bytes::from(vec![0, 0b1010]);
    let good = down(&frame, FrameKind::Selection, &body);
    let mut refused = |shard: u16, header: FrameHeader, body: &Bytes| {
        let mut out = Vec::new();
        let error = machine
            .handle(ShardId(shard), header, body.clone(), &mut out)
            .unwrap_err();
        assert!(out.is_empty());
        error
    };
    let wrong_step = FrameHeader {
        step: Step(1),
        ..good
    };
    assert!(matches!(
        refused(0, wrong_step, &body),
        StepError::WrongStep { .. }
    ));
    let wrong_update = FrameHeader { update: 9, ..good };
    assert!(matches!(
        refused(0, wrong_update, &body),
        StepError::WrongStep { .. }
    ));
    let wrong_kind = FrameHeader {
        kind: FrameKind::Mean,
        ..good
    };
    assert!(matches!(
        refused(0, wrong_kind, &body),
        StepError::UnexpectedFrame { .. }
    ));
    assert!(matches!(
        refused(5, good, &body),
        StepError::UnexpectedFrame {
            state: "not held",
            ..
        }
    ));
    let cut = body.slice(..1);
    assert!(matches!(
        refused(0, good, &cut),
        StepError::Body {
            source: WireError::Truncated { .. },
            ..
        }
    ));
    let three = Bytes::from(vec![0, 0b1110]);
    assert!(matches!(
        refused(0, good, &three),
        StepError::Body {
            source: WireError::RowCount { .. },
            ..
        }
    ));
    let mut flagged = good;
    flagged.flags.non_finite = true;
    assert!(matches!(refused(0, flagged, &body), StepError::Body { .. }));

    let mut out = Vec::new();
    machine
        .handle(ShardId(0), good, body.clone(), &mut out)
        .unwrap();
    let values = out.pop().unwrap();
    machine.handle(ShardId(0), good, body, &mut out).unwrap();
    assert!(out.is_empty());
    let others = Bytes::from(vec![0, 0b11]);
    let twice = machine.handle(ShardId(0), good, others, &mut out);
    assert!(matches!(twice, Err(StepError::AnswerDiffers { .. })));
    let mean = down(&values, FrameKind::SparseMean, &values.body);
    let wrong = machine
        .handle(ShardId(0), mean, values.body.clone(), &mut out)
        .unwrap_err();
    assert!(
        wrong.to_string().contains("waiting for a later answer"),
        "{wrong}"
    );
    for flags in [
        FrameFlags {
            held: true,
            ..FrameFlags::default()
        },
        FrameFlags {
            absent: true,
            ..FrameFlags::default()
        },
    ] {
        let mut header = down(&values, FrameKind::Mean, &values.body);
        header.flags = flags;
        let wrong = machine.handle(ShardId(0), header, values.body.clone(), &mut out);
        assert!(matches!(wrong, Err(StepError::UnexpectedFrame { .. })));
    }
    let mut header = down(&values, FrameKind::Mean, &values.body);
    for roster in [1, u16::MAX] {
        header.roster_bytes = roster;
        let wrong = machine.handle(ShardId(0), header, values.body.clone(), &mut out);
        assert!(matches!(wrong, Err(StepError::Body { .. })));
    }
    let short = Bytes::from(vec![0; 3]);
    let error = machine
        .handle(
            ShardId(0),
            down(&values, FrameKind::Mean, &short),
            short,
            &mut out,
        )
        .unwrap_err();
    assert!(matches!(
        error,
        StepError::Body {
            source: WireError::BodyLength { .. },
            ..
        }
    ));
    let mean = values.body.clone();
    machine
        .handle(
            ShardId(0),
            down(&values, FrameKind::Mean, &mean),
            mean,
            &mut out,
        )
        .unwrap();
    assert!(machine.is_complete());
}

#[test]
fn gradients_that_do_not_fit_are_refused_by_name() {
    let spec = one_matrix(Compressor::Arc);
    let mut machine = machine(&spec);
    let mut out = Vec::new();
    assert_eq!(
        machine.fill(TensorId(0), &[0.0; 64], &mut out),
        Err(StepError::NotBegun)
    );
    machine.begin();
    let short = machine.fill(TensorId(0), &[0.0; 63], &mut out).unwrap_err();
    assert_eq!(
        short,
        StepError::GradientLength {
            tensor: "w".into(),
            expected: 64,
            actual: 63
        }
    );
    assert!(matches!(
        machine.fill(TensorId(1), &[], &mut out),
        Err(StepError::UnknownTensor {
            tensor: 1,
            tensors: 1
        })
    ));
    machine.fill(TensorId(0), &[0.0; 64], &mut out).unwrap();
    let twice = machine.fill(TensorId(0), &[0.0; 64], &mut out).unwrap_err();
    assert_eq!(
        twice,
        StepError::FilledTwice {
            tensor: "w".into(),
            step: Step(0)
        }
    );
    assert_eq!(out.len(), 1);
}

#[test]
fn saved_states_that_do_not_fit_are_refused_by_name() {
    let spec = one_matrix(Compressor::Arc);
    let mut machine = machine(&spec);
    let saved = machine.export_state();
    let mut missing = saved.clone();
    missing.arrays.clear();
    assert_eq!(
        machine.import_state(missing),
        Err(ImportError::Missing {
            array: "residual",
            tensor: "w".into()
        })
    );
    let mut short = saved.clone();
    short.arrays[0].1.pop();
    let error = machine.import_state(short).unwrap_err();
    assert_eq!(
        error,
        ImportError::Length {
            array: "residual",
            tensor: "w".into(),
            expected: 64,
            actual: 63
        }
    );
    let mut more = saved.clone();
    more.arrays.push(("residual/x".into(), vec![]));
    assert_eq!(
        machine.import_state(more),
        Err(ImportError::Unknown {
            name: "residual/x".into()
        })
    );
    machine.begin();
    assert_eq!(machine.import_state(saved), Err(ImportError::StepOpen));
}

#[test]
fn a_forgotten_step_leaves_no_trace() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let (mut fresh, mut stale) = (machine(&spec), machine(&spec));
    open(&mut stale, &spec, 5);
    assert_eq!(open(&mut stale, &spec, 0), open(&mut fresh, &spec, 0));
    assert_eq!(stale.export_state(), fresh.export_state());
}

#[test]
fn bytes_are_counted_by_kind() {
    for compressor in [
        Compressor::Arc,
        Compressor::Randk,
        Compressor::Topk,
        Compressor::Dense,
    ] {
        let algorithm = AlgorithmConfig {
            compressor,
            ..algorithm(Feedback::None, 0.3)
        };
        let spec = spec(algorithm, 2, model());
        let mut machine = machine(&spec);
        let first = open(&mut machine, &spec, 0);
        let mut queue = first.clone();
        while let Some(frame) = queue.pop() {
            let (header, body) = shard::answer(machine.plan(), &frame, &[0], 0.0);
            machine
                .handle(frame.shard, header, body, &mut queue)
                .unwrap();
        }
        let stats = machine.commit().stats;
        let first_bytes: usize = first.iter().map(|frame| frame.body.len()).sum();
        let sent = stats.sent;
        if compressor != Compressor::Arc {
            assert_eq!(
                sent.total() as usize,
                first_bytes + first.len() * HEADER_BYTES
            );
        } else {
            assert_eq!((sent.sketch + sent.dense) as usize, first_bytes);
        }
        assert_eq!(sent.sketch > 0, compressor == Compressor::Arc);
        assert_eq!(
            stats.received.selection > 0,
            matches!(compressor, Compressor::Arc | Compressor::Topk)
        );
        assert_eq!(sent.values > 0, compressor != Compressor::Dense);
        assert_eq!(sent.values, stats.received.values);
        assert_eq!(sent.dense, stats.received.dense);
        let elements: u64 = spec
            .tensors
            .iter()
            .map(|t| t.shape.iter().product::<u64>())
            .sum();
        assert_eq!(stats.dense_equivalent_bytes, 4 * elements);
    }
}
