//! What a seed stands for: the job, its network, and what goes wrong when.

use crate::random::Random;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback, Init, SelectionPolicy, ValueType};
use arc_topk_common::optim::{OptimizerConfig, OptimizerKind};
use arc_topk_common::plan::{DType, Plan, PlanSpec, TensorSpec};
use core::time::Duration;
use std::sync::Arc;

/// Everything that a seed decides before the first event.
#[derive(Clone, Debug)]
pub struct Case {
    /// The seed.
    pub seed: u64,
    /// The plan.
    pub plan: Arc<Plan>,
    /// The optimizer of every replica.
    pub optimizer: OptimizerConfig,
    /// Shards.
    pub shards: u16,
    /// Workers that start the job.
    pub world: u16,
    /// Fewer members end it.
    pub min_workers: u16,
    /// Most workers at once.
    pub max_workers: u16,
    /// Contributions that close a phase after `straggler_timeout`; 0: all.
    pub quorum: u16,
    /// See `quorum`.
    pub straggler_timeout: Duration,
    /// Whether the minority of differing digests must join again.
    pub resync: bool,
    /// Steps of the job.
    pub steps: u64,
    /// Gradients are small integers, and the wire is exact: sums have one value whatever the order, and the books of the
    /// feedback rule balance to the bit.
    pub exact: bool,
    /// Steps in a thousand in which a worker's gradient has a NaN.
    pub nan_per_mille: u64,
    /// Steps in a thousand in which a worker takes ten times as long.
    pub straggler_per_mille: u64,
    /// Time to compute a gradient.
    pub compute: core::ops::Range<Duration>,
    /// Steps between digests; 0: none.
    pub digest_every: u64,
    /// Replicas survive the shard that keeps them.
    pub durable_store: bool,
    /// Fetches in a thousand that fail.
    pub fetch_fails_per_mille: u64,
    /// The network when nothing is wrong with it.
    pub network: NetworkCase,
    /// What goes wrong, by the order of its numbers.
    pub faults: Vec<Planned>,
}

/// A network that is up.
#[derive(Clone, Debug)]
pub struct NetworkCase {
    /// Least delay.
    pub delay: Duration,
    /// Random delay on top.
    pub jitter: Duration,
    /// Packets in a thousand that are lost once, which delays them.
    pub loss_per_mille: u64,
    /// Links in a thousand that are slow.
    pub slow_per_mille: u64,
}

/// When a fault strikes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum When {
    /// At this time.
    At(Duration),
    /// So long after shards have sent so many answers in all.
    AfterAnswers(u64, Duration),
}

/// A fault to come. Numbers are taken modulo what is there when it strikes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Planned {
    /// When.
    pub when: When,
    /// What.
    pub fault: Fault,
}

/// What can go wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// A shard's process is killed, and started again after a while.
    ShardCrash {
        /// Which.
        shard: u64,
        /// How long it is down.
        down: Duration,
    },
    /// A worker's process is killed.
    WorkerKill {
        /// Which.
        worker: u64,
    },
    /// A worker leaves in order after its step.
    WorkerLeave {
        /// Which.
        worker: u64,
    },
    /// A new worker comes.
    WorkerJoin,
    /// A process stands still (SIGSTOP).
    Freeze {
        /// A shard's or a worker's.
        of_shard: bool,
        /// Which.
        process: u64,
        /// How long.
        time: Duration,
    },
    /// A process' clock jumps forward.
    ClockJump {
        /// A shard's or a worker's.
        of_shard: bool,
        /// Which.
        process: u64,
        /// How far.
        by: Duration,
    },
    /// Nothing passes between a worker and a shard, or all shards.
    Partition {
        /// Which worker.
        worker: u64,
        /// Which shard; `None`: all.
        shard: Option<u64>,
        /// Towards the shard.
        up: bool,
        /// Towards the worker.
        down: bool,
        /// How long.
        time: Duration,
    },
    /// A link delivers nothing for a while, less than an idle timeout, then everything at once.
    Clog {
        /// Which worker.
        worker: u64,
        /// Which shard.
        shard: u64,
        /// How long.
        time: Duration,
    },
}

impl Fault {
    /// Its kind as a word.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::ShardCrash { .. } => "shard crashes",
            Self::WorkerKill { .. } => "worker kills",
            Self::WorkerLeave { .. } => "leaves",
            Self::WorkerJoin => "new workers",
            Self::Freeze { .. } => "freezes",
            Self::ClockJump { .. } => "clock jumps",
            Self::Partition { .. } => "partitions",
            Self::Clog { .. } => "clogs",
        }
    }
}

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

impl Case {
    /// The case of a seed.
    ///
    /// # Panics
    /// If the drawn settings give no plan: a bug of this module.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed, "case");
        let exact = random.chance(500);
        let shards = random.within(1..4) as u16;
        let world = random.within(2..6) as u16;
        let algorithm = with_energy(
            with_estimates(
                algorithm(&mut random, exact),
                &mut Random::new(seed, "estimates"),
            ),
            &mut Random::new(seed, "energy"),
        );
        let keeps_estimates = algorithm.keeps_estimates();
        let spec = PlanSpec {
            trainer: String::new(),
            algorithm,
            shards,
            tensors: tensors(&mut random),
        };
        let plan = Plan::build(spec).expect("the drawn settings are all in range");
        let steps = random.within(8..26);
        let (least, most) = random.pick(&[(5, 15), (20, 60), (50, 200)]);
        let compute = ms(least)..ms(most);
        let elastic = random.chance(700);
        let quorum = if random.chance(150) {
            world.div_ceil(2)
        } else {
            0
        };
        let faults = faults(
            &mut Random::new(seed, "fault plan"),
            compute.end * steps as u32,
            elastic,
        );
        Self {
            seed,
            plan: Arc::new(plan),
            optimizer: optimizer(&mut random),
            shards,
            world,
            min_workers: if random.chance(800) { 1 } else { 2 },
            max_workers: world + random.within(0..3) as u16,
            // Shards refuse the two together.
            quorum: if keeps_estimates { 0 } else { quorum },
            straggler_timeout: ms(random.within(100..1500)),
            resync: random.chance(300),
            steps,
            exact,
            nan_per_mille: random.pick(&[0, 0, 20]),
            straggler_per_mille: random.pick(&[0, 20, 100]),
            compute,
            digest_every: random.pick(&[0, 1, 4]),
            durable_store: random.chance(300),
            fetch_fails_per_mille: random.pick(&[0, 200]),
            network: NetworkCase {
                delay: Duration::from_micros(random.pick(&[50, 500, 5_000])),
                jitter: Duration::from_micros(random.pick(&[100, 5_000, 30_000])),
                loss_per_mille: random.pick(&[0, 5, 50]),
                slow_per_mille: random.pick(&[0, 100]),
            },
            faults,
        }
    }

    /// The case without faults.
    #[must_use]
    pub fn calm(mut self) -> Self {
        self.faults.clear();
        self
    }
}

fn algorithm(random: &mut Random, exact: bool) -> AlgorithmConfig {
    use Compressor::{Arc, Dense, Randk, Topk};
    let compressor = random.pick(&[Arc, Arc, Arc, Arc, Randk, Topk, Topk, Dense]);
    let feedback = random.pick(&[
        Feedback::Ef14,
        Feedback::Ef14,
        Feedback::Ef14,
        Feedback::None,
    ]);
    let mut wire = |lossy: &[ValueType]| {
        if exact || random.chance(300) {
            ValueType::F32
        } else {
            random.pick(lossy)
        }
    };
    let any = [
        ValueType::Bf16,
        ValueType::F16,
        ValueType::Int8,
        ValueType::Int4,
    ];
    let (wire_up, wire_down, wire_sketch) = (wire(&any), wire(&any), wire(&any));
    let (wire_dense, wire_warmup) = (wire(&any[..3]), wire(&any[..3]));
    let pooled = compressor != Randk && random.chance(250);
    AlgorithmConfig {
        compressor,
        feedback,
        density: random.pick(&[0.1, 0.25, 0.5]),
        sketch_rank: random.pick(&[2, 4]),
        selection: if pooled {
            SelectionPolicy::Pooled
        } else {
            SelectionPolicy::PerTensor
        },
        block_width: random.pick(&[0, 0, 8]),
        dense_below_elements: 24,
        wire_up,
        wire_down,
        wire_sketch,
        wire_dense,
        wire_warmup,
        quant_block: 16,
        warmup_updates: random.pick(&[0, 1, 3]),
        ramp_updates: random.pick(&[0, 0, 3]),
        seed: random.bits(),
        bucket_bytes: 1024,
        ..AlgorithmConfig::default()
    }
}

/// A part of the jobs keeps ef21's estimates. They need wires that round no mean.
fn with_estimates(algorithm: AlgorithmConfig, random: &mut Random) -> AlgorithmConfig {
    if algorithm.compressor == Compressor::Dense || !random.chance(250) {
        return algorithm;
    }
    AlgorithmConfig {
        feedback: random.pick(&[Feedback::Ef21, Feedback::Ef21m]),
        init: random.pick(&[Init::FirstGradient, Init::Zeros]),
        wire_down: ValueType::F32,
        wire_dense: ValueType::F32,
        wire_warmup: ValueType::F32,
        ..algorithm
    }
}

/// In a part of the jobs with sketches their energy decides how many rows travel.
fn with_energy(algorithm: AlgorithmConfig, random: &mut Random) -> AlgorithmConfig {
    if algorithm.compressor != Compressor::Arc || !random.chance(300) {
        return algorithm;
    }
    AlgorithmConfig {
        energy: random.pick(&[0.3, 0.6, 0.9]),
        ..algorithm
    }
}

/// Shapes that tensors may have.
const SHAPES: [&[u64]; 7] = [
    &[16, 8],
    &[48, 8],
    &[24, 9],
    &[8, 4, 4],
    &[20],
    &[7],
    &[64, 4],
];

fn tensors(random: &mut Random) -> Vec<TensorSpec> {
    let count = random.within(3..7);
    (0..count)
        .map(|at| TensorSpec {
            name: format!("t{at}"),
            shape: random.pick(&SHAPES).to_vec(),
            dtype: DType::F32,
            density: None,
        })
        .collect()
}

fn optimizer(random: &mut Random) -> OptimizerConfig {
    OptimizerConfig {
        kind: random.pick(&[OptimizerKind::Sgd, OptimizerKind::CatchUpAdamW]),
        catch_up_cap: 5,
        ..OptimizerConfig::default()
    }
}

fn faults(random: &mut Random, span: Duration, elastic: bool) -> Vec<Planned> {
    let count = random.pick(&[0, 1, 2, 3, 4, 6, 8]);
    // Faults last seconds, so that a job lasts longer than its computing.
    let span = span + ms(1000) * count;
    let mut faults = Vec::new();
    for _ in 0..count {
        let when = if random.chance(500) {
            When::At(random.time(ms(0)..span))
        } else {
            When::AfterAnswers(random.within(1..400), random.time(ms(0)..ms(30)))
        };
        let fault = fault(random, elastic);
        faults.push(Planned { when, fault });
        // Several at once.
        if random.chance(150) {
            faults.push(Planned {
                when,
                fault: self::fault(random, elastic),
            });
        }
    }
    faults
}

fn fault(random: &mut Random, elastic: bool) -> Fault {
    let (process, of_shard) = (random.bits(), random.chance(500));
    let long = random.pick(&[ms(300), ms(1500), ms(3500), ms(6000), ms(15000)]);
    let time = random.time(ms(20)..long);
    match random.below(if elastic { 16 } else { 10 }) {
        0..4 => Fault::ShardCrash {
            shard: process,
            down: random.time(ms(0)..random_pause(process)),
        },
        4 | 5 => Fault::Partition {
            worker: process,
            shard: random.chance(700).then(|| random.bits()),
            up: random.chance(850),
            down: random.chance(850),
            time,
        },
        6 => Fault::Clog {
            worker: process,
            shard: random.bits(),
            time: random.time(ms(50)..ms(2500)),
        },
        7 => Fault::Freeze {
            of_shard,
            process,
            time,
        },
        8 => Fault::ClockJump {
            of_shard,
            process,
            by: random.time(ms(10)..ms(10_000)),
        },
        9 | 10 => Fault::WorkerKill { worker: process },
        11 => Fault::WorkerLeave { worker: process },
        _ => Fault::WorkerJoin,
    }
}

/// Most are short, some outlast every grace.
fn random_pause(bits: u64) -> Duration {
    [ms(50), ms(1000), ms(5000), ms(12_000)][(bits >> 32) as usize % 4]
}
