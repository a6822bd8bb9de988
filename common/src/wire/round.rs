//! Body layouts of a round, for both sides: which phases it has, and where each segment's bytes lie.
//!
//! All bodies list the sparse segments in plan order and then the dense ones; every segment is encoded on its
//! own, so that a slice of the body decodes without its neighbours.
//!
//! | frame | per sparse segment | then per dense segment |
//! |---|---|---|
//! | Sketch | rows·r entries, `wire_sketch` | all elements, `wire_dense` |
//! | Selection | [`append_selection`] | mean, `wire_dense` |
//! | Values, Mean | kept·n values, `wire_up` / `wire_down` | only randk: all elements, `wire_dense` |
//! | Dense, DenseMean | rows·n values, `wire_warmup` or `wire_dense` | all elements, the same type |
//! | Sparse, SparseMean | [`append_selection`], kept·n values, `wire_up` / `wire_down` | all elements, `wire_dense` |
//!
//! Rows in selections are numbered within their segment ([`SegmentShape::absolute`] gives the tensor's).

use super::codec::Reader;
use super::selection::{append_selection, decode_selection, selection_limit};
use super::{FrameKind, WireError};
use crate::compress::ValueCodec;
use crate::compress::select::rows_to_keep;
use crate::config::AlgorithmConfig;
use crate::config::algorithm::{Compressor, RoundKind, SelectionPolicy};
use crate::ids::{BucketId, ShardId};
use crate::plan::{Plan, Segment};
use core::ops::Range;

/// Where values travel to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// Worker → shard.
    Up,
    /// Shard → worker.
    Down,
}

/// One exchange of a round: every worker sends `up`, then the shard answers `down`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Phase {
    /// Kind of the workers' frame.
    pub up: FrameKind,
    /// Kind of the shard's answer.
    pub down: FrameKind,
}

const DENSE: &[Phase] = &[Phase {
    up: FrameKind::Dense,
    down: FrameKind::DenseMean,
}];
const ARC: &[Phase] = &[
    Phase {
        up: FrameKind::Sketch,
        down: FrameKind::Selection,
    },
    Phase {
        up: FrameKind::Values,
        down: FrameKind::Mean,
    },
];
const RANDK: &[Phase] = &[Phase {
    up: FrameKind::Values,
    down: FrameKind::Mean,
}];
const TOPK: &[Phase] = &[Phase {
    up: FrameKind::Sparse,
    down: FrameKind::SparseMean,
}];

/// One segment in a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentShape {
    /// Its tensor and rows.
    pub segment: Segment,
    /// Rows m_s.
    pub rows: usize,
    /// Width n of a row; 1 for dense tensors.
    pub width: usize,
    /// Rows K_s that travel in this round, at most where [`RoundShape::energy`] is below 1: max(1, ⌈μ·m_s⌉), or all rows in a
    /// dense round or of a dense tensor.
    pub keep: usize,
}

impl SegmentShape {
    /// rows·width.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.rows * self.width
    }

    /// Row numbers of the tensor from those of the segment.
    #[must_use]
    pub fn absolute(&self, selected: &[u32]) -> Vec<u32> {
        selected
            .iter()
            .map(|row| row + self.segment.row_start)
            .collect()
    }
}

/// Byte ranges of a body.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// Per sparse segment, its sketch, values or selection.
    pub sparse: Vec<Range<usize>>,
    /// Per dense segment, its elements; empty where the frame carries none.
    pub dense: Vec<Range<usize>>,
    /// Bytes of the whole body.
    pub bytes: usize,
}

impl Layout {
    /// Whether a body of `actual` bytes has this layout.
    ///
    /// # Errors
    /// [`WireError::BodyLength`] if not.
    pub fn check(&self, kind: FrameKind, actual: usize) -> Result<(), WireError> {
        let expected = self.bytes;
        if expected == actual {
            Ok(())
        } else {
            Err(WireError::BodyLength {
                kind,
                expected,
                actual,
            })
        }
    }

    fn push_sparse(&mut self, bytes: usize) {
        self.sparse.push(self.bytes..self.bytes + bytes);
        self.bytes += bytes;
    }

    fn push_dense(&mut self, bytes: usize) {
        self.dense.push(self.bytes..self.bytes + bytes);
        self.bytes += bytes;
    }
}

/// Decoded selections of a body, and where the rest of it lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SelectedRows {
    /// Per sparse segment, its rows (numbered within the segment, ascending).
    pub rows: Vec<Vec<u32>>,
    /// Selection body: ranges of the selections and dense means. Sparse body: ranges of the values and dense tensors.
    pub layout: Layout,
}

impl SelectedRows {
    /// Rows per segment, as [`RoundShape::values_layout`] takes them.
    #[must_use]
    pub fn kept(&self) -> Vec<usize> {
        self.rows.iter().map(Vec::len).collect()
    }
}

/// What the round of a bucket with a shard looks like. Worker and shard build it from the same plan.
#[derive(Clone, PartialEq, Debug)]
pub struct RoundShape {
    /// Bucket.
    pub bucket: BucketId,
    /// Shard.
    pub shard: ShardId,
    /// By the schedule, before looking at what the shard owns; see [`RoundShape::is_dense`].
    pub kind: RoundKind,
    /// Segments of compressible tensors, in plan order.
    pub sparse: Vec<SegmentShape>,
    /// Segments of dense tensors, in plan order.
    pub dense: Vec<SegmentShape>,
    /// How compressed rows travel up.
    pub codec_up: ValueCodec,
    /// How their mean travels down.
    pub codec_down: ValueCodec,
    /// How sketches travel.
    pub codec_sketch: ValueCodec,
    /// How dense tensors travel, or everything in a dense round, both ways.
    pub codec_dense: ValueCodec,
    /// Rank r of sketches.
    pub rank: usize,
    /// Share of the sketch's energy at which the shard chooses no more rows; 1: as many as the density allows.
    pub energy: f32,
    /// Workers keep ef21's estimates, and this round changes them by the rows that travel: see [`FrameKind::Restore`].
    pub changes_estimates: bool,
    compressor: Compressor,
    selection: SelectionPolicy,
}

impl RoundShape {
    /// The shape of update number `update`.
    ///
    /// # Panics
    /// If the plan has no such bucket or shard.
    #[must_use]
    pub fn new(plan: &Plan, bucket: BucketId, shard: ShardId, update: u64) -> Self {
        let algorithm = &plan.spec.algorithm;
        let kind = algorithm.round_kind(update);
        let (mut sparse, mut dense) = (Vec::new(), Vec::new());
        for &segment in plan.segments(bucket, shard) {
            let tensor = &plan.tensors[segment.tensor.index()];
            let rows = segment.rows();
            if tensor.sparse {
                let keep = match kind {
                    RoundKind::Dense => rows,
                    RoundKind::Sparse { .. } => rows_to_keep(
                        algorithm
                            .density_at(update, tensor.spec.density.unwrap_or(algorithm.density)),
                        rows,
                    ),
                };
                sparse.push(SegmentShape {
                    segment,
                    rows,
                    width: tensor.width,
                    keep,
                });
            } else {
                dense.push(SegmentShape {
                    segment,
                    rows,
                    width: tensor.width,
                    keep: rows,
                });
            }
        }
        Self::from_segments(algorithm, bucket, shard, kind, sparse, dense)
    }

    fn from_segments(
        algorithm: &AlgorithmConfig,
        bucket: BucketId,
        shard: ShardId,
        kind: RoundKind,
        sparse: Vec<SegmentShape>,
        dense: Vec<SegmentShape>,
    ) -> Self {
        Self {
            bucket,
            shard,
            kind,
            codec_up: algorithm.codec_up(),
            codec_down: algorithm.codec_down(),
            codec_sketch: algorithm.codec_sketch(),
            codec_dense: match kind {
                RoundKind::Dense => algorithm.codec_dense_round(),
                RoundKind::Sparse { .. } => algorithm.codec_dense(),
            },
            rank: usize::from(algorithm.sketch_rank),
            energy: algorithm.energy,
            changes_estimates: algorithm.keeps_estimates()
                && kind != RoundKind::Dense
                && !sparse.is_empty(),
            sparse,
            dense,
            compressor: algorithm.compressor,
            selection: algorithm.selection,
        }
    }

    /// The phases of the round, in order. None if the shard owns nothing of the bucket: no stream is opened then.
    /// One dense phase if the schedule says so, or if the shard owns only dense tensors of the bucket.
    #[must_use]
    pub fn phases(&self) -> &'static [Phase] {
        if self.sparse.is_empty() && self.dense.is_empty() {
            return &[];
        }
        if self.sparse.is_empty() {
            return DENSE;
        }
        match (self.kind, self.compressor) {
            (RoundKind::Dense, _) | (_, Compressor::Dense) => DENSE,
            (_, Compressor::Arc) => ARC,
            (_, Compressor::Randk) => RANDK,
            (_, Compressor::Topk) => TOPK,
        }
    }

    /// Bytes of the largest body that travels in this direction, without the roster.
    #[must_use]
    pub fn largest_body(&self, direction: Direction) -> usize {
        let bodies = self.phases().iter().map(|phase| match direction {
            Direction::Up => self.body_limit(phase.up),
            Direction::Down => self.body_limit(phase.down),
        });
        let estimates = if self.changes_estimates {
            self.body_limit(FrameKind::Estimates)
        } else {
            0
        };
        bodies.chain([estimates]).max().unwrap_or(0)
    }

    /// Which of the round's answers a frame of this kind is, or asks for. The round ends with the last of [`phases`](Self::phases),
    /// or, where H is restored, with the one after it.
    #[must_use]
    pub fn phase_of(&self, kind: FrameKind) -> usize {
        match kind {
            FrameKind::Sketch | FrameKind::Selection => 0,
            FrameKind::Estimates | FrameKind::EstimatesMean => self.phases().len(),
            _ => self.phases().len().saturating_sub(1),
        }
    }

    /// Whether all segments travel whole.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        self.phases() == DENSE
    }

    /// K_s per sparse segment, as [`RoundShape::values_layout`] takes them. What a Selection or a Sparse body holds may be
    /// less, or other: [`SelectedRows::kept`].
    #[must_use]
    pub fn keep(&self) -> Vec<usize> {
        self.sparse.iter().map(|s| s.keep).collect()
    }

    /// Elements that K_s rows of all sparse segments have together: Σ K_s·n, the budget of pooled selection.
    #[must_use]
    pub fn budget_elements(&self) -> usize {
        self.sparse.iter().map(|s| s.keep * s.width).sum()
    }

    /// Elements of all sparse segments.
    #[must_use]
    pub fn sparse_elements(&self) -> usize {
        self.sparse.iter().map(SegmentShape::elements).sum()
    }

    /// Elements of all dense segments.
    #[must_use]
    pub fn dense_elements(&self) -> usize {
        self.dense.iter().map(SegmentShape::elements).sum()
    }

    /// Layout of a Sketch body.
    #[must_use]
    pub fn sketch_layout(&self) -> Layout {
        let mut layout = Layout::default();
        self.sparse
            .iter()
            .for_each(|s| layout.push_sparse(self.codec_sketch.encoded_bytes(s.rows * self.rank)));
        self.push_dense(&mut layout);
        layout
    }

    /// Layout of a Dense or DenseMean body.
    #[must_use]
    pub fn dense_layout(&self) -> Layout {
        let mut layout = Layout::default();
        self.sparse
            .iter()
            .for_each(|s| layout.push_sparse(self.codec_dense.encoded_bytes(s.elements())));
        self.push_dense(&mut layout);
        layout
    }

    /// Layout of a Values (up) or Mean (down) body; `kept`: rows per sparse segment.
    #[must_use]
    pub fn values_layout(&self, kept: &[usize], direction: Direction) -> Layout {
        let codec = self.codec_values(direction);
        let mut layout = Layout::default();
        self.sparse
            .iter()
            .zip(kept)
            .for_each(|(s, kept)| layout.push_sparse(codec.encoded_bytes(kept * s.width)));
        if self.compressor == Compressor::Randk {
            self.push_dense(&mut layout);
        }
        layout
    }

    /// Codec of compressed rows.
    #[must_use]
    pub fn codec_values(&self, direction: Direction) -> ValueCodec {
        match direction {
            Direction::Up => self.codec_up,
            Direction::Down => self.codec_down,
        }
    }

    /// Largest body of a kind in this round, bytes: what a reader accepts before it looks inside.
    #[must_use]
    pub fn body_limit(&self, kind: FrameKind) -> usize {
        let selections = || {
            self.sparse
                .iter()
                .map(|s| selection_limit(s.rows))
                .sum::<usize>()
        };
        let dense = || {
            self.dense
                .iter()
                .map(|s| self.codec_dense.encoded_bytes(s.elements()))
                .sum::<usize>()
        };
        let rows = || self.sparse.iter().map(|s| s.rows).collect::<Vec<_>>();
        match kind {
            FrameKind::Sketch => self.sketch_layout().bytes,
            FrameKind::Selection => selections() + dense(),
            FrameKind::Values => self.values_layout(&rows(), Direction::Up).bytes,
            FrameKind::Mean => self.values_layout(&rows(), Direction::Down).bytes,
            FrameKind::Dense
            | FrameKind::DenseMean
            | FrameKind::Estimates
            | FrameKind::EstimatesMean => self.dense_layout().bytes,
            FrameKind::Restore => 0,
            FrameKind::Sparse => selections() + dense() + self.values_bytes(&rows(), Direction::Up),
            FrameKind::SparseMean => {
                selections() + dense() + self.values_bytes(&rows(), Direction::Down)
            }
        }
    }

    /// Bytes of the compressed rows alone.
    #[must_use]
    pub fn values_bytes(&self, kept: &[usize], direction: Direction) -> usize {
        let codec = self.codec_values(direction);
        self.sparse
            .iter()
            .zip(kept)
            .map(|(s, kept)| codec.encoded_bytes(kept * s.width))
            .sum()
    }

    /// The selections of a Selection body; the dense means are appended by the caller.
    ///
    /// # Panics
    /// If `selected` does not fit the sparse segments (see [`append_selection`]).
    #[must_use]
    pub fn encode_selections(&self, selected: &[Vec<u32>]) -> Vec<u8> {
        assert_eq!(
            selected.len(),
            self.sparse.len(),
            "one selection per sparse segment"
        );
        let mut out = Vec::new();
        self.sparse
            .iter()
            .zip(selected)
            .for_each(|(s, rows)| append_selection(s.rows, rows, &mut out));
        out
    }

    /// Reads a Selection body.
    ///
    /// # Errors
    /// A selection that is not canonical or holds other than K_s rows (with an energy below 1: none, or more; pooled: rows
    /// beyond the budget), or a body that does not end with the dense means.
    pub fn decode_selection_body(&self, body: &[u8]) -> Result<SelectedRows, WireError> {
        let (mut rest, mut rows, mut layout) = (
            body,
            Vec::with_capacity(self.sparse.len()),
            Layout::default(),
        );
        for segment in &self.sparse {
            let before = rest.len();
            rows.push(decode_selection(&mut rest, segment.rows)?);
            layout.push_sparse(before - rest.len());
        }
        self.push_dense(&mut layout);
        layout.check(FrameKind::Selection, body.len())?;
        self.check_kept(&rows)?;
        Ok(SelectedRows { rows, layout })
    }

    /// Reads a Sparse (up) or SparseMean (down) body of topk.
    ///
    /// # Errors
    /// As [`RoundShape::decode_selection_body`]; a union (down) may hold any number of rows.
    pub fn decode_sparse_body(
        &self,
        body: &[u8],
        direction: Direction,
    ) -> Result<SelectedRows, WireError> {
        let (mut rest, mut rows, mut layout) = (
            body,
            Vec::with_capacity(self.sparse.len()),
            Layout::default(),
        );
        for segment in &self.sparse {
            let before = rest.len();
            let selected = decode_selection(&mut rest, segment.rows)?;
            let bytes = self
                .codec_values(direction)
                .encoded_bytes(selected.len() * segment.width);
            layout.bytes += before - rest.len();
            layout.push_sparse(bytes);
            rows.push(selected);
            let mut reader = Reader(rest);
            reader.take("values of chosen rows", bytes)?;
            rest = reader.0;
        }
        self.push_dense(&mut layout);
        match direction {
            Direction::Up => {
                layout.check(FrameKind::Sparse, body.len())?;
                self.check_kept(&rows)?;
            }
            Direction::Down => layout.check(FrameKind::SparseMean, body.len())?,
        }
        Ok(SelectedRows { rows, layout })
    }

    fn check_kept(&self, rows: &[Vec<u32>]) -> Result<(), WireError> {
        if self.selection == SelectionPolicy::Pooled {
            let elements: usize = self
                .sparse
                .iter()
                .zip(rows)
                .map(|(s, rows)| s.width * rows.len())
                .sum();
            let limit = self.budget_elements();
            if elements > limit {
                return Err(WireError::TooLong {
                    what: "selected elements",
                    value: elements as u64,
                    limit: limit as u64,
                });
            }
            return Ok(());
        }
        for (at, (segment, rows)) in self.sparse.iter().zip(rows).enumerate() {
            let most = segment.keep;
            let fewest = if self.energy < 1.0 { most.min(1) } else { most };
            if !(fewest..=most).contains(&rows.len()) {
                return Err(WireError::RowCount {
                    segment: at,
                    rows: rows.len(),
                    allowed: most,
                });
            }
        }
        Ok(())
    }

    fn push_dense(&self, layout: &mut Layout) {
        self.dense
            .iter()
            .for_each(|s| layout.push_dense(self.codec_dense.encoded_bytes(s.elements())));
    }
}
