//! What a run leaves behind: one [`StepRecord`] per step in `steps.jsonl`, one [`RunSummary`] in `summary.json`.
//!
//! Reports, progress bars and tables read these files and nothing else, so a finished run can be reported
//! again at any time. Seconds and bytes are plain numbers; a loss is in nats per token (or per image).

use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// File name of the step records inside a run's directory.
pub const STEPS_FILE: &str = "steps.jsonl";
/// File name of the summary inside a run's directory.
pub const SUMMARY_FILE: &str = "summary.json";

/// One step of one worker.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StepRecord {
    /// Number of the step, from 0. Skipped steps use one up.
    pub step: u64,
    /// Updates applied before this step, from 0.
    pub update: u64,
    /// Training loss of this worker's batch. NaN is written as `null`.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f32,
    /// Learning rate.
    pub lr: f32,
    /// Whether all workers skipped the update because some gradient was not finite.
    pub skipped: bool,
    /// Whether the step had closed without this worker, which only took its result: it has no loss then.
    pub behind: bool,
    /// Whether some of this worker's contribution came too late to be counted.
    pub late: bool,
    /// Workers that steps waited for after this one.
    pub live_workers: u16,
    /// Tokens (or images) that this worker processed.
    pub tokens: u64,
    /// Seconds of the whole step.
    pub step_seconds: f32,
    /// Seconds of forward and backward.
    pub compute_seconds: f32,
    /// Seconds of clipping and of the optimizer.
    pub update_seconds: f32,
    /// Seconds of sketching, gathering and committing. A session does this beside the trainer, so they overlap
    /// `compute_seconds` and `wait_seconds`.
    pub compress_seconds: f32,
    /// Seconds in which the trainer waited for communication after its last gradient was ready.
    pub wait_seconds: f32,
    /// Payload bytes sent by this worker in this step.
    pub bytes_sent: u64,
    /// Payload bytes received by this worker in this step.
    pub bytes_received: u64,
    /// Bytes that dense f32 would have sent, one direction.
    pub dense_equivalent_bytes: u64,
    /// Share of the energy of what this worker compressed (gradient and residual) that the chosen rows hold, in the
    /// steps that measured it.
    pub captured_energy: Option<f32>,
    /// Share of the elements that travelled.
    pub density: f32,
    /// ‖residual‖/‖gradient‖ when it was measured.
    pub residual_ratio: Option<f32>,
    /// Mean loss on the validation windows, in the steps that measured it.
    pub validation_loss: Option<f32>,
    /// Share of validation examples classified rightly (image tasks).
    pub validation_accuracy: Option<f32>,
}

/// What a whole run came to.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RunSummary {
    /// Name of the run, for tables ("arc", "dense", …).
    pub name: String,
    /// Echo of the settings it ran with.
    pub config: serde_json::Value,
    /// Data it trained on, for people.
    pub data: String,
    /// World size at the start.
    pub workers: u16,
    /// Shards.
    pub shards: u16,
    /// Rank that wrote this.
    pub rank: u16,
    /// Parameters of the model (elements).
    pub parameters: u64,
    /// Steps done, of which `skipped_steps` changed nothing.
    pub steps: u64,
    /// Steps that all workers skipped.
    pub skipped_steps: u64,
    /// Steps that had closed without this worker.
    pub behind_steps: u64,
    /// Steps in which some of this worker's contribution came too late.
    pub late_steps: u64,
    /// Mean training loss of the last steps (up to 20).
    pub final_train_loss: Option<f32>,
    /// Last validation loss.
    pub final_validation_loss: Option<f32>,
    /// Best validation loss.
    pub best_validation_loss: Option<f32>,
    /// Last validation accuracy (image tasks).
    pub final_validation_accuracy: Option<f32>,
    /// Tokens (or images) processed by this worker.
    pub tokens: u64,
    /// Seconds of all steps.
    pub total_seconds: f64,
    /// Seconds of forward and backward.
    pub compute_seconds: f64,
    /// Seconds of clipping and of the optimizer.
    pub update_seconds: f64,
    /// Seconds of sketching, gathering and committing.
    pub compress_seconds: f64,
    /// Seconds spent waiting for communication.
    pub wait_seconds: f64,
    /// Payload bytes sent by this worker.
    pub bytes_sent: u64,
    /// Payload bytes received by this worker.
    pub bytes_received: u64,
    /// Bytes that dense f32 would have sent, one direction.
    pub dense_equivalent_bytes: u64,
    /// SHA-256 of all parameters, hexadecimal: equal on all workers, and on equal runs.
    pub digest: String,
}

impl RunSummary {
    /// Adds a step's figures to the totals.
    pub fn add(&mut self, record: &StepRecord) {
        self.steps += 1;
        self.skipped_steps += u64::from(record.skipped);
        self.behind_steps += u64::from(record.behind);
        self.late_steps += u64::from(record.late);
        self.tokens += record.tokens;
        self.total_seconds += f64::from(record.step_seconds);
        self.compute_seconds += f64::from(record.compute_seconds);
        self.update_seconds += f64::from(record.update_seconds);
        self.compress_seconds += f64::from(record.compress_seconds);
        self.wait_seconds += f64::from(record.wait_seconds);
        self.bytes_sent += record.bytes_sent;
        self.bytes_received += record.bytes_received;
        self.dense_equivalent_bytes += record.dense_equivalent_bytes;
        if let Some(loss) = record.validation_loss {
            self.final_validation_loss = Some(loss);
            self.best_validation_loss = Some(
                self.best_validation_loss
                    .map_or(loss, |best| best.min(loss)),
            );
        }
        if record.validation_accuracy.is_some() {
            self.final_validation_accuracy = record.validation_accuracy;
        }
    }
}

/// Why a record could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}; check that the directory exists, is writable and has room", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// File.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A line is not a record.
    #[error("{}:{line}: not a record of this version ({source}); was the file cut off or edited?", path.display())]
    Parse {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Cause.
        source: serde_json::Error,
    },
}

/// Appends step records to `<run>/steps.jsonl`, one line each, flushed so that a watcher sees them at once.
#[derive(Debug)]
pub struct StepWriter {
    path: PathBuf,
    out: BufWriter<File>,
}

impl StepWriter {
    /// Opens the file in `run`, creating the directory.
    ///
    /// Records of steps from `first_step` on are dropped from an existing file, so that a run resumed from a
    /// checkpoint leaves one line per step.
    ///
    /// # Errors
    /// If the file cannot be created or an existing one cannot be read.
    pub fn open(run: &Path, first_step: u64) -> Result<Self, RecordError> {
        let path = run.join(STEPS_FILE);
        fs::create_dir_all(run).map_err(|source| io_error("create", run, source))?;
        let kept = if first_step > 0 && path.exists() {
            read_steps(run)?
        } else {
            Vec::new()
        };
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .open(&path);
        let file = file.map_err(|source| io_error("create", &path, source))?;
        let mut writer = Self {
            path,
            out: BufWriter::new(file),
        };
        for record in kept.iter().filter(|record| record.step < first_step) {
            writer.write(record)?;
        }
        Ok(writer)
    }

    /// Appends one record.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, record: &StepRecord) -> Result<(), RecordError> {
        let mut line = serde_json::to_vec(record).expect("a step record has only plain fields");
        line.push(b'\n');
        let done = self.out.write_all(&line).and_then(|()| self.out.flush());
        done.map_err(|source| io_error("write", &self.path, source))
    }
}

/// Directories `worker-<rank>` in that of a job, by rank. Ranks may be missing: a worker that joins late, or again, has the
/// next one.
///
/// # Errors
/// If the directory cannot be listed; one that does not exist holds none.
pub fn worker_directories(job: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let entries = match fs::read_dir(job) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(io_error("list", job, source)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|source| io_error("list", job, source))?
            .path();
        let name = path.file_name().and_then(|name| name.to_str());
        let rank = name.and_then(|name| name.strip_prefix("worker-")?.parse::<u16>().ok());
        if let Some(rank) = rank.filter(|_| path.is_dir()) {
            found.push((rank, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Reads all step records of a run. A half-written last line (a run that was killed) is left out.
///
/// # Errors
/// If the file cannot be read, or a line other than the last is not a record.
pub fn read_steps(run: &Path) -> Result<Vec<StepRecord>, RecordError> {
    let path = run.join(STEPS_FILE);
    let file = File::open(&path).map_err(|source| io_error("open", &path, source))?;
    let lines: Result<Vec<String>, io::Error> = BufReader::new(file).lines().collect();
    let lines = lines.map_err(|source| io_error("read", &path, source))?;
    let mut records = Vec::with_capacity(lines.len());
    for (index, line) in lines.iter().enumerate() {
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            Err(_) if index + 1 == lines.len() => break,
            Err(source) => {
                return Err(RecordError::Parse {
                    path,
                    line: index + 1,
                    source,
                });
            }
        }
    }
    Ok(records)
}

/// Writes `<run>/summary.json` by rename, so that a reader never sees half of it.
///
/// # Errors
/// If the file cannot be written.
pub fn write_summary(run: &Path, summary: &RunSummary) -> Result<(), RecordError> {
    let path = run.join(SUMMARY_FILE);
    let temporary = run.join(format!("{SUMMARY_FILE}.new"));
    let text = serde_json::to_vec_pretty(summary).expect("a summary has only plain fields");
    fs::create_dir_all(run).map_err(|source| io_error("create", run, source))?;
    fs::write(&temporary, text).map_err(|source| io_error("write", &temporary, source))?;
    fs::rename(&temporary, &path).map_err(|source| io_error("rename", &path, source))
}

/// Reads `<run>/summary.json`.
///
/// # Errors
/// If the file is missing or is not a summary.
pub fn read_summary(run: &Path) -> Result<RunSummary, RecordError> {
    let path = run.join(SUMMARY_FILE);
    let text = fs::read(&path).map_err(|source| io_error("open", &path, source))?;
    serde_json::from_slice(&text).map_err(|source| RecordError::Parse {
        path,
        line: 1,
        source,
    })
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> RecordError {
    RecordError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// JSON has no NaN: serde_json writes `null`, which is read back as NaN.
fn null_is_nan<'de, D: serde::Deserializer<'de>>(input: D) -> Result<f32, D::Error> {
    Ok(Option::<f32>::deserialize(input)?.unwrap_or(f32::NAN))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn record(step: u64) -> StepRecord {
        StepRecord {
            step,
            loss: 1.5,
            validation_loss: (step == 1).then_some(2.0),
            ..StepRecord::default()
        }
    }

    #[test]
    fn steps_survive_a_round_trip_and_a_cut_last_line() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = StepWriter::open(dir.path(), 0).unwrap();
        for step in 0..3 {
            writer.write(&record(step)).unwrap();
        }
        writer
            .write(&StepRecord {
                step: 3,
                loss: f32::NAN,
                ..StepRecord::default()
            })
            .unwrap();
        let path = dir.path().join(STEPS_FILE);
        let mut text = fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"step\":4,\"lo");
        fs::write(&path, text).unwrap();
        let back = read_steps(dir.path()).unwrap();
        assert_eq!(back.len(), 4);
        assert_eq!(back[1], record(1));
        assert!(back[3].loss.is_nan());
    }

    #[test]
    fn a_resumed_run_leaves_one_line_per_step() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = StepWriter::open(dir.path(), 0).unwrap();
        (0..5).for_each(|step| writer.write(&record(step)).unwrap());
        let mut writer = StepWriter::open(dir.path(), 3).unwrap();
        (3..6).for_each(|step| writer.write(&record(step)).unwrap());
        let steps: Vec<u64> = read_steps(dir.path())
            .unwrap()
            .iter()
            .map(|r| r.step)
            .collect();
        assert_eq!(steps, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_summary_adds_up_and_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let mut summary = RunSummary {
            name: "arc".into(),
            ..RunSummary::default()
        };
        (0..3).for_each(|step| summary.add(&record(step)));
        assert_eq!(
            (summary.steps, summary.best_validation_loss),
            (3, Some(2.0))
        );
        write_summary(dir.path(), &summary).unwrap();
        assert_eq!(read_summary(dir.path()).unwrap(), summary);
    }

    #[test]
    fn a_missing_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = read_summary(dir.path()).unwrap_err().to_string();
        assert!(text.contains("summary.json"), "{text}");
    }
}
