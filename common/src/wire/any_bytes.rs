//! What must hold for any bytes whatever: reading them ends in a message or an error, never in a panic, and what is
//! accepted has exactly one encoding. The fuzz targets and `tests/fuzz_corpus.rs` call these functions.

use super::{
    Control, Direction, FrameHeader, FrameKind, HEADER_BYTES, Manifest, PART_HEADER_BYTES,
    PieceMeta, RoundShape, StoreRequest, StoreResponse, decode_roster, decode_selection,
    encode_roster, encode_selection,
};
use crate::config::AlgorithmConfig;
use crate::config::algorithm::{Compressor, SelectionPolicy, ValueType};
use crate::ids::{BucketId, ShardId};
use crate::plan::{DType, Plan, PlanSpec, TensorSpec};

/// A control message; an accepted plan and its rounds are built as a shard would.
///
/// # Panics
/// If an accepted message has another encoding.
pub fn control(bytes: &[u8]) {
    if let Ok(message) = Control::decode(bytes) {
        assert_eq!(
            message.encode(),
            bytes,
            "a control message has one encoding"
        );
        if let Control::Hello(hello) = message {
            // An error is as good as a plan; neither may panic.
            let _ = hello.plan.first_difference(&PlanSpec {
                trainer: String::new(),
                shards: 1,
                ..hello.plan.clone()
            });
            if let Ok(plan) = Plan::build(hello.plan) {
                rounds(&plan);
            }
        }
    }
}

/// Rounds of a plan at both ends of its schedule and on its ramp.
fn rounds(plan: &Plan) {
    let warmup = plan.spec.algorithm.warmup_updates;
    for bucket in plan.buckets.iter().take(16) {
        for shard in (0..plan.spec.shards.min(16)).map(ShardId) {
            for update in [0, warmup, warmup + 1, u64::MAX] {
                let shape = RoundShape::new(plan, bucket.id, shard, update);
                for phase in shape.phases() {
                    // Limits are sums over the plan, which must not overflow either.
                    let _ = (shape.body_limit(phase.up), shape.body_limit(phase.down));
                }
            }
        }
    }
}

/// A message of the snapshot store, and its files.
///
/// # Panics
/// If an accepted message or file has another encoding.
pub fn store(bytes: &[u8]) {
    if let Ok(message) = StoreRequest::decode(bytes) {
        assert_eq!(message.encode(), bytes, "a request has one encoding");
    }
    if let Ok(message) = StoreResponse::decode(bytes) {
        assert_eq!(message.encode(), bytes, "a response has one encoding");
    }
    if let Ok(manifest) = Manifest::from_file_bytes(bytes) {
        assert_eq!(manifest.file_bytes(), bytes, "a manifest has one file");
    }
    if let Some(header) = bytes.first_chunk::<PART_HEADER_BYTES>()
        && let Ok(meta) = PieceMeta::from_file_header(header)
    {
        assert_eq!(&meta.file_header(), header, "a piece has one header");
    }
}

/// A frame header.
///
/// # Panics
/// If an accepted header has another encoding.
pub fn header(bytes: &[u8]) {
    if let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>()
        && let Ok(header) = FrameHeader::decode(bytes)
    {
        assert_eq!(&header.encode(), bytes, "a header has one encoding");
    }
}

/// A selection; the first two bytes are the segment's rows less one.
///
/// # Panics
/// If an accepted selection has another encoding.
pub fn selection(bytes: &[u8]) {
    let Some((rows, bytes)) = bytes.split_first_chunk::<2>() else {
        return;
    };
    let rows = usize::from(u16::from_le_bytes(*rows)) + 1;
    let mut rest = bytes;
    if let Ok(selected) = decode_selection(&mut rest, rows) {
        let used = bytes.len() - rest.len();
        assert_eq!(
            encode_selection(rows, &selected),
            bytes[..used],
            "a selection has one encoding"
        );
    }
}

/// A roster.
///
/// # Panics
/// If an accepted roster has another encoding.
pub fn roster(bytes: &[u8]) {
    if let Ok(ranks) = decode_roster(bytes)
        && !bytes.is_empty()
    {
        assert_eq!(encode_roster(&ranks), bytes, "a roster has one encoding");
    }
}

/// A round body; the first byte chooses compressor, policy, energy and update.
///
/// # Panics
/// If an accepted body's ranges lie outside of it, or it is above its limit.
pub fn body(bytes: &[u8]) {
    let Some((&choice, bytes)) = bytes.split_first() else {
        return;
    };
    let shape = shape(choice);
    let inside = |layout: super::Layout| {
        let ranges = layout.sparse.iter().chain(&layout.dense);
        assert!(
            ranges
                .clone()
                .all(|range| range.start <= range.end && range.end <= bytes.len()),
            "ranges lie in the body"
        );
    };
    if let Ok(read) = shape.decode_selection_body(bytes) {
        assert!(
            bytes.len() <= shape.body_limit(FrameKind::Selection),
            "an accepted body is within its limit"
        );
        inside(read.layout);
    }
    for (direction, kind) in [
        (Direction::Up, FrameKind::Sparse),
        (Direction::Down, FrameKind::SparseMean),
    ] {
        if let Ok(read) = shape.decode_sparse_body(bytes, direction) {
            assert!(
                bytes.len() <= shape.body_limit(kind),
                "an accepted body is within its limit"
            );
            inside(read.layout);
        }
    }
    for (kind, layout) in [
        (FrameKind::Sketch, shape.sketch_layout()),
        (FrameKind::Dense, shape.dense_layout()),
    ] {
        if layout.check(kind, bytes.len()).is_ok() {
            inside(layout);
        }
    }
}

/// The rounds that [`body`] reads: two matrices and a vector.
///
/// # Panics
/// Never: the plan is a constant of this function and valid.
#[must_use]
pub fn shape(choice: u8) -> RoundShape {
    let bit = |at: u8| choice >> at & 1 == 1;
    let compressors = [
        Compressor::Arc,
        Compressor::Topk,
        Compressor::Randk,
        Compressor::Dense,
    ];
    let algorithm = AlgorithmConfig {
        compressor: compressors[usize::from(choice & 3)],
        selection: if bit(2) && choice & 3 != 2 {
            SelectionPolicy::Pooled
        } else {
            SelectionPolicy::PerTensor
        },
        energy: if bit(5) && choice & 3 == 0 { 0.5 } else { 1.0 },
        wire_up: if bit(4) {
            ValueType::Bf16
        } else {
            ValueType::Int4
        },
        density: 0.25,
        warmup_updates: 1,
        dense_below_elements: 1,
        ..AlgorithmConfig::default()
    };
    let tensor = |name: &str, shape: &[u64]| TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    };
    let tensors = vec![
        tensor("a", &[20, 4]),
        tensor("bias", &[5]),
        tensor("b", &[10, 8]),
    ];
    let plan = Plan::build(PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors,
    })
    .expect("the plan is valid");
    RoundShape::new(&plan, BucketId(0), ShardId(0), u64::from(!bit(3)))
}
