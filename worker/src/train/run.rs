//! The loop: gradients out, result in, optimizer, records, validation, checkpoints.

use super::checkpoint::{Checkpoint, CheckpointError, CheckpointStore};
use super::data::Dataset;
use super::model::{read_parameter, write_parameter};
use super::{Observer, TrainError, Trainer, Validation};
use crate::record::{RunSummary, StepRecord, StepWriter, read_steps, write_summary};
use crate::reducer::{Reducer, TrainReport};
use crate::step::{StepOutcome, WorkerState};
use arc_topk_common::config::train::TrainArgs;
use arc_topk_common::ids::Step;
use arc_topk_common::plan::Plan;
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
}

/// Where a worker resumes: what to ask for when joining.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResumePoint {
    /// Next step.
    pub step: u64,
    /// Next update (skipped steps not counted).
    pub update: u64,
    /// The rank whose checkpoints lie on this machine, if they are those of one rank alone. A worker that was told
    /// no rank must ask for this one.
    pub only_rank: Option<u16>,
}

/// Where a worker would resume; `None`: from the start. Without a `rank` it is that of the checkpoints that are
/// there, all of which are of the same step.
///
/// # Errors
/// If there are checkpoints, but none can be used.
pub fn resume_point(
    args: &TrainArgs,
    rank: Option<u16>,
    message: &mut dyn FnMut(&str),
) -> Result<Option<ResumePoint>, CheckpointError> {
    let Some(directory) = args.checkpoint_dir.as_deref().filter(|_| args.resume) else {
        return Ok(None);
    };
    let ranks = CheckpointStore::ranks(directory)?;
    let only_rank = match ranks[..] {
        [only] => Some(only),
        _ => None,
    };
    let Some(rank) = rank.or(ranks.first().copied()) else {
        return Ok(None);
    };
    let latest = CheckpointStore::new(directory, rank).latest(message)?;
    Ok(latest.map(|checkpoint| ResumePoint {
        step: checkpoint.step,
        update: checkpoint.update,
        only_rank,
    }))
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
    for step in run.first_step..config.args.steps {
        let stop = observer.should_stop();
        run.step(step, stop, reducer, observer)?;
        if stop {
            observer.on_message(&format!("stopped after step {step}, as asked"));
            break;
        }
    }
    run.end()
}

/// Settings that decide no result.
const FREE_SETTINGS: [&str; 8] = [
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

/// Hash of all settings that decide the result.
fn config_hash(args: &TrainArgs, plan: &Plan) -> String {
    let mut settings = serde_json::to_value(args).expect("settings are plain values");
    if let Some(settings) = settings.as_object_mut() {
        settings.retain(|key, _| !FREE_SETTINGS.contains(&key.as_str()));
    }
    let mut hash = Sha256::new();
    hash.update(plan.spec.hash());
    hash.update(settings.to_string());
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

struct Run<'a> {
    args: &'a TrainArgs,
    trainer: Trainer,
    store: Option<CheckpointStore>,
    writer: Option<StepWriter>,
    summary: RunSummary,
    config: String,
    first_step: u64,
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
            writer: None,
            summary,
            config: config_hash(args, reducer.plan()),
            first_step: 0,
            last_losses: VecDeque::new(),
        };
        if args.resume {
            run.resume(reducer, observer)?;
        } else if let Some(store) = &run.store {
            store.check_unused()?;
        }
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

    /// Goes on from the newest checkpoint, if there is one.
    fn resume(
        &mut self,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let Some(store) = &self.store else {
            return Ok(());
        };
        let Some(checkpoint) = store.latest(&mut |text| observer.on_message(text))? else {
            observer.on_message("no checkpoint to resume from: starting at step 0");
            return Ok(());
        };
        if checkpoint.config != self.config {
            observer.on_message(
                "settings differ from those that made the checkpoint: the run goes on, but not as it would have",
            );
        }
        let path = store.path(checkpoint.step);
        let mismatch = |detail: String| CheckpointError::Mismatch {
            path: path.clone(),
            detail,
        };
        let (specs, vars) = (self.trainer.model().specs(), self.trainer.model().vars());
        if checkpoint.model.len() != specs.len() {
            let detail = format!(
                "it holds {} parameters, the model has {}",
                checkpoint.model.len(),
                specs.len()
            );
            return Err(mismatch(detail).into());
        }
        for ((name, values), (spec, var)) in checkpoint.model.iter().zip(specs.iter().zip(vars)) {
            if *name != spec.name || values.len() != spec.elements() {
                let detail = format!(
                    "{name} has {} elements, {} needs {}",
                    values.len(),
                    spec.name,
                    spec.elements()
                );
                return Err(mismatch(detail).into());
            }
            write_parameter(var.as_tensor(), |parameter| {
                parameter.copy_from_slice(values)
            })?;
        }
        let kind = optimizer_marker(self.args);
        if !checkpoint.optimizer.iter().any(|(name, _)| *name == kind) {
            let detail = format!("its optimizer is not {:?}", self.args.optimizer);
            return Err(mismatch(detail).into());
        }
        let imported = self.trainer.optimizer_mut().import(&checkpoint.optimizer);
        imported.map_err(|error| mismatch(error.to_string()))?;
        let state = WorkerState {
            step: Step(checkpoint.step),
            update: checkpoint.update,
            arrays: checkpoint.feedback,
        };
        reducer.import_state(state)?;
        self.first_step = checkpoint.step;
        store.abandon_after(checkpoint.step)?;
        observer.on_message(&format!(
            "resumed at step {} from {}",
            checkpoint.step,
            path.display()
        ));
        Ok(())
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
        reducer.begin()?;
        let rank = reducer.rank();
        let mut pushing = Duration::ZERO;
        let (loss, examples) = self
            .trainer
            .gradients(step, rank, &mut |tensor, gradient| {
                let start = Instant::now();
                let pushed = reducer.push(tensor, gradient);
                pushing += start.elapsed();
                pushed
            })?;
        let pushed = start.elapsed();
        let outcome = reducer.finish()?;
        let waited = start.elapsed() - pushed;
        let updating = Instant::now();
        if outcome.skipped {
            observer.on_message(&skipped_text(step, loss));
        } else {
            self.trainer
                .apply(step, &mut |f| reducer.for_each_result(f))?;
        }
        let mut record = self.record(loss, examples, &outcome);
        record.update_seconds = updating.elapsed().as_secs_f32();
        record.step_seconds = start.elapsed().as_secs_f32();
        record.compute_seconds = pushed.saturating_sub(pushing).as_secs_f32();
        if record.wait_seconds == 0.0 {
            record.wait_seconds = waited.as_secs_f32();
        }
        // Parameters are equal everywhere: one worker measures for all.
        let due =
            self.args.validate_every > 0 && (step + 1).is_multiple_of(self.args.validate_every);
        if (due || last) && rank.0 == 0 {
            let validation = self.trainer.validate()?;
            (record.validation_loss, record.validation_accuracy) =
                (Some(validation.loss), validation.accuracy);
            warn_if_not_finite(step, validation, observer);
            observer.on_validation(step, validation);
        }
        self.publish(&record, reducer, observer)?;
        let every = self.args.checkpoint_every;
        if last || (every > 0 && (step + 1).is_multiple_of(every)) {
            self.save(reducer)?;
        }
        Ok(())
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
        let Some(store) = &self.store else {
            return Ok(());
        };
        let model = self.trainer.model();
        let mut parameters = Vec::with_capacity(model.specs().len());
        for (spec, var) in model.specs().iter().zip(model.vars()) {
            parameters.push((
                spec.name.clone(),
                read_parameter(var.as_tensor(), <[f32]>::to_vec)?,
            ));
        }
        let state = reducer.export_state();
        let mut optimizer = self.trainer.optimizer_mut().export();
        optimizer.push((optimizer_marker(self.args), Vec::new()));
        store.save(&Checkpoint {
            step: state.step.0,
            update: state.update,
            config: self.config.clone(),
            model: parameters,
            optimizer,
            feedback: state.arrays,
        })?;
        Ok(())
    }

    fn end(mut self) -> Result<RunSummary, TrainError> {
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
fn optimizer_marker(args: &TrainArgs) -> String {
    format!("kind/{:?}", args.optimizer)
}

fn skipped_text(step: u64, loss: f32) -> String {
    let own = if loss.is_finite() {
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
