//! What a shard computes from the mean of a phase: scores, selection, bodies of answers.

use super::aggregate::{Piece, body_bytes};
use arc_topk_common::compress::ValueCodec;
use arc_topk_common::compress::select::{PooledSegment, score, select_energy, select_pooled};
use arc_topk_common::config::algorithm::SelectionPolicy;
use arc_topk_common::wire::{RoundShape, SegmentShape, append_selection};

/// Rows that a selection chose.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Picked {
    /// Per sparse segment, ascending, numbered within the segment.
    pub rows: Vec<Vec<u32>>,
    /// Share of the sketch's energy in them; `None` of a sketch that is zero everywhere.
    pub captured_energy: Option<f32>,
}

/// Pieces of a Sketch body.
pub(crate) fn sketch_pieces(shape: &RoundShape) -> Vec<Piece> {
    let sketch = |s: &SegmentShape| Piece {
        codec: shape.codec_sketch,
        values: s.rows * shape.rank,
    };
    shape
        .sparse
        .iter()
        .map(sketch)
        .chain(dense_pieces(shape))
        .collect()
}

/// Pieces of a Dense body.
pub(crate) fn whole_pieces(shape: &RoundShape) -> Vec<Piece> {
    let whole = |s: &SegmentShape| Piece {
        codec: shape.codec_dense,
        values: s.elements(),
    };
    shape
        .sparse
        .iter()
        .map(whole)
        .chain(dense_pieces(shape))
        .collect()
}

/// Pieces of the values of `kept` rows per sparse segment.
pub(crate) fn values_pieces(shape: &RoundShape, kept: &[usize], codec: ValueCodec) -> Vec<Piece> {
    let values = |(s, kept): (&SegmentShape, &usize)| Piece {
        codec,
        values: kept * s.width,
    };
    shape.sparse.iter().zip(kept).map(values).collect()
}

/// Pieces of the dense segments that ride along.
pub(crate) fn dense_pieces(shape: &RoundShape) -> Vec<Piece> {
    let dense = shape.dense.iter();
    dense
        .map(|s| Piece {
            codec: shape.codec_dense,
            values: s.elements(),
        })
        .collect()
}

/// Encoded bytes of the dense segments that ride along.
pub(crate) fn riding_bytes(shape: &RoundShape) -> usize {
    body_bytes(&dense_pieces(shape))
}

/// Appends `values`, every piece encoded on its own.
///
/// # Panics
/// If `values` is shorter than the pieces say.
pub(crate) fn encode_pieces(pieces: &[Piece], values: &[f32], out: &mut Vec<u8>) {
    out.reserve_exact(body_bytes(pieces));
    let mut rest = values;
    for piece in pieces {
        let (own, after) = rest.split_at(piece.values);
        piece.codec.encode(own, out);
        rest = after;
    }
}

/// Appends the selections of all sparse segments.
pub(crate) fn encode_selections(shape: &RoundShape, rows: &[Vec<u32>], out: &mut Vec<u8>) {
    for (segment, rows) in shape.sparse.iter().zip(rows) {
        append_selection(segment.rows, rows, out);
    }
}

/// Chooses rows by the averaged sketch (all sparse segments, one after the other): as many as the density allows, or as
/// hold the energy that is asked for.
pub(crate) fn select(shape: &RoundShape, policy: SelectionPolicy, sketch: &[f32]) -> Picked {
    let mut rest = sketch;
    let mut scores = Vec::with_capacity(shape.sparse.len());
    for segment in &shape.sparse {
        let (own, after) = rest.split_at(segment.rows * shape.rank);
        scores.push(score(own, shape.rank));
        rest = after;
    }
    let rows = match policy {
        SelectionPolicy::PerTensor => {
            let each = shape.sparse.iter().zip(&scores);
            each.map(|(segment, scores)| select_energy(scores, segment.keep, shape.energy))
                .collect()
        }
        SelectionPolicy::Pooled => {
            let each = shape.sparse.iter().zip(&scores);
            let segments: Vec<_> = each
                .map(|(s, scores)| PooledSegment {
                    scores,
                    width: s.width,
                })
                .collect();
            select_pooled(&segments, shape.budget_elements(), shape.energy)
        }
    };
    let captured_energy = captured_energy(&scores, &rows);
    Picked {
        rows,
        captured_energy,
    }
}

fn captured_energy(scores: &[Vec<f64>], rows: &[Vec<u32>]) -> Option<f32> {
    let total: f64 = scores.iter().flatten().sum();
    let chosen: f64 = scores
        .iter()
        .zip(rows)
        .flat_map(|(s, rows)| rows.iter().map(|row| s[*row as usize]))
        .sum();
    (total > 0.0).then(|| ((chosen / total) as f32).clamp(0.0, 1.0))
}

/// Share of the compressible elements that `kept` rows per segment hold; `None` if there are no such elements.
pub(crate) fn density(shape: &RoundShape, kept: impl IntoIterator<Item = usize>) -> Option<f32> {
    let chosen: usize = shape
        .sparse
        .iter()
        .zip(kept)
        .map(|(s, kept)| kept * s.width)
        .sum();
    let all = shape.sparse_elements();
    (all > 0).then(|| (chosen as f64 / all as f64) as f32)
}
