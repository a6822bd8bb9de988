//! How launches are cut into blocks. Pure functions of shapes, so that a plan's tile tables are made once.
//!
//! Rows wider than 8192 columns are cut into parts, whose sums are added when the sketch is encoded: no block waits for another, and
//! the order of the sums is fixed. Every block has [`THREADS`] threads; a power of two of them share a row, so many that each
//! has some four to eight quads of columns, and the rest go to further rows.

use crate::abi::{Segment, Tile};

/// Threads of every block.
pub const THREADS: u32 = 256;
/// Most rows of a tile.
pub const MAX_TILE_ROWS: u32 = 1024;
/// Values of a gather tile, about.
pub const GATHER_VALUES: u32 = 8192;

/// Sign bits of V that a tile may need.
const MAX_SIGN_BITS: u32 = 65_536;
/// Most columns of a part.
const MAX_PART_COLUMNS: u32 = 8192;
/// Elements that a tile has, about.
const TILE_ELEMENTS: u32 = 16_384;
/// Columns of a row that a thread has, about.
const THREAD_COLUMNS: u32 = 32;
/// Rows that a thread works on at a time.
const THREAD_ROWS: u32 = 2;

/// How the kernels see a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentShape {
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub width: u32,
    /// Columns of a part: all, or a multiple of 128.
    pub part_columns: u32,
    /// Parts of a row.
    pub parts: u32,
    /// log₂ of the threads that share a row.
    pub lanes_log2: u32,
}

impl SegmentShape {
    /// Rows of a matrix, sketched with this rank (0: never).
    ///
    /// # Panics
    /// If the width is 0, or the rank is above 64.
    #[must_use]
    pub fn new(rows: u32, width: u32, rank: u32) -> Self {
        assert!(width > 0 && rank <= 64, "width {width}, rank {rank}");
        let most = (MAX_SIGN_BITS / rank.max(1)).min(MAX_PART_COLUMNS) / 128 * 128;
        let parts = width.div_ceil(most);
        // Parts of equal size, so that no block has much less to do.
        let part_columns = if parts == 1 {
            width
        } else {
            width.div_ceil(parts).next_multiple_of(128)
        };
        Self {
            rows,
            width,
            part_columns,
            parts: width.div_ceil(part_columns),
            lanes_log2: lanes_log2(part_columns),
        }
    }

    /// `elements` of which all travel, so that rows are only a way to read them. The last row may be short.
    #[must_use]
    pub fn flat(elements: u32) -> Self {
        let width = elements.clamp(1, 1024);
        Self::new(elements.div_ceil(width), width, 0)
    }

    /// Rows that a block has at a time.
    fn rows_at_once(&self) -> u32 {
        (THREADS >> self.lanes_log2) * THREAD_ROWS
    }

    /// Writes the shape into a descriptor.
    pub fn describe(&self, segment: &mut Segment) {
        segment.rows = self.rows;
        segment.width = self.width;
        segment.part_columns = self.part_columns;
        segment.parts = self.parts;
        segment.lanes_log2 = self.lanes_log2;
    }
}

/// log₂ of the threads that share a row of so many columns.
fn lanes_log2(columns: u32) -> u32 {
    let lanes = columns.div_ceil(THREAD_COLUMNS).next_power_of_two();
    lanes.clamp(4, THREADS).ilog2()
}

/// Tiles of the segments of a launch, in order: sketch, commit and energy.
#[must_use]
pub fn segment_tiles(shapes: &[SegmentShape]) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (segment, shape) in (0..).zip(shapes) {
        let at_once = shape.rows_at_once();
        let times = TILE_ELEMENTS / (at_once * shape.part_columns).max(1);
        let rows = (at_once * times.max(1)).min(MAX_TILE_ROWS);
        push_tiles(&mut tiles, segment, shape.rows, rows, shape.parts);
    }
    tiles
}

/// Tiles of tensors given as (rows, width), and log₂ of the threads that share a row of each. Rows are never cut: each has a
/// counter.
#[must_use]
pub fn adam_tiles(tensors: &[(u32, u32)]) -> (Vec<Tile>, Vec<u32>) {
    let mut tiles = Vec::new();
    let mut lanes = Vec::with_capacity(tensors.len());
    for (tensor, (rows, width)) in (0..).zip(tensors) {
        let shared = lanes_log2(*width);
        let at_once = THREADS >> shared;
        let times = TILE_ELEMENTS / at_once.saturating_mul(*width).max(1);
        let of_tile = (at_once * times.max(1)).min(MAX_TILE_ROWS);
        push_tiles(&mut tiles, tensor, *rows, of_tile, 1);
        lanes.push(shared);
    }
    (tiles, lanes)
}

/// Tiles of pieces given as (values, values that share a scale).
#[must_use]
pub fn gather_tiles(pieces: &[(u32, u32)]) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (piece, (values, quant_block)) in (0..).zip(pieces) {
        let block = (*quant_block).max(1);
        push_tiles(
            &mut tiles,
            piece,
            *values,
            GATHER_VALUES.div_ceil(block) * block,
            1,
        );
    }
    tiles
}

/// Tiles of projections given by their entries.
#[must_use]
pub fn gaussian_tiles(entries: &[u32]) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (projection, entries) in (0..).zip(entries) {
        push_tiles(&mut tiles, projection, *entries, THREADS * 4, 1);
    }
    tiles
}

fn push_tiles(tiles: &mut Vec<Tile>, segment: u32, all: u32, each: u32, parts: u32) {
    let mut row = 0;
    while row < all {
        let rows = each.min(all - row);
        let tile = |part| Tile {
            segment,
            row,
            rows,
            part,
        };
        tiles.extend((0..parts).map(tile));
        row += rows;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_and_column_once() {
        for (rows, width, rank) in [
            (1, 1, 1),
            (512, 1376, 4),
            (2048, 5461, 4),
            (64, 27, 4),
            (300, 30_000, 4),
            (7, 70_001, 64),
            (100_000, 9, 8),
            (3, 8192, 8),
            (3, 8193, 8),
        ] {
            let shape = SegmentShape::new(rows, width, rank);
            assert!(shape.part_columns * rank <= MAX_SIGN_BITS, "{shape:?}");
            assert!(shape.parts == 1 || shape.part_columns.is_multiple_of(128));
            assert!((shape.parts - 1) * shape.part_columns < width);
            assert!(shape.parts * shape.part_columns >= width);
            let mut seen = vec![0u32; (rows * shape.parts) as usize];
            for tile in segment_tiles(&[shape]) {
                assert!(tile.rows <= MAX_TILE_ROWS && tile.rows > 0);
                for row in tile.row..tile.row + tile.rows {
                    seen[(tile.part * rows + row) as usize] += 1;
                }
            }
            assert!(seen.iter().all(|n| *n == 1), "{shape:?}");
        }
    }

    #[test]
    fn a_bucket_of_25_mib_makes_work_for_every_multiprocessor() {
        for width in [27, 512, 576, 1376, 2048, 5461, 8192, 30_000] {
            let rows = (25 << 18) / width;
            let tiles = segment_tiles(&[SegmentShape::new(rows, width, 4)]).len();
            assert!((264..4000).contains(&tiles), "width {width}: {tiles} tiles");
        }
    }

    #[test]
    fn gather_tiles_begin_with_a_block() {
        let tiles = gather_tiles(&[(100_001, 4096), (50, 64), (0, 64), (20_000, 7)]);
        assert_eq!(tiles.iter().map(|t| t.rows).sum::<u32>(), 120_051);
        let block = [4096, 64, 64, 7];
        assert!(
            tiles
                .iter()
                .all(|t| t.row.is_multiple_of(block[t.segment as usize]))
        );
    }

    #[test]
    fn adam_never_cuts_a_row() {
        let (tiles, lanes) = adam_tiles(&[(10, 50_000), (5000, 3), (4096, 512)]);
        assert!(tiles.iter().all(|t| t.part == 0 && t.rows <= MAX_TILE_ROWS));
        let rows = tiles.iter().filter(|t| t.segment == 1).map(|t| t.rows);
        assert_eq!(rows.sum::<u32>(), 5000);
        assert_eq!(lanes, [8, 2, 4]);
    }
}
