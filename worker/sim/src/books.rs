//! The books of ef14 after a step.

use crate::case::Case;
use crate::check::FrameKey;
use crate::trainer::Books;
use crate::world::OpenStep;
use arc_topk_common::compress::{ProjectionKey, ValueCodec, randk_rows};
use arc_topk_common::ids::{Rank, ShardId, Step, TensorId};
use arc_topk_common::plan::Segment;
use arc_topk_common::wire::{Direction, FrameKind, Layout, Phase, RoundShape, SegmentShape};
use arc_topk_worker::step::WorkerState;
use bytes::Bytes;

impl Books {
    /// Enters what a step gave, and what of it the answers' rosters count.
    pub(crate) fn settle(
        &mut self,
        case: &Case,
        rank: Rank,
        step: Step,
        update: u64,
        open: &OpenStep,
        abstained: bool,
    ) {
        if abstained {
            return;
        }
        for (tensor, gradient) in &open.gradients {
            let given = &mut self.given[tensor.index()];
            let rows = finite_rows(case, *tensor, open);
            let width = case.plan.tensors[tensor.index()].width;
            for (at, (sum, x)) in given.iter_mut().zip(gradient).enumerate() {
                // A gradient that is not finite gives nothing, and with it all that its round has of the others.
                *sum += if rows(at / width) { f64::from(*x) } else { 0.0 };
            }
        }
        for bucket in &case.plan.buckets {
            for shard in (0..case.shards).map(ShardId) {
                let shape = RoundShape::new(&case.plan, bucket.id, shard, update);
                for phase in shape.phases() {
                    self.settle_phase(case, rank, step, &shape, *phase, open);
                }
            }
        }
    }

    fn settle_phase(
        &mut self,
        case: &Case,
        rank: Rank,
        step: Step,
        shape: &RoundShape,
        phase: Phase,
        open: &OpenStep,
    ) {
        let key = |kind: FrameKind| (shape.bucket, shape.shard, FrameKey::from(kind));
        let Some((_, answer)) = open.answers.get(&key(phase.down)) else {
            return;
        };
        let counted = answer.roster().is_ok_and(|roster| roster.contains(&rank));
        let Some(body) = open.sent.get(&key(phase.up)).filter(|_| counted) else {
            return;
        };
        match phase.up {
            FrameKind::Sketch => self.enter_dense(shape, &shape.sketch_layout(), body),
            FrameKind::Dense => {
                let layout = shape.dense_layout();
                for (segment, range) in shape.sparse.iter().zip(&layout.sparse) {
                    let rows: Vec<u32> =
                        (segment.segment.row_start..segment.segment.row_end).collect();
                    self.enter(segment, &rows, shape.codec_dense, &body[range.clone()]);
                }
                self.enter_dense(shape, &layout, body);
            }
            FrameKind::Values => {
                let rows = rows_sent(case, step, shape, open);
                let kept: Vec<usize> = rows.iter().map(Vec::len).collect();
                let layout = shape.values_layout(&kept, Direction::Up);
                for ((segment, rows), range) in shape.sparse.iter().zip(&rows).zip(&layout.sparse) {
                    self.enter(segment, rows, shape.codec_up, &body[range.clone()]);
                }
                self.enter_dense(shape, &layout, body);
            }
            _ => {
                let Ok(selected) = shape.decode_sparse_body(body, Direction::Up) else {
                    return;
                };
                let each = shape
                    .sparse
                    .iter()
                    .zip(&selected.rows)
                    .zip(&selected.layout.sparse);
                for ((segment, rows), range) in each {
                    self.enter(
                        segment,
                        &segment.absolute(rows),
                        shape.codec_up,
                        &body[range.clone()],
                    );
                }
                self.enter_dense(shape, &selected.layout, body);
            }
        }
    }

    fn enter_dense(&mut self, shape: &RoundShape, layout: &Layout, body: &Bytes) {
        for (segment, range) in shape.dense.iter().zip(&layout.dense) {
            let rows: Vec<u32> = (segment.segment.row_start..segment.segment.row_end).collect();
            self.enter(segment, &rows, shape.codec_dense, &body[range.clone()]);
        }
    }

    fn enter(&mut self, segment: &SegmentShape, rows: &[u32], codec: ValueCodec, bytes: &[u8]) {
        let mut values = vec![0.0; rows.len() * segment.width];
        codec.decode(bytes, &mut values);
        let counted = &mut self.counted[segment.segment.tensor.index()];
        for (row, values) in rows.iter().zip(values.chunks_exact(segment.width)) {
            let start = *row as usize * segment.width;
            let sums = &mut counted[start..start + segment.width];
            sums.iter_mut()
                .zip(values)
                .for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }

    /// Compares with the residual.
    ///
    /// # Errors
    /// The first element that does not balance.
    pub(crate) fn check(&self, case: &Case, state: &WorkerState) -> Result<(), String> {
        for tensor in &case.plan.tensors {
            let name = format!("residual/{}", tensor.spec.name);
            let residual = state.arrays.iter().find(|(array, _)| *array == name);
            // Tensors that always travel whole have no residual where the wire is exact; what of them comes late is lost.
            if residual.is_none() {
                continue;
            }
            let books = self.given[tensor.id.index()]
                .iter()
                .zip(&self.counted[tensor.id.index()]);
            for (at, (given, counted)) in books.enumerate() {
                let kept = residual.map_or(0.0, |(_, values)| f64::from(values[at]));
                if *given != counted + kept {
                    return Err(format!(
                        "element {at} of {}: {given} was given, {counted} was counted, {kept} is in the residual",
                        tensor.spec.name
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Which rows of a tensor are in rounds whose gradients are all finite.
fn finite_rows(case: &Case, tensor: TensorId, open: &OpenStep) -> impl Fn(usize) -> bool {
    let plan = &case.plan;
    let bucket = plan.tensors[tensor.index()].bucket;
    let segments = &plan.buckets[bucket.index()].segments;
    let is_finite = |segment: &Segment| {
        let width = plan.tensors[segment.tensor.index()].width;
        let range = segment.row_start as usize * width..segment.row_end as usize * width;
        let gradient = open.gradients.get(&segment.tensor);
        gradient.is_none_or(|values| {
            values[range.start.min(values.len())..range.end.min(values.len())]
                .iter()
                .all(|x| x.is_finite())
        })
    };
    let mut bad = Vec::new();
    for owned in segments.iter().filter(|owned| !owned.iter().all(is_finite)) {
        let rows = owned.iter().filter(|segment| segment.tensor == tensor);
        bad.extend(rows.map(|segment| segment.row_start as usize..segment.row_end as usize));
    }
    move |row| !bad.iter().any(|range| range.contains(&row))
}

/// The rows whose values travelled up, in the numbers of their tensors.
fn rows_sent(case: &Case, step: Step, shape: &RoundShape, open: &OpenStep) -> Vec<Vec<u32>> {
    let key = (
        shape.bucket,
        shape.shard,
        FrameKey::from(FrameKind::Selection),
    );
    if let Some((header, answer)) = open.answers.get(&key) {
        let payload = &answer.body[..header.payload_bytes()];
        if let Ok(selected) = shape.decode_selection_body(payload) {
            let each = shape.sparse.iter().zip(&selected.rows);
            return each.map(|(segment, rows)| segment.absolute(rows)).collect();
        }
    }
    let rows = |segment: &SegmentShape| {
        let key = ProjectionKey {
            seed: case.plan.spec.algorithm.seed,
            tensor: segment.segment.tensor.0,
            step: step.0,
        };
        let range = segment.segment.row_start as usize..segment.segment.row_end as usize;
        randk_rows(key, range, segment.keep)
    };
    shape.sparse.iter().map(rows).collect()
}
