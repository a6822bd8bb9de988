//! The end of a round: rows that were sent leave the feedback state, and the result takes the buffer's place.

use super::{PARALLEL_FROM, STREAM_FROM, gather, rows_per_chunk};
use crate::compress::simd::Stream;
use crate::compress::{TensorState, ValueCodec};
use crate::config::algorithm::Feedback;
use core::ops::Range;
use rayon::prelude::*;

/// Values of some rows of a tensor: ascending absolute row numbers, and `width` values each.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) numbers: &'a [u32],
    pub(super) values: &'a [f32],
    pub(super) width: usize,
}

impl<'a> Rows<'a> {
    fn check(&self, rows: &Range<usize>) {
        assert_eq!(
            self.values.len(),
            self.numbers.len() * self.width,
            "values of the rows"
        );
        check_numbers(self.numbers, rows);
    }

    /// Those that lie in `rows`, as (elements relative to the first of `rows`, values).
    fn within(self, rows: Range<usize>) -> impl Iterator<Item = (Range<usize>, &'a [f32])> {
        let from = self.numbers.partition_point(|r| (*r as usize) < rows.start);
        let to = self.numbers.partition_point(|r| (*r as usize) < rows.end);
        let values = self.values[from * self.width..to * self.width].chunks_exact(self.width);
        self.numbers[from..to]
            .iter()
            .zip(values)
            .map(move |(row, values)| {
                let start = (*row as usize - rows.start) * self.width;
                (start..start + self.width, values)
            })
    }
}

fn check_numbers(numbers: &[u32], rows: &Range<usize>) {
    assert!(numbers.is_sorted_by(|a, b| a < b), "rows ascend");
    let inside = numbers.first().is_none_or(|r| *r as usize >= rows.start)
        && numbers.last().is_none_or(|r| (*r as usize) < rows.end);
    assert!(inside, "rows lie in the segment");
}

/// Values that are decoded together, and used while they are in the first-level cache: 16 KiB.
const DECODED: usize = 1 << 12;

/// What this worker sent, as it travelled: `values` of them, one array.
#[derive(Clone, Copy)]
pub(super) struct Sent<'a> {
    bytes: &'a [u8],
    codec: ValueCodec,
    values: usize,
}

impl<'a> Sent<'a> {
    /// # Panics
    /// If the bytes are not of so many values.
    pub(super) fn new(bytes: &'a [u8], codec: ValueCodec, values: usize) -> Self {
        assert_eq!(
            bytes.len(),
            codec.encoded_bytes(values),
            "bytes of the values"
        );
        Self {
            bytes,
            codec,
            values,
        }
    }

    /// Decodes some of them, from the block in which the first lies to that of the last.
    fn decode<'s>(&self, wanted: Range<usize>, scratch: &'s mut Vec<f32>) -> &'s [f32] {
        let block = gather::block(self.codec);
        let from = wanted.start / block * block;
        let to = wanted.end.next_multiple_of(block).min(self.values);
        scratch.resize(to - from, 0.0);
        let bytes = self.codec.encoded_bytes(from)..self.codec.encoded_bytes(to);
        self.codec.decode(&self.bytes[bytes], scratch);
        &scratch[wanted.start - from..wanted.end - from]
    }

    /// Calls `f` with what was sent of the rows in `rows`, a few at a time, as (elements relative to the first of `rows`,
    /// values). `numbers` are those of all rows that were sent.
    fn within(
        &self,
        numbers: &[u32],
        width: usize,
        rows: Range<usize>,
        mut f: impl FnMut(Range<usize>, &[f32]),
    ) {
        let from = numbers.partition_point(|r| (*r as usize) < rows.start);
        let to = numbers.partition_point(|r| (*r as usize) < rows.end);
        let at_once = (DECODED / width).max(1);
        let mut scratch = Vec::new();
        for start in (from..to).step_by(at_once) {
            let end = (start + at_once).min(to);
            let values = self.decode(start * width..end * width, &mut scratch);
            for (row, values) in numbers[start..end].iter().zip(values.chunks_exact(width)) {
                let at = (*row as usize - rows.start) * width;
                f(at..at + width, values);
            }
        }
    }
}

/// A sparse round's end for the rows `rows`. `sent` is `None` if this worker did not count (or there is no feedback).
pub(super) fn sparse(
    state: &mut TensorState,
    buffer: &mut [f32],
    rows: Range<usize>,
    sent: Option<(&[u32], Sent<'_>)>,
    mean: Rows<'_>,
) {
    mean.check(&rows);
    if let Some((numbers, _)) = sent {
        check_numbers(numbers, &rows);
    }
    let width = state.width;
    let elements = rows.start * width..rows.end * width;
    let buffer = &mut buffer[elements.clone()];
    let streams = buffer.len() >= STREAM_FROM;
    match state.feedback {
        Feedback::None => in_chunks(width, &rows, [buffer], |rows, [buffer]| {
            replace(buffer, rows, mean, streams)
        }),
        Feedback::Ef14 => in_chunks(
            width,
            &rows,
            [buffer, &mut state.residual[elements]],
            |rows, [buffer, e]| {
                if let Some((numbers, sent)) = sent {
                    sent.within(numbers, width, rows.clone(), |at, values| {
                        each(&mut e[at], values, |e, sent| *e -= sent);
                    });
                }
                replace(buffer, rows, mean, streams);
            },
        ),
        // v is U already.
        Feedback::Ef21 | Feedback::Ef21m => {
            let arrays = [
                buffer,
                &mut state.local[elements.clone()],
                &mut state.global[elements],
            ];
            in_chunks(width, &rows, arrays, |rows, [buffer, h, global]| {
                advance(h, global, rows, sent, mean);
                assign(buffer, global, streams);
            });
        }
    }
}

/// Narrower rows are scattered over zeros: their ends cost more than a line that is read for nothing.
const STREAMED_WIDTH: usize = 16;

/// The result of none and ef14: the mean where there is one, else zero.
fn replace(buffer: &mut [f32], rows: Range<usize>, mean: Rows<'_>, streams: bool) {
    if !streams || mean.width < STREAMED_WIDTH {
        buffer.fill(0.0);
        for (at, values) in mean.within(rows) {
            buffer[at].copy_from_slice(values);
        }
        return;
    }
    let (mut done, end) = (0, buffer.len());
    let mut result = Stream::new(buffer);
    for (at, values) in mean.within(rows) {
        result.zeros(at.start - done);
        result.copy(values);
        done = at.end;
    }
    result.zeros(end - done);
}

fn assign(to: &mut [f32], from: &[f32], streams: bool) {
    if streams {
        Stream::new(to).copy(from);
    } else {
        to.copy_from_slice(from);
    }
}

/// H += mean, h += sent (h = H if it did not count).
fn advance(
    h: &mut [f32],
    global: &mut [f32],
    rows: Range<usize>,
    sent: Option<(&[u32], Sent<'_>)>,
    mean: Rows<'_>,
) {
    for (at, values) in mean.within(rows.clone()) {
        each(&mut global[at], values, |h, x| *h += x);
    }
    match sent {
        Some((numbers, sent)) => sent.within(numbers, mean.width, rows, |at, values| {
            each(&mut h[at], values, |h, x| *h += x);
        }),
        None => h.copy_from_slice(global),
    }
}

fn each(slots: &mut [f32], values: &[f32], f: impl Fn(&mut f32, f32)) {
    for (slot, x) in slots.iter_mut().zip(values) {
        f(slot, *x);
    }
}

/// A dense round's end for the rows `rows`.
pub(super) fn dense(
    state: &mut TensorState,
    buffer: &mut [f32],
    rows: Range<usize>,
    sent: Option<Sent<'_>>,
    mean: &[f32],
) {
    let elements = rows.start * state.width..rows.end * state.width;
    assert_eq!(mean.len(), elements.len(), "mean of all rows");
    let buffer = &mut buffer[elements.clone()];
    match state.feedback {
        Feedback::None => {}
        Feedback::Ef14 => {
            let mut scratch = Vec::new();
            let pieces = state.residual[elements].chunks_mut(DECODED);
            for (start, e) in (0..).step_by(DECODED).zip(pieces) {
                if let Some(sent) = &sent {
                    let values = sent.decode(start..start + e.len(), &mut scratch);
                    each(e, values, |e, sent| *e -= sent);
                }
            }
        }
        Feedback::Ef21 | Feedback::Ef21m => {
            let h = &mut state.local[elements.clone()];
            match sent {
                Some(sent) => sent.codec.decode(sent.bytes, h),
                None => h.copy_from_slice(mean),
            }
            state.global[elements].copy_from_slice(mean);
        }
    }
    let streams = buffer.len() >= STREAM_FROM;
    assign(buffer, mean, streams);
}

/// Cuts `arrays` (the same rows of each) into pieces of whole rows and runs `f` on each, on all threads if it is
/// worth it. `f` gets the absolute rows of its piece.
fn in_chunks<const N: usize>(
    width: usize,
    rows: &Range<usize>,
    arrays: [&mut [f32]; N],
    f: impl Fn(Range<usize>, [&mut [f32]; N]) + Sync,
) {
    let per_chunk = rows_per_chunk(width);
    let large = rows.len() * width >= PARALLEL_FROM;
    let mut rest = arrays;
    let mut pieces = Vec::with_capacity(rows.len().div_ceil(per_chunk));
    for start in rows.clone().step_by(per_chunk) {
        let chunk = start..(start + per_chunk).min(rows.end);
        let mut piece = [const { None }; N];
        rest = std::array::from_fn(|i| {
            let (head, tail) = std::mem::take(&mut rest[i]).split_at_mut(chunk.len() * width);
            piece[i] = Some(head);
            tail
        });
        pieces.push((chunk, piece.map(|p| p.expect("filled above"))));
    }
    if large {
        pieces
            .into_par_iter()
            .for_each(|(rows, piece)| f(rows, piece));
    } else {
        pieces.into_iter().for_each(|(rows, piece)| f(rows, piece));
    }
}
