//! Bytes of a [`PlanSpec`]: inside Hello, and what the plan's hash is taken of.
//!
//! Fields in the order below, little endian; floats as their bits, so that equal settings have equal bytes.

use super::WireError;
use super::codec::{Reader, Writer};
use crate::config::AlgorithmConfig;
use crate::config::algorithm::{
    Compressor, Feedback, Init, ProjectionKind, SelectionPolicy, ValueType,
};
use crate::plan::{DType, PlanSpec, TensorSpec};

/// Most tensors of a plan.
pub const MAX_TENSORS: usize = 1 << 16;
/// Longest tensor name, bytes.
pub const MAX_NAME_BYTES: usize = 512;
/// Longest text of what trainers agree on, bytes.
pub const MAX_TRAINER_BYTES: usize = 8192;
/// Most dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 8;

/// A choice and its number on the wire. Numbers are never reused.
trait Choice: Copy + PartialEq + 'static {
    const WHAT: &'static str;
    const ALL: &'static [Self];

    fn write(self, w: &mut Writer<'_>) {
        let number = Self::ALL
            .iter()
            .position(|v| *v == self)
            .expect("ALL lists every choice");
        w.u8(number as u8);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let value = r.u8(Self::WHAT)?;
        Self::ALL
            .get(usize::from(value))
            .copied()
            .ok_or(WireError::Unknown {
                what: Self::WHAT,
                value: u64::from(value),
            })
    }
}

impl Choice for Compressor {
    const WHAT: &'static str = "compressor";
    const ALL: &'static [Self] = &[Self::Dense, Self::Arc, Self::Randk, Self::Topk];
}
impl Choice for Feedback {
    const WHAT: &'static str = "feedback rule";
    const ALL: &'static [Self] = &[Self::None, Self::Ef14, Self::Ef21, Self::Ef21m];
}
impl Choice for Init {
    const WHAT: &'static str = "feedback start";
    const ALL: &'static [Self] = &[Self::FirstGradient, Self::Zeros];
}
impl Choice for ProjectionKind {
    const WHAT: &'static str = "projection";
    const ALL: &'static [Self] = &[Self::Rademacher, Self::Gaussian];
}
impl Choice for SelectionPolicy {
    const WHAT: &'static str = "selection policy";
    const ALL: &'static [Self] = &[Self::PerTensor, Self::Pooled];
}
impl Choice for ValueType {
    const WHAT: &'static str = "value type";
    const ALL: &'static [Self] = &[Self::F32, Self::Bf16, Self::F16, Self::Int8, Self::Int4];
}
impl Choice for DType {
    const WHAT: &'static str = "gradient type";
    const ALL: &'static [Self] = &[Self::F32, Self::Bf16, Self::F16];
}

/// The canonical bytes of a spec.
#[must_use]
pub fn encode_plan_spec(spec: &PlanSpec) -> Vec<u8> {
    let mut out = Vec::new();
    write_plan_spec(&mut Writer(&mut out), spec);
    out
}

pub(super) fn write_plan_spec(w: &mut Writer<'_>, spec: &PlanSpec) {
    write_algorithm(w, &spec.algorithm);
    w.text_cut(&spec.trainer, MAX_TRAINER_BYTES);
    w.u16(spec.shards);
    w.count(spec.tensors.len());
    for tensor in &spec.tensors {
        w.text(&tensor.name);
        w.count(tensor.shape.len());
        tensor.shape.iter().for_each(|dimension| w.u64(*dimension));
        tensor.dtype.write(w);
        w.option(tensor.density, Writer::f32);
    }
}

pub(super) fn read_plan_spec(r: &mut Reader<'_>) -> Result<PlanSpec, WireError> {
    let algorithm = read_algorithm(r)?;
    let trainer = r.text("trainer's settings", MAX_TRAINER_BYTES)?;
    let shards = r.u16("shards")?;
    // The shortest tensor: two counts, a type and an absent density.
    let count = r.count("tensors", MAX_TENSORS, 10)?;
    let tensors = (0..count)
        .map(|_| read_tensor(r))
        .collect::<Result<_, _>>()?;
    Ok(PlanSpec {
        trainer,
        algorithm,
        shards,
        tensors,
    })
}

fn read_tensor(r: &mut Reader<'_>) -> Result<TensorSpec, WireError> {
    let name = r.text("tensor name", MAX_NAME_BYTES)?;
    let dimensions = r.count("tensor dimensions", MAX_DIMENSIONS, 8)?;
    let shape = (0..dimensions)
        .map(|_| r.u64("dimension"))
        .collect::<Result<_, _>>()?;
    let dtype = DType::read(r)?;
    let density = r.option("tensor density option", |r| r.f32("tensor density"))?;
    Ok(TensorSpec {
        name,
        shape,
        dtype,
        density,
    })
}

fn write_algorithm(w: &mut Writer<'_>, a: &AlgorithmConfig) {
    // Destructured so that a new setting cannot be forgotten here, and with it in the plan's hash.
    let AlgorithmConfig {
        compressor,
        feedback,
        init,
        eta,
        feedback_decay,
        density,
        energy,
        sketch_rank,
        projection,
        selection,
        block_width,
        dense_below_elements,
        wire_up,
        wire_down,
        wire_sketch,
        wire_dense,
        wire_warmup,
        quant_block,
        warmup_updates,
        ramp_updates,
        seed,
        bucket_bytes,
    } = a;
    compressor.write(w);
    feedback.write(w);
    init.write(w);
    [eta, feedback_decay, density, energy]
        .into_iter()
        .for_each(|v| w.f32(*v));
    w.u16(*sketch_rank);
    projection.write(w);
    selection.write(w);
    w.u32(*block_width);
    w.u32(*dense_below_elements);
    [wire_up, wire_down, wire_sketch, wire_dense, wire_warmup]
        .into_iter()
        .for_each(|v| v.write(w));
    w.u32(*quant_block);
    [warmup_updates, ramp_updates, seed]
        .into_iter()
        .for_each(|v| w.u64(*v));
    w.u32(*bucket_bytes);
}

fn read_algorithm(r: &mut Reader<'_>) -> Result<AlgorithmConfig, WireError> {
    Ok(AlgorithmConfig {
        compressor: Compressor::read(r)?,
        feedback: Feedback::read(r)?,
        init: Init::read(r)?,
        eta: r.f32("eta")?,
        feedback_decay: r.f32("feedback_decay")?,
        density: r.f32("density")?,
        energy: r.f32("energy")?,
        sketch_rank: r.u16("sketch_rank")?,
        projection: ProjectionKind::read(r)?,
        selection: SelectionPolicy::read(r)?,
        block_width: r.u32("block_width")?,
        dense_below_elements: r.u32("dense_below_elements")?,
        wire_up: ValueType::read(r)?,
        wire_down: ValueType::read(r)?,
        wire_sketch: ValueType::read(r)?,
        wire_dense: ValueType::read(r)?,
        wire_warmup: ValueType::read(r)?,
        quant_block: r.u32("quant_block")?,
        warmup_updates: r.u64("warmup_updates")?,
        ramp_updates: r.u64("ramp_updates")?,
        seed: r.u64("seed")?,
        bucket_bytes: r.u32("bucket_bytes")?,
    })
}
