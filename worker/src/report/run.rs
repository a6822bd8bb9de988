//! A run as its workers recorded it, merged into one: losses and times are means over workers, bytes are those of
//! one worker on average.

use super::ReportError;
use crate::record::{
    RunSummary, STEPS_FILE, SUMMARY_FILE, StepRecord, read_steps, read_summary, worker_directories,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One run, its workers merged.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// What to call it in tables and legends.
    pub name: String,
    /// Totals and settings, as rank 0 wrote them; rebuilt from the steps where a run was killed before its end.
    pub summary: RunSummary,
    /// One record per step, merged over workers.
    pub steps: Vec<StepRecord>,
    /// Whether the run came to its end and wrote a summary.
    pub finished: bool,
}

impl Run {
    /// Reads a run's directory: one worker's records, or a `worker-<rank>` directory for each.
    ///
    /// # Errors
    /// [`ReportError::NoRun`] if there are no records; [`ReportError::Record`] if they cannot be read.
    pub fn load(dir: &Path) -> Result<Self, ReportError> {
        let mut sources: Vec<PathBuf> = worker_directories(dir)?;
        sources.retain(|worker| worker.join(STEPS_FILE).is_file());
        if sources.is_empty() {
            if !dir.join(STEPS_FILE).is_file() {
                return Err(ReportError::NoRun(dir.to_owned()));
            }
            sources.push(dir.to_owned());
        }
        let all: Vec<Vec<StepRecord>> = sources
            .iter()
            .map(|source| read_steps(source))
            .collect::<Result<_, _>>()?;
        let ended = sources
            .iter()
            .filter(|source| source.join(SUMMARY_FILE).is_file());
        let summaries: Vec<RunSummary> = ended
            .map(|source| read_summary(source))
            .collect::<Result<_, _>>()?;
        // That of the worker that was there longest; of those, the first.
        let summary = summaries.into_iter().rev().max_by_key(|s| s.steps);
        let fallback = dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Self::new(summary, &all, fallback))
    }

    /// A run from records that are in memory already; `name` is used where the summary has none.
    #[must_use]
    pub fn new(summary: Option<RunSummary>, workers: &[Vec<StepRecord>], name: String) -> Self {
        let steps = merge(workers);
        let finished = summary.is_some();
        let mut summary = summary.unwrap_or_default();
        let mut merged = RunSummary::default();
        steps.iter().for_each(|record| merged.add(record));
        if !finished {
            summary = merged;
        } else if merged.final_validation_loss.is_some() {
            // One worker validates for all, and not always the same one.
            summary.final_validation_loss = merged.final_validation_loss;
            summary.best_validation_loss = merged.best_validation_loss;
            summary.final_validation_accuracy = merged.final_validation_accuracy;
        }
        let name = if summary.name.is_empty() {
            name
        } else {
            summary.name.clone()
        };
        Self {
            name,
            summary,
            steps,
            finished,
        }
    }

    /// Mean bytes sent and received by a worker, all steps.
    #[must_use]
    pub fn bytes(&self) -> (f64, f64) {
        let sum = |pick: fn(&StepRecord) -> u64| self.steps.iter().map(|r| pick(r) as f64).sum();
        (sum(|r| r.bytes_sent), sum(|r| r.bytes_received))
    }

    /// Bytes in both directions over what dense f32 would have moved; `None` without steps.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        ratio_of(self.steps.iter())
    }

    /// As [`Run::ratio`], of the steps after warm-up and ramp: those whose density is at most a tenth above the median
    /// of the run's second half, or, where the density follows the energy, those that the schedule has there. Skipped steps,
    /// which move no values, do not count. `None` if a run that compresses did not get that far.
    #[must_use]
    pub fn steady_ratio(&self) -> Option<f64> {
        let applied = || self.steps.iter().filter(|r| !r.skipped);
        if let Some(first) = self.first_update_by_energy() {
            return ratio_of(applied().filter(|r| r.update >= first));
        }
        let mut late: Vec<f32> = applied().map(|r| r.density).collect();
        late.drain(..late.len() / 2);
        late.sort_by(f32::total_cmp);
        let usual = *late.get(late.len() / 2)?;
        if usual >= 1.0 && self.setting("compressor").is_some_and(|c| c != "dense") {
            // It ended within its warm-up.
            return None;
        }
        ratio_of(applied().filter(|r| r.density <= usual * 1.1))
    }

    /// The update after warm-up and ramp, if the energy decides from there on how many rows come.
    fn first_update_by_energy(&self) -> Option<u64> {
        let settings = settings(&self.summary.config);
        let energy: f32 = settings.get("energy")?.parse().ok()?;
        let updates = |key| settings.get(key).and_then(|text| text.parse::<u64>().ok());
        let first = updates("warmup_updates")?.saturating_add(updates("ramp_updates")?);
        (energy < 1.0).then_some(first)
    }

    /// Median seconds of a step as measured; `None` without steps.
    #[must_use]
    pub fn step_seconds(&self) -> Option<f64> {
        let mut all: Vec<f32> = self
            .steps
            .iter()
            .map(|r| r.step_seconds)
            .filter(|s| s.is_finite())
            .collect();
        all.sort_by(f32::total_cmp);
        all.get(all.len() / 2).map(|&s| f64::from(s))
    }

    /// Mean seconds per step of compute, waiting, update and the rest (copies of gradients, mostly), which add up to
    /// the step.
    #[must_use]
    pub fn phases(&self) -> [f64; 4] {
        let known = [
            self.mean_seconds(|r| r.compute_seconds),
            self.mean_seconds(|r| r.wait_seconds),
            self.mean_seconds(|r| r.update_seconds),
        ];
        let rest = self.mean_seconds(|r| r.step_seconds) - known.iter().sum::<f64>();
        [known[0], known[1], known[2], rest.max(0.0)]
    }

    /// Mean seconds per step of compression, which a session does beside compute and waiting.
    #[must_use]
    pub fn compress_seconds(&self) -> f64 {
        self.mean_seconds(|r| r.compress_seconds)
    }

    fn mean_seconds(&self, pick: fn(&StepRecord) -> f32) -> f64 {
        let sum: f64 = self.steps.iter().map(|r| f64::from(pick(r))).sum();
        sum / self.steps.len().max(1) as f64
    }

    /// Predicted seconds that every step needs the links for, were every worker and every shard behind a link of its
    /// own at this rate: the busiest direction of the busiest link decides.
    ///
    /// The model is that of [`arc_topk_common::plan::predict`] with separate shards and a short round trip.
    pub fn predicted_link_seconds(&self, bits_per_second: f64) -> impl Iterator<Item = f64> + '_ {
        let per_shard = f64::from(self.summary.workers) / f64::from(self.summary.shards.max(1));
        self.steps.iter().map(move |record| {
            let bytes = record.bytes_sent.max(record.bytes_received) as f64 * per_shard.max(1.0);
            8.0 * bytes / bits_per_second
        })
    }

    /// Predicted seconds of every step: its local work as measured, and [`Run::predicted_link_seconds`]. Compression
    /// is counted as if nothing of it overlapped computing, and so are the links.
    pub fn predicted_step_seconds(&self, bits_per_second: f64) -> impl Iterator<Item = f64> + '_ {
        let local = |r: &StepRecord| {
            let seconds = [r.compute_seconds, r.update_seconds, r.compress_seconds];
            seconds.into_iter().map(f64::from).sum::<f64>()
        };
        let link = self.predicted_link_seconds(bits_per_second);
        self.steps
            .iter()
            .zip(link)
            .map(move |(record, link)| local(record) + link)
    }

    /// Steps and validation losses, in order.
    pub fn validations(&self) -> impl Iterator<Item = (&StepRecord, f32)> {
        let finite = |r: &'_ StepRecord| r.validation_loss.filter(|loss| loss.is_finite());
        self.steps
            .iter()
            .filter_map(move |r| finite(r).map(|loss| (r, loss)))
    }

    /// A setting that the run echoed, wherever it stands in the echo.
    #[must_use]
    pub fn setting(&self, key: &str) -> Option<String> {
        settings(&self.summary.config).remove(key)
    }
}

/// The echo of a run's settings as flat keys and plain texts; tables inside it lose their name.
#[must_use]
pub fn settings(config: &serde_json::Value) -> BTreeMap<String, String> {
    let mut flat = BTreeMap::new();
    if let serde_json::Value::Object(fields) = config {
        for (key, value) in fields {
            match value {
                serde_json::Value::Object(_) => flat.extend(settings(value)),
                serde_json::Value::Null => {}
                serde_json::Value::String(text) => drop(flat.insert(key.clone(), text.clone())),
                // f32 settings come back as f64: 0.003 must not read 0.003000000026077032.
                serde_json::Value::Number(number) if number.is_f64() => {
                    let value = number.as_f64().unwrap_or_default() as f32;
                    flat.insert(key.clone(), value.to_string());
                }
                other => drop(flat.insert(key.clone(), other.to_string())),
            }
        }
    }
    flat
}

fn ratio_of<'a>(records: impl Iterator<Item = &'a StepRecord>) -> Option<f64> {
    let (moved, dense) = records.fold((0, 0), |(moved, dense), r| {
        (
            moved + r.bytes_sent + r.bytes_received,
            dense + 2 * r.dense_equivalent_bytes,
        )
    });
    (dense > 0).then(|| moved as f64 / dense as f64)
}

/// Means over the workers that have a step. The order of workers does not matter to a reader, so neither does rounding.
fn merge(workers: &[Vec<StepRecord>]) -> Vec<StepRecord> {
    let mut by_step: BTreeMap<u64, Vec<&StepRecord>> = BTreeMap::new();
    for record in workers.iter().flatten() {
        by_step.entry(record.step).or_default().push(record);
    }
    // One that only took a step's result says nothing of how the step went, unless nobody else is left to ask.
    let took_part = |mut records: Vec<&StepRecord>| -> StepRecord {
        if records.iter().any(|record| !record.behind) {
            records.retain(|record| !record.behind);
        }
        merge_step(&records)
    };
    by_step.into_values().map(took_part).collect()
}

fn merge_step(records: &[&StepRecord]) -> StepRecord {
    let count = records.len();
    let mean = |pick: fn(&StepRecord) -> f32| {
        (records.iter().map(|r| f64::from(pick(r))).sum::<f64>() / count as f64) as f32
    };
    let optional = |pick: fn(&StepRecord) -> Option<f32>| {
        let known: Vec<f64> = records
            .iter()
            .filter_map(|r| pick(r))
            .map(f64::from)
            .collect();
        (!known.is_empty()).then(|| (known.iter().sum::<f64>() / known.len() as f64) as f32)
    };
    let whole =
        |pick: fn(&StepRecord) -> u64| records.iter().map(|r| pick(r)).sum::<u64>() / count as u64;
    StepRecord {
        loss: mean(|r| r.loss),
        tokens: records.iter().map(|r| r.tokens).sum(),
        step_seconds: mean(|r| r.step_seconds),
        compute_seconds: mean(|r| r.compute_seconds),
        update_seconds: mean(|r| r.update_seconds),
        compress_seconds: mean(|r| r.compress_seconds),
        wait_seconds: mean(|r| r.wait_seconds),
        bytes_sent: whole(|r| r.bytes_sent),
        bytes_received: whole(|r| r.bytes_received),
        captured_energy: optional(|r| r.captured_energy),
        residual_ratio: optional(|r| r.residual_ratio),
        validation_loss: optional(|r| r.validation_loss),
        validation_accuracy: optional(|r| r.validation_accuracy),
        ..records[0].clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, loss: f32, sent: u64) -> StepRecord {
        StepRecord {
            step,
            loss,
            bytes_sent: sent,
            bytes_received: sent,
            dense_equivalent_bytes: 1000,
            density: if step == 0 { 1.0 } else { 0.25 },
            ..StepRecord::default()
        }
    }

    #[test]
    fn workers_are_averaged_and_a_lost_one_is_left_out() {
        let first = vec![record(0, 2.0, 1000), record(1, 1.0, 100)];
        let second = vec![record(0, 4.0, 1000)];
        let run = Run::new(None, &[first, second], "x".into());
        assert_eq!(run.steps.len(), 2);
        assert_eq!((run.steps[0].loss, run.steps[1].loss), (3.0, 1.0));
        assert_eq!(run.bytes(), (1100.0, 1100.0));
        assert!((run.ratio().unwrap() - 0.55).abs() < 1e-12);
        assert!((run.steady_ratio().unwrap() - 0.1).abs() < 1e-12);
        assert!(!run.finished);
    }

    #[test]
    fn workers_may_come_late_and_go_early() {
        let dir = tempfile::tempdir().unwrap();
        let write = |rank: u16, steps: &[StepRecord], validation: Option<f32>| {
            let worker = dir.path().join(format!("worker-{rank}"));
            let mut writer = crate::record::StepWriter::open(&worker, 0).unwrap();
            steps.iter().for_each(|step| writer.write(step).unwrap());
            let mut summary = RunSummary {
                rank,
                ..RunSummary::default()
            };
            steps.iter().for_each(|step| summary.add(step));
            summary.final_validation_loss = validation;
            if validation.is_some() || rank > 4 {
                crate::record::write_summary(&worker, &summary).unwrap();
            }
        };
        // Rank 0 is lost after two steps; rank 5 joins at step 1, which it only takes the result of.
        let mut first = vec![record(0, 2.0, 10), record(1, 2.0, 10)];
        first[1].validation_loss = Some(3.0);
        write(0, &first, None);
        let mut last = record(2, 4.0, 10);
        last.validation_loss = Some(2.5);
        let behind = StepRecord {
            behind: true,
            ..record(1, f32::NAN, 1)
        };
        write(5, &[behind, last], Some(2.5));
        let run = Run::load(dir.path()).unwrap();
        let losses: Vec<f32> = run.steps.iter().map(|step| step.loss).collect();
        assert_eq!(losses, [2.0, 2.0, 4.0]);
        assert!(run.finished);
        assert_eq!(run.summary.rank, 5);
        assert_eq!(run.summary.final_validation_loss, Some(2.5));
    }

    #[test]
    fn a_skipped_step_is_not_the_steady_state() {
        let mut steps: Vec<_> = (0..9)
            .map(|step| record(step, 1.0, if step == 0 { 1000 } else { 100 }))
            .collect();
        steps[6] = StepRecord {
            skipped: true,
            density: 0.0,
            ..record(6, 1.0, 3)
        };
        let run = Run::new(None, &[steps], "x".into());
        assert!((run.steady_ratio().unwrap() - 0.1).abs() < 1e-12);
    }

    #[test]
    fn a_density_that_follows_the_energy_does_not_hide_the_larger_steps() {
        let record = |step, sent, density| StepRecord {
            update: step,
            density,
            ..record(step, 1.0, sent)
        };
        // One dense update, then 100, 300, 100, 300 bytes.
        let steps: Vec<_> = (0..5)
            .map(|step| match step {
                0 => record(step, 1000, 1.0),
                _ if step % 2 == 1 => record(step, 100, 0.1),
                _ => record(step, 300, 0.3),
            })
            .collect();
        let summary = |energy: f32, updates: u64| RunSummary {
            config: serde_json::json!({"algorithm": {"energy": energy, "warmup_updates": 1, "ramp_updates": updates - 1}}),
            ..RunSummary::default()
        };
        let run = |summary| Run::new(Some(summary), std::slice::from_ref(&steps), "x".into());
        assert!((run(summary(0.9, 1)).steady_ratio().unwrap() - 0.2).abs() < 1e-12);
        assert!((run(summary(0.9, 4)).steady_ratio().unwrap() - 0.3).abs() < 1e-12);
        assert_eq!(run(summary(0.9, 5)).steady_ratio(), None);
    }

    #[test]
    fn an_empty_run_has_no_figures() {
        let run = Run::new(None, &[], "x".into());
        assert_eq!(
            (run.ratio(), run.steady_ratio(), run.step_seconds()),
            (None, None, None)
        );
        assert_eq!(run.phases(), [0.0; 4]);
    }

    #[test]
    fn prediction_adds_the_link_to_local_work() {
        let mut one = record(0, 1.0, 500_000);
        one.compute_seconds = 0.5;
        let run = Run::new(None, &[vec![one]], "x".into());
        let seconds: Vec<f64> = run.predicted_step_seconds(8e6).collect();
        assert_eq!(seconds, [1.0]);
        let mut four = run;
        (four.summary.workers, four.summary.shards) = (4, 2);
        let seconds: Vec<f64> = four.predicted_step_seconds(8e6).collect();
        assert_eq!(seconds, [1.5], "two workers share a shard's link");
    }

    #[test]
    fn settings_are_flattened_and_keep_their_spelling() {
        let config = serde_json::json!({"train": {"lr": f64::from(0.003f32), "data": null}, "name": "arc", "steps": 3});
        let flat = settings(&config);
        assert_eq!(flat["lr"], "0.003");
        assert_eq!(flat["name"], "arc");
        assert_eq!(flat.len(), 3);
    }

    #[test]
    fn a_directory_without_records_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Run::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("holds no run"), "{error}");
    }
}
