//! The CPU backend: [`Kernels`] over plain vectors.

use super::lent::Buffer;
use super::norms;
use super::rules::{Rule, tensor_segments};
use super::{
    Backend, DeviceFault, Energies, Gradient, LoadPass, Opened, Piece, PieceValues, SegmentCommit,
    SentRows, StateArrays,
};
use arc_topk_common::compress::{Kernels, SketchShape, TensorState, ValueCodec, select_top_k};
use arc_topk_common::ids::{BucketId, TensorId};
use arc_topk_common::plan::{Plan, Segment};
use core::ops::Range;
use rayon::prelude::*;
use std::sync::Arc;

/// Elements that are copied, blended and sketched together, so that U is sketched while it is in a cache.
const CHUNK_ELEMENTS: usize = 1 << 18;
/// Rows that a chunk has at least: expanding V costs about as much as sketching some 30 rows.
const CHUNK_ROWS: usize = 2048;
/// Elements that one thread copies.
const COPY_ELEMENTS: usize = 1 << 16;

/// One tensor of one worker.
struct Slot {
    elements: usize,
    state: TensorState,
    /// What was not counted of a tensor that travels whole and exactly: ef14 loses nothing, but a residual that is
    /// nearly always zero is worth no memory. Empty while it is zero.
    late: Vec<f32>,
    rule: Rule,
    /// Gradient; then U, or what lay in the place that U takes ([`TensorState::kept`]); then the result: m·n, padded with zeros.
    buffer: Buffer,
    /// Sketch of this step, m×r; empty unless the compressor needs one.
    sketch: Vec<f32>,
    /// By ascending rows.
    segments: Vec<Segment>,
    /// Whether all of U is finite, by segment.
    finite: Vec<bool>,
    /// By segment: U was formed, and its round has not ended. Until then the buffer is what brings the state back.
    open: Vec<bool>,
    /// ‖g‖², if it was asked for.
    gradient_energy: f64,
}

/// Buffers and state in main memory. Threads: the rayon pool that the caller runs in.
pub struct CpuBackend {
    kernels: Arc<dyn Kernels>,
    slots: Vec<Slot>,
    /// By bucket, then shard.
    buckets: Vec<Vec<Vec<Segment>>>,
    shape: SketchShape,
    /// Scratch: the decoded mean of one segment.
    mean: Vec<f32>,
    /// Scratch: energies of the rows of one segment.
    row_energy: Vec<f64>,
    fault: Option<DeviceFault>,
}

impl CpuBackend {
    /// Buffers and zero state for every tensor of the plan.
    #[must_use]
    pub fn new(plan: &Plan, kernels: Arc<dyn Kernels>) -> Self {
        let algorithm = &plan.spec.algorithm;
        let slots = plan
            .tensors
            .iter()
            .zip(tensor_segments(plan))
            .map(|(tensor, segments)| {
                let rule = Rule::of(tensor, algorithm);
                Slot {
                    elements: tensor.elements,
                    rule,
                    state: TensorState::new(rule.feedback, tensor.rows, tensor.width),
                    late: Vec::new(),
                    buffer: Buffer::Own(Vec::new()),
                    sketch: Vec::new(),
                    finite: Vec::new(),
                    open: vec![false; segments.len()],
                    segments,
                    gradient_energy: 0.0,
                }
            });
        let buckets = plan.buckets.iter();
        Self {
            kernels,
            slots: slots.collect(),
            buckets: buckets.map(|bucket| bucket.segments.clone()).collect(),
            shape: SketchShape {
                width: 0,
                rank: usize::from(algorithm.sketch_rank),
                kind: algorithm.projection,
            },
            mean: Vec::new(),
            row_energy: Vec::new(),
            fault: None,
        }
    }
}

impl Slot {
    fn range(&self, rows: &Range<usize>) -> Range<usize> {
        rows.start * self.state.width..rows.end * self.state.width
    }

    /// Elements with padding.
    fn size(&self) -> usize {
        self.state.rows * self.state.width
    }

    /// Before a gradient comes: there is a place for it. One that was lent is its own place, unless it lacks the padding.
    fn place(&mut self, gradient: Gradient<'_>) {
        self.abandon();
        self.buffer.give_back();
        if let Gradient::Lent(lent) = gradient
            && lent.elements() == self.size()
        {
            self.buffer = Buffer::Lent(lent);
        }
        self.buffer.ensure(self.size());
    }

    /// Copies the gradient of `rows` into the buffer; what lies past the last element is zero.
    fn copy(&mut self, gradient: Gradient<'_>, rows: &Range<usize>) {
        if matches!(self.buffer, Buffer::Lent(_)) {
            return;
        }
        let range = self.range(rows);
        let end = range.end.min(self.elements);
        let (values, padding) = self.buffer[range.clone()].split_at_mut(end - range.start);
        padding.fill(0.0);
        let from = range.start..end;
        match gradient {
            Gradient::F32(g) => copy_with(values, &g[from], |to, from| to.copy_from_slice(from)),
            Gradient::Bf16(g) => copy_with(values, &g[from], |to, from| {
                to.iter_mut()
                    .zip(from)
                    .for_each(|(to, from)| *to = from.to_f32());
            }),
            Gradient::F16(g) => copy_with(values, &g[from], |to, from| {
                to.iter_mut()
                    .zip(from)
                    .for_each(|(to, from)| *to = from.to_f32());
            }),
            Gradient::Lent(lent) => copy_with(values, &lent.values()[from], |to, from| {
                to.copy_from_slice(from);
            }),
            // `load` has refused it.
            Gradient::OnDevice(_) | Gradient::Absent => values.fill(0.0),
        }
    }

    /// Position of a segment.
    fn at(&self, segment: Segment) -> usize {
        let at = self.segments.iter().position(|known| *known == segment);
        at.expect("a segment of the plan")
    }

    /// A segment's round ends with U.
    fn close(&mut self, segment: Segment) {
        let at = self.at(segment);
        self.open[at] = false;
    }

    /// A segment's round ends without U, or has none: e and v are what they were.
    fn withdraw(&mut self, segment: Segment) {
        let at = self.at(segment);
        if core::mem::take(&mut self.open[at]) {
            self.state.withdraw(&self.buffer, rows_of(segment));
        }
    }

    /// All rounds that are open end without U.
    fn abandon(&mut self) {
        for at in 0..self.segments.len() {
            self.withdraw(self.segments[at]);
        }
    }

    /// The state as it is if what is open is abandoned.
    fn settled(&self) -> TensorState {
        let mut state = self.state.clone();
        for (segment, _) in self
            .segments
            .iter()
            .zip(&self.open)
            .filter(|(_, open)| **open)
        {
            state.withdraw(&self.buffer, rows_of(*segment));
        }
        state
    }

    /// Before a commit: U stays here if it was not counted, or has gone.
    fn keep(&mut self, rows: &Range<usize>, counted: bool) {
        if !self.rule.keeps_late || (counted && self.late.is_empty()) {
            return;
        }
        let range = self.range(rows);
        self.late.resize(self.state.rows * self.state.width, 0.0);
        if counted {
            self.late[range].fill(0.0);
        } else {
            self.late[range.clone()].copy_from_slice(&self.buffer[range]);
        }
        if self.late.iter().all(|x| *x == 0.0) {
            self.late = Vec::new();
        }
    }

    /// [`Backend::load`] for one chunk of rows: copied, blended and sketched while it is in a cache.
    fn load_rows(
        &mut self,
        kernels: &dyn Kernels,
        shape: SketchShape,
        gradient: Gradient<'_>,
        pass: LoadPass,
        rows: Range<usize>,
    ) -> (bool, f64) {
        self.copy(gradient, &rows);
        let energy = if pass.measure {
            norms::energy(&self.buffer[self.range(&rows)])
        } else {
            0.0
        };
        if !self.late.is_empty() {
            let range = self.range(&rows);
            let late = &self.late[range.clone()];
            let values = self.buffer[range].iter_mut();
            values.zip(late).for_each(|(u, late)| *u += late);
        }
        let finite = kernels.input(
            &mut self.state,
            self.rule.params,
            pass.dense_round,
            &mut self.buffer,
            rows.clone(),
        );
        if let Some(key) = pass.sketch {
            let out = &mut self.sketch[rows.start * shape.rank..rows.end * shape.rank];
            kernels.sketch(&self.state, shape, key, &self.buffer, rows, out);
        }
        (finite, energy)
    }
}

fn copy_with<T: Sync>(to: &mut [f32], from: &[T], copy: impl Fn(&mut [f32], &[T]) + Sync) {
    if to.len() <= COPY_ELEMENTS {
        return copy(to, from);
    }
    to.par_chunks_mut(COPY_ELEMENTS)
        .zip(from.par_chunks(COPY_ELEMENTS))
        .for_each(|(to, from)| copy(to, from));
}

fn rows_of(segment: Segment) -> Range<usize> {
    segment.row_start as usize..segment.row_end as usize
}

impl CpuBackend {
    fn encode_piece(&self, piece: &Piece<'_>, out: &mut Vec<u8>) {
        let (segment, codec) = (piece.segment, piece.codec);
        let slot = &self.slots[segment.tensor.index()];
        let rows = rows_of(segment);
        match piece.values {
            PieceValues::Sketch => {
                let rank = self.shape.rank;
                codec.encode(&slot.sketch[rows.start * rank..rows.end * rank], out);
            }
            PieceValues::Rows(rows) => {
                self.kernels
                    .gather(&slot.state, false, &slot.buffer, rows, codec, out);
            }
            // In a dense round A is U, so there is nothing to subtract.
            PieceValues::All => {
                codec.encode(&slot.state.formed(&slot.buffer)[slot.range(&rows)], out);
            }
            PieceValues::Estimates => codec.encode(&slot.state.local[slot.range(&rows)], out),
        }
    }

    fn commit_segment(&mut self, end: &SegmentCommit<'_>) -> Energies {
        let slot = &mut self.slots[end.segment.tensor.index()];
        let (rows, width) = (rows_of(end.segment), slot.state.width);
        if end.abstained {
            slot.withdraw(end.segment);
            slot.buffer.ensure(slot.size());
        } else {
            slot.close(end.segment);
            slot.keep(&rows, end.sent.is_some());
        }
        let (own, all): (&[u32], &[u32]) = match end.rows {
            SentRows::All => (&[], &[]),
            SentRows::Some(rows) => (rows, rows),
            SentRows::Union { own, all } => (own, all),
        };
        let mean_rows = if end.rows == SentRows::All {
            rows.len()
        } else {
            all.len()
        };
        self.mean.resize(mean_rows * width, 0.0);
        end.codec_down.decode(end.mean, &mut self.mean);

        let mut energies = Energies::default();
        if end.measure && !end.dense_round {
            self.row_energy.resize(rows.len(), 0.0);
            self.kernels.energy(
                &slot.state,
                &slot.buffer,
                rows.clone(),
                &mut self.row_energy,
            );
            energies.input = self.row_energy.iter().sum();
            energies.sent = own
                .iter()
                .map(|row| self.row_energy[*row as usize - rows.start])
                .sum();
            energies.residual = energies.input - energies.sent;
        }
        let (state, buffer) = (&mut slot.state, &mut slot.buffer[..]);
        if let SentRows::Union { .. } = end.rows {
            self.kernels.commit_own_rows(
                state,
                buffer,
                rows.clone(),
                own,
                end.sent,
                end.codec_up,
                all,
                &self.mean,
            );
        } else {
            self.kernels.commit(
                state,
                end.dense_round,
                buffer,
                rows.clone(),
                all,
                end.sent,
                end.codec_up,
                &self.mean,
            );
        }
        if end.measure && !slot.state.residual.is_empty() {
            energies.residual = norms::energy(&slot.state.residual[slot.range(&rows)]);
        }
        energies
    }
}

impl Backend for CpuBackend {
    fn load(&mut self, tensor: TensorId, gradient: Gradient<'_>, pass: LoadPass) {
        if let Gradient::OnDevice(_) = gradient {
            self.fault = Some(DeviceFault(
                "a gradient lies on a GPU, but this worker computes on the CPU: copy it to main memory, or compute on the GPU"
                    .to_owned(),
            ));
        }
        let slot = &mut self.slots[tensor.index()];
        slot.place(gradient);
        let shape = SketchShape {
            width: slot.state.width,
            ..self.shape
        };
        if pass.sketch.is_some() {
            slot.sketch.resize(slot.state.rows * shape.rank, 0.0);
        }
        let chunk = (CHUNK_ELEMENTS / slot.state.width.max(1)).max(CHUNK_ROWS);
        slot.finite.clear();
        slot.gradient_energy = 0.0;
        for index in 0..slot.segments.len() {
            let rows = rows_of(slot.segments[index]);
            let mut all_finite = true;
            for start in rows.clone().step_by(chunk) {
                let rows = start..(start + chunk).min(rows.end);
                let (finite, energy) = slot.load_rows(&*self.kernels, shape, gradient, pass, rows);
                all_finite &= finite;
                slot.gradient_energy += energy;
            }
            slot.finite.push(all_finite);
            slot.open[index] = true;
        }
    }

    fn open(&mut self, bucket: BucketId, frames: &[Vec<Piece<'_>>]) -> Opened {
        let shards = &self.buckets[bucket.index()];
        let finite = |segment: &Segment| {
            let slot = &self.slots[segment.tensor.index()];
            slot.finite[slot.at(*segment)]
        };
        let finite = shards.iter().map(|of| of.iter().all(finite)).collect();
        let mut tensors: Vec<TensorId> = shards.iter().flatten().map(|s| s.tensor).collect();
        tensors.sort_unstable();
        tensors.dedup();
        let energies = tensors
            .iter()
            .map(|t| self.slots[t.index()].gradient_energy);
        let gradient_energy = energies.sum();
        let encoded = |pieces: &Vec<Piece<'_>>| {
            let mut frame = Vec::new();
            pieces
                .iter()
                .for_each(|piece| self.encode_piece(piece, &mut frame));
            frame
        };
        Opened {
            finite,
            frames: frames.iter().map(encoded).collect(),
            gradient_energy,
        }
    }

    fn encode(&mut self, pieces: &[Piece<'_>], out: &mut Vec<u8>) {
        pieces
            .iter()
            .for_each(|piece| self.encode_piece(piece, out));
    }

    fn restore(&mut self, segment: Segment, codec: ValueCodec, mean: &[u8], counted: bool) {
        let slot = &mut self.slots[segment.tensor.index()];
        slot.withdraw(segment);
        slot.buffer.ensure(slot.size());
        let range = slot.range(&rows_of(segment));
        let global = &mut slot.state.global[range.clone()];
        codec.decode(mean, global);
        if !counted {
            slot.state.local[range.clone()].copy_from_slice(global);
        }
        slot.buffer[range].copy_from_slice(global);
    }

    fn top_rows(&mut self, segment: Segment, k: usize) -> Vec<u32> {
        let slot = &self.slots[segment.tensor.index()];
        self.row_energy.resize(segment.rows(), 0.0);
        self.kernels.energy(
            &slot.state,
            &slot.buffer,
            rows_of(segment),
            &mut self.row_energy,
        );
        let mut rows = select_top_k(&self.row_energy, k);
        rows.iter_mut().for_each(|row| *row += segment.row_start);
        rows
    }

    fn commit(&mut self, ends: &[SegmentCommit<'_>]) -> Vec<Energies> {
        ends.iter().map(|end| self.commit_segment(end)).collect()
    }

    fn result(&self, tensor: TensorId) -> &[f32] {
        let slot = &self.slots[tensor.index()];
        &slot.buffer[..slot.elements]
    }

    fn abandon(&mut self) {
        self.slots.iter_mut().for_each(Slot::abandon);
    }

    fn give_back(&mut self) {
        self.abandon();
        self.slots
            .iter_mut()
            .for_each(|slot| slot.buffer.give_back());
    }

    fn failure(&self) -> Option<DeviceFault> {
        self.fault.clone()
    }

    fn export(&self, tensor: TensorId) -> StateArrays {
        let slot = &self.slots[tensor.index()];
        let mut state = slot.settled();
        let late = ("residual", slot.late.clone());
        arrays(&mut state)
            .map(|(name, values)| (name, core::mem::take(values)))
            .into_iter()
            .chain([late])
            .filter(|(_, values)| !values.is_empty())
            .collect()
    }

    fn optional_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)> {
        let slot = &self.slots[tensor.index()];
        if slot.rule.keeps_late {
            vec![("residual", slot.size())]
        } else {
            Vec::new()
        }
    }

    fn state_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)> {
        let state = &self.slots[tensor.index()].state;
        let lengths = [
            ("residual", state.residual.len()),
            ("momentum", state.momentum.len()),
            ("local", state.local.len()),
            ("global", state.global.len()),
        ];
        lengths.into_iter().filter(|(_, len)| *len > 0).collect()
    }

    fn import(&mut self, tensor: TensorId, name: &'static str, values: &[f32]) {
        let slot = &mut self.slots[tensor.index()];
        slot.abandon();
        if slot.rule.keeps_late {
            slot.late = values.to_vec();
            return;
        }
        let array = arrays(&mut slot.state)
            .into_iter()
            .find_map(|(known, array)| (known == name).then_some(array));
        array
            .expect("names come from state_lengths")
            .copy_from_slice(values);
    }
}

fn arrays(state: &mut TensorState) -> [(&'static str, &mut Vec<f32>); 4] {
    [
        ("residual", &mut state.residual),
        ("momentum", &mut state.momentum),
        ("local", &mut state.local),
        ("global", &mut state.global),
    ]
}
