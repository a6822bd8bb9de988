//! What a plan will cost: bytes of a step by kind, and seconds on links of a given rate.
//!
//! The model is plain: a link carries its rate in both directions at once; a phase ends when the busiest link of that
//! phase has carried its bytes, plus one round trip; buckets are pipelined, so the round trips of a step are those of
//! one bucket. Compression, computing and loss are left out: compare predictions with each other and measure.
//!
//! Where an `energy` below 1 chooses the rows, how many come is known only once there are gradients: then bytes and seconds are
//! those of a step that takes the whole density, and no step takes more.

use super::{Plan, PlanError, PlanSpec};
use crate::config::AlgorithmConfig;
use crate::config::algorithm::{Compressor, RoundKind};
use crate::ids::{BucketId, ShardId};
use crate::wire::{Direction, FrameKind, HEADER_BYTES, RoundShape, selection_limit};
use serde::Serialize;

/// Bytes of a step by kind, one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct KindBytes {
    /// Sketches.
    pub sketch: u64,
    /// Chosen rows, at most (a bitmap's size; deltas are smaller).
    pub selection: u64,
    /// Values of chosen rows; at most, where the energy is below 1.
    pub values: u64,
    /// Dense tensors and dense rounds.
    pub dense: u64,
    /// Frame headers.
    pub control: u64,
}

impl KindBytes {
    /// All kinds together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.sketch + self.selection + self.values + self.dense + self.control
    }

    fn add(&mut self, other: &Self) {
        self.sketch += other.sketch;
        self.selection += other.selection;
        self.values += other.values;
        self.dense += other.dense;
        self.control += other.control;
    }
}

/// What one worker exchanges with one shard in a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ShardBytes {
    /// Worker → shard.
    pub up: KindBytes,
    /// Shard → worker.
    pub down: KindBytes,
}

/// Bytes of a step of one worker.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct StepBytes {
    /// Worker → all shards.
    pub up: KindBytes,
    /// All shards → worker.
    pub down: KindBytes,
    /// Per shard.
    pub shards: Vec<ShardBytes>,
    /// Round trips that follow each other within a bucket.
    pub round_trips: u32,
    /// Bytes of all gradients as f32.
    pub dense_equivalent: u64,
}

/// Where shards run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Placement {
    /// Machines of their own, each with a link of its own.
    #[default]
    Separate,
    /// Shard i on the machine of worker i mod W: both share that machine's link, and what stays on it costs nothing.
    CoLocated,
}

/// The network.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Network {
    /// Workers W.
    pub workers: u16,
    /// Where shards run.
    pub placement: Placement,
    /// Rate of each machine's link in either direction, bit/s.
    pub bits_per_second: f64,
    /// Round trip, seconds.
    pub round_trip_seconds: f64,
}

/// One way of exchanging a step's gradients.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Prediction {
    /// What it is, for a table.
    pub name: String,
    /// Bytes that a worker sends in a step.
    pub bytes_up: u64,
    /// Bytes that it receives.
    pub bytes_down: u64,
    /// f32 bytes of the gradient over `bytes_up`.
    pub reduction: f64,
    /// Seconds of communication, unless it overlaps with computing.
    pub seconds: f64,
}

impl Plan {
    /// Bytes of the step of update number `update`; an upper bound where an `energy` below 1 chooses the rows.
    #[must_use]
    pub fn step_bytes(&self, update: u64) -> StepBytes {
        let mut shards = vec![ShardBytes::default(); self.shards()];
        let mut round_trips = 0;
        for bucket in &self.buckets {
            for (at, shard) in shards.iter_mut().enumerate() {
                let shape =
                    RoundShape::new(self, BucketId(bucket.id.0), ShardId(at as u16), update);
                round_trips = round_trips.max(shape.phases().len() as u32);
                for phase in shape.phases() {
                    shard.up.add(&frame_bytes(&shape, phase.up));
                    shard.down.add(&frame_bytes(&shape, phase.down));
                }
            }
        }
        let (mut up, mut down) = (KindBytes::default(), KindBytes::default());
        for shard in &shards {
            up.add(&shard.up);
            down.add(&shard.down);
        }
        StepBytes {
            up,
            down,
            shards,
            round_trips,
            dense_equivalent: self.elements() as u64 * 4,
        }
    }
}

/// Bytes of one frame. Of topk's union down, what one worker sent: its true size depends on how far workers agree.
fn frame_bytes(shape: &RoundShape, kind: FrameKind) -> KindBytes {
    let keep = shape.keep();
    let tensors = || {
        shape
            .dense
            .iter()
            .map(|s| shape.codec_dense.encoded_bytes(s.elements()) as u64)
            .sum::<u64>()
    };
    let selections = || {
        shape
            .sparse
            .iter()
            .map(|s| selection_limit(s.rows) as u64)
            .sum::<u64>()
    };
    let values = |direction| shape.values_bytes(&keep, direction) as u64;
    let mut bytes = KindBytes {
        control: HEADER_BYTES as u64,
        ..KindBytes::default()
    };
    match kind {
        FrameKind::Sketch => {
            bytes.dense = tensors();
            bytes.sketch = shape.sketch_layout().bytes as u64 - bytes.dense;
        }
        FrameKind::Selection => (bytes.selection, bytes.dense) = (selections(), tensors()),
        FrameKind::Values | FrameKind::Mean => {
            let direction = if kind.is_down() {
                Direction::Down
            } else {
                Direction::Up
            };
            bytes.values = values(direction);
            bytes.dense = shape.values_layout(&keep, direction).bytes as u64 - bytes.values;
        }
        FrameKind::Dense
        | FrameKind::DenseMean
        | FrameKind::Estimates
        | FrameKind::EstimatesMean => bytes.dense = shape.dense_layout().bytes as u64,
        FrameKind::Restore => {}
        FrameKind::Sparse | FrameKind::SparseMean => {
            let direction = if kind.is_down() {
                Direction::Down
            } else {
                Direction::Up
            };
            (bytes.selection, bytes.values, bytes.dense) =
                (selections(), values(direction), tensors());
        }
    }
    bytes
}

impl StepBytes {
    /// Seconds of communication of this step.
    ///
    /// # Panics
    /// If the network has no worker or its rate is not positive.
    #[must_use]
    pub fn seconds(&self, network: &Network) -> f64 {
        assert!(
            network.workers > 0 && network.bits_per_second > 0.0,
            "a network has workers and a rate"
        );
        let bits = 8.0 * self.busiest_link_bytes(network);
        bits / network.bits_per_second + f64::from(self.round_trips) * network.round_trip_seconds
    }

    /// Bytes of the busiest direction of the busiest link.
    fn busiest_link_bytes(&self, network: &Network) -> f64 {
        let workers = usize::from(network.workers);
        let n = workers as f64;
        let (up, down) = (self.up.total() as f64, self.down.total() as f64);
        match network.placement {
            Placement::Separate => {
                let shard = |s: &ShardBytes| n * s.up.total().max(s.down.total()) as f64;
                self.shards.iter().map(shard).fold(up.max(down), f64::max)
            }
            Placement::CoLocated => {
                let machine = |machine: usize| {
                    let (mut out, mut into) = (up, down);
                    for shard in self.shards.iter().skip(machine).step_by(workers) {
                        // Towards its own shards a worker sends nothing over the link; the others' traffic joins.
                        let (up, down) = (shard.up.total() as f64, shard.down.total() as f64);
                        out += (n - 1.0) * down - up;
                        into += (n - 1.0) * up - down;
                    }
                    out.max(into)
                };
                (0..workers).map(machine).fold(0.0, f64::max)
            }
        }
    }
}

/// A dense f32 ring all-reduce of `elements` gradients: 2(W−1)/W of them cross every link in 2(W−1) phases.
#[must_use]
pub fn ring_all_reduce(elements: usize, network: &Network) -> Prediction {
    let n = f64::from(network.workers);
    let dense = elements as f64 * 4.0;
    let bytes = 2.0 * (n - 1.0) / n * dense;
    let latency = 2.0 * (n - 1.0) * network.round_trip_seconds / 2.0;
    Prediction {
        name: "dense f32, ring all-reduce".to_owned(),
        bytes_up: bytes as u64,
        bytes_down: bytes as u64,
        reduction: if bytes > 0.0 {
            dense / bytes
        } else {
            f64::INFINITY
        },
        seconds: 8.0 * bytes / network.bits_per_second + latency,
    }
}

/// Predicts the steady state of `spec` (after warm-up and ramp) through shards.
///
/// # Errors
/// If the spec gives no plan.
pub fn through_shards(spec: &PlanSpec, network: &Network) -> Result<Prediction, PlanError> {
    let plan = Plan::build(spec.clone())?;
    let algorithm = &plan.spec.algorithm;
    let step = plan.step_bytes(steady_update(algorithm));
    let bytes_up = step.up.total();
    Ok(Prediction {
        name: name(algorithm),
        bytes_up,
        bytes_down: step.down.total(),
        reduction: step.dense_equivalent as f64 / bytes_up.max(1) as f64,
        seconds: step.seconds(network),
    })
}

/// First update after warm-up and ramp.
#[must_use]
pub fn steady_update(algorithm: &AlgorithmConfig) -> u64 {
    algorithm
        .warmup_updates
        .saturating_add(algorithm.ramp_updates)
        .max(1)
}

fn name(algorithm: &AlgorithmConfig) -> String {
    let shown = |v: crate::config::algorithm::ValueType| format!("{v:?}").to_lowercase();
    match (
        algorithm.round_kind(steady_update(algorithm)),
        algorithm.compressor,
    ) {
        (RoundKind::Dense, _) | (_, Compressor::Dense) => {
            format!("dense {}, shards", shown(algorithm.wire_dense))
        }
        (RoundKind::Sparse { density }, compressor) => {
            let compressor = format!("{compressor:?}").to_lowercase();
            let rows = if algorithm.energy < 1.0 {
                format!("at most {density}, energy {}", algorithm.energy)
            } else {
                density.to_string()
            };
            format!(
                "{compressor} {rows}, {} up, {} down",
                shown(algorithm.wire_up),
                shown(algorithm.wire_down)
            )
        }
    }
}

/// The table of `arc-worker plan`: ring all-reduce, dense through shards, and `spec` at each density.
///
/// # Errors
/// If the spec gives no plan, at one of the densities.
pub fn table(
    spec: &PlanSpec,
    densities: &[f32],
    network: &Network,
) -> Result<Vec<Prediction>, PlanError> {
    let with = |change: &dyn Fn(&mut AlgorithmConfig)| {
        let mut spec = spec.clone();
        change(&mut spec.algorithm);
        through_shards(&spec, network)
    };
    let elements = Plan::build(spec.clone())?.elements();
    let mut rows = vec![
        ring_all_reduce(elements, network),
        with(&|a| *a = a.dense())?,
    ];
    for density in densities {
        rows.push(with(&|a| a.density = *density)?);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::config::algorithm::ValueType;
    use crate::plan::{DType, TensorSpec};

    fn spec(shards: u16) -> PlanSpec {
        let tensor = |name: &str, shape: &[u64]| TensorSpec {
            name: name.into(),
            shape: shape.into(),
            dtype: DType::F32,
            density: None,
        };
        let algorithm = AlgorithmConfig {
            density: 0.25,
            sketch_rank: 4,
            wire_up: ValueType::Bf16,
            wire_down: ValueType::F32,
            wire_sketch: ValueType::F32,
            warmup_updates: 1,
            ..AlgorithmConfig::default()
        };
        PlanSpec {
            trainer: String::new(),
            algorithm,
            shards,
            tensors: vec![tensor("w", &[1024, 100]), tensor("b", &[50])],
        }
    }

    fn network(placement: Placement) -> Network {
        Network {
            workers: 4,
            placement,
            bits_per_second: 8e6,
            round_trip_seconds: 0.01,
        }
    }

    #[test]
    fn bytes_are_those_of_the_bodies() {
        let step = Plan::build(spec(1)).unwrap().step_bytes(1);
        let up = KindBytes {
            sketch: 16384,
            selection: 0,
            values: 51200,
            dense: 200,
            control: 64,
        };
        let down = KindBytes {
            sketch: 0,
            selection: 129,
            values: 102_400,
            dense: 200,
            control: 64,
        };
        assert_eq!((step.up, step.down), (up, down));
        assert_eq!((step.round_trips, step.dense_equivalent), (2, 409_800));
        let warm = Plan::build(spec(1)).unwrap().step_bytes(0);
        // int8, and a scale of two bytes for each 64 values.
        assert_eq!((warm.up.dense, warm.round_trips), (105_652, 1));
    }

    #[test]
    fn one_shard_is_the_bottleneck_and_two_halve_it() {
        let seconds = |shards| {
            Plan::build(spec(shards))
                .unwrap()
                .step_bytes(1)
                .seconds(&network(Placement::Separate))
        };
        let down = 4.0 * f64::from(129 + 102_400 + 200 + 64) / 1e6;
        assert!((seconds(1) - down - 0.02).abs() < 1e-9);
        assert!((seconds(2) / seconds(1) - 0.5).abs() < 0.05);
    }

    #[test]
    fn co_located_shards_on_every_machine_match_a_ring() {
        let mut spec = spec(4);
        spec.algorithm.compressor = Compressor::Dense;
        let through = through_shards(&spec, &network(Placement::CoLocated)).unwrap();
        let ring = ring_all_reduce(102_450, &network(Placement::CoLocated));
        assert!(
            (through.seconds - 0.01 - (ring.seconds - 0.03)).abs() / ring.seconds < 0.03,
            "{} {}",
            through.seconds,
            ring.seconds
        );
        assert_eq!(through.name, "dense f32, shards");
    }

    #[test]
    fn a_table_has_a_row_per_choice_and_falls_with_density() {
        let rows = table(&spec(2), &[0.4, 0.2, 0.05], &network(Placement::Separate)).unwrap();
        assert_eq!(rows.len(), 5);
        assert!(rows[1..].is_sorted_by(|a, b| a.seconds > b.seconds && a.reduction < b.reduction));
        assert_eq!(rows[2].name, "arc 0.4, bf16 up, f32 down");
        assert!(table(&spec(2), &[2.0], &network(Placement::Separate)).is_err());
    }

    #[test]
    fn with_an_energy_the_density_is_what_a_step_takes_at_most() {
        let whole = table(&spec(2), &[0.2], &network(Placement::Separate)).unwrap();
        let mut by_energy = spec(2);
        by_energy.algorithm.energy = 0.9;
        let bounds = table(&by_energy, &[0.2], &network(Placement::Separate)).unwrap();
        assert_eq!(bounds[..2], whole[..2], "nothing else is sketched");
        assert_eq!(
            bounds[2],
            Prediction {
                name: "arc at most 0.2, energy 0.9, bf16 up, f32 down".into(),
                ..whole[2].clone()
            }
        );
    }
}
