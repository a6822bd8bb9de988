//! What an answer must be: the plain way from contributions to bytes, apart from the shard's own code.
//!
//! Bodies are decoded whole, added in the order given, divided, and encoded.

use arc_topk_common::compress::ValueCodec;
use arc_topk_common::compress::select::{PooledSegment, score, select_energy, select_pooled};
use arc_topk_common::config::algorithm::SelectionPolicy;
use arc_topk_common::wire::{Direction, FrameKind, RoundShape, append_selection};
use bytes::Bytes;
use std::collections::BTreeMap;

/// What one worker sent in one phase.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Contribution {
    /// Its gradient was not finite.
    pub non_finite: bool,
    /// The body.
    pub body: Bytes,
}

/// A run of values in a body.
type Piece = (ValueCodec, usize);

fn dense_pieces(shape: &RoundShape) -> impl Iterator<Item = Piece> + '_ {
    shape
        .dense
        .iter()
        .map(|s| (shape.codec_dense, s.elements()))
}

fn value_pieces(shape: &RoundShape, kept: &[usize], codec: ValueCodec) -> Vec<Piece> {
    let each = shape.sparse.iter().zip(kept);
    each.map(|(s, kept)| (codec, kept * s.width)).collect()
}

fn decode(pieces: &[Piece], body: &[u8]) -> Vec<f32> {
    let (mut values, mut at) = (Vec::new(), 0);
    for (codec, count) in pieces {
        let bytes = codec.encoded_bytes(*count);
        let mut piece = vec![0.0; *count];
        codec.decode(&body[at..at + bytes], &mut piece);
        values.extend(piece);
        at += bytes;
    }
    assert_eq!(at, body.len(), "a body ends with its last piece");
    values
}

fn encode(pieces: &[Piece], values: &[f32]) -> Vec<u8> {
    let (mut out, mut at) = (Vec::new(), 0);
    for (codec, count) in pieces {
        codec.encode(&values[at..at + count], &mut out);
        at += count;
    }
    out
}

/// Sum in the order given, times 1/n; `None` if it is not finite.
fn mean(vectors: impl IntoIterator<Item = Vec<f32>>) -> Option<Vec<f32>> {
    let (mut sum, mut count) = (Vec::<f32>::new(), 0u32);
    for vector in vectors {
        sum.resize(vector.len(), 0.0);
        sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += x);
        count += 1;
    }
    let factor = 1.0 / count.max(1) as f32;
    sum.iter_mut().for_each(|x| *x *= factor);
    sum.iter().all(|x| x.is_finite()).then_some(sum)
}

/// The payload of the answer to a phase whose frames are of kind `up`; `None`: all skip. `chosen`: the rows of the
/// Selection in the second phase of arc. Contributions in the order in which they are to be added.
///
/// # Panics
/// If a body does not fit the shape.
#[must_use]
pub fn answer(
    shape: &RoundShape,
    policy: SelectionPolicy,
    up: FrameKind,
    chosen: Option<&[Vec<u32>]>,
    contributions: &[Contribution],
) -> Option<Vec<u8>> {
    if contributions.is_empty() || contributions.iter().any(|c| c.non_finite) {
        return None;
    }
    let bodies = || contributions.iter().map(|c| &c.body[..]);
    let mean_of = |pieces: &[Piece]| mean(bodies().map(|body| decode(pieces, body)));
    match up {
        FrameKind::Sketch => {
            let sketch =
                |s: &arc_topk_common::wire::SegmentShape| (shape.codec_sketch, s.rows * shape.rank);
            let mut pieces: Vec<Piece> = shape.sparse.iter().map(sketch).collect();
            pieces.extend(dense_pieces(shape));
            Some(selection(shape, policy, &mean_of(&pieces)?))
        }
        FrameKind::Values => {
            let keep = shape.keep();
            let kept = chosen.map_or(keep, |rows| rows.iter().map(Vec::len).collect());
            let mut pieces = value_pieces(shape, &kept, shape.codec_up);
            let mut down = value_pieces(shape, &kept, shape.codec_down);
            if chosen.is_none() {
                pieces.extend(dense_pieces(shape));
                down.extend(dense_pieces(shape));
            }
            Some(encode(&down, &mean_of(&pieces)?))
        }
        FrameKind::Sparse => union(shape, contributions),
        _ => {
            let whole = shape
                .sparse
                .iter()
                .map(|s| (shape.codec_dense, s.elements()));
            let mut pieces: Vec<Piece> = whole.collect();
            pieces.extend(dense_pieces(shape));
            Some(encode(&pieces, &mean_of(&pieces)?))
        }
    }
}

fn selection(shape: &RoundShape, policy: SelectionPolicy, mean: &[f32]) -> Vec<u8> {
    let mut at = 0;
    let mut scores = Vec::new();
    for segment in &shape.sparse {
        let entries = segment.rows * shape.rank;
        scores.push(score(&mean[at..at + entries], shape.rank));
        at += entries;
    }
    let each = || shape.sparse.iter().zip(&scores);
    let rows = match policy {
        SelectionPolicy::PerTensor => each()
            .map(|(s, scores)| select_energy(scores, s.keep, shape.energy))
            .collect(),
        SelectionPolicy::Pooled => {
            let segments = each().map(|(s, scores)| PooledSegment {
                scores,
                width: s.width,
            });
            let segments: Vec<_> = segments.collect();
            select_pooled(&segments, shape.budget_elements(), shape.energy)
        }
    };
    let mut body = shape.encode_selections(&rows);
    body.extend(encode(
        &dense_pieces(shape).collect::<Vec<_>>(),
        &mean[at..],
    ));
    body
}

fn union(shape: &RoundShape, contributions: &[Contribution]) -> Option<Vec<u8>> {
    let mut sums = vec![BTreeMap::<u32, Vec<f32>>::new(); shape.sparse.len()];
    let mut dense = Vec::new();
    for contribution in contributions {
        let body = &contribution.body;
        let rows = shape
            .decode_sparse_body(body, Direction::Up)
            .expect("a Sparse body that a worker made can be read");
        for (at, segment) in shape.sparse.iter().enumerate() {
            let values = decode(
                &[(shape.codec_up, rows.rows[at].len() * segment.width)],
                &body[rows.layout.sparse[at].clone()],
            );
            for (row, values) in rows.rows[at].iter().zip(values.chunks_exact(segment.width)) {
                let sum = sums[at]
                    .entry(*row)
                    .or_insert_with(|| vec![0.0; segment.width]);
                sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
            }
        }
        let tail = rows
            .layout
            .dense
            .first()
            .map_or(body.len(), |range| range.start);
        dense.push(decode(
            &dense_pieces(shape).collect::<Vec<_>>(),
            &body[tail..],
        ));
    }
    let factor = 1.0 / contributions.len() as f32;
    let mut body = Vec::new();
    for (segment, sums) in shape.sparse.iter().zip(sums) {
        let rows: Vec<u32> = sums.keys().copied().collect();
        let values: Vec<f32> = sums.into_values().flatten().map(|x| x * factor).collect();
        if values.iter().any(|x| !x.is_finite()) {
            return None;
        }
        append_selection(segment.rows, &rows, &mut body);
        shape.codec_down.encode(&values, &mut body);
    }
    body.extend(encode(
        &dense_pieces(shape).collect::<Vec<_>>(),
        &mean(dense)?,
    ));
    Some(body)
}
