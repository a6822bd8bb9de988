//! Chosen rows of a segment: a bitmap or delta-coded rows, whichever is smaller.
//!
//! | form | bytes |
//! |---|---|
//! | bitmap | `00`, then ⌈rows/8⌉ bytes; bit b mod 8 (from the low end) of byte b/8 is row b; spare bits are zero |
//! | deltas | `01`, count, first row, then (row − previous row − 1)…, each LEB128 in its shortest form |
//!
//! The smaller form is used, the bitmap if both are equal. A selection thus has exactly one encoding, and
//! the decoder refuses any other: what a shard sends is comparable byte by byte.

use super::WireError;
use super::codec::{Reader, Writer, leb128_bytes};

const BITMAP: u8 = 0;
const DELTAS: u8 = 1;
const WHAT: &str = "selection";

/// Most bytes that the selection of a segment of `rows` rows takes.
#[must_use]
pub fn selection_limit(rows: usize) -> usize {
    1 + rows.div_ceil(8)
}

/// The selection's bytes. `selected` are row numbers within the segment, ascending, each below `rows`.
///
/// # Panics
/// If a row is out of range or the rows do not ascend.
#[must_use]
pub fn encode_selection(rows: usize, selected: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    append_selection(rows, selected, &mut out);
    out
}

/// [`encode_selection`] at the end of `out`.
///
/// # Panics
/// If a row is out of range or the rows do not ascend.
pub fn append_selection(rows: usize, selected: &[u32], out: &mut Vec<u8>) {
    assert!(selected.is_sorted_by(|a, b| a < b), "selected rows ascend");
    assert!(
        selected.last().is_none_or(|&row| (row as usize) < rows),
        "selected rows are in the segment"
    );
    if rows.div_ceil(8) <= delta_bytes(selected) {
        out.push(BITMAP);
        let start = out.len();
        out.resize(start + rows.div_ceil(8), 0);
        for &row in selected {
            out[start + row as usize / 8] |= 1 << (row % 8);
        }
    } else {
        let mut w = Writer(out);
        w.u8(DELTAS);
        w.leb128(selected.len() as u32);
        gaps(selected).for_each(|gap| w.leb128(gap));
    }
}

/// Takes a selection of a segment of `rows` rows off the front of `bytes`.
///
/// # Errors
/// Anything but the one encoding of ascending rows below `rows`. `bytes` is then left where it was.
pub fn decode_selection(bytes: &mut &[u8], rows: usize) -> Result<Vec<u32>, WireError> {
    let mut r = Reader(bytes);
    let selected = match r.u8(WHAT)? {
        BITMAP => {
            let map = r.take(WHAT, rows.div_ceil(8))?;
            let selected = read_bitmap(map, rows)?;
            if delta_bytes(&selected) < map.len() {
                return Err(WireError::Invalid {
                    what: WHAT,
                    rule: "a bitmap is used only where deltas are not smaller",
                });
            }
            selected
        }
        DELTAS => {
            let selected = read_deltas(&mut r, rows)?;
            if rows.div_ceil(8) <= delta_bytes(&selected) {
                return Err(WireError::Invalid {
                    what: WHAT,
                    rule: "deltas are used only where they are smaller than the bitmap",
                });
            }
            selected
        }
        value => {
            return Err(WireError::Unknown {
                what: "selection form",
                value: u64::from(value),
            });
        }
    };
    *bytes = r.0;
    Ok(selected)
}

/// First row, then the number of rows skipped before each following one.
fn gaps(selected: &[u32]) -> impl Iterator<Item = u32> {
    let mut next = 0;
    selected.iter().map(move |&row| {
        let gap = row - next;
        next = row.saturating_add(1);
        gap
    })
}

fn delta_bytes(selected: &[u32]) -> usize {
    leb128_bytes(selected.len() as u32) + gaps(selected).map(leb128_bytes).sum::<usize>()
}

fn read_bitmap(map: &[u8], rows: usize) -> Result<Vec<u32>, WireError> {
    let spare = map.len() * 8 - rows;
    if map
        .last()
        .is_some_and(|&last| spare > 0 && last >> (8 - spare) != 0)
    {
        return Err(WireError::Invalid {
            what: WHAT,
            rule: "bits past the last row must be zero",
        });
    }
    let count = map.iter().map(|byte| byte.count_ones() as usize).sum();
    let mut selected = Vec::with_capacity(count);
    for (at, &byte) in map.iter().enumerate() {
        let mut bits = byte;
        while bits != 0 {
            selected.push(at as u32 * 8 + bits.trailing_zeros());
            bits &= bits - 1;
        }
    }
    Ok(selected)
}

fn read_deltas(r: &mut Reader<'_>, rows: usize) -> Result<Vec<u32>, WireError> {
    let count = r.leb128(WHAT)? as usize;
    if count > rows {
        return Err(WireError::TooLong {
            what: "selected rows",
            value: count as u64,
            limit: rows as u64,
        });
    }
    if count > r.0.len() {
        return Err(WireError::Truncated {
            what: WHAT,
            needed: count,
            left: r.0.len(),
        });
    }
    let mut selected = Vec::with_capacity(count);
    let mut next = 0u64;
    for _ in 0..count {
        let row = next + u64::from(r.leb128(WHAT)?);
        if row >= rows as u64 {
            return Err(WireError::TooLong {
                what: "selected row",
                value: row,
                limit: rows as u64 - 1,
            });
        }
        selected.push(row as u32);
        next = row + 1;
    }
    Ok(selected)
}
