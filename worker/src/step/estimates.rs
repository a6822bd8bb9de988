//! ef21: H made anew, when a worker whose h is a part of it was not counted.
//!
//! H must be the mean of the h of those who contribute. Adding the mean of what some of them moved breaks that once one of
//! the others is missing, so the shard then answers with Restore instead: nothing of the round is applied to compressible
//! tensors, every worker sends the h that it has, and their mean is the new H. Dense tensors travel along as in a dense
//! round, since under randk and topk their means would have been part of the answer that did not come.

use super::exchange::Exchange;
use super::round::{Round, Traffic};
use super::stats::ByteCounts;
use super::{Outgoing, StepContext};
use crate::backend::{Backend, Piece, PieceValues};
use arc_topk_common::wire::{FrameFlags, FrameKind, RoundShape, WireError};
use bytes::Bytes;

impl Round {
    /// The estimates of all compressible segments, and the dense tensors.
    pub(super) fn send_estimates(
        &mut self,
        backend: &mut dyn Backend,
        ctx: &StepContext<'_>,
        traffic: &mut Traffic,
    ) -> Outgoing {
        let layout = self.shape.dense_layout();
        let piece = |exchange: &Exchange| {
            let values = if exchange.sparse {
                PieceValues::Estimates
            } else {
                PieceValues::All
            };
            exchange.piece(values, self.shape.codec_dense)
        };
        let pieces: Vec<Piece<'_>> = self.exchanges.iter().map(piece).collect();
        let mut body = Vec::with_capacity(layout.bytes);
        backend.encode(&pieces, &mut body);
        let body = Bytes::from(body);
        let ranges = layout.sparse.iter().chain(&layout.dense);
        for (exchange, range) in self.exchanges.iter_mut().zip(ranges) {
            exchange.sent = body.slice(range.clone());
        }
        traffic.sent.dense += body.len() as u64;
        let phase = self.shape.phase_of(FrameKind::Estimates);
        self.outgoing(phase, FrameFlags::default(), body, ctx, traffic)
    }

    /// The mean of the estimates.
    pub(super) fn take_estimates(
        &mut self,
        body: &Bytes,
        counted: bool,
        received: &mut ByteCounts,
    ) -> Result<(), WireError> {
        let layout = self.shape.dense_layout();
        layout.check(FrameKind::EstimatesMean, body.len())?;
        received.dense += body.len() as u64;
        self.assign_all(&layout, body, counted);
        self.restored = true;
        Ok(())
    }
}

impl Exchange {
    /// Puts the new H in place.
    pub(super) fn restore(&self, round: &RoundShape, backend: &mut dyn Backend) {
        backend.restore(
            self.shape.segment,
            round.codec_dense,
            &self.mean,
            self.counted,
        );
    }
}
