//! The backend of a device that runs the kernels of `arc-topk-kernels`: a GPU, or their emulator.
//!
//! U is not stored anywhere: the gradient's memory stays as it is until the commit, and every kernel computes U again from
//! gradient and state. Gradients that lie on the device ([`Gradient::OnDevice`]) are used where they are, and results take
//! their place; those in main memory are copied (for tests, and trainers that compute elsewhere).
//!
//! | call | to the device | launches | from the device |
//! |---|---|---|---|
//! | `open` (a bucket) | descriptors, randk's rows | (Gaussian V,) sketch or inspect; gather | flags, first frames of all shards |
//! | `encode` (a round) | descriptors, rows | gather | the frame |
//! | `commit` (a round) | descriptors, rows, what was sent, the mean | commit | nothing, or energies when it measures |
//!
//! Each sends one block and waits only for what it reads back. Memory beyond the feedback state: tile tables, the
//! sketches of the largest bucket, the frames of the largest bucket, and two of the blocks above.
#![allow(unsafe_code, reason = "kernels take addresses: the room of devices")]

mod block;
mod commit;
mod driver;
mod gather;
mod layout;
#[cfg(feature = "cuda")]
pub mod nvidia;

pub use arc_topk_kernels::Element;
pub use driver::{DeviceSeconds, DeviceStats, Driver};

use super::{
    Backend, DeviceFault, Energies, Gradient, LoadPass, Opened, Piece, SegmentCommit, StateArrays,
};
use arc_topk_common::compress::{ProjectionKey, ValueCodec};
use arc_topk_common::config::algorithm::Compressor;
use arc_topk_common::ids::{BucketId, TensorId};
use arc_topk_common::plan::{Plan, Segment};
use arc_topk_kernels as kernels;
use arc_topk_kernels::{gaussian_tiles, names};
use block::Block;
use core::cell::{OnceCell, RefCell};
use core::ops::Range;
use driver::Device;
use layout::{Layout, Values};
use std::sync::Arc;

/// Something that happens on the device, after which a gradient is there.
pub trait Ready: Send + Sync {
    /// It as the device knows it (a `CUevent`), for what is launched after it.
    fn event(&self) -> u64;

    /// Whether it has happened, or never will.
    fn has_happened(&self) -> bool;
}

/// A gradient in device memory, which is the backend's until [`Backend::give_back`]: the result takes its place.
#[derive(Clone)]
pub struct DeviceGradient {
    address: u64,
    elements: usize,
    element: Element,
    ready: Option<Arc<dyn Ready>>,
}

impl core::fmt::Debug for DeviceGradient {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self {
            address, elements, ..
        } = self;
        write!(
            f,
            "{elements} elements at {address:#x}, ready: {}",
            self.is_ready()
        )
    }
}

impl DeviceGradient {
    /// `elements` values of type `element` from `address` on, there once `ready` has happened (`None`: already).
    ///
    /// # Safety
    /// The memory must be the device's of the backend that gets it, aligned to its elements, and used by nothing else that is
    /// launched after `ready`, until `give_back` of the reducer has returned true and the device has reached its event
    /// ([`Backend::finished`]), or the reducer was dropped and the device has nothing left to do.
    #[must_use]
    pub unsafe fn new(
        address: u64,
        elements: usize,
        element: Element,
        ready: Option<Arc<dyn Ready>>,
    ) -> Self {
        Self {
            address,
            elements,
            element,
            ready,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Whether it is there. Whoever computes with it before waits for it on the device.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.as_ref().is_none_or(|ready| ready.has_happened())
    }
}

/// Where a tensor's gradient of this step is.
#[derive(Clone, Debug, Default)]
enum Home {
    /// Nowhere: zeros.
    #[default]
    Nowhere,
    /// In memory of the backend's own.
    Own,
    /// In the trainer's.
    Lent(DeviceGradient),
}

/// Memory for frames, flags and energies on their way to the host; grows to what is needed.
#[derive(Default)]
struct Outbox {
    address: u64,
    bytes: usize,
    host: Vec<u8>,
}

/// Buffers and state on a device.
pub struct DeviceBackend<D> {
    device: RefCell<Device<D>>,
    layout: Layout,
    homes: Vec<Home>,
    passes: Vec<Option<LoadPass>>,
    /// Per tensor, memory for gradients that were not lent, and for results without a gradient; 0 until it is needed.
    own: Vec<u64>,
    /// Per tensor, what of its result the host has asked for.
    results: Vec<OnceCell<Vec<f32>>>,
    outbox: Outbox,
    block: Block,
    /// Scratch: gradients on their way to f32.
    converted: Vec<f32>,
}

impl<D: Driver> DeviceBackend<D> {
    /// Buffers and zero state for every tensor of the plan.
    ///
    /// # Errors
    /// If the device has not enough memory, or the plan wants what only the CPU does (topk).
    pub fn new(plan: &Plan, driver: D) -> Result<Self, DeviceFault> {
        if plan.spec.algorithm.compressor == Compressor::Topk {
            return Err(DeviceFault(
                "compressor topk is computed on the CPU alone: take arc (or randk) on a GPU, or compute on the CPU".to_owned(),
            ));
        }
        let mut device = Device::new(driver);
        let layout = Layout::new(plan, &mut device)?;
        if let Some(fault) = device.fault() {
            return Err(fault.clone());
        }
        let tensors = plan.tensors.len();
        Ok(Self {
            device: RefCell::new(device),
            layout,
            homes: vec![Home::Nowhere; tensors],
            passes: vec![None; tensors],
            own: vec![0; tensors],
            results: vec![OnceCell::new(); tensors],
            outbox: Outbox::default(),
            block: Block::default(),
            converted: Vec::new(),
        })
    }

    /// What the device did so far, and what lies on it.
    #[must_use]
    pub fn stats(&self) -> DeviceStats {
        self.device.borrow().stats()
    }

    /// The backend's own memory for a tensor's gradient and result.
    fn own_memory(&mut self, tensor: usize) -> u64 {
        if self.own[tensor] == 0 {
            let bytes = self.layout.tensors[tensor].elements * 4;
            self.own[tensor] = self.device.get_mut().allocate_scratch(bytes);
        }
        self.own[tensor]
    }

    fn values(&self, tensor: TensorId) -> Values {
        match &self.homes[tensor.index()] {
            Home::Nowhere => Values {
                result: self.own[tensor.index()],
                ..Values::default()
            },
            Home::Own => Values {
                gradient: self.own[tensor.index()],
                result: self.own[tensor.index()],
                element: Element::F32,
            },
            Home::Lent(lent) => Values {
                gradient: lent.address,
                result: lent.address,
                element: lent.element,
            },
        }
    }

    /// Descriptors of some parts of a bucket.
    fn describe(&self, bucket: usize, parts: Range<usize>) -> Vec<kernels::Segment> {
        self.layout.buckets[bucket].parts[parts]
            .iter()
            .map(|part| self.layout.describe(part, self.values(part.segment.tensor)))
            .collect()
    }

    /// Copies a gradient of main memory to the device, as f32.
    fn take_copy(&mut self, tensor: usize, gradient: Gradient<'_>) {
        let address = self.own_memory(tensor);
        let device = self.device.get_mut();
        self.converted.clear();
        match gradient {
            Gradient::F32(values) => return device.upload(address, values),
            Gradient::Lent(lent) => return device.upload(address, lent.values()),
            Gradient::Bf16(values) => self.converted.extend(values.iter().map(|x| x.to_f32())),
            Gradient::F16(values) => self.converted.extend(values.iter().map(|x| x.to_f32())),
            Gradient::OnDevice(_) | Gradient::Absent => {}
        }
        device.upload(address, &self.converted);
    }

    /// What this step does with a bucket's compressible tensors, all alike; `None` if there are none. Of those that travel whole a
    /// launch need not know it: they are not sketched, and have no estimate to start anew.
    fn sparse_pass(&self, bucket: usize) -> Option<LoadPass> {
        let parts = self.layout.buckets[bucket].parts.iter();
        parts
            .filter(|part| part.sparse)
            .find_map(|part| self.passes[part.segment.tensor.index()])
    }

    /// The first pass over a bucket: U's sketch and whether it is finite; flags and energies go to the outbox.
    fn inspect(&mut self, bucket: usize, segments: u64, flags: u64, energies: u64) {
        let table = &self.layout.buckets[bucket];
        let sparse = self.sparse_pass(bucket);
        let key = sparse.and_then(|pass| pass.sketch);
        let kernel = key.map_or(names::INSPECT, |_| {
            names::sketch(self.layout.rank, self.layout.gaussian)
        });
        let key = key.unwrap_or(ProjectionKey {
            seed: 0,
            tensor: 0,
            step: 0,
        });
        let arguments = kernels::SketchArgs {
            segments,
            tiles: table.tiles,
            not_finite: flags,
            energy: energies,
            seed: key.seed,
            step: key.step,
            rank: self.layout.rank,
            dense_round: u32::from(sparse.is_none_or(|pass| pass.dense_round)),
            unscale: 1.0,
            reserved: 0,
        };
        let tiles = table.tile_count();
        // SAFETY: descriptors, tiles and flags lie on the device, and what they point to is held by the layout, by this
        // backend, or lent by the trainer.
        unsafe { self.device.get_mut().launch(kernel, tiles, &arguments) };
    }

    /// Gaussian V of a bucket's tensors. Their descriptors are in the block already.
    fn project(&mut self, bucket: usize, projections: u64, tiles: u64, count: usize) {
        let Some(key) = self.sparse_pass(bucket).and_then(|pass| pass.sketch) else {
            return;
        };
        let arguments = kernels::GaussianArgs {
            projections,
            tiles,
            seed: key.seed,
            step: key.step,
        };
        // SAFETY: as above; the projections' memory is the layout's scratch.
        unsafe {
            self.device
                .get_mut()
                .launch(names::GAUSSIAN, count, &arguments);
        }
    }

    /// Makes room for so many bytes on their way to the host.
    fn ensure_outbox(&mut self, bytes: usize) {
        if self.outbox.bytes < bytes {
            let device = self.device.get_mut();
            device.replace_scratch(&mut self.outbox.address, self.outbox.bytes, bytes);
            self.outbox.bytes = bytes;
        }
        self.outbox.host.resize(bytes, 0);
    }

    /// Reads the outbox.
    fn fetch(&mut self, bytes: usize) {
        let out = &mut self.outbox.host[..bytes];
        self.device.get_mut().fetch(self.outbox.address, out);
    }

    /// Sends the block to where `stage` said.
    fn send_block(&mut self) {
        self.device.get_mut().send(self.block.bytes());
    }
}

impl<D: Driver> Backend for DeviceBackend<D> {
    fn load(&mut self, tensor: TensorId, gradient: Gradient<'_>, pass: LoadPass) {
        let index = tensor.index();
        self.passes[index] = Some(pass);
        self.results[index] = OnceCell::new();
        self.homes[index] = match gradient {
            Gradient::Absent => Home::Nowhere,
            Gradient::OnDevice(lent) => {
                if let Some(ready) = &lent.ready {
                    self.device.get_mut().wait_for(ready.event());
                }
                Home::Lent(lent.clone())
            }
            _ => {
                self.take_copy(index, gradient);
                Home::Own
            }
        };
    }

    fn open(&mut self, bucket: BucketId, frames: &[Vec<Piece<'_>>]) -> Opened {
        let index = bucket.index();
        let parts = 0..self.layout.buckets[index].parts.len();
        let wanted: Vec<Piece<'_>> = frames.iter().flatten().copied().collect();
        let measures = self.layout.buckets[index]
            .parts
            .iter()
            .any(|part| self.passes[part.segment.tensor.index()].is_some_and(|pass| pass.measure));
        // The outbox: flags, energies of tiles, frames.
        let flag_bytes = (parts.len() * 4).next_multiple_of(8);
        let tiles = self.layout.buckets[index].tile_count();
        let energy_bytes = if measures { tiles * 8 } else { 0 };
        let head = flag_bytes + energy_bytes;
        let bytes = head + self.bytes_of(&wanted);
        self.ensure_outbox(bytes);
        let out = self.outbox.address;

        self.block.clear();
        let plan = self.plan_gather(index, &parts, &wanted);
        let projections = self.layout.buckets[index].projections.clone();
        let entries: Vec<u32> = projections.iter().map(|p| p.entries).collect();
        let projection_tiles = gaussian_tiles(&entries);
        let projections = self.block.push(&projections);
        let projection_tiles_at = self.block.push(&projection_tiles);
        let base = self.device.get_mut().stage(self.block.bytes().len());
        self.place_pieces(&plan, 0, &wanted, base, out + head as u64);
        self.send_block();
        self.device.get_mut().clear(out, flag_bytes);
        self.project(
            index,
            projections.address(base),
            projection_tiles_at.address(base),
            projection_tiles.len(),
        );
        let energies = if measures { out + flag_bytes as u64 } else { 0 };
        self.inspect(index, plan.segments.address(base), out, energies);
        self.gather(&plan, base);
        self.fetch(bytes);
        self.opened(index, frames, flag_bytes, head)
    }

    fn encode(&mut self, pieces: &[Piece<'_>], out: &mut Vec<u8>) {
        let parts = |piece: &Piece<'_>| self.layout.place(piece.segment).part;
        let (Some(first), Some(last)) = (
            pieces.iter().map(parts).min(),
            pieces.iter().map(parts).max(),
        ) else {
            return;
        };
        let bucket = self.layout.place(pieces[0].segment).bucket;
        let bytes = self.bytes_of(pieces);
        self.ensure_outbox(bytes);
        self.block.clear();
        let plan = self.plan_gather(bucket, &(first..last + 1), pieces);
        let base = self.device.get_mut().stage(self.block.bytes().len());
        self.place_pieces(&plan, first, pieces, base, self.outbox.address);
        self.send_block();
        self.gather(&plan, base);
        self.fetch(bytes);
        out.extend_from_slice(&self.outbox.host[..bytes]);
    }

    fn top_rows(&mut self, _: Segment, _: usize) -> Vec<u32> {
        // `new` refuses plans that would ask for it.
        let fault = DeviceFault("topk was asked for on a device".to_owned());
        self.device.get_mut().fail(fault);
        Vec::new()
    }

    fn commit(&mut self, ends: &[SegmentCommit<'_>]) -> Vec<Energies> {
        self.commit_round(ends)
    }

    fn restore(&mut self, segment: Segment, codec: ValueCodec, mean: &[u8], counted: bool) {
        self.restore_segment(segment, codec, mean, counted);
    }

    fn result(&self, tensor: TensorId) -> &[f32] {
        let index = tensor.index();
        if let Home::Lent(_) = self.homes[index] {
            // It is where the gradient was.
            return &[];
        }
        let (address, elements) = (self.own[index], self.layout.tensors[index].elements);
        self.results[index].get_or_init(|| {
            let mut device = self.device.borrow_mut();
            device.fetch_floats(address, elements)
        })
    }

    fn give_back(&mut self) {
        self.homes.fill(Home::Nowhere);
        self.passes.fill(None);
        self.results.fill(OnceCell::new());
    }

    fn finished(&mut self) -> Option<u64> {
        self.device.get_mut().finished()
    }

    fn failure(&self) -> Option<DeviceFault> {
        self.device.borrow().fault().cloned()
    }

    fn device_stats(&self) -> Option<DeviceStats> {
        Some(self.stats())
    }

    fn export(&self, tensor: TensorId) -> StateArrays {
        let tensor = &self.layout.tensors[tensor.index()];
        let mut device = self.device.borrow_mut();
        let arrays = tensor.arrays().into_iter();
        arrays
            .map(|(name, address)| (name, device.fetch_floats(address, tensor.padded)))
            .collect()
    }

    fn state_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)> {
        let tensor = &self.layout.tensors[tensor.index()];
        if tensor.rule.keeps_late {
            return Vec::new();
        }
        let arrays = tensor.arrays().into_iter();
        arrays.map(|(name, _)| (name, tensor.padded)).collect()
    }

    fn optional_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)> {
        let tensor = &self.layout.tensors[tensor.index()];
        if tensor.rule.keeps_late {
            vec![("residual", tensor.padded)]
        } else {
            Vec::new()
        }
    }

    fn import(&mut self, tensor: TensorId, name: &'static str, values: &[f32]) {
        let index = tensor.index();
        if self.layout.tensors[index].rule.keeps_late {
            return self.import_late(tensor, values);
        }
        let arrays = self.layout.tensors[index].arrays();
        let address = arrays.iter().find(|(known, _)| *known == name);
        if let Some((_, address)) = address {
            self.device.get_mut().upload(*address, values);
        }
    }
}

impl<D: Driver> DeviceBackend<D> {
    /// What lies in the outbox after [`Backend::open`]'s launches.
    fn opened(
        &self,
        bucket: usize,
        frames: &[Vec<Piece<'_>>],
        flag_bytes: usize,
        head: usize,
    ) -> Opened {
        let host = &self.outbox.host;
        let flags: Vec<bool> = host[..flag_bytes]
            .chunks_exact(4)
            .map(|flag| flag == [0; 4])
            .collect();
        let energies = host[flag_bytes..head].chunks_exact(8);
        let energies = energies.map(|x| f64::from_ne_bytes(x.try_into().expect("8 bytes")));
        let mut at = head;
        let mut cut = |pieces: &Vec<Piece<'_>>| {
            let bytes = self.bytes_of(pieces);
            at += bytes;
            host[at - bytes..at].to_vec()
        };
        Opened {
            frames: frames.iter().map(&mut cut).collect(),
            finite: self.layout.buckets[bucket]
                .shards
                .iter()
                .map(|parts| flags[parts.clone()].iter().all(|finite| *finite))
                .collect(),
            gradient_energy: energies.sum(),
        }
    }
}
