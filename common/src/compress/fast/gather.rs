//! Encodes chosen rows.
//!
//! Rows go from the tensor straight into the encoder where a row is a whole number of the codec's blocks;
//! otherwise, or where h must be subtracted, through a small staging array. Consecutive rows count as one run, so
//! that tensors of width 1 and dense rounds are as fast as wide rows.

use super::PARALLEL_FROM;
use crate::compress::ValueCodec;
use crate::compress::simd::prefetch;
use crate::config::algorithm::ValueType;
use rayon::prelude::*;

/// Values staged at a time, at least.
const STAGED: usize = 2048;

/// Values of the next run that are asked for while one is encoded; the CPU goes on from there.
const PREFETCHED: usize = 1024;

/// Where values come from, A = values − estimate, and how they are encoded.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) values: &'a [f32],
    pub(super) estimate: Option<&'a [f32]>,
    pub(super) width: usize,
    pub(super) codec: ValueCodec,
}

/// Appends the encoding of the rows `selected`.
pub(super) fn gather(source: Source<'_>, selected: &[u32], out: &mut Vec<u8>) {
    let (width, codec) = (source.width, source.codec);
    let start = out.len();
    out.resize(start + codec.encoded_bytes(selected.len() * width), 0);
    let out = &mut out[start..];
    if selected.len() * width < PARALLEL_FROM {
        return source.encode(selected, out);
    }
    // Pieces end at block boundaries of the codec, so that their encodings concatenate.
    let granule = block(codec);
    let rows = (PARALLEL_FROM / 4 / width / granule).max(1) * granule;
    let bytes = codec.encoded_bytes(rows * width);
    let pieces = selected.par_chunks(rows).zip(out.par_chunks_mut(bytes));
    pieces.for_each(|(selected, out)| source.encode(selected, out));
}

/// Values that are encoded together.
pub(super) fn block(codec: ValueCodec) -> usize {
    match codec.value_type {
        ValueType::F32 | ValueType::Bf16 | ValueType::F16 => 1,
        ValueType::Int8 | ValueType::Int4 => codec.quant_block,
    }
}

impl Source<'_> {
    fn encode(&self, selected: &[u32], out: &mut [u8]) {
        if self.estimate.is_none() && self.width.is_multiple_of(block(self.codec)) {
            self.encode_runs(selected, out);
        } else {
            self.encode_staged(selected, out);
        }
    }

    fn encode_runs(&self, selected: &[u32], mut out: &mut [u8]) {
        let mut coming = runs(selected).skip(1);
        for run in runs(selected) {
            let values = &self.values[run.start * self.width..run.end * self.width];
            if let Some(next) = coming.next() {
                let start = next.start * self.width;
                prefetch(&self.values[start..start + (next.len() * self.width).min(PREFETCHED)]);
            }
            let (head, rest) = out.split_at_mut(self.codec.encoded_bytes(values.len()));
            self.codec.encode_into(values, head);
            out = rest;
        }
    }

    fn encode_staged(&self, selected: &[u32], mut out: &mut [u8]) {
        let granule = block(self.codec);
        let capacity = STAGED.div_ceil(granule) * granule;
        let mut staged = Vec::with_capacity(capacity);
        for run in runs(selected) {
            let mut at = run.start * self.width;
            let end = run.end * self.width;
            while at < end {
                let to = end.min(at + capacity - staged.len());
                self.stage(at..to, &mut staged);
                at = to;
                if staged.len() == capacity {
                    out = self.flush(&mut staged, out);
                }
            }
        }
        self.flush(&mut staged, out);
    }

    fn stage(&self, elements: core::ops::Range<usize>, staged: &mut Vec<f32>) {
        match self.estimate {
            None => staged.extend_from_slice(&self.values[elements]),
            Some(h) => {
                let pairs = self.values[elements.clone()].iter().zip(&h[elements]);
                staged.extend(pairs.map(|(u, h)| u - h));
            }
        }
    }

    fn flush<'a>(&self, staged: &mut Vec<f32>, out: &'a mut [u8]) -> &'a mut [u8] {
        let (head, rest) = out.split_at_mut(self.codec.encoded_bytes(staged.len()));
        self.codec.encode_into(staged, head);
        staged.clear();
        rest
    }
}

/// Maximal runs of consecutive rows.
fn runs(selected: &[u32]) -> impl Iterator<Item = core::ops::Range<usize>> + '_ {
    selected
        .chunk_by(|a, b| a + 1 == *b)
        .map(|run| run[0] as usize..run[0] as usize + run.len())
}
