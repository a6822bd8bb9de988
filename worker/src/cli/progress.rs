//! Progress of a run from its step records: a bar on a terminal, lines elsewhere, JSON for machines.

use crate::record::StepRecord;
use crate::report::format;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two plain lines, unless a validation comes in.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// How progress is shown.
#[derive(Debug)]
enum Style {
    Bar(ProgressBar),
    Lines { last: Option<Instant>, text: String },
    Json,
}

/// Progress of one run of some workers.
#[derive(Debug)]
pub(super) struct Progress {
    name: String,
    total: u64,
    style: Style,
    /// Latest record by rank.
    latest: Vec<Option<StepRecord>>,
    validation: Option<f32>,
    /// Steps shown.
    shown: u64,
}

impl Progress {
    /// Of a run called `name` with `workers` workers and `total` steps. Bars and lines go to standard error.
    pub(super) fn new(name: &str, workers: usize, total: u64, json: bool) -> Self {
        let style = if json {
            Style::Json
        } else if io::stderr().is_terminal() {
            Style::Bar(bar(name, total))
        } else {
            Style::Lines {
                last: None,
                text: String::new(),
            }
        };
        Self {
            name: name.to_owned(),
            total,
            style,
            latest: vec![None; workers],
            validation: None,
            shown: 0,
        }
    }

    /// A worker finished a step. JSON gets every record, people what most workers have reached.
    pub(super) fn step(&mut self, rank: usize, record: &StepRecord) {
        if matches!(self.style, Style::Json) {
            return self.json(
                "step",
                rank,
                &serde_json::to_value(record).unwrap_or_default(),
            );
        }
        if record.behind {
            // A loss it has none, and the others are further.
            return;
        }
        let fresh = record.validation_loss.is_some();
        self.validation = record.validation_loss.or(self.validation);
        if rank >= self.latest.len() {
            self.latest.resize(rank + 1, None);
        }
        self.latest[rank] = Some(record.clone());
        let done = record.step + 1;
        // The worker that validates is the last to report its step.
        if done > self.shown || fresh {
            self.shown = self.shown.max(done);
            self.show(fresh);
        }
    }

    /// Something a person should know.
    pub(super) fn message(&mut self, rank: Option<usize>, text: &str) {
        match (&self.style, rank) {
            (Style::Json, rank) => {
                self.json(
                    "message",
                    rank.unwrap_or(0),
                    &serde_json::json!({ "text": text }),
                );
            }
            // Every worker says the same of data and skipped steps; of its own joining only itself.
            (_, Some(rank)) if rank > self.speaker() && !text.starts_with("joined") => {}
            (Style::Bar(bar), _) => bar.println(format!("{}: {text}", self.name)),
            (Style::Lines { .. }, _) => eprintln!("{}: {text}", self.name),
        }
    }

    /// Something that went wrong with one process, whatever its rank.
    pub(super) fn complaint(&mut self, text: &str) {
        match &self.style {
            Style::Bar(bar) => bar.println(text),
            Style::Lines { .. } | Style::Json => eprintln!("{text}"),
        }
    }

    /// The run is over.
    pub(super) fn finish(&mut self) {
        match &self.style {
            Style::Bar(bar) => bar.finish(),
            Style::Lines { .. } if self.shown > 0 => self.line(),
            Style::Lines { .. } | Style::Json => {}
        }
    }

    fn show(&mut self, fresh_validation: bool) {
        let text = self.text();
        match &mut self.style {
            Style::Bar(bar) => {
                bar.set_position(self.shown);
                bar.set_message(text);
            }
            Style::Lines { last, .. } => {
                if fresh_validation || last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
                    *last = Some(Instant::now());
                    self.line();
                }
            }
            Style::Json => {}
        }
    }

    /// A plain line, unless it would say what the last one said.
    fn line(&mut self) {
        let new = format!(
            "{}: step {}/{}  {}",
            self.name,
            self.shown,
            self.total,
            self.text()
        );
        if let Style::Lines { text, .. } = &mut self.style
            && *text != new
        {
            eprintln!("{new}");
            *text = new;
        }
    }

    /// Means over the workers' latest records.
    fn text(&self) -> String {
        let known = || self.recent().map(|(_, record)| record);
        let count = known().count().max(1) as f64;
        let mean = |pick: fn(&StepRecord) -> f64| known().map(pick).sum::<f64>() / count;
        let moved = mean(|r| (r.bytes_sent + r.bytes_received) as f64);
        let dense = mean(|r| 2.0 * r.dense_equivalent_bytes as f64);
        let mut text = format!("loss {:.3}", mean(|r| f64::from(r.loss)));
        if let Some(loss) = self.validation {
            text += &format!("  val {loss:.3}");
        }
        text += &format!(
            "  {}/step",
            format::seconds(mean(|r| f64::from(r.step_seconds)))
        );
        if moved > 0.0 {
            text += &format!(
                "  {}/step, {} of dense",
                format::bytes(moved),
                format::ratio(moved / dense)
            );
        }
        text
    }

    /// Latest records of the workers that keep up, by rank: the others are lost.
    fn recent(&self) -> impl Iterator<Item = (usize, &StepRecord)> {
        let known = self.latest.iter().enumerate();
        let known = known.filter_map(|(rank, record)| record.as_ref().map(|record| (rank, record)));
        known.filter(|(_, record)| record.step + 3 > self.shown)
    }

    /// The rank that speaks for all.
    fn speaker(&self) -> usize {
        self.recent().next().map_or(0, |(rank, _)| rank)
    }

    fn json(&self, event: &str, rank: usize, fields: &serde_json::Value) {
        let mut line = serde_json::json!({ "event": event, "run": self.name, "rank": rank });
        if let (Some(line), Some(fields)) = (line.as_object_mut(), fields.as_object()) {
            line.extend(fields.clone());
        }
        emit(&line);
    }
}

/// One line of JSON on standard output. A reader that went away is no failure.
pub(super) fn emit(line: &serde_json::Value) {
    let mut out = io::stdout().lock();
    let _reader_gone = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn bar(name: &str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:>6} {bar:24.cyan/dim} {pos}/{len} {elapsed}/{eta_precise} {wide_msg}",
    );
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total)
        .with_style(style)
        .with_prefix(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_loss_time_bytes_and_ratio() {
        let mut progress = Progress::new("arc", 2, 10, false);
        let record = StepRecord {
            loss: 2.0,
            step_seconds: 0.5,
            bytes_sent: 100_000,
            bytes_received: 100_000,
            dense_equivalent_bytes: 2_000_000,
            validation_loss: Some(2.5),
            ..StepRecord::default()
        };
        progress.step(0, &record);
        progress.step(
            1,
            &StepRecord {
                loss: 4.0,
                ..record
            },
        );
        assert_eq!(
            progress.text(),
            "loss 3.000  val 2.500  500 ms/step  200 kB/step, 1/20 of dense"
        );
        assert_eq!(progress.shown, 1);
    }

    #[test]
    fn a_run_without_communication_has_no_ratio() {
        let mut progress = Progress::new("alone", 1, 10, false);
        progress.step(
            0,
            &StepRecord {
                loss: 1.0,
                step_seconds: 0.1,
                ..StepRecord::default()
            },
        );
        assert_eq!(progress.text(), "loss 1.000  100 ms/step");
    }
}
