//! A shard made by hand: answers of the right form, with what the test wants in them.

use arc_topk_common::ids::Rank;
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{
    Direction, FrameFlags, FrameHeader, FrameKind, RoundShape, append_selection, encode_roster,
};
use arc_topk_worker::step::Outgoing;
use bytes::Bytes;

/// The answer to a frame: the first rows are chosen, every mean is `mean`, and these ranks were counted. Exact wires only.
pub fn answer(plan: &Plan, frame: &Outgoing, counted: &[u16], mean: f32) -> (FrameHeader, Bytes) {
    let FrameHeader {
        bucket,
        update,
        kind,
        ..
    } = frame.header;
    let shape = RoundShape::new(plan, bucket, frame.shard, update);
    let mut body = Vec::new();
    let rows = |keep: usize| (0..keep as u32).collect::<Vec<_>>();
    let fill = |body: &mut Vec<u8>, bytes: usize| {
        (0..bytes / 4).for_each(|_| body.extend_from_slice(&mean.to_le_bytes()));
    };
    let kind = match kind {
        FrameKind::Sketch => {
            for segment in &shape.sparse {
                append_selection(segment.rows, &rows(segment.keep), &mut body);
            }
            fill(&mut body, 4 * shape.dense_elements());
            FrameKind::Selection
        }
        FrameKind::Values => {
            fill(
                &mut body,
                shape.values_layout(&shape.keep(), Direction::Down).bytes,
            );
            FrameKind::Mean
        }
        FrameKind::Sparse => {
            for segment in &shape.sparse {
                append_selection(segment.rows, &rows(segment.keep), &mut body);
                fill(&mut body, 4 * segment.keep * segment.width);
            }
            fill(&mut body, 4 * shape.dense_elements());
            FrameKind::SparseMean
        }
        _ => {
            fill(&mut body, shape.dense_layout().bytes);
            FrameKind::DenseMean
        }
    };
    let roster = encode_roster(&counted.iter().copied().map(Rank).collect());
    body.extend_from_slice(&roster);
    let header = FrameHeader {
        kind,
        flags: FrameFlags::default(),
        body_bytes: body.len() as u32,
        roster_bytes: roster.len() as u16,
        ..frame.header
    };
    (header, body.into())
}

/// The answer that lets all skip the update.
pub fn non_finite(plan: &Plan, frame: &Outgoing) -> (FrameHeader, Bytes) {
    let (header, _) = answer(plan, frame, &[], 0.0);
    let flags = FrameFlags {
        non_finite: true,
        ..FrameFlags::default()
    };
    let header = FrameHeader {
        flags,
        body_bytes: 0,
        roster_bytes: 0,
        ..header
    };
    (header, Bytes::new())
}
