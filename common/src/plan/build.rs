//! From a spec to a plan: validation, the view of every tensor, buckets, shard ranges.

use super::{BucketPlan, Plan, PlanSpec, Segment, TensorPlan, TensorSpec};
use crate::config::algorithm::{AlgorithmConfig, Compressor, ValueType};
use crate::config::{SettingError, check_density};
use crate::ids::{BucketId, TensorId};
use crate::wire::{MAX_BODY_BYTES, MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSORS, selection_limit};
use std::collections::HashMap;

/// Most shards of a job.
pub const MAX_SHARDS: usize = 256;
/// Most buckets of a plan.
pub const MAX_BUCKETS: usize = 4096;
/// Most elements of a tensor: rows are numbered by u32.
pub const MAX_ELEMENTS: u64 = 1 << 31;
/// A tensor is cut between shards only where each piece keeps at least this many rows a round. With fewer, rounding
/// K_s up raises the density, and a shard has too few rows to choose among.
pub const MIN_CUT_KEPT_ROWS: usize = 4;
/// A dense tensor is cut only into pieces of at least this many elements.
pub const MIN_CUT_DENSE_ELEMENTS: usize = 1024;
/// Longest row count for which an exactly fitting cut is sought.
const MAX_QUANTUM_ROWS: usize = 128;

/// A spec that gives no plan. Every message names cause and remedy.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum PlanError {
    /// A setting is outside its range.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// Nothing to train.
    #[error("the plan has no tensors: register the model's trainable parameters before connecting")]
    NoTensors,
    /// More tensors than a plan may have.
    #[error(
        "the plan has {tensors} tensors, above the limit of {MAX_TENSORS}: fuse small parameters into larger ones"
    )]
    TooManyTensors {
        /// Registered.
        tensors: usize,
    },
    /// A name that is empty or too long.
    #[error(
        "tensor {at}: its name has {bytes} bytes, but must have 1 to {MAX_NAME_BYTES}: rename the parameter"
    )]
    Name {
        /// Position.
        at: usize,
        /// Length.
        bytes: usize,
    },
    /// Two tensors have one name.
    #[error(
        "tensors {first} and {second} are both named {name:?}: every parameter needs a name of its own (is a shared weight registered twice?)"
    )]
    DuplicateName {
        /// Name.
        name: String,
        /// First position.
        first: usize,
        /// Second position.
        second: usize,
    },
    /// A shape that cannot be used.
    #[error("tensor {at} {name:?}: shape {shape:?} {problem}")]
    Shape {
        /// Position.
        at: usize,
        /// Name.
        name: String,
        /// Shape.
        shape: Vec<u64>,
        /// What is wrong and what to do.
        problem: &'static str,
    },
    /// A tensor's own density is outside its range.
    #[error("tensor {at} {name:?}: {source}")]
    TensorDensity {
        /// Position.
        at: usize,
        /// Name.
        name: String,
        /// What is wrong.
        source: SettingError,
    },
    /// More buckets than a plan may have.
    #[error(
        "bucket_bytes is {bucket_bytes}, which makes more than {MAX_BUCKETS} buckets: set a larger one (26214400 is the default)"
    )]
    TooManyBuckets {
        /// Setting.
        bucket_bytes: u32,
    },
    /// A shard's share of a bucket does not fit into a frame.
    #[error(
        "bucket {bucket} (its largest tensor is {name:?}) gives one shard {bytes} bytes a frame, above the limit of \
         {MAX_BODY_BYTES}: use more shards (now {shards}), a smaller bucket_bytes, or split the tensor"
    )]
    BodyTooLarge {
        /// Bucket.
        bucket: usize,
        /// Largest tensor in it.
        name: String,
        /// Bytes of the largest frame.
        bytes: u64,
        /// Shards.
        shards: u16,
    },
}

impl Plan {
    /// Builds the plan.
    ///
    /// # Errors
    /// [`PlanError`] if a setting, name, shape or density is outside its range, or a frame would be too large.
    pub fn build(spec: PlanSpec) -> Result<Self, PlanError> {
        spec.algorithm.validate()?;
        if !(1..=MAX_SHARDS).contains(&usize::from(spec.shards)) {
            let advice =
                "list the address of every parameter server once, in the same order on all workers";
            return Err(SettingError::new("shards", spec.shards, "1 to 256", advice).into());
        }
        check_names(&spec.tensors)?;
        let mut tensors = Vec::with_capacity(spec.tensors.len());
        for (at, tensor) in spec.tensors.iter().enumerate() {
            tensors.push(view(&spec.algorithm, at, tensor)?);
        }
        let buckets = fill_buckets(&spec, &mut tensors)?;
        let plan = Self {
            spec,
            tensors,
            buckets,
        };
        plan.check_bodies()?;
        Ok(plan)
    }

    /// Bounds every frame by what it takes with four bytes a value.
    fn check_bodies(&self) -> Result<(), PlanError> {
        let rank = u64::from(self.spec.algorithm.sketch_rank);
        for bucket in &self.buckets {
            for segments in &bucket.segments {
                let bytes = segments.iter().map(|segment| {
                    let rows = segment.rows();
                    let values = (rows * self.tensors[segment.tensor.index()].width) as u64;
                    4 * values.max(rows as u64 * rank) + selection_limit(rows) as u64
                });
                let bytes = bytes.sum();
                if bytes > MAX_BODY_BYTES as u64 {
                    let largest = bucket
                        .tensors
                        .iter()
                        .max_by_key(|t| self.tensors[t.index()].elements);
                    let name = largest
                        .map_or_else(String::new, |t| self.tensors[t.index()].spec.name.clone());
                    return Err(PlanError::BodyTooLarge {
                        bucket: bucket.id.index(),
                        name,
                        bytes,
                        shards: self.spec.shards,
                    });
                }
            }
        }
        Ok(())
    }
}

fn check_names(tensors: &[TensorSpec]) -> Result<(), PlanError> {
    if tensors.is_empty() {
        return Err(PlanError::NoTensors);
    }
    if tensors.len() > MAX_TENSORS {
        return Err(PlanError::TooManyTensors {
            tensors: tensors.len(),
        });
    }
    let mut seen = HashMap::with_capacity(tensors.len());
    for (second, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.name.len();
        if bytes == 0 || bytes > MAX_NAME_BYTES {
            return Err(PlanError::Name { at: second, bytes });
        }
        if let Some(first) = seen.insert(tensor.name.as_str(), second) {
            return Err(PlanError::DuplicateName {
                name: tensor.name.clone(),
                first,
                second,
            });
        }
    }
    Ok(())
}

/// Rows and width of a tensor; its bucket is not known yet.
fn view(
    algorithm: &AlgorithmConfig,
    at: usize,
    spec: &TensorSpec,
) -> Result<TensorPlan, PlanError> {
    let wrong = |problem| PlanError::Shape {
        at,
        name: spec.name.clone(),
        shape: spec.shape.clone(),
        problem,
    };
    if spec.shape.len() > MAX_DIMENSIONS {
        return Err(wrong("has more than 8 dimensions: reshape the parameter"));
    }
    if spec.shape.contains(&0) {
        return Err(wrong(
            "has no elements: leave the parameter out of the list",
        ));
    }
    let elements = spec
        .shape
        .iter()
        .try_fold(1u64, |product, d| product.checked_mul(*d));
    let elements = elements
        .filter(|e| *e <= MAX_ELEMENTS)
        .ok_or_else(|| wrong("has more than 2^31 elements: split the parameter"))?;
    if let Some(density) = spec.density {
        check_density(density).map_err(|source| PlanError::TensorDensity {
            at,
            name: spec.name.clone(),
            source,
        })?;
    }
    let elements = elements as usize;
    let sparse = spec.shape.len() >= 2 && elements >= algorithm.dense_below_elements as usize;
    let (rows, width) = match (sparse, algorithm.block_width as usize) {
        (false, _) => (elements, 1),
        (true, 0) => (spec.shape[0] as usize, elements / spec.shape[0] as usize),
        (true, block) => (elements.div_ceil(block.min(elements)), block.min(elements)),
    };
    let id = TensorId(at as u32);
    Ok(TensorPlan {
        id,
        spec: spec.clone(),
        elements,
        rows,
        width,
        sparse,
        bucket: BucketId(0),
    })
}

/// Tensors in reverse registration order, closed when the next one would not fit.
fn fill_buckets(spec: &PlanSpec, tensors: &mut [TensorPlan]) -> Result<Vec<BucketPlan>, PlanError> {
    let limit = u64::from(spec.algorithm.bucket_bytes);
    let mut groups: Vec<Vec<TensorId>> = Vec::new();
    let mut filled = u64::MAX;
    for tensor in tensors.iter_mut().rev() {
        let bytes = tensor.elements as u64 * 4;
        if filled.saturating_add(bytes) > limit {
            groups.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if groups.len() > MAX_BUCKETS {
            return Err(PlanError::TooManyBuckets {
                bucket_bytes: spec.algorithm.bucket_bytes,
            });
        }
        tensor.bucket = BucketId((groups.len() - 1) as u16);
        if let Some(group) = groups.last_mut() {
            group.push(tensor.id);
        }
    }
    let mut load = vec![0u64; usize::from(spec.shards)];
    let divide = |(at, members): (usize, Vec<TensorId>)| {
        let segments = divide(&spec.algorithm, tensors, &members, &mut load);
        BucketPlan {
            id: BucketId(at as u16),
            tensors: members,
            segments,
        }
    };
    Ok(groups.into_iter().enumerate().map(divide).collect())
}

/// A tensor as the division sees it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    tensor: TensorId,
    rows: usize,
    /// What a row costs on the wire in the steady state, thousandths of a bit.
    row_cost: u64,
    /// Cuts lie at multiples of this many rows, so that rounding K_s up adds nothing.
    quantum: usize,
    /// Fewest rows before and after a cut.
    min_rows: usize,
}

impl Piece {
    fn new(algorithm: &AlgorithmConfig, tensor: &TensorPlan) -> Self {
        let bits = |value_type| match value_type {
            ValueType::F32 => 32.0,
            ValueType::Bf16 | ValueType::F16 => 16.0,
            ValueType::Int8 => 8.0,
            ValueType::Int4 => 4.0,
        };
        let milli_bits = |cost: f64| ((cost * 1000.0).round() as u64).max(1);
        if !tensor.sparse || algorithm.compressor == Compressor::Dense {
            let min_rows = MIN_CUT_DENSE_ELEMENTS.div_ceil(tensor.width);
            let row_cost = milli_bits(tensor.width as f64 * bits(algorithm.wire_dense));
            return Self {
                tensor: tensor.id,
                rows: tensor.rows,
                row_cost,
                quantum: 1,
                min_rows,
            };
        }
        let density = f64::from(tensor.spec.density.unwrap_or(algorithm.density));
        let sketch = match algorithm.compressor {
            Compressor::Arc => f64::from(algorithm.sketch_rank) * bits(algorithm.wire_sketch),
            Compressor::Randk | Compressor::Topk | Compressor::Dense => 0.0,
        };
        let values = density * tensor.width as f64 * bits(algorithm.wire_up);
        let whole = |rows: &usize| {
            let kept = density * *rows as f64;
            kept >= 0.5 && (kept - kept.round()).abs() < 1e-6 * kept
        };
        Self {
            tensor: tensor.id,
            rows: tensor.rows,
            row_cost: milli_bits(values + sketch),
            quantum: (1..=MAX_QUANTUM_ROWS).find(whole).unwrap_or(1),
            min_rows: (MIN_CUT_KEPT_ROWS as f64 / density).ceil() as usize,
        }
    }

    fn cost(&self) -> u64 {
        self.rows as u64 * self.row_cost
    }

    /// Row at which to cut so that about `cost` lies before, not before `from`; 0 and `rows` are always allowed.
    fn cut(&self, cost: u64, from: usize) -> usize {
        let distance = |row: usize| (row as u64 * self.row_cost).abs_diff(cost);
        let first = if from == 0 {
            self.min_rows
        } else {
            from + self.min_rows
        };
        let last = self.rows.saturating_sub(self.min_rows);
        let wanted = usize::try_from(cost / self.row_cost).unwrap_or(usize::MAX);
        let below = wanted.clamp(first.min(last), last) / self.quantum * self.quantum;
        [from, below, below + self.quantum, self.rows]
            .into_iter()
            .filter(|row| *row == from || *row == self.rows || (first..=last).contains(row))
            .min_by_key(|row| distance(*row))
            .unwrap_or(self.rows)
    }
}

/// Cuts the concatenated rows of a bucket into one contiguous part per shard, of about equal cost, and deals the parts
/// out so that the loads of all buckets so far stay level.
fn divide(
    algorithm: &AlgorithmConfig,
    tensors: &[TensorPlan],
    members: &[TensorId],
    load: &mut [u64],
) -> Vec<Vec<Segment>> {
    let pieces: Vec<Piece> = members
        .iter()
        .map(|t| Piece::new(algorithm, &tensors[t.index()]))
        .collect();
    let shards = load.len();
    let total: u64 = pieces.iter().map(Piece::cost).sum();
    let mut parts = vec![(0u64, Vec::new()); shards];
    let (mut part, mut before) = (0, 0u64);
    for piece in &pieces {
        let mut from = 0;
        while from < piece.rows {
            // Where this part should end, counted from the piece's start.
            let target = (u128::from(total) * (part as u128 + 1) / shards as u128) as u64;
            let end = if part + 1 == shards {
                piece.rows
            } else {
                piece.cut(target.saturating_sub(before), from)
            };
            if end > from {
                parts[part].0 += (end - from) as u64 * piece.row_cost;
                parts[part].1.push(Segment {
                    tensor: piece.tensor,
                    row_start: from as u32,
                    row_end: end as u32,
                });
            }
            if end < piece.rows {
                part += 1;
            }
            from = end;
        }
        before += piece.cost();
    }
    deal(parts, load)
}

/// Rotates the parts over the shards so that the highest load becomes as small as it can.
fn deal(parts: Vec<(u64, Vec<Segment>)>, load: &mut [u64]) -> Vec<Vec<Segment>> {
    let shards = load.len();
    let highest = |turn: usize| {
        (0..shards)
            .map(|s| load[s] + parts[(s + turn) % shards].0)
            .max()
    };
    let turn = (0..shards).min_by_key(|turn| highest(*turn)).unwrap_or(0);
    let mut dealt = parts;
    dealt.rotate_left(turn);
    load.iter_mut()
        .zip(&dealt)
        .for_each(|(load, part)| *load += part.0);
    dealt.into_iter().map(|part| part.1).collect()
}

/// For tests: highest cost of a shard's part above an equal share, and what the cutting rules may cause.
#[cfg(test)]
pub(super) fn imbalance(plan: &Plan, bucket: &BucketPlan) -> (u64, u64) {
    let piece = |t: &TensorId| Piece::new(&plan.spec.algorithm, &plan.tensors[t.index()]);
    let cost = |s: &Segment| s.rows() as u64 * piece(&s.tensor).row_cost;
    let highest = bucket
        .segments
        .iter()
        .map(|part| part.iter().map(cost).sum::<u64>())
        .max();
    let total: u64 = bucket.tensors.iter().map(|t| piece(t).cost()).sum();
    let step = |p: Piece| p.rows.min(p.min_rows + p.quantum) as u64 * p.row_cost;
    let coarsest = bucket.tensors.iter().map(|t| step(piece(t))).max();
    (
        highest
            .unwrap_or(0)
            .saturating_sub(total / bucket.segments.len() as u64),
        2 * coarsest.unwrap_or(0) + 1,
    )
}
