//! Encoding values of segments on a device, as one launch.

use super::driver::Driver;
use super::layout::wire;
use super::{DeviceBackend, block};
use crate::backend::{Piece, PieceValues};
use arc_topk_common::compress::ValueCodec;
use arc_topk_kernels as kernels;
use arc_topk_kernels::{PieceSource, Tile, gather_tiles, names};
use core::ops::Range;

impl<D: Driver> DeviceBackend<D> {
    /// Encodes what the plan says.
    pub(super) fn gather(&mut self, plan: &GatherPlan, base: u64) {
        let arguments = kernels::GatherArgs {
            segments: plan.segments.address(base),
            pieces: plan.pieces.address(base),
            tiles: plan.tiles.address(base),
            not_finite: 0,
            rank: self.layout.rank,
            scale: 1.0 / (self.layout.rank as f32).sqrt(),
            unscale: 1.0,
            reserved: 0,
        };
        // SAFETY: the block holds what the arguments point to, and the outbox has room for all pieces.
        unsafe {
            let device = self.device.get_mut();
            device.launch(names::GATHER, plan.blocks, &arguments);
        }
    }

    /// Puts what a gather needs into the block: descriptors of `parts`, rows, and places for pieces and tiles.
    pub(super) fn plan_gather(
        &mut self,
        bucket: usize,
        parts: &Range<usize>,
        wanted: &[Piece<'_>],
    ) -> GatherPlan {
        let rows = wanted
            .iter()
            .map(|piece| match piece.values {
                PieceValues::Rows(rows) if !rows.is_empty() => Some(self.block.push(rows)),
                _ => None,
            })
            .collect();
        let shapes: Vec<(u32, u32)> = wanted
            .iter()
            .map(|piece| (self.count(piece) as u32, quant_block(piece.codec)))
            .collect();
        let tiles: Vec<Tile> = gather_tiles(&shapes);
        let segments = self.describe(bucket, parts.clone());
        GatherPlan {
            rows,
            blocks: tiles.len(),
            tiles: self.block.push(&tiles),
            segments: self.block.push(&segments),
            pieces: self.block.reserve::<kernels::Piece>(wanted.len()),
        }
    }

    /// Writes the pieces' descriptors, whose bytes go to `out` one after the other.
    pub(super) fn place_pieces(
        &mut self,
        plan: &GatherPlan,
        first_part: usize,
        wanted: &[Piece<'_>],
        base: u64,
        mut out: u64,
    ) {
        let pieces: Vec<kernels::Piece> = wanted
            .iter()
            .zip(&plan.rows)
            .map(|(piece, rows)| {
                let values = self.count(piece);
                let part = self.layout.place(piece.segment).part;
                let described = kernels::Piece {
                    rows: rows.map_or(0, |rows| rows.address(base)),
                    out,
                    values: values as u32,
                    segment: (part - first_part) as u32,
                    source: match piece.values {
                        PieceValues::Sketch => PieceSource::Sketch,
                        PieceValues::Rows(_) | PieceValues::All => PieceSource::Input,
                        PieceValues::Estimates => PieceSource::Estimates,
                    },
                    wire: wire(piece.codec),
                    quant_block: quant_block(piece.codec),
                    dense_round: u32::from(piece.values == PieceValues::All),
                    reserved: [0; 2],
                };
                out += piece.codec.encoded_bytes(values) as u64;
                described
            })
            .collect();
        self.block.write(plan.pieces, &pieces);
    }

    /// Values of a piece.
    fn count(&self, piece: &Piece<'_>) -> usize {
        let place = self.layout.place(piece.segment);
        let part = &self.layout.buckets[place.bucket].parts[place.part];
        let width = self.layout.tensors[piece.segment.tensor.index()].width;
        match piece.values {
            PieceValues::Sketch => piece.segment.rows() * self.layout.rank as usize,
            PieceValues::Rows(rows) => rows.len() * width,
            PieceValues::All | PieceValues::Estimates => part.padded as usize,
        }
    }

    pub(super) fn bytes_of(&self, pieces: &[Piece<'_>]) -> usize {
        let bytes = |piece| self.count(piece);
        pieces
            .iter()
            .map(|piece| piece.codec.encoded_bytes(bytes(piece)))
            .sum()
    }
}

/// Where in the block the arguments of a gather lie.
pub(super) struct GatherPlan {
    rows: Vec<Option<block::At>>,
    tiles: block::At,
    pub(super) segments: block::At,
    pieces: block::At,
    blocks: usize,
}

/// Values that share a scale.
pub(super) fn quant_block(codec: ValueCodec) -> u32 {
    codec.quant_block as u32
}
