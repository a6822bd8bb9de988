//! One run: four logical workers in this thread, with the real step and shard machines and no sockets.

use crate::cells::Cell;
use arc_topk_common::config::train::TrainArgs;
use arc_topk_common::ids::Rank;
use arc_topk_common::plan::PlanSpec;
use arc_topk_common::plan::predict::steady_update;
use arc_topk_worker::backend::Gradient;
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use arc_topk_worker::train::{Trainer, data::Dataset, parameters};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

/// What decides a run beside its cell.
#[derive(Clone, Debug)]
pub(crate) struct RunSettings {
    pub(crate) train: TrainArgs,
    pub(crate) workers: u16,
    pub(crate) shards: u16,
}

/// A line of the results file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub(crate) struct RunResult {
    pub(crate) cell: String,
    pub(crate) lr: f32,
    pub(crate) seed: u64,
    pub(crate) steps: u64,
    pub(crate) batch: usize,
    pub(crate) context: usize,
    pub(crate) workers: u16,
    /// Data and all settings that the other fields do not tell: see [`settings_hash`].
    pub(crate) settings: String,
    /// Validation loss at the end; `None` if it diverged.
    pub(crate) validation_loss: Option<f32>,
    /// (step, validation loss, bytes sent by a worker so far).
    pub(crate) curve: Vec<(u64, Option<f32>, u64)>,
    /// Bytes that rank 0 sent and received in the whole run, headers and sketches included.
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
    /// The same per step after warm-up and ramp, on average: the steady state.
    pub(crate) steady_sent: u64,
    pub(crate) steady_received: u64,
    /// What dense f32 would have sent per step, one direction.
    pub(crate) dense_bytes_per_step: u64,
    pub(crate) captured_energy: Option<f32>,
    pub(crate) seconds: f64,
}

impl RunResult {
    /// Names a run among all: a finished one is not repeated.
    pub(crate) fn key(cell: &str, lr: f32, seed: u64, settings: &str) -> String {
        format!("{cell}|{lr}|{seed}|{settings}")
    }

    pub(crate) fn own_key(&self) -> String {
        Self::key(&self.cell, self.lr, self.seed, &self.settings)
    }
}

/// Hash of the data and of all settings that runs share: results of others are no results of these.
pub(crate) fn settings_hash(settings: &RunSettings, data: &Dataset) -> String {
    // What varies from run to run, what changes no result, and the path, for which the data's description stands.
    let free = [
        "lr",
        "optimizer",
        "catch_up_cap",
        "data",
        "run_dir",
        "checkpoint_dir",
        "threads",
        "json",
        "validate_every",
    ];
    let mut train = serde_json::to_value(&settings.train).expect("settings are plain values");
    if let Some(fields) = train.as_object_mut() {
        fields.retain(|key, _| !free.contains(&key.as_str()));
    }
    // "<path>: <bytes>, <tokens>"
    let data = data.description().rsplit('/').next().unwrap_or_default();
    let text = format!("{train} {data} {} {}", settings.workers, settings.shards);
    let hash = Sha256::digest(text.as_bytes());
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of steps after warm-up and ramp, of which there are some that an energy makes smaller than others.
#[derive(Default)]
struct Steady {
    steps: u64,
    sent: u64,
    received: u64,
}

/// Losses beyond this (a uniform guess has 5.5) will not come back.
const DIVERGED: f32 = 20.0;

/// Trains a cell at one learning rate and seed.
pub(crate) fn train(
    cell: &Cell,
    lr: f32,
    seed: u64,
    settings: &RunSettings,
    data: &Arc<Dataset>,
) -> Result<RunResult, Box<dyn Error + Send + Sync>> {
    let start = Instant::now();
    let mut args = settings.train.clone();
    (args.lr, args.optimizer, args.catch_up_cap) = (lr, cell.optimizer, cell.cap);
    let mut algorithm = cell.algorithm.clone();
    algorithm.seed = seed;
    let spec = PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: settings.shards,
        tensors: parameters(&args)?,
    };
    let mut cluster = MemoryCluster::new(spec, settings.workers, &MemoryOptions::default())?;
    let plan = Arc::clone(cluster.plan());
    // One model serves all workers: by invariant they apply the same results.
    let mut trainer = Trainer::new(&args, &plan, Arc::clone(data))?;
    let mut steady = Steady::default();
    let mut result = RunResult {
        cell: cell.name(),
        lr,
        seed,
        steps: args.steps,
        batch: args.batch,
        context: args.model_shape().context,
        workers: settings.workers,
        settings: settings_hash(settings, data),
        validation_loss: None,
        curve: Vec::new(),
        bytes_sent: 0,
        bytes_received: 0,
        steady_sent: 0,
        steady_received: 0,
        dense_bytes_per_step: 0,
        captured_energy: None,
        seconds: 0.0,
    };
    for step in 0..args.steps {
        let loss = one_step(
            step,
            settings.workers,
            &mut cluster,
            &mut trainer,
            &mut result,
            &mut steady,
        )?;
        let due = (step + 1) % args.validate_every.max(1) == 0 || step + 1 == args.steps;
        if loss.is_nan() || loss >= DIVERGED {
            result.curve.push((step + 1, None, result.bytes_sent));
            break;
        }
        if due {
            let loss = trainer.validate()?.loss;
            result.curve.push((
                step + 1,
                loss.is_finite().then_some(loss),
                result.bytes_sent,
            ));
        }
    }
    result.steady_sent = steady.sent / steady.steps.max(1);
    result.steady_received = steady.received / steady.steps.max(1);
    let finished = result.curve.last().filter(|(step, ..)| *step == args.steps);
    result.validation_loss = finished.and_then(|(_, loss, _)| *loss);
    result.seconds = start.elapsed().as_secs_f64();
    Ok(result)
}

fn one_step(
    step: u64,
    workers: u16,
    cluster: &mut MemoryCluster,
    trainer: &mut Trainer,
    result: &mut RunResult,
    steady: &mut Steady,
) -> Result<f32, Box<dyn Error + Send + Sync>> {
    cluster.begin();
    let (mut loss, mut failed) = (0.0, None);
    for rank in (0..workers).map(Rank) {
        let (own, _) = trainer.gradients(step, rank, &mut |tensor, gradient| {
            let done = cluster.push(rank, tensor, Gradient::F32(gradient));
            failed = failed.take().or(done.err());
            Ok(())
        })?;
        loss += own / f32::from(workers);
    }
    if let Some(error) = failed {
        return Err(error.into());
    }
    let outcomes = cluster.finish()?;
    let outcome = outcomes[0].ok_or("rank 0 left the job")?;
    if !outcome.skipped {
        let machine = cluster.worker(Rank(0)).ok_or("rank 0 left the job")?;
        trainer.apply(step, &mut |f| machine.for_each_result(f))?;
    }
    let stats = outcome.stats;
    let (sent, received) = (stats.sent.total(), stats.received.total());
    result.bytes_sent += sent;
    result.bytes_received += received;
    if outcome.update >= steady_update(&cluster.plan().spec.algorithm) {
        steady.steps += 1;
        steady.sent += sent;
        steady.received += received;
    }
    result.dense_bytes_per_step = stats.dense_equivalent_bytes;
    result.captured_energy = stats.captured_energy.or(result.captured_energy);
    Ok(loss)
}
