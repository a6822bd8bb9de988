//! A worker's tensors as a GPU backend would hold them, and its calls, on the emulator.
#![allow(unsafe_code, reason = "launches take addresses")]

use crate::memory::Memory;
use arc_topk_common::compress::{FeedbackParams, ProjectionKey, TensorState, ValueCodec};
use arc_topk_common::config::algorithm::{Feedback, ProjectionKind, ValueType};
use arc_topk_kernels::emulator::Emulator;
use arc_topk_kernels::{
    Commit, CommitArgs, CommitFlags, Element, EnergyArgs, EnergySource, GatherArgs, GaussianArgs,
    Piece, PieceSource, Projection, Segment, SegmentShape, SketchArgs, Tile, Wire, gather_tiles,
    gaussian_tiles, names, segment_tiles,
};
use core::ops::Range;
use half::{bf16, f16};
use std::path::Path;
use std::sync::LazyLock;

/// The kernels, compiled once.
pub(crate) static EMULATOR: LazyLock<Emulator> = LazyLock::new(|| {
    Emulator::load(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|e| panic!("{e}"))
});

/// Launches, in an order of threads that `seed` permutes.
pub(crate) fn launch<T: Copy>(kernel: &str, tiles: &[Tile], arguments: &T, seed: u64) {
    if tiles.is_empty() {
        return;
    }
    // SAFETY: `arguments` holds addresses of guarded memory of the lengths that its descriptors name.
    unsafe { EMULATOR.launch(kernel, tiles.len() as u32, arguments, seed) }.unwrap();
}

/// One tensor.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Feedback state at the start.
    pub(crate) state: TensorState,
    /// Elements of the gradient.
    pub(crate) elements: usize,
    /// Type of the gradient.
    pub(crate) element: Element,
    /// Rows where a segment ends and the next begins.
    pub(crate) cuts: Vec<usize>,
    /// Travels whole: its rows of width 1 are read as it suits.
    pub(crate) flat: bool,
    /// Elements by which its arrays miss a 16-byte boundary.
    pub(crate) shift: usize,
}

struct Slot {
    gradient: Memory,
    blended: Memory,
    local: Memory,
    global: Memory,
    element: Element,
}

/// Where a device's segment comes from.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) tensor: usize,
    pub(crate) rows: Range<usize>,
}

/// What to encode of a segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) segment: usize,
    pub(crate) source: PieceSource,
    pub(crate) rows: Option<&'a [u32]>,
    pub(crate) values: usize,
    pub(crate) codec: ValueCodec,
    pub(crate) dense_round: bool,
}

/// How a segment's round ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End<'a> {
    pub(crate) rows: &'a [u32],
    pub(crate) sent: &'a [u8],
    pub(crate) up: ValueCodec,
    pub(crate) mean: &'a [u8],
    pub(crate) down: ValueCodec,
    pub(crate) flags: CommitFlags,
}

pub(crate) struct Device {
    slots: Vec<Slot>,
    sketches: Vec<Memory>,
    energies: Vec<Memory>,
    segments: Vec<Segment>,
    tiles: Vec<Tile>,
    pub(crate) places: Vec<Place>,
    rank: u32,
    seed: u64,
    pub(crate) unscale: f32,
    pub(crate) rescale: f32,
}

impl Device {
    /// `seed` permutes threads.
    pub(crate) fn new(specs: &[Spec], rank: usize, params: FeedbackParams, seed: u64) -> Self {
        let mut device = Self {
            slots: Vec::new(),
            sketches: Vec::new(),
            energies: Vec::new(),
            segments: Vec::new(),
            tiles: Vec::new(),
            places: Vec::new(),
            rank: rank as u32,
            seed,
            unscale: 1.0,
            rescale: 1.0,
        };
        let mut shapes = Vec::new();
        for (tensor, spec) in specs.iter().enumerate() {
            device.add(tensor, spec, params, &mut shapes);
        }
        device.tiles = segment_tiles(&shapes);
        device
    }

    fn add(
        &mut self,
        tensor: usize,
        spec: &Spec,
        params: FeedbackParams,
        shapes: &mut Vec<SegmentShape>,
    ) {
        let state = &spec.state;
        let floats = |values: &[f32]| Memory::new(values, spec.shift * 4);
        let blended = if state.feedback == Feedback::Ef21m {
            &state.momentum
        } else {
            &state.residual
        };
        let size = spec.element.bytes();
        let mut slot = Slot {
            gradient: Memory::new(&vec![0u8; spec.elements * size], spec.shift * size),
            blended: floats(blended),
            local: floats(&state.local),
            global: floats(&state.global),
            element: spec.element,
        };
        let (keep, take) = match state.feedback {
            Feedback::Ef21m => (1.0 - params.eta, params.eta),
            _ => (params.decay, 1.0),
        };
        let edges = [&[0], &spec.cuts[..], &[state.rows]].concat();
        for edge in edges.windows(2) {
            let (rows, width) = (edge[0]..edge[1], state.width);
            let shape = if spec.flat {
                SegmentShape::flat(rows.len() as u32)
            } else {
                SegmentShape::new(rows.len() as u32, width as u32, self.rank)
            };
            let first = rows.start * width;
            let at = |memory: &mut Memory, bytes: usize| match memory.read::<u8>().len() {
                0 => 0,
                _ => memory.address() + (first * bytes) as u64,
            };
            let parts = shape.parts as usize;
            let mut sketch = Memory::poisoned(parts * rows.len() * self.rank as usize * 4, 0);
            let mut energy = Memory::poisoned(parts * shape.rows as usize * 8, 0);
            let mut segment = Segment {
                gradient: at(&mut slot.gradient, size),
                result: at(&mut slot.gradient, size),
                blended: at(&mut slot.blended, 4),
                local: at(&mut slot.local, 4),
                global: at(&mut slot.global, 4),
                sketch: if spec.flat { 0 } else { sketch.address() },
                energy: energy.address(),
                elements: (spec.elements.saturating_sub(first)).min(rows.len() * width) as u32,
                padded: (rows.len() * width) as u32,
                row_start: rows.start as u32,
                tensor: tensor as u32,
                element: spec.element,
                keep,
                take,
                ..Segment::default()
            };
            shape.describe(&mut segment);
            shapes.push(shape);
            self.segments.push(segment);
            self.sketches.push(sketch);
            self.energies.push(energy);
            self.places.push(Place { tensor, rows });
        }
        self.slots.push(slot);
    }

    /// Rounds to the tensor's type. Afterwards the gradient is there.
    pub(crate) fn set_gradient(&mut self, tensor: usize, values: &[f32]) {
        let slot = &mut self.slots[tensor];
        slot.gradient.write(&stored(values, slot.element));
    }

    /// The id that the projection of the only tensor has.
    pub(crate) fn set_id(&mut self, id: u32) {
        self.segments
            .iter_mut()
            .for_each(|segment| segment.tensor = id);
    }

    /// No gradient: zeros, whatever lies in the memory.
    pub(crate) fn forget_gradient(&mut self, tensor: usize) {
        for (segment, place) in self.segments.iter_mut().zip(&self.places) {
            if place.tensor == tensor {
                segment.gradient = 0;
            }
        }
    }

    /// Sketch (or none, `rank` 0), whether each segment is finite, and ‖g‖².
    pub(crate) fn sketch(
        &mut self,
        key: ProjectionKey,
        kind: ProjectionKind,
        dense_round: bool,
        measure: bool,
    ) -> (Vec<bool>, f64) {
        let gaussian = kind == ProjectionKind::Gaussian;
        let projections = if gaussian {
            self.projections(key)
        } else {
            Vec::new()
        };
        let mut flags = Memory::zeros::<u32>(self.segments.len());
        let mut energy = Memory::poisoned(self.tiles.len() * 8, 0);
        let kernel = if dense_round {
            names::INSPECT
        } else {
            names::sketch(self.rank, gaussian)
        };
        let arguments = SketchArgs {
            segments: self.segments.as_ptr() as u64,
            tiles: self.tiles.as_ptr() as u64,
            not_finite: flags.address(),
            energy: if measure { energy.address() } else { 0 },
            seed: key.seed,
            step: key.step,
            rank: self.rank,
            dense_round: dense_round.into(),
            unscale: self.unscale,
            reserved: 0,
        };
        launch(kernel, &self.tiles, &arguments, self.seed);
        drop(projections);
        let finite = flags.read::<u32>().iter().map(|flag| *flag == 0).collect();
        (finite, energy.read::<f64>().iter().sum())
    }

    /// Gaussian V of every tensor, for as long as they are held.
    fn projections(&mut self, key: ProjectionKey) -> Vec<Memory> {
        let mut out = Vec::new();
        let mut targets = Vec::new();
        for tensor in 0..self.slots.len() {
            let of = |place: &Place| place.tensor == tensor;
            let first = self.places.iter().position(of).unwrap();
            let entries = self.segments[first].width * self.rank;
            let mut memory = Memory::poisoned(entries as usize * 4, 0);
            targets.push(Projection {
                out: memory.address(),
                entries,
                tensor: tensor as u32,
            });
            for (segment, place) in self.segments.iter_mut().zip(&self.places) {
                if of(place) {
                    segment.projection = memory.address();
                }
            }
            out.push(memory);
        }
        gaussian(&targets, key, self.seed);
        out
    }

    /// Encodes each in one launch; the bytes lie apart by `gap`, so that their alignment varies.
    pub(crate) fn encode(
        &mut self,
        wanted: &[Wanted<'_>],
        gap: usize,
    ) -> (Vec<Vec<u8>>, Vec<bool>) {
        let mut out: Vec<Memory> = Vec::new();
        let mut pieces = Vec::new();
        for (index, want) in wanted.iter().enumerate() {
            let bytes = want.codec.encoded_bytes(want.values);
            let mut memory = Memory::poisoned(bytes, index * gap % 16);
            pieces.push(Piece {
                rows: want.rows.map_or(0, |rows| rows.as_ptr() as u64),
                out: memory.address(),
                values: want.values as u32,
                segment: want.segment as u32,
                source: want.source,
                wire: wire(want.codec),
                quant_block: want.codec.quant_block as u32,
                dense_round: want.dense_round.into(),
                reserved: [0; 2],
            });
            out.push(memory);
        }
        let shapes: Vec<(u32, u32)> = pieces.iter().map(|p| (p.values, p.quant_block)).collect();
        let tiles = gather_tiles(&shapes);
        let mut flags = Memory::zeros::<u32>(self.segments.len());
        let arguments = GatherArgs {
            segments: self.segments.as_ptr() as u64,
            pieces: pieces.as_ptr() as u64,
            tiles: tiles.as_ptr() as u64,
            not_finite: flags.address(),
            rank: self.rank,
            scale: 1.0 / (self.rank as f32).sqrt(),
            unscale: self.unscale,
            reserved: 0,
        };
        launch(names::GATHER, &tiles, &arguments, self.seed);
        let finite = flags.read::<u32>().iter().map(|flag| *flag == 0).collect();
        (out.iter().map(Memory::read).collect(), finite)
    }

    /// One end per segment.
    pub(crate) fn commit(&mut self, ends: &[End<'_>]) {
        // At any alignment, as they lie in frames.
        let copies = |bytes: fn(&End<'_>) -> Vec<u8>, step: usize| -> Vec<Memory> {
            let shifted = |(i, end)| Memory::new(&bytes(end), i * step % 16);
            ends.iter().enumerate().map(shifted).collect()
        };
        let mut sent = copies(|end| end.sent.to_vec(), 3);
        let mut mean = copies(|end| end.mean.to_vec(), 5);
        let commit = |((end, sent), mean): ((&End<'_>, &mut Memory), &mut Memory)| Commit {
            rows: end.rows.as_ptr() as u64,
            sent: sent.address(),
            mean: mean.address(),
            count: end.rows.len() as u32,
            flags: end.flags,
            wire_up: wire(end.up),
            quant_up: end.up.quant_block as u32,
            wire_down: wire(end.down),
            quant_down: end.down.quant_block as u32,
        };
        let commits: Vec<Commit> = ends
            .iter()
            .zip(&mut sent)
            .zip(&mut mean)
            .map(commit)
            .collect();
        let arguments = CommitArgs {
            segments: self.segments.as_ptr() as u64,
            commits: commits.as_ptr() as u64,
            tiles: self.tiles.as_ptr() as u64,
            unscale: self.unscale,
            rescale: self.rescale,
        };
        launch(names::COMMIT, &self.tiles, &arguments, self.seed);
    }

    /// Energies of the rows of every segment, parts added.
    pub(crate) fn energies(&mut self, source: EnergySource, dense_round: bool) -> Vec<Vec<f64>> {
        let arguments = EnergyArgs {
            segments: self.segments.as_ptr() as u64,
            tiles: self.tiles.as_ptr() as u64,
            source,
            dense_round: dense_round.into(),
            unscale: self.unscale,
            reserved: 0,
        };
        launch(names::ENERGY, &self.tiles, &arguments, self.seed);
        let sums = |(memory, segment): (&Memory, &Segment)| {
            let mut sums = vec![0.0; segment.rows as usize];
            for part in memory.read::<f64>().chunks_exact(sums.len()) {
                sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
            sums
        };
        self.energies.iter().zip(&self.segments).map(sums).collect()
    }

    /// Feedback state of a tensor, in the shape of `like`.
    pub(crate) fn state(&self, tensor: usize, like: &TensorState) -> TensorState {
        let slot = &self.slots[tensor];
        let blended = slot.blended.read();
        let (residual, momentum) = match like.feedback {
            Feedback::Ef21m => (Vec::new(), blended),
            _ => (blended, Vec::new()),
        };
        TensorState {
            residual,
            momentum,
            local: slot.local.read(),
            global: slot.global.read(),
            ..like.clone()
        }
    }

    /// What lies in the gradient's memory.
    pub(crate) fn gradient(&self, tensor: usize) -> Vec<u8> {
        self.slots[tensor].gradient.read()
    }
}

/// Runs arc_gaussian.
pub(crate) fn gaussian(targets: &[Projection], key: ProjectionKey, seed: u64) {
    let entries: Vec<u32> = targets.iter().map(|target| target.entries).collect();
    let tiles = gaussian_tiles(&entries);
    let arguments = GaussianArgs {
        projections: targets.as_ptr() as u64,
        tiles: tiles.as_ptr() as u64,
        seed: key.seed,
        step: key.step,
    };
    launch(names::GAUSSIAN, &tiles, &arguments, seed);
}

/// Values as a tensor of a type holds them.
pub(crate) fn stored(values: &[f32], element: Element) -> Vec<u8> {
    let bytes = |x: &f32| match element {
        Element::F32 => x.to_ne_bytes().to_vec(),
        Element::Bf16 => bf16::from_f32(*x).to_ne_bytes().to_vec(),
        Element::F16 => f16::from_f32(*x).to_ne_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

/// And back.
pub(crate) fn rounded(x: f32, element: Element) -> f32 {
    match element {
        Element::F32 => x,
        Element::Bf16 => bf16::from_f32(x).to_f32(),
        Element::F16 => f16::from_f32(x).to_f32(),
    }
}

fn wire(codec: ValueCodec) -> Wire {
    match codec.value_type {
        ValueType::F32 => Wire::F32,
        ValueType::Bf16 => Wire::Bf16,
        ValueType::F16 => Wire::F16,
        ValueType::Int8 => Wire::Int8,
        ValueType::Int4 => Wire::Int4,
    }
}
