#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::memory::{MemoryCluster, MemoryOptions, MemoryReducer};
use crate::record::{RunSummary, StepRecord, read_steps, read_summary};
use crate::reducer::{ReduceError, Reducer, StepStart, TrainReport};
use crate::step::{StepOutcome, TensorResult, WorkerState};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Feedback, ValueType};
use arc_topk_common::config::train::TrainArgs;
use arc_topk_common::ids::{Rank, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec};
use clap::Parser;
use std::path::Path;
use std::thread;

#[derive(Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    train: TrainArgs,
}

/// A decoder of some 10,000 parameters.
pub(super) fn small(line: &str) -> TrainConfig {
    let sizes = "test --hidden 32 --intermediate 48 --layers 2 --heads 2 --context 16 --batch 2 --validate-batches 2 --lr-warmup 2";
    let line = format!("{sizes} {line}");
    let args = Cli::parse_from(line.split_whitespace()).train;
    TrainConfig::new("test", args)
}

pub(super) fn spec(config: &TrainConfig, algorithm: AlgorithmConfig, shards: u16) -> PlanSpec {
    PlanSpec {
        trainer: String::new(),
        algorithm,
        shards,
        tensors: parameters(&config.args).unwrap(),
    }
}

pub(super) fn local(config: &TrainConfig) -> LocalReducer {
    LocalReducer::new(spec(config, AlgorithmConfig::default(), 1)).unwrap()
}

#[derive(Default)]
pub(super) struct Log {
    pub(super) records: Vec<StepRecord>,
    pub(super) messages: Vec<String>,
    pub(super) stop_after: Option<usize>,
}

impl Observer for Log {
    fn on_step(&mut self, record: &StepRecord) {
        self.records.push(record.clone());
    }

    fn on_message(&mut self, text: &str) {
        self.messages.push(text.to_owned());
    }

    fn should_stop(&mut self) -> bool {
        self.stop_after == Some(self.records.len())
    }
}

#[test]
fn the_loss_falls_on_the_builtin_text() {
    let config = small("--steps 60 --lr 0.01 --batch 4");
    let mut log = Log::default();
    let summary = run(&config, &mut local(&config), &mut log).unwrap();
    let (first, last) = (log.records[0].loss, summary.final_train_loss.unwrap());
    assert!(first > 5.0 && last < 3.6, "{first} → {last}");
    assert!(summary.final_validation_loss.unwrap() < 3.6);
    assert!(log.messages[0].contains("built-in"), "{:?}", log.messages);
}

#[test]
fn accumulation_is_one_exchange_of_the_mean() {
    let config = small("--steps 3 --accumulation 4");
    let mut log = Log::default();
    let summary = run(&config, &mut local(&config), &mut log).unwrap();
    assert_eq!(log.records.len(), 3);
    assert_eq!(summary.tokens, 3 * 4 * 2 * 16);
}

#[test]
fn fashion_trains_and_reports_accuracy() {
    let dir = tempfile::tempdir().unwrap();
    data::write_fashion(dir.path(), 200);
    let mut config = small("--task fashion --steps 40 --lr 0.01 --validate-batches 10");
    (config.args.data, config.args.batch) = (Some(dir.path().to_owned()), 16);
    let summary = run(&config, &mut local(&config), &mut Quiet).unwrap();
    assert!(
        summary.final_validation_accuracy.unwrap() > 0.9,
        "{summary:?}"
    );
}

#[test]
fn records_and_summary_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small("--steps 4 --validate-every 2");
    config.args.run_dir = Some(dir.path().to_owned());
    let summary = run(&config, &mut local(&config), &mut Quiet).unwrap();
    let records = read_steps(dir.path()).unwrap();
    assert_eq!(read_summary(dir.path()).unwrap(), summary);
    let validated: Vec<bool> = records
        .iter()
        .map(|record| record.validation_loss.is_some())
        .collect();
    assert_eq!(validated, [false, true, false, true]);
    assert_eq!(summary.digest.len(), 64);
    assert!(
        records
            .iter()
            .all(|record| record.step_seconds >= record.compute_seconds)
    );
}

#[test]
fn a_plan_of_another_model_is_refused() {
    let (config, other) = (small("--steps 1"), small("--steps 1 --hidden 64"));
    let text = run(&config, &mut local(&other), &mut Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("embed.weight") && text.contains("plan"),
        "{text}"
    );
}

#[test]
fn a_worker_that_would_start_elsewhere_than_the_job_is_told() {
    let config = small("--steps 9");
    let mut reducer = local(&config);
    let late = WorkerState {
        step: Step(5),
        update: 5,
        arrays: Vec::new(),
    };
    reducer.import_state(late).unwrap();
    let error = run(&config, &mut reducer, &mut Quiet).unwrap_err();
    assert!(matches!(
        error,
        TrainError::StartStep {
            rank: 0,
            joined: Step(5),
            here: Step(0)
        }
    ));
    assert!(error.to_string().contains("--resume"), "{error}");
}

#[test]
fn workers_agree_on_all_that_decides_and_on_nothing_else() {
    let text = |line: &str| agreed_settings(&small(line).args);
    for other in [
        "--lr 0.1",
        "--optimizer sgd",
        "--clip 0",
        "--steps 3",
        "--batch 1",
    ] {
        assert_ne!(text(""), text(other), "{other}");
    }
    for free in [
        "--threads 3",
        "--data /x",
        "--json",
        "--run-dir /y",
        "--validate-every 1",
    ] {
        assert_eq!(text(""), text(free), "{free}");
    }
    assert!(text("").contains("lr="));
}

#[test]
fn a_new_run_leaves_the_checkpoints_of_an_earlier_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small("--steps 2");
    config.args.checkpoint_dir = Some(dir.path().to_owned());
    run(&config, &mut local(&config), &mut Quiet).unwrap();
    let error = run(&config, &mut local(&config), &mut Quiet).unwrap_err();
    assert!(matches!(
        error,
        TrainError::Checkpoint(CheckpointError::InUse { newest: 2, .. })
    ));
}

#[test]
fn a_stop_that_is_asked_for_leaves_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = small("--steps 9");
    config.args.checkpoint_dir = Some(dir.path().to_owned());
    let mut log = Log {
        stop_after: Some(2),
        ..Log::default()
    };
    assert_eq!(
        run(&config, &mut local(&config), &mut log).unwrap().steps,
        3
    );
    let store = CheckpointStore::new(dir.path(), 0);
    // Another worker may have stopped a step earlier.
    assert_eq!(store.load(2).unwrap().step, 2);
    config.args.resume = true;
    assert_eq!(
        resume_point(&config.args, None, None, &mut |_| ()).unwrap(),
        Some(ResumePoint {
            step: 3,
            update: 3,
            only_rank: Some(0),
            snapshot: None,
        })
    );
}

/// A worker whose gradient of one tensor is NaN in one step.
struct Spoiled {
    inner: MemoryReducer,
    step: u64,
    at: u64,
}

impl Reducer for Spoiled {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }
    fn world(&self) -> u16 {
        self.inner.world()
    }
    fn plan(&self) -> &Plan {
        self.inner.plan()
    }
    fn start_step(&self) -> Step {
        self.inner.start_step()
    }
    fn begin(&mut self) -> Result<StepStart, ReduceError> {
        self.inner.begin()
    }
    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
        if self.step == self.at && tensor == TensorId(2) {
            let mut gradient = gradient.to_vec();
            gradient[5] = f32::NAN;
            return self.inner.push(tensor, &gradient);
        }
        self.inner.push(tensor, gradient)
    }
    fn finish(&mut self) -> Result<StepOutcome, ReduceError> {
        self.step += 1;
        self.inner.finish()
    }
    fn for_each_result(&mut self, f: &mut dyn FnMut(TensorResult<'_>)) {
        self.inner.for_each_result(f);
    }
    fn export_state(&mut self) -> WorkerState {
        self.inner.export_state()
    }
    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError> {
        self.inner.import_state(state)
    }
    fn report(&mut self, report: TrainReport) {
        self.inner.report(report);
    }
    fn leave(self: Box<Self>) {}
}

/// Runs two workers in threads, the second of which spoils step `spoil`.
fn two_workers(
    configs: [TrainConfig; 2],
    algorithm: AlgorithmConfig,
    spoil: u64,
    start: (u64, u64),
) -> Vec<(RunSummary, Log)> {
    let options = MemoryOptions {
        start: Step(start.0),
        update: start.1,
        ..MemoryOptions::default()
    };
    let reducers = MemoryCluster::reducers(spec(&configs[0], algorithm, 2), 2, &options).unwrap();
    let work = reducers.into_iter().zip(configs).map(|(inner, config)| {
        thread::spawn(move || {
            let at = if inner.rank() == Rank(1) {
                spoil
            } else {
                u64::MAX
            };
            let mut reducer = Spoiled {
                inner,
                step: start.0,
                at,
            };
            let mut log = Log::default();
            let summary = run(&config, &mut reducer, &mut log).unwrap();
            Box::new(reducer.inner).leave();
            (summary, log)
        })
    });
    let threads: Vec<_> = work.collect();
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect()
}

pub(super) fn sparse(feedback: Feedback) -> AlgorithmConfig {
    AlgorithmConfig {
        feedback,
        warmup_updates: 1,
        density: 0.25,
        dense_below_elements: 64,
        wire_down: ValueType::F32,
        wire_warmup: ValueType::F32,
        ..AlgorithmConfig::default()
    }
}

#[test]
fn a_nan_on_one_worker_makes_all_skip_that_update() {
    let config = small("--steps 5");
    let done = two_workers([config.clone(), config], sparse(Feedback::Ef14), 2, (0, 0));
    assert_eq!(done[0].0.digest, done[1].0.digest);
    for (summary, log) in &done {
        assert_eq!(summary.skipped_steps, 1);
        let skipped: Vec<bool> = log.records.iter().map(|record| record.skipped).collect();
        assert_eq!(skipped, [false, false, true, false, false]);
        assert_eq!(log.records.last().unwrap().update, 3);
        assert!(
            log.messages
                .iter()
                .any(|text| text.contains("skip") && text.contains("--lr")),
            "{:?}",
            log.messages
        );
    }
}

/// Six steps at a stretch, or with a stop after three; parameters and feedback state must agree to the bit.
fn resumes_to_the_bit(feedback: Feedback) {
    let dir = tempfile::tempdir().unwrap();
    let with = |name: &str, rank: usize| {
        let mut config = small("--steps 6 --checkpoint-every 3");
        config.args.checkpoint_dir = Some(dir.path().join(name));
        config.args.run_dir = Some(dir.path().join(format!("{name}-{rank}")));
        config
    };
    let straight = two_workers(
        [0, 1].map(|rank| with("straight", rank)),
        sparse(feedback),
        4,
        (0, 0),
    );
    two_workers(
        [0, 1].map(|rank| with("resumed", rank)),
        sparse(feedback),
        4,
        (0, 0),
    );
    // Forget what came after step 3, as if the job had died there.
    for rank in 0..2 {
        std::fs::remove_file(CheckpointStore::new(&dir.path().join("resumed"), rank).path(6))
            .unwrap();
    }
    let resumed = two_workers(
        [0, 1].map(|rank| {
            let mut config = with("resumed", rank);
            config.args.resume = true;
            config
        }),
        sparse(feedback),
        4,
        (3, 3),
    );
    for (rank, (a, b)) in straight.iter().zip(&resumed).enumerate() {
        assert_eq!(a.0.digest, b.0.digest, "parameters of rank {rank}");
        assert_eq!(b.0.steps, 6, "records of the first part are counted");
        let load = |name: &str| {
            CheckpointStore::new(&dir.path().join(name), rank as u16)
                .load(6)
                .unwrap()
        };
        assert_eq!(
            load("straight"),
            load("resumed"),
            "whole state of rank {rank}"
        );
        assert_eq!(
            load("straight").feedback.is_empty(),
            feedback == Feedback::None
        );
        assert!(
            b.1.messages
                .iter()
                .any(|text| text.contains("resumed at step 3")),
            "{:?}",
            b.1.messages
        );
    }
}

#[test]
fn a_resumed_run_goes_on_to_the_bit_under_every_rule() {
    for feedback in [
        Feedback::None,
        Feedback::Ef14,
        Feedback::Ef21,
        Feedback::Ef21m,
    ] {
        resumes_to_the_bit(feedback);
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused_and_other_settings_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let with = |line: &str, directory: &Path| {
        let mut config = small(line);
        config.args.checkpoint_dir = Some(directory.to_owned());
        config
    };
    let config = with("--steps 2", dir.path());
    run(&config, &mut local(&config), &mut Quiet).unwrap();
    let other = with("--steps 2 --resume --intermediate 64", dir.path());
    let text = run(&other, &mut local(&other), &mut Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("does not fit") && text.contains("gate_up"),
        "{text}"
    );
    let sgd = with("--steps 2 --resume --optimizer sgd", dir.path());
    assert!(run(&sgd, &mut local(&sgd), &mut Quiet).is_err());
    let longer = with("--steps 4 --resume", dir.path());
    let mut log = Log::default();
    let summary = run(&longer, &mut local(&longer), &mut log).unwrap();
    assert_eq!(summary.steps, 2);
    assert!(
        log.messages
            .iter()
            .any(|text| text.contains("are not those that made the checkpoint")),
        "{:?}",
        log.messages
    );
}
