//! The CPU backend: [`Kernels`] over plain vectors.

use super::lent::Buffer;
use super::norms;
use super::{Backend, Energies, Gradient, LoadPass, Loaded, SegmentCommit, SentRows, StateArrays};
use arc_topk_common::compress::{
    FeedbackParams, Kernels, SketchShape, TensorState, ValueCodec, select_top_k,
};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback};
use arc_topk_common::ids::TensorId;
use arc_topk_common::plan::{Plan, Segment, TensorPlan};
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
    keeps_late: bool,
    params: FeedbackParams,
    /// Gradient, then U, then the result: m·n, padded with zeros.
    buffer: Buffer,
    /// Sketch of this step, m×r; empty unless the compressor needs one.
    sketch: Vec<f32>,
    /// By ascending rows.
    segments: Vec<Segment>,
}

/// Buffers and state in main memory. Threads: the rayon pool that the caller runs in.
pub struct CpuBackend {
    kernels: Arc<dyn Kernels>,
    slots: Vec<Slot>,
    shape: SketchShape,
    /// Scratch: the decoded mean of one segment.
    mean: Vec<f32>,
    /// Scratch: energies of the rows of one segment.
    row_energy: Vec<f64>,
}

/// The feedback rule that a tensor really needs. Where all rows always travel, ef21's estimate would be the gradient
/// itself: only what rounding loses needs a place, which is ef14's residual.
fn state_of(tensor: &TensorPlan, algorithm: &AlgorithmConfig) -> TensorState {
    if !tensor.sparse {
        return TensorState::for_dense_tensor(
            algorithm.feedback,
            tensor.elements,
            algorithm.rounds_dense_tensors(),
        );
    }
    let feedback = match (algorithm.compressor, algorithm.feedback) {
        (Compressor::Dense, Feedback::None) => Feedback::None,
        (Compressor::Dense, _) if algorithm.codec_dense().is_lossy() => Feedback::Ef14,
        (Compressor::Dense, _) => Feedback::None,
        (_, feedback) => feedback,
    };
    TensorState::new(feedback, tensor.rows, tensor.width)
}

/// Whether what a worker sends of this tensor must be kept when it is not counted, although [`state_of`] has no place for it.
/// (ef21 and ef21m lose it: they average estimates, and that of a tensor that travels whole is the gradient of one step.)
fn keeps_late(tensor: &TensorPlan, algorithm: &AlgorithmConfig) -> bool {
    !tensor.sparse
        && algorithm.compressor != Compressor::Dense
        && algorithm.feedback == Feedback::Ef14
        && !algorithm.rounds_dense_tensors()
}

/// Segments of every tensor, by ascending rows.
#[must_use]
pub(crate) fn tensor_segments(plan: &Plan) -> Vec<Vec<Segment>> {
    let mut segments = vec![Vec::new(); plan.tensors.len()];
    for segment in plan
        .buckets
        .iter()
        .flat_map(|bucket| bucket.segments.iter().flatten())
    {
        segments[segment.tensor.index()].push(*segment);
    }
    for segments in &mut segments {
        segments.sort_unstable_by_key(|segment| segment.row_start);
    }
    segments
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
            .map(|(tensor, segments)| Slot {
                elements: tensor.elements,
                state: state_of(tensor, algorithm),
                late: Vec::new(),
                keeps_late: keeps_late(tensor, algorithm),
                params: FeedbackParams {
                    eta: algorithm.eta,
                    // The residual of a tensor that travels whole is rounding alone: nothing stale to forget.
                    decay: if tensor.sparse {
                        algorithm.feedback_decay
                    } else {
                        1.0
                    },
                },
                buffer: Buffer::Own(Vec::new()),
                sketch: Vec::new(),
                segments,
            });
        Self {
            kernels,
            slots: slots.collect(),
            shape: SketchShape {
                width: 0,
                rank: usize::from(algorithm.sketch_rank),
                kind: algorithm.projection,
            },
            mean: Vec::new(),
            row_energy: Vec::new(),
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
            Gradient::Absent => values.fill(0.0),
        }
    }

    /// Before a commit without a gradient: U is what leaves e and v as they are.
    fn recall(&mut self, rows: &Range<usize>) {
        let range = self.range(rows);
        let kept = match self.state.feedback {
            Feedback::Ef14 => &self.state.residual,
            Feedback::Ef21m => &self.state.momentum,
            Feedback::None | Feedback::Ef21 => return,
        };
        self.buffer[range.clone()].copy_from_slice(&kept[range]);
    }

    /// Before a commit: U stays here if it was not counted, or has gone.
    fn keep(&mut self, rows: &Range<usize>, counted: bool) {
        if !self.keeps_late || (counted && self.late.is_empty()) {
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
            &self.state,
            self.params,
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

impl Backend for CpuBackend {
    fn load(&mut self, tensor: TensorId, gradient: Gradient<'_>, pass: LoadPass) -> Loaded {
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
        let mut loaded = Loaded::default();
        for index in 0..slot.segments.len() {
            let rows = rows_of(slot.segments[index]);
            let mut all_finite = true;
            for start in rows.clone().step_by(chunk) {
                let rows = start..(start + chunk).min(rows.end);
                let (finite, energy) = slot.load_rows(&*self.kernels, shape, gradient, pass, rows);
                all_finite &= finite;
                loaded.gradient_energy += energy;
            }
            loaded.finite.push(all_finite);
        }
        loaded
    }

    fn encode_sketch(&mut self, segment: Segment, codec: ValueCodec, out: &mut Vec<u8>) {
        let rank = self.shape.rank;
        let sketch = &self.slots[segment.tensor.index()].sketch;
        codec.encode(
            &sketch[segment.row_start as usize * rank..segment.row_end as usize * rank],
            out,
        );
    }

    fn encode_rows(
        &mut self,
        segment: Segment,
        rows: &[u32],
        codec: ValueCodec,
        out: &mut Vec<u8>,
    ) {
        let slot = &self.slots[segment.tensor.index()];
        self.kernels
            .gather(&slot.state, false, &slot.buffer, rows, codec, out);
    }

    fn encode_all(&mut self, segment: Segment, codec: ValueCodec, out: &mut Vec<u8>) {
        // In a dense round A is what `input` left in the buffer, so there is nothing to subtract.
        let slot = &self.slots[segment.tensor.index()];
        codec.encode(&slot.buffer[slot.range(&rows_of(segment))], out);
    }

    fn encode_estimates(&mut self, segment: Segment, codec: ValueCodec, out: &mut Vec<u8>) {
        let slot = &self.slots[segment.tensor.index()];
        codec.encode(&slot.state.local[slot.range(&rows_of(segment))], out);
    }

    fn restore(&mut self, segment: Segment, codec: ValueCodec, mean: &[u8], counted: bool) {
        let slot = &mut self.slots[segment.tensor.index()];
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

    fn commit(&mut self, end: SegmentCommit<'_>) -> Energies {
        let slot = &mut self.slots[end.segment.tensor.index()];
        slot.buffer.ensure(slot.size());
        let (rows, width) = (rows_of(end.segment), slot.state.width);
        if end.abstained {
            slot.recall(&rows);
        } else {
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

    fn result(&self, tensor: TensorId) -> &[f32] {
        let slot = &self.slots[tensor.index()];
        &slot.buffer[..slot.elements]
    }

    fn give_back(&mut self) {
        self.slots
            .iter_mut()
            .for_each(|slot| slot.buffer.give_back());
    }

    fn export(&self, tensor: TensorId) -> StateArrays {
        let slot = &self.slots[tensor.index()];
        let late = [("residual", &slot.late)];
        arrays(&slot.state)
            .into_iter()
            .chain(late)
            .filter(|(_, values)| !values.is_empty())
            .map(|(name, values)| (name, values.clone()))
            .collect()
    }

    fn optional_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)> {
        let slot = &self.slots[tensor.index()];
        if slot.keeps_late {
            vec![("residual", slot.size())]
        } else {
            Vec::new()
        }
    }

    fn state_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)> {
        arrays(&self.slots[tensor.index()].state)
            .into_iter()
            .filter(|(_, values)| !values.is_empty())
            .map(|(name, values)| (name, values.len()))
            .collect()
    }

    fn import(&mut self, tensor: TensorId, name: &'static str, values: &[f32]) {
        let slot = &mut self.slots[tensor.index()];
        if slot.keeps_late {
            slot.late = values.to_vec();
            return;
        }
        let state = &mut slot.state;
        let array = match name {
            "residual" => &mut state.residual,
            "momentum" => &mut state.momentum,
            "local" => &mut state.local,
            "global" => &mut state.global,
            _ => unreachable!("names come from state_lengths"),
        };
        array.copy_from_slice(values);
    }
}

fn arrays(state: &TensorState) -> [(&'static str, &Vec<f32>); 4] {
    [
        ("residual", &state.residual),
        ("momentum", &state.momentum),
        ("local", &state.local),
        ("global", &state.global),
    ]
}
