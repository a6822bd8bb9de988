//! topk: every worker brings rows of its own; the result is their union, averaged over all workers.

use super::aggregate::scale_by_count;
use super::answer::{dense_pieces, density, encode_pieces, riding_bytes};
use arc_topk_common::wire::{Direction, RoundShape, WireError, append_selection};
use std::collections::BTreeMap;

/// Running sum over a union of rows. Memory: rows that came × width.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Union {
    /// Per sparse segment: row → its sum.
    rows: Vec<BTreeMap<u32, Vec<f32>>>,
    dense: Vec<f32>,
    added: u32,
}

impl Union {
    pub(crate) fn new(shape: &RoundShape) -> Self {
        Self {
            rows: vec![BTreeMap::new(); shape.sparse.len()],
            dense: vec![0.0; shape.dense_elements()],
            added: 0,
        }
    }

    /// Whether a body can be added.
    pub(crate) fn check(shape: &RoundShape, body: &[u8]) -> Result<(), WireError> {
        shape.decode_sparse_body(body, Direction::Up).map(drop)
    }

    /// Adds one worker's body; the caller does so in rank order.
    ///
    /// # Panics
    /// If [`Union::check`] refuses it.
    pub(crate) fn add(&mut self, shape: &RoundShape, body: &[u8]) {
        let selected = shape
            .decode_sparse_body(body, Direction::Up)
            .expect("a Sparse body is checked on arrival");
        let ranges = selected.layout.sparse.iter().zip(&selected.rows);
        for ((segment, sums), (range, rows)) in shape.sparse.iter().zip(&mut self.rows).zip(ranges)
        {
            let mut values = vec![0.0; rows.len() * segment.width];
            shape.codec_up.decode(&body[range.clone()], &mut values);
            for (row, values) in rows.iter().zip(values.chunks_exact(segment.width)) {
                let sum = sums.entry(*row).or_insert_with(|| vec![0.0; segment.width]);
                sum.iter_mut()
                    .zip(values)
                    .for_each(|(sum, value)| *sum += value);
            }
        }
        let mut start = 0;
        for (segment, range) in shape.dense.iter().zip(&selected.layout.dense) {
            let acc = &mut self.dense[start..start + segment.elements()];
            shape.codec_dense.decode_add(&body[range.clone()], acc);
            start += segment.elements();
        }
        self.added += 1;
    }

    /// Body of the answer and the union's density, or `None` if a sum is not finite.
    pub(crate) fn mean_body(mut self, shape: &RoundShape) -> Option<(Vec<u8>, Option<f32>)> {
        let mut body = Vec::with_capacity(riding_bytes(shape));
        let density = density(shape, self.rows.iter().map(BTreeMap::len));
        for (segment, sums) in shape.sparse.iter().zip(self.rows) {
            let rows: Vec<u32> = sums.keys().copied().collect();
            let mut values: Vec<f32> = sums.into_values().flatten().collect();
            if !scale_by_count(&mut values, self.added) {
                return None;
            }
            append_selection(segment.rows, &rows, &mut body);
            shape.codec_down.encode(&values, &mut body);
        }
        if !scale_by_count(&mut self.dense, self.added) {
            return None;
        }
        encode_pieces(&dense_pieces(shape), &self.dense, &mut body);
        Some((body, density))
    }
}
