//! Where everything of a plan lies on the device, and how its launches are cut: made once per plan.

use super::driver::{Device, Driver};
use crate::backend::DeviceFault;
use crate::backend::rules::Rule;
use arc_topk_common::compress::ValueCodec;
use arc_topk_common::config::algorithm::{Feedback, ProjectionKind, ValueType};
use arc_topk_common::ids::TensorId;
use arc_topk_common::plan::{Plan, Segment, TensorPlan};
use arc_topk_kernels as kernels;
use arc_topk_kernels::{Element, SegmentShape, Wire, segment_tiles};
use core::ops::Range;
use std::collections::HashMap;

/// One tensor's state on the device.
pub(super) struct Tensor {
    pub(super) elements: usize,
    /// Elements with padding.
    pub(super) padded: usize,
    pub(super) width: usize,
    pub(super) rule: Rule,
    /// e of ef14, v of ef21m; 0: none. Of a tensor that keeps what was not counted it comes and goes.
    pub(super) blended: u64,
    /// h.
    pub(super) local: u64,
    /// H.
    pub(super) global: u64,
}

/// One segment.
pub(super) struct Part {
    pub(super) segment: Segment,
    pub(super) shape: SegmentShape,
    /// First element of the tensor.
    first: usize,
    /// Elements with padding.
    pub(super) padded: u32,
    pub(super) sparse: bool,
    /// In the bucket's table.
    pub(super) tiles: Range<usize>,
    /// Addresses of its scratch.
    pub(super) sketch: u64,
    pub(super) projection: u64,
    pub(super) energy: u64,
    /// Of a tensor that keeps what was not counted: whether this part of it was not.
    pub(super) late: bool,
}

/// One bucket.
pub(super) struct Bucket {
    /// Segments in the order of shards.
    pub(super) parts: Vec<Part>,
    /// Of which the shards own these.
    pub(super) shards: Vec<Range<usize>>,
    /// Tiles of all parts in order, on the device. Their segments count from the bucket's first on.
    pub(super) tiles: u64,
    /// Entries of its tensors' V, each once; empty unless it is Gaussian.
    pub(super) projections: Vec<kernels::Projection>,
    /// Floats of all its projections.
    projection_floats: usize,
}

/// Where a segment is found.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) bucket: usize,
    pub(super) part: usize,
}

pub(super) struct Layout {
    pub(super) tensors: Vec<Tensor>,
    pub(super) buckets: Vec<Bucket>,
    places: HashMap<(TensorId, u32), Place>,
    pub(super) rank: u32,
    pub(super) gaussian: bool,
}

/// Memory that some gradients, or results, have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Values {
    /// 0: there are none.
    pub(super) gradient: u64,
    /// 0: nowhere.
    pub(super) result: u64,
    pub(super) element: Element,
}

impl Layout {
    pub(super) fn new<D: Driver>(plan: &Plan, device: &mut Device<D>) -> Result<Self, DeviceFault> {
        let algorithm = &plan.spec.algorithm;
        let gaussian = algorithm.projection == ProjectionKind::Gaussian;
        let rank = u32::from(algorithm.sketch_rank);
        let mut layout = Self {
            tensors: plan
                .tensors
                .iter()
                .map(|tensor| Tensor::new(tensor, Rule::of(tensor, algorithm), device))
                .collect(),
            buckets: Vec::new(),
            places: HashMap::new(),
            rank,
            gaussian,
        };
        for (index, bucket) in plan.buckets.iter().enumerate() {
            let mut parts = Vec::new();
            let mut shards = Vec::new();
            for segments in &bucket.segments {
                let first = parts.len();
                for segment in segments {
                    let place = Place {
                        bucket: index,
                        part: parts.len(),
                    };
                    layout
                        .places
                        .insert((segment.tensor, segment.row_start), place);
                    let tensor = &plan.tensors[segment.tensor.index()];
                    parts.push(Part::new(*segment, tensor, rank)?);
                }
                shards.push(first..parts.len());
            }
            layout
                .buckets
                .push(Bucket::new(parts, shards, rank, gaussian, device));
        }
        layout.share_scratch(device);
        Ok(layout)
    }

    /// Buckets are opened and committed one after the other: one piece of scratch memory of each kind serves them all.
    fn share_scratch<D: Driver>(&mut self, device: &mut Device<D>) {
        let rank = self.rank as usize;
        let most = |of: &dyn Fn(&Bucket) -> usize| self.buckets.iter().map(of).max().unwrap_or(0);
        let sketch = most(&|bucket| bucket.sum(|part| part.sketch_floats(rank))) * 4;
        let energy = most(&|bucket| bucket.sum(Part::energies)) * 8;
        let projection = most(&|bucket| bucket.projection_floats) * 4;
        let sketch = device.allocate_scratch(sketch);
        let energy = device.allocate_scratch(energy);
        let projection = device.allocate_scratch(projection);
        for bucket in &mut self.buckets {
            bucket.place_scratch(rank, sketch, energy, projection);
        }
    }

    pub(super) fn place(&self, segment: Segment) -> Place {
        self.places[&(segment.tensor, segment.row_start)]
    }

    /// How the kernels see a part.
    pub(super) fn describe(&self, part: &Part, values: Values) -> kernels::Segment {
        let tensor = &self.tensors[part.segment.tensor.index()];
        let (keep, take) = match tensor.rule.feedback {
            Feedback::Ef21m => (1.0 - tensor.rule.params.eta, tensor.rule.params.eta),
            Feedback::Ef14 => (tensor.rule.params.decay, 1.0),
            // What was not counted of a tensor without state.
            Feedback::None | Feedback::Ef21 => (1.0, 1.0),
        };
        let at = |address: u64, bytes: usize| match address {
            0 => 0,
            address => address + (part.first * bytes) as u64,
        };
        let element_bytes = values.element.bytes();
        let elements = tensor.elements.saturating_sub(part.first);
        let mut segment = kernels::Segment {
            gradient: at(values.gradient, element_bytes),
            result: at(values.result, element_bytes),
            blended: at(tensor.blended, 4),
            local: at(tensor.local, 4),
            global: at(tensor.global, 4),
            sketch: part.sketch,
            projection: part.projection,
            energy: part.energy,
            elements: elements.min(part.padded as usize) as u32,
            padded: part.padded,
            row_start: part.segment.row_start,
            tensor: part.segment.tensor.0,
            element: values.element,
            keep,
            take,
            ..kernels::Segment::default()
        };
        part.shape.describe(&mut segment);
        segment
    }
}

impl Tensor {
    fn new<D: Driver>(tensor: &TensorPlan, rule: Rule, device: &mut Device<D>) -> Self {
        let padded = tensor.padded_elements();
        let mut array = |needed: bool| device.allocate_state(if needed { padded } else { 0 });
        let estimate = matches!(rule.feedback, Feedback::Ef21 | Feedback::Ef21m);
        Self {
            elements: tensor.elements,
            padded,
            width: tensor.width,
            rule,
            blended: array(matches!(rule.feedback, Feedback::Ef14 | Feedback::Ef21m)),
            local: array(estimate),
            global: array(estimate),
        }
    }

    /// Gives back what held what was not counted, if there is any.
    pub(super) fn release_late<D: Driver>(&mut self, device: &mut Device<D>) {
        if self.rule.keeps_late && self.blended != 0 {
            device.free_state(core::mem::take(&mut self.blended), self.padded);
        }
    }

    /// Names, addresses and lengths of its arrays, in the order of checkpoints.
    pub(super) fn arrays(&self) -> Vec<(&'static str, u64)> {
        let blended = match self.rule.feedback {
            Feedback::Ef21m => "momentum",
            _ => "residual",
        };
        [
            (blended, self.blended),
            ("local", self.local),
            ("global", self.global),
        ]
        .into_iter()
        .filter(|(_, address)| *address != 0)
        .collect()
    }
}

impl Part {
    fn new(segment: Segment, tensor: &TensorPlan, rank: u32) -> Result<Self, DeviceFault> {
        let rows = segment.rows();
        let padded = u32::try_from(rows * tensor.width).map_err(|_| {
            DeviceFault(format!(
                "{} elements of {} lie on one shard, and kernels count to 2³²: use more shards",
                rows * tensor.width,
                tensor.spec.name
            ))
        })?;
        Ok(Self {
            segment,
            shape: if tensor.sparse {
                SegmentShape::new(rows as u32, tensor.width as u32, rank)
            } else {
                SegmentShape::flat(padded)
            },
            first: segment.row_start as usize * tensor.width,
            padded,
            sparse: tensor.sparse,
            tiles: 0..0,
            sketch: 0,
            projection: 0,
            energy: 0,
            late: false,
        })
    }

    /// Sums of its sketch; none if it travels whole.
    fn sketch_floats(&self, rank: usize) -> usize {
        if self.sparse {
            (self.shape.parts * self.shape.rows) as usize * rank
        } else {
            0
        }
    }

    /// Energies that its rows leave.
    pub(super) fn energies(&self) -> usize {
        (self.shape.parts * self.shape.rows) as usize
    }
}

impl Bucket {
    fn new<D: Driver>(
        mut parts: Vec<Part>,
        shards: Vec<Range<usize>>,
        rank: u32,
        gaussian: bool,
        device: &mut Device<D>,
    ) -> Self {
        let shapes: Vec<SegmentShape> = parts.iter().map(|part| part.shape).collect();
        let tiles = segment_tiles(&shapes);
        for (index, part) in parts.iter_mut().enumerate() {
            let from = tiles.partition_point(|tile| (tile.segment as usize) < index);
            let to = tiles.partition_point(|tile| tile.segment as usize <= index);
            part.tiles = from..to;
        }
        let mut projections: Vec<kernels::Projection> = Vec::new();
        let sparse = parts.iter().filter(|part| part.sparse && gaussian);
        for part in sparse {
            let tensor = part.segment.tensor.0;
            if !projections.iter().any(|known| known.tensor == tensor) {
                projections.push(kernels::Projection {
                    out: 0,
                    entries: part.shape.width * rank,
                    tensor,
                });
            }
        }
        let bytes: &[u8] = bytemuck::cast_slice(&tiles);
        let address = device.allocate_scratch(bytes.len());
        device.upload_bytes(address, bytes);
        let entries = projections
            .iter()
            .map(|projection| projection.entries as usize);
        Self {
            projection_floats: entries.sum(),
            parts,
            shards,
            tiles: address,
            projections,
        }
    }

    pub(super) fn tile_count(&self) -> usize {
        self.parts.last().map_or(0, |part| part.tiles.end)
    }

    fn sum(&self, of: impl Fn(&Part) -> usize) -> usize {
        self.parts.iter().map(of).sum()
    }

    fn place_scratch(&mut self, rank: usize, mut sketch: u64, mut energy: u64, projection: u64) {
        let mut at = projection;
        for projection in &mut self.projections {
            projection.out = at;
            at += u64::from(projection.entries) * 4;
        }
        for part in &mut self.parts {
            let tensor = part.segment.tensor.0;
            let mut known = self.projections.iter();
            part.projection = known
                .find(|projection| projection.tensor == tensor)
                .map_or(0, |projection| projection.out);
            if part.sparse {
                part.sketch = sketch;
            }
            part.energy = energy;
            sketch += part.sketch_floats(rank) as u64 * 4;
            energy += part.energies() as u64 * 8;
        }
    }
}

pub(super) fn wire(codec: ValueCodec) -> Wire {
    match codec.value_type {
        ValueType::F32 => Wire::F32,
        ValueType::Bf16 => Wire::Bf16,
        ValueType::F16 => Wire::F16,
        ValueType::Int8 => Wire::Int8,
        ValueType::Int4 => Wire::Int4,
    }
}
