//! One segment in a round: what this worker sent of it and what came back.

use super::StepContext;
use super::stats::ByteCounts;
use crate::backend::{Backend, Piece, PieceValues, SegmentCommit, SentRows};
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
    /// This segment's part of the first frame; `None` if it takes another look at A (topk).
    pub(super) fn first_piece(&self, kind: FrameKind, round: &RoundShape) -> Option<Piece<'_>> {
        let (values, codec) = match kind {
            FrameKind::Sparse => return None,
            FrameKind::Sketch if self.sparse => (PieceValues::Sketch, round.codec_sketch),
            FrameKind::Values if self.sparse => (PieceValues::Rows(&self.own), round.codec_up),
            _ => (PieceValues::All, round.codec_dense),
        };
        Some(self.piece(values, codec))
    }

    /// Values of this segment.
    pub(super) fn piece<'a>(&self, values: PieceValues<'a>, codec: ValueCodec) -> Piece<'a> {
        Piece {
            segment: self.shape.segment,
            values,
            codec,
        }
    }

    /// topk: chooses this worker's rows and appends them, with their values. Returns where the values lie.
    pub(super) fn encode_own(
        &mut self,
        round: &RoundShape,
        backend: &mut dyn Backend,
        body: &mut Vec<u8>,
        sent: &mut ByteCounts,
    ) -> Range<usize> {
        let segment = self.shape.segment;
        let mut start = body.len();
        if self.sparse {
            self.own = backend.top_rows(segment, self.shape.keep);
            let relative: Vec<u32> = self.own.iter().map(|row| row - segment.row_start).collect();
            append_selection(self.shape.rows, &relative, body);
            sent.selection += (body.len() - start) as u64;
            start = body.len();
            backend.encode(
                &[self.piece(PieceValues::Rows(&self.own), round.codec_up)],
                body,
            );
            sent.values += (body.len() - start) as u64;
        } else {
            backend.encode(&[self.piece(PieceValues::All, round.codec_dense)], body);
            sent.dense += (body.len() - start) as u64;
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
