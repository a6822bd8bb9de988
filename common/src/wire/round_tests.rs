#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "layouts are lists of ranges, some of one"
)]

use super::*;
use crate::config::AlgorithmConfig;
use crate::config::algorithm::{Compressor, RoundKind, SelectionPolicy, ValueType};
use crate::ids::ShardId;
use crate::plan::{DType, Plan, TensorSpec};

/// A bucket with two sparse tensors (10×8 and 20×4) and a dense one (5), owned by one shard.
fn plan(change: impl FnOnce(&mut AlgorithmConfig)) -> Plan {
    let mut algorithm = AlgorithmConfig {
        dense_below_elements: 1,
        density: 0.25,
        sketch_rank: 2,
        wire_up: ValueType::Bf16,
        wire_down: ValueType::F32,
        wire_sketch: ValueType::Bf16,
        warmup_updates: 2,
        ..AlgorithmConfig::default()
    };
    change(&mut algorithm);
    let tensor = |name: &str, shape: &[u64]| TensorSpec {
        name: name.into(),
        shape: shape.into(),
        dtype: DType::F32,
        density: None,
    };
    let tensors = vec![
        tensor("a", &[20, 4]),
        tensor("bias", &[5]),
        tensor("b", &[10, 8]),
    ];
    Plan::build(PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors,
    })
    .unwrap()
}

fn shape(update: u64, change: impl FnOnce(&mut AlgorithmConfig)) -> RoundShape {
    RoundShape::new(&plan(change), BucketId(0), ShardId(0), update)
}

#[test]
fn layouts_of_an_arc_round() {
    let shape = shape(2, |_| ());
    assert_eq!(shape.keep(), [3, 5]);
    let sketch = shape.sketch_layout();
    assert_eq!(
        (sketch.sparse, sketch.dense, sketch.bytes),
        (vec![0..40, 40..120], vec![120..140], 140)
    );
    let up = shape.values_layout(&[3, 5], Direction::Up);
    assert_eq!(
        (up.sparse, up.dense, up.bytes),
        (vec![0..48, 48..88], vec![], 88)
    );
    assert_eq!(shape.values_layout(&[3, 5], Direction::Down).bytes, 176);
    assert_eq!(shape.dense_layout().bytes, 4 * (80 + 80 + 5));
    assert_eq!(shape.budget_elements(), 44);
    assert_eq!((shape.sparse_elements(), shape.dense_elements()), (160, 5));
}

#[test]
fn phases_follow_schedule_compressor_and_ownership() {
    let ups = |s: RoundShape| s.phases().iter().map(|p| p.up).collect::<Vec<_>>();
    assert_eq!(ups(shape(1, |_| ())), [FrameKind::Dense]);
    assert_eq!(
        ups(shape(2, |_| ())),
        [FrameKind::Sketch, FrameKind::Values]
    );
    assert_eq!(
        ups(shape(2, |a| a.compressor = Compressor::Randk)),
        [FrameKind::Values]
    );
    assert_eq!(
        ups(shape(2, |a| a.compressor = Compressor::Topk)),
        [FrameKind::Sparse]
    );
    assert_eq!(
        ups(shape(2, |a| a.compressor = Compressor::Dense)),
        [FrameKind::Dense]
    );
    assert_eq!(shape(1, |_| ()).kind, RoundKind::Dense);
    let mut only_dense = shape(2, |_| ());
    only_dense.sparse.clear();
    assert_eq!(ups(only_dense.clone()), [FrameKind::Dense]);
    assert!(only_dense.is_dense());
    only_dense.dense.clear();
    assert_eq!(ups(only_dense), []);
}

#[test]
fn a_tensors_own_density_follows_the_ramp() {
    let mut plan = plan(|a| a.ramp_updates = 1);
    plan.spec.tensors[0].density = Some(0.04);
    plan.tensors[0].spec.density = Some(0.04);
    let keep = |update| RoundShape::new(&plan, BucketId(0), ShardId(0), update).keep();
    assert_eq!(keep(1), [10, 20]);
    assert_eq!(keep(2), [5, 4], "half way, geometrically: 0.5 and 0.2");
    assert_eq!(keep(3), [3, 1]);
}

#[test]
fn selection_bodies_are_checked() {
    let shape = shape(2, |_| ());
    let rows = vec![vec![1, 2, 9], vec![0, 1, 2, 3, 19]];
    let mut body = shape.encode_selections(&rows);
    body.extend([7; 20]);
    let read = shape.decode_selection_body(&body).unwrap();
    assert_eq!(read.rows, rows);
    assert_eq!(
        (read.layout.sparse, read.layout.dense),
        (vec![0..3, 3..7], vec![7..27])
    );
    assert!(body.len() <= shape.body_limit(FrameKind::Selection));
    body.push(0);
    assert_eq!(
        shape.decode_selection_body(&body),
        Err(WireError::BodyLength {
            kind: FrameKind::Selection,
            expected: 27,
            actual: 28
        })
    );
    let mut body = shape.encode_selections(&[vec![1, 2], vec![0, 1, 2, 3, 19]]);
    body.extend([7; 20]);
    assert_eq!(
        shape.decode_selection_body(&body),
        Err(WireError::RowCount {
            segment: 0,
            rows: 2,
            allowed: 3
        })
    );
}

#[test]
fn pooled_selections_are_held_to_their_budget() {
    let shape = shape(2, |a| a.selection = SelectionPolicy::Pooled);
    let read = |rows: [Vec<u32>; 2]| {
        let mut body = shape.encode_selections(&rows);
        body.extend([7; 20]);
        shape.decode_selection_body(&body).map(|r| r.kept())
    };
    assert_eq!(read([(0..5).collect(), vec![7]]), Ok(vec![5, 1]));
    assert_eq!(read([vec![], (0..11).collect()]), Ok(vec![0, 11]));
    assert_eq!(
        read([vec![], (0..12).collect()]),
        Err(WireError::TooLong {
            what: "selected elements",
            value: 48,
            limit: 44
        })
    );
}

#[test]
fn selections_by_energy_may_be_short_but_not_empty() {
    let read = |shape: &RoundShape, rows: [Vec<u32>; 2]| {
        let mut body = shape.encode_selections(&rows);
        body.extend([7; 20]);
        shape.decode_selection_body(&body).map(|r| r.kept())
    };
    let refused = |segment, rows, allowed| {
        Err(WireError::RowCount {
            segment,
            rows,
            allowed,
        })
    };
    let per_tensor = shape(2, |a| a.energy = 0.9);
    assert_eq!(per_tensor.keep(), [3, 5], "the caps");
    assert_eq!(read(&per_tensor, [vec![4], vec![7, 8]]), Ok(vec![1, 2]));
    assert_eq!(
        read(&per_tensor, [vec![0, 1, 9], (0..5).collect()]),
        Ok(vec![3, 5])
    );
    assert_eq!(read(&per_tensor, [vec![], vec![7]]), refused(0, 0, 3));
    assert_eq!(
        read(&per_tensor, [vec![1], (0..6).collect()]),
        refused(1, 6, 5)
    );
    let pooled = shape(2, |a| {
        (a.energy, a.selection) = (0.9, SelectionPolicy::Pooled);
    });
    assert_eq!(read(&pooled, [vec![], vec![3]]), Ok(vec![0, 1]));
    // Bounds of allocation are those of the whole density, and beyond.
    let whole = shape(2, |_| ());
    for kind in [FrameKind::Selection, FrameKind::Values, FrameKind::Mean] {
        assert_eq!(per_tensor.body_limit(kind), whole.body_limit(kind));
    }
}

#[test]
fn sparse_bodies_hold_rows_and_values() {
    let shape = shape(2, |a| a.compressor = Compressor::Topk);
    let mut body = Vec::new();
    append_selection(10, &[0, 4, 9], &mut body);
    body.extend([1; 48]);
    append_selection(20, &[0, 1, 2, 3, 4], &mut body);
    body.extend([2; 40]);
    body.extend([3; 20]);
    let read = shape.decode_sparse_body(&body, Direction::Up).unwrap();
    assert_eq!(read.layout.sparse, [3..51, 55..95]);
    assert_eq!(read.layout.dense, [95..115]);
    assert!(body.len() <= shape.body_limit(FrameKind::Sparse));
    for end in 0..body.len() {
        assert!(
            shape
                .decode_sparse_body(&body[..end], Direction::Up)
                .is_err(),
            "{end}"
        );
    }
    assert!(
        shape.decode_sparse_body(&body, Direction::Down).is_err(),
        "f32 values are longer"
    );
}

#[test]
fn randk_bodies_end_with_the_dense_tensors() {
    let shape = shape(2, |a| a.compressor = Compressor::Randk);
    assert_eq!(
        shape.values_layout(&shape.keep(), Direction::Up).dense,
        [88..108]
    );
}
