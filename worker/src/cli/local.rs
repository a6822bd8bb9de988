//! `arc-worker local` and `arc-worker demo`: a whole job on this machine.

use super::error::CliError;
use super::job::{self, JobSpec};
use super::progress::{Progress, emit};
use super::{compressor_name, print, start_log};
use crate::report::{Run, closing_table, write_report};
use crate::train::data::Dataset;
use crate::train::parameters;
use arc_topk_common::config::{AlgorithmConfig, CommonArgs, LocalArgs, TrainArgs};
use arc_topk_common::plan::{Plan, PlanSpec};
use clap::Args;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Start the shards and workers of a whole job on this machine, and run it.
///
/// Real processes of this program talk over QUIC on loopback, with certificates made for this run alone. Records go to
/// `--run-dir`: `worker-<rank>/` and `logs/`. A process that dies is started again and takes part again (--restart); a worker
/// then has a new rank. With `--compare` the job runs twice, dense first, each at its own learning
/// rate, and is compared at the end in a table and an HTML page.
#[derive(Args, Debug)]
#[command(after_help = LOCAL_EXAMPLES)]
pub(super) struct LocalCommand {
    #[command(flatten)]
    settings: LocalSettings,
    /// Runs dense training first and compares.
    #[arg(long)]
    compare: bool,
    /// Runs this program as every worker instead of the built-in trainer. It finds in its environment how to join:
    /// ARC_SHARD_ADDRESSES, ARC_CERTS, ARC_JOB, ARC_RANK, ARC_WORKERS, ARC_RUN_DIR, and torchrun's RANK, LOCAL_RANK, WORLD_SIZE,
    /// MASTER_ADDR and MASTER_PORT, and its share of the cores as OMP_NUM_THREADS. What it prints is shown with its rank. One that makes a process group wants --restart never: a worker that is started again
    /// does not get back into the group. One that fails within 30 s of its start is not started again anyway. When the job is stopped it gets
    /// SIGTERM, and its standard input ends; 20 s later it is killed.
    #[arg(last = true, value_name = "PROGRAM", conflicts_with = "compare")]
    program: Vec<OsString>,
}

const LOCAL_EXAMPLES: &str = "\
Examples:
  arc-worker local                                           built-in text, tiny model, 4 workers, 2 shards
  arc-worker local --data text.txt --density 0.1 --compare   beside dense training
  arc-worker local --workers 2 --shards 1 --task fashion --data .data/fashion-mnist
  arc-worker local --json --steps 50 > steps.jsonl           one JSON object per step and worker
  arc-worker local -- python train.py                        another program as every worker

Exit status: 0 done, 1 a process failed, 2 wrong usage or settings, 130 stopped by a signal.";

/// Train a tiny language model twice on this machine, dense and with ARC-Top-K, and compare.
///
/// What `make demo` runs: `local --compare` with settings that suit two cores and a few minutes. Without --data it takes
/// `.data/shakespeare.txt` (`make data` fetches it) if it is there, or a small built-in text.
#[derive(Args, Debug)]
#[command(
    after_help = DEMO_EXAMPLES,
    mut_arg("density", |arg| arg.default_value("0.4")),
)]
pub(super) struct DemoCommand {
    #[command(flatten)]
    settings: LocalSettings,
}

const DEMO_EXAMPLES: &str = "\
Examples:
  arc-worker demo
  arc-worker demo --density 0.2                   half the bytes
  arc-worker demo --task fashion --data .data/fashion-mnist

Exit status: 0 done, 1 a process failed, 2 wrong usage or settings, 130 stopped by a signal.";

#[derive(Args, Debug)]
struct LocalSettings {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    local: LocalArgs,
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    algorithm: AlgorithmConfig,
    /// Peak learning rate of the dense run of a comparison: each run should have its own best.
    #[arg(
        long,
        value_name = "LR",
        env = "ARC_DENSE_LR",
        default_value_t = 4e-3,
        help_heading = "Local job"
    )]
    dense_lr: f32,
    /// Most milliseconds by which shards delay each answer, at random. For tests.
    #[arg(long, hide = true, default_value_t = 0)]
    chaos_delay_ms: u64,
}

/// Runs `local`.
pub(super) fn run(command: &LocalCommand) -> Result<(), CliError> {
    let dir = command
        .settings
        .train
        .run_dir
        .clone()
        .unwrap_or_else(|| "runs/local".into());
    if command.compare {
        return compare(&command.settings, &dir);
    }
    let mut job = command.settings.check(command.program.is_empty())?;
    job.dir = dir;
    job.program = command.program.clone();
    finish(&command.settings, &[job], None)
}

/// Runs `demo`.
pub(super) fn demo(command: &DemoCommand) -> Result<(), CliError> {
    let dir = command
        .settings
        .train
        .run_dir
        .clone()
        .unwrap_or_else(|| "runs/demo".into());
    let (local, train) = (&command.settings.local, &command.settings.train);
    if !train.json {
        eprintln!(
            "demo: two runs of {} steps, dense and then compressed; in each, {} workers and {} shards as processes of their own",
            train.steps, local.workers, local.shards
        );
    }
    compare(&command.settings, &dir)
}

/// Dense, then the chosen compressor, at equal steps.
fn compare(settings: &LocalSettings, dir: &Path) -> Result<(), CliError> {
    let mut own = settings.check(true)?;
    let mut dense = own.clone();
    dense.algorithm = dense.algorithm.dense();
    dense.train.lr = settings.dense_lr;
    dense.train.validate()?;
    dense.name = compressor_name(&dense.algorithm);
    dense.dir = dir.join(&dense.name);
    // Each run keeps its own checkpoints.
    let checkpoints = own.train.checkpoint_dir.take();
    own.dir = dir.join(&own.name);
    if own.name == dense.name {
        // Dense against dense at another rate is a fair question too.
        own.name = format!("{}-2", own.name);
        own.dir = dir.join(&own.name);
    }
    for job in [&mut dense, &mut own] {
        job.train.checkpoint_dir = checkpoints.as_ref().map(|dir| dir.join(&job.name));
    }
    finish(settings, &[dense, own], Some(&dir.join("report.html")))
}

impl LocalSettings {
    /// Checks everything that can be checked before a process is started: `own_trainer` if the built-in one will run.
    fn check(&self, own_trainer: bool) -> Result<JobSpec, CliError> {
        self.common.validate()?;
        self.local.validate()?;
        self.train.validate()?;
        self.algorithm.validate()?;
        self.local.elastic.validate_with(&self.algorithm)?;
        start_log(&self.common.log)?;
        let mut train = self.train.clone();
        if train.data.is_none() && train.task == arc_topk_common::config::Task::Lm {
            train.data = Some(PathBuf::from(".data/shakespeare.txt")).filter(|path| path.is_file());
        }
        if train.threads == 0 {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            train.threads = (cores / usize::from(self.local.workers)).max(1);
        }
        if own_trainer {
            let tensors = parameters(&train)?;
            Plan::build(PlanSpec {
                trainer: String::new(),
                algorithm: self.algorithm.clone(),
                shards: self.local.shards,
                tensors,
            })?;
            let data = Dataset::load(&train).map_err(crate::train::TrainError::from)?;
            if !train.json {
                eprintln!("data: {}", data.description());
            }
        }
        Ok(JobSpec {
            name: compressor_name(&self.algorithm),
            job: self.common.job.clone(),
            log: self.common.log.clone(),
            workers: self.local.workers,
            shards: self.local.shards,
            elastic: self.local.elastic.clone(),
            restart: self.local.restart,
            admin: self.local.admin.0,
            train,
            algorithm: self.algorithm.clone(),
            dir: PathBuf::new(),
            chaos_delay_ms: self.chaos_delay_ms,
            program: Vec::new(),
        })
    }
}

/// Runs the jobs one after the other, then shows what they came to.
fn finish(settings: &LocalSettings, jobs: &[JobSpec], page: Option<&Path>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| CliError::System {
        action: "start the runtime",
        source,
    })?;
    let json = settings.train.json;
    for spec in jobs {
        let mut progress = Progress::new(
            &spec.name,
            usize::from(spec.workers),
            spec.train.steps,
            json,
        );
        runtime.block_on(job::run(spec, &mut progress))?;
    }
    if jobs.iter().any(|spec| !spec.program.is_empty()) {
        return Ok(());
    }
    let mut runs = Vec::with_capacity(jobs.len());
    for spec in jobs {
        let mut run = Run::load(&spec.dir)?;
        run.name.clone_from(&spec.name);
        runs.push(run);
    }
    if let Some(page) = page {
        write_report(page, &runs)?;
    }
    if json {
        for run in &runs {
            emit(
                &serde_json::json!({ "event": "summary", "run": run.name, "summary": run.summary }),
            );
        }
        return Ok(());
    }
    print(&format!("\n{}", closing_table(&runs)))?;
    let records: Vec<String> = jobs
        .iter()
        .map(|spec| spec.dir.display().to_string())
        .collect();
    print(&format!("records: {}\n", records.join(", ")))?;
    if let Some(page) = page {
        print(&format!("report: {}\n", page.display()))?;
    }
    Ok(())
}
