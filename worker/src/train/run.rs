//! The loop: gradients out, result in, optimizer, records, validation, checkpoints.

use super::checkpoint::{Checkpoint, CheckpointStore};
use super::data::Dataset;
use super::feedback::own;
use super::model::read_parameter;
use super::snapshot::{Lead, SnapshotStore, Uploads};
use super::{Observer, TrainError, Trainer, Validation};
use crate::record::{RunSummary, StepRecord, StepWriter, read_steps, write_summary};
use crate::reducer::{Reducer, StepStart, TrainReport};
use crate::step::{StepOutcome, WorkerState};
use crate::store::SnapshotInfo;
use arc_topk_common::config::algorithm::Feedback;
use arc_topk_common::config::train::TrainArgs;
use arc_topk_common::ids::Step;
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::SnapshotId;
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps over which the summary's training loss is averaged.
const FINAL_STEPS: usize = 20;

/// A run's settings.
#[derive(Clone, Debug)]
pub struct TrainConfig {
    /// Name for tables and reports.
    pub name: String,
    /// Everything else.
    pub args: TrainArgs,
    /// Where snapshots are kept, if they are.
    pub store: Option<Arc<dyn SnapshotStore>>,
    /// The snapshot to go on from, as [`resume_point`](super::resume_point) said.
    pub snapshot: Option<SnapshotInfo>,
}

impl TrainConfig {
    /// A run without snapshots.
    #[must_use]
    pub fn new(name: &str, args: TrainArgs) -> Self {
        Self {
            name: name.to_owned(),
            args,
            store: None,
            snapshot: None,
        }
    }
}

/// Trains with `reducer` until the settings' last step, on the data that the settings name.
///
/// # Errors
/// Whatever stops it; records and checkpoints up to then stay.
pub fn run(
    config: &TrainConfig,
    reducer: &mut dyn Reducer,
    observer: &mut dyn Observer,
) -> Result<RunSummary, TrainError> {
    let data = Arc::new(Dataset::load(&config.args)?);
    run_on(config, data, reducer, observer)
}

/// As [`run`], on data that is loaded already.
///
/// # Errors
/// As [`run`].
pub fn run_on(
    config: &TrainConfig,
    data: Arc<Dataset>,
    reducer: &mut dyn Reducer,
    observer: &mut dyn Observer,
) -> Result<RunSummary, TrainError> {
    if reducer.rank().0 == 0 {
        observer.on_message(&format!("data: {}", data.description()));
    }
    let description = data.description().to_owned();
    let trainer = Trainer::new(&config.args, reducer.plan(), data)?;
    let mut run = Run::start(config, trainer, reducer, observer)?;
    run.summary.data = description;
    let mut stopped = false;
    for step in run.first_step..config.args.steps {
        let stop = observer.should_stop();
        run.step(step, stop, reducer, observer)?;
        if stop {
            observer.on_message(&format!("stopped after step {step}, as asked"));
            stopped = true;
            break;
        }
    }
    run.end(stopped, reducer, observer)
}

/// Settings that decide no result.
const FREE_SETTINGS: [&str; 10] = [
    "snapshot_every",
    "digest_every",
    "checkpoint_dir",
    "checkpoint_every",
    "resume",
    "run_dir",
    "threads",
    "json",
    "validate_every",
    "validate_batches",
];

/// What all workers of a job must be told alike, for the plan's `trainer`: with another learning rate or optimizer on one
/// of them, their parameters would drift apart unnoticed. Paths may differ from machine to machine.
#[must_use]
pub fn agreed_settings(args: &TrainArgs) -> String {
    let settings = serde_json::to_value(args).expect("settings are plain values");
    let mut text = String::new();
    for (name, value) in settings.as_object().into_iter().flatten() {
        let path = ["data", "tokenizer"].contains(&name.as_str());
        if !path && !value.is_null() && !FREE_SETTINGS.contains(&name.as_str()) {
            text += &format!("{name}={value}\n");
        }
    }
    text
}

/// Hash of all settings that decide the result, equal on all workers of a job.
fn config_hash(args: &TrainArgs, plan: &Plan) -> String {
    let mut hash = Sha256::new();
    hash.update(plan.spec.hash());
    hash.update(agreed_settings(args));
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A run under way.
pub(super) struct Run<'a> {
    pub(super) args: &'a TrainArgs,
    pub(super) trainer: Trainer,
    pub(super) store: Option<CheckpointStore>,
    uploads: Option<Uploads>,
    writer: Option<StepWriter>,
    summary: RunSummary,
    /// Hash of the settings.
    pub(super) config: String,
    pub(super) first_step: u64,
    last_losses: VecDeque<f32>,
}

impl<'a> Run<'a> {
    fn start(
        config: &'a TrainConfig,
        trainer: Trainer,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<Self, TrainError> {
        let (args, rank) = (&config.args, reducer.rank().0);
        let summary = RunSummary {
            name: config.name.clone(),
            config: serde_json::json!({ "train": args, "algorithm": reducer.plan().spec.algorithm }),
            workers: reducer.world(),
            shards: reducer.plan().spec.shards,
            rank,
            parameters: trainer.elements() as u64,
            ..RunSummary::default()
        };
        let mut run = Self {
            args,
            trainer,
            store: args
                .checkpoint_dir
                .as_deref()
                .map(|directory| CheckpointStore::new(directory, rank)),
            uploads: config.store.clone().map(Uploads::new),
            writer: None,
            summary,
            config: config_hash(args, reducer.plan()),
            first_step: 0,
            last_losses: VecDeque::new(),
        };
        run.take_state(config, reducer, observer)?;
        if let Some(store) = &run.store {
            // Not at the first checkpoint, hours later.
            store.prepare()?;
        }
        if Step(run.first_step) != reducer.start_step() {
            return Err(TrainError::StartStep {
                rank,
                joined: reducer.start_step(),
                here: Step(run.first_step),
            });
        }
        if let Some(directory) = &args.run_dir {
            run.writer = Some(StepWriter::open(directory, run.first_step)?);
            if run.first_step > 0 {
                read_steps(directory)?
                    .iter()
                    .for_each(|record| run.count(record));
            }
        }
        Ok(run)
    }

    /// One step; if it is the last, because of `stop` or by its number, it also validates and writes a checkpoint.
    fn step(
        &mut self,
        step: u64,
        stop: bool,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let last = stop || step + 1 == self.args.steps;
        if stop && step > self.first_step {
            // Workers that are asked together may stop a step apart, since none can be more than a step ahead: with
            // a checkpoint before the last step and one after it, they have one step in common.
            self.save(reducer)?;
        }
        let start = Instant::now();
        let StepStart { behind } = reducer.begin()?;
        let mut pushing = Duration::ZERO;
        let (loss, examples) = if behind {
            (f32::NAN, 0)
        } else {
            let rank = reducer.rank();
            self.trainer
                .gradients(step, rank, &mut |tensor, gradient| {
                    let start = Instant::now();
                    let pushed = reducer.push(tensor, gradient);
                    pushing += start.elapsed();
                    pushed
                })?
        };
        let pushed = start.elapsed();
        let outcome = reducer.finish()?;
        let waited = start.elapsed() - pushed;
        let updating = Instant::now();
        if outcome.skipped {
            observer.on_message(&skipped_text(step, loss.is_finite() || behind));
        } else {
            self.trainer
                .apply(step, &mut |f| reducer.for_each_result(f))?;
        }
        let mut record = self.record(loss, examples, &outcome);
        record.behind = behind;
        record.late = !behind && outcome.stats.rounds_counted < outcome.stats.rounds;
        record.live_workers = reducer.live_workers();
        record.update_seconds = updating.elapsed().as_secs_f32();
        record.step_seconds = start.elapsed().as_secs_f32();
        record.compute_seconds = pushed.saturating_sub(pushing).as_secs_f32();
        if record.wait_seconds == 0.0 {
            record.wait_seconds = waited.as_secs_f32();
        }
        let due = |every: u64| every > 0 && (step + 1).is_multiple_of(every);
        // Parameters are equal everywhere: one worker measures for all, unless it has steps to catch up with.
        let validates = (due(self.args.validate_every) && !behind) || last;
        if validates && reducer.is_leader() {
            let validation = self.trainer.validate()?;
            (record.validation_loss, record.validation_accuracy) =
                (Some(validation.loss), validation.accuracy);
            warn_if_not_finite(step, validation, observer);
            observer.on_validation(step, validation);
        }
        self.publish(&record, reducer, observer)?;
        if due(self.args.digest_every) {
            reducer.digest(Step(step + 1), self.trainer.digest_bytes()?);
        }
        self.upload(due(self.args.snapshot_every), reducer, observer)?;
        if last || due(self.args.checkpoint_every) {
            self.save(reducer)?;
        }
        Ok(())
    }

    /// Sees to the uploads to the shards' store: starts what was asked for, and a snapshot if one is `due`.
    fn upload(
        &mut self,
        due: bool,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let (Some(mut uploads), Some(run)) = (self.uploads.take(), reducer.run()) else {
            return Ok(());
        };
        if let Some((id, stored)) = uploads.note(false, observer) {
            reducer.donation_ended(id.step, stored);
        }
        if reducer.donation_due() && uploads.may_donate() {
            let replica = self.replica(reducer.export_shared())?;
            let step = Step(replica.step);
            reducer.donating(step);
            if !uploads.donate(SnapshotId { step, run }, replica) {
                reducer.donation_ended(step, false);
            }
        }
        if due && uploads.is_free(observer) {
            let mut state = reducer.export_state();
            let own = Checkpoint {
                step: state.step.0,
                update: state.update,
                config: self.config.clone(),
                feedback: own(std::mem::take(&mut state.arrays)),
                ..Checkpoint::default()
            };
            let lead = if reducer.is_leader() {
                let feedback = reducer.plan().spec.algorithm.feedback;
                Some(Lead {
                    replica: self.replica(reducer.export_shared())?,
                    members: reducer.members(),
                    live: reducer.live_ranks(),
                    all_or_none: matches!(feedback, Feedback::Ef21 | Feedback::Ef21m),
                })
            } else {
                None
            };
            let step = state.step;
            uploads.snapshot(SnapshotId { step, run }, reducer.rank(), own, lead);
        }
        self.uploads = Some(uploads);
        Ok(())
    }

    /// Copies parameters and optimizer, beside the feedback state that the caller has.
    fn replica(&mut self, state: WorkerState) -> Result<Checkpoint, TrainError> {
        let model = self.trainer.model();
        let mut parameters = Vec::with_capacity(model.specs().len());
        for (spec, var) in model.specs().iter().zip(model.vars()) {
            parameters.push((
                spec.name.clone(),
                read_parameter(var.as_tensor(), <[f32]>::to_vec)?,
            ));
        }
        let mut optimizer = self.trainer.optimizer_mut().export();
        optimizer.push((optimizer_marker(self.args), Vec::new()));
        Ok(Checkpoint {
            step: state.step.0,
            update: state.update,
            config: self.config.clone(),
            model: parameters,
            optimizer,
            feedback: state.arrays,
        })
    }

    fn record(&self, loss: f32, examples: u64, outcome: &StepOutcome) -> StepRecord {
        let stats = &outcome.stats;
        StepRecord {
            step: outcome.step.0,
            update: outcome.update,
            loss,
            lr: self.trainer.schedule().rate(outcome.step.0),
            skipped: outcome.skipped,
            tokens: examples,
            compress_seconds: stats.compress_seconds as f32,
            wait_seconds: stats.wait_seconds as f32,
            bytes_sent: stats.sent.total(),
            bytes_received: stats.received.total(),
            dense_equivalent_bytes: stats.dense_equivalent_bytes,
            captured_energy: stats.captured_energy,
            density: stats.density,
            residual_ratio: stats.residual_ratio(),
            ..StepRecord::default()
        }
    }

    fn publish(
        &mut self,
        record: &StepRecord,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        self.count(record);
        if let Some(writer) = &mut self.writer {
            writer.write(record)?;
        }
        let StepRecord {
            step,
            loss,
            step_seconds,
            wait_seconds,
            ..
        } = *record;
        reducer.report(TrainReport {
            step: Step(step),
            loss,
            step_seconds,
            wait_seconds,
        });
        observer.on_step(record);
        Ok(())
    }

    fn count(&mut self, record: &StepRecord) {
        self.summary.add(record);
        if !record.skipped && record.loss.is_finite() {
            self.last_losses.push_back(record.loss);
            if self.last_losses.len() > FINAL_STEPS {
                self.last_losses.pop_front();
            }
        }
    }

    fn save(&mut self, reducer: &mut dyn Reducer) -> Result<(), TrainError> {
        let Some(store) = self.store.clone() else {
            return Ok(());
        };
        store.save(&self.replica(reducer.export_state())?)?;
        Ok(())
    }

    fn end(
        mut self,
        stopped: bool,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<RunSummary, TrainError> {
        if let Some(mut uploads) = self.uploads.take() {
            // What is on its way may take long, and the others need not wait for that.
            reducer.step_aside();
            if stopped {
                // The others go on, or are being stopped as well; whoever stops machines does not wait long.
                uploads.hurry();
            }
            if let Some((id, stored)) = uploads.note(true, observer) {
                reducer.donation_ended(id.step, stored);
            }
        }
        let losses = &self.last_losses;
        if !losses.is_empty() {
            self.summary.final_train_loss = Some(losses.iter().sum::<f32>() / losses.len() as f32);
        }
        self.summary.digest = self.trainer.digest()?;
        if let Some(directory) = &self.args.run_dir {
            write_summary(directory, &self.summary)?;
        }
        Ok(self.summary)
    }
}

/// Name of the empty array that tells which rule an optimizer's state belongs to: some rules could misread another's.
pub(super) fn optimizer_marker(args: &TrainArgs) -> String {
    format!("kind/{:?}", args.optimizer)
}

fn skipped_text(step: u64, finite: bool) -> String {
    let own = if finite {
        "another worker's"
    } else {
        "this worker's"
    };
    format!(
        "step {step}: {own} gradient has a NaN or an infinity, so all workers skip the update; if that goes on, lower --lr or set --clip"
    )
}

fn warn_if_not_finite(step: u64, validation: Validation, observer: &mut dyn Observer) {
    if !validation.loss.is_finite() {
        observer.on_message(&format!(
            "step {step}: the validation loss is {}: training has diverged; start again with a lower --lr",
            validation.loss
        ));
    }
}
