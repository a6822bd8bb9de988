//! One segment in a round: what this worker sent of it and what came back.

use super::StepContext;
use super::stats::ByteCounts;
use crate::backend::{Backend, SegmentCommit, SentRows};
use arc_topk_common::compress::{ValueCodec, randk_rows};
use arc_topk_common::wire::{FrameKind, RoundShape, SegmentShape, append_selection};
use bytes::Bytes;
use core::ops::Range;

/// What became of one segment in this round. Bytes are slices of whole frames.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) shape: SegmentShape,
    /// Compressible tensor.
    pub(super) sparse: bool,
    /// Rows that this worker sent (absolute); unused where all rows travel.
    pub(super) own: Vec<u32>,
    /// topk: rows of the mean.
    pub(super) union: Option<Vec<u32>>,
    pub(super) sent: Bytes,
    pub(super) mean: Bytes,
    pub(super) counted: bool,
}

impl Exchange {
    /// Appends this segment's part of the first frame. Returns where the part lies that commit will need.
    pub(super) fn encode_first(
        &mut self,
        kind: FrameKind,
        round: &RoundShape,
        backend: &mut dyn Backend,
        ctx: &StepContext<'_>,
        body: &mut Vec<u8>,
        sent: &mut ByteCounts,
    ) -> Range<usize> {
        let segment = self.shape.segment;
        let mut start = body.len();
        match kind {
            _ if !self.sparse => backend.encode_all(segment, round.codec_dense, body),
            FrameKind::Sketch => {
                backend.encode_sketch(segment, round.codec_sketch, body);
                sent.sketch += (body.len() - start) as u64;
                return 0..0;
            }
            FrameKind::Values => {
                self.own = self.shared_rows(ctx);
                backend.encode_rows(segment, &self.own, round.codec_up, body);
            }
            FrameKind::Sparse => {
                self.own = backend.top_rows(segment, self.shape.keep);
                let relative: Vec<u32> =
                    self.own.iter().map(|row| row - segment.row_start).collect();
                append_selection(self.shape.rows, &relative, body);
                sent.selection += (body.len() - start) as u64;
                start = body.len();
                backend.encode_rows(segment, &self.own, round.codec_up, body);
            }
            _ => backend.encode_all(segment, round.codec_dense, body),
        }
        let bytes = (body.len() - start) as u64;
        if self.sparse && matches!(kind, FrameKind::Values | FrameKind::Sparse) {
            sent.values += bytes;
        } else {
            sent.dense += bytes;
        }
        start..body.len()
    }

    /// Rows that every worker draws alike.
    pub(super) fn shared_rows(&self, ctx: &StepContext<'_>) -> Vec<u32> {
        let segment = self.shape.segment;
        let rows = segment.row_start as usize..segment.row_end as usize;
        randk_rows(ctx.key(segment.tensor), rows, self.shape.keep)
    }

    pub(super) fn end(
        &self,
        all_rows: bool,
        round: &RoundShape,
        measure: bool,
    ) -> SegmentCommit<'_> {
        let codec = |compressed: ValueCodec| {
            if all_rows {
                round.codec_dense
            } else {
                compressed
            }
        };
        SegmentCommit {
            segment: self.shape.segment,
            dense_round: all_rows,
            rows: match &self.union {
                _ if all_rows => SentRows::All,
                Some(union) => SentRows::Union {
                    own: &self.own,
                    all: union,
                },
                None => SentRows::Some(&self.own),
            },
            sent: self.counted.then_some(&self.sent[..]),
            abstained: false,
            codec_up: codec(round.codec_up),
            mean: &self.mean,
            codec_down: codec(round.codec_down),
            measure,
        }
    }
}
