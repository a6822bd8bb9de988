//! The closing table: one column per run, the first being what the others are compared with.

use super::format;
use super::run::Run;
use comfy_table::{Cell, CellAlignment, Table, presets};

/// Link rates for which a run's time is predicted, in bit/s.
pub const PREDICTED_RATES: [f64; 2] = [1e9, 1e8];

/// The closing table as text, with a line under it that says how its predictions were made. Empty without runs.
#[must_use]
pub fn closing_table(runs: &[Run]) -> String {
    if runs.is_empty() {
        return String::new();
    }
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let mut head = vec![Cell::new("")];
    head.extend(runs.iter().map(|run| right(&run.name)));
    table.set_header(head);
    for (label, cells) in rows(runs) {
        let mut row = vec![Cell::new(label)];
        row.extend(cells.iter().map(|text| right(text)));
        table.add_row(row);
    }
    format!(
        "{table}\nPredicted: compute as measured here, every worker and shard behind a link of its own at that rate.\n"
    )
}

fn right(text: &str) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

/// Rows as label and one text per run; also what the page shows.
pub(super) fn rows(runs: &[Run]) -> Vec<(String, Vec<String>)> {
    let mut rows: Vec<(String, Vec<String>)> = Vec::new();
    let mut add = |label: &str, cells: Vec<String>| {
        if cells.iter().any(|cell| cell != "–") {
            rows.push((label.to_owned(), cells));
        }
    };
    let each = |cell: &dyn Fn(&Run) -> Option<String>| -> Vec<String> {
        runs.iter()
            .map(|run| cell(run).unwrap_or_else(|| "–".to_owned()))
            .collect()
    };
    add("validation loss", losses(runs));
    add(
        "validation accuracy",
        each(&|run| {
            run.summary
                .final_validation_accuracy
                .map(|share| format!("{:.1} %", 100.0 * share))
        }),
    );
    add(
        "training loss, end",
        each(&|run| {
            run.summary
                .final_train_loss
                .map(|loss| format!("{loss:.4}"))
        }),
    );
    add("learning rate", each(&|run| run.setting("lr")));
    add("steps", each(&|run| Some(steps(run))));
    add("sent per worker", each(&|run| moved(run, run.bytes().0)));
    add(
        "received per worker",
        each(&|run| moved(run, run.bytes().1)),
    );
    add(
        "bytes against dense f32",
        each(&|run| run.ratio().map(format::ratio)),
    );
    add(
        "… after the warm-up",
        each(&|run| run.steady_ratio().map(format::ratio)),
    );
    add(
        "step time, measured here",
        each(&|run| run.step_seconds().map(format::seconds)),
    );
    for rate in PREDICTED_RATES {
        let label = |what: &str| format!("{what} at {}, predicted", format::rate(rate));
        add(
            &label("communication"),
            each(&|run| {
                let seconds = run.predicted_link_seconds(rate).sum();
                (!run.steps.is_empty()).then(|| format::seconds(seconds))
            }),
        );
        add(&label("whole run"), predictions(runs, rate));
    }
    rows
}

/// Losses, each after the first with its distance to the first.
fn losses(runs: &[Run]) -> Vec<String> {
    let base = runs
        .first()
        .and_then(|run| run.summary.final_validation_loss);
    let one = |(index, run): (usize, &Run)| match (run.summary.final_validation_loss, base) {
        (Some(loss), Some(base)) if index > 0 && base > 0.0 => {
            format!("{loss:.4} ({:+.1} %)", 100.0 * (loss / base - 1.0))
        }
        (Some(loss), _) => format!("{loss:.4}"),
        (None, _) => "–".to_owned(),
    };
    runs.iter().enumerate().map(one).collect()
}

fn steps(run: &Run) -> String {
    let skipped = run.steps.iter().filter(|r| r.skipped).count();
    match (run.finished, skipped) {
        (true, 0) => run.steps.len().to_string(),
        (true, skipped) => format!("{} ({skipped} skipped)", run.steps.len()),
        (false, _) => format!("{} (cut short)", run.steps.len()),
    }
}

fn moved(run: &Run, bytes: f64) -> Option<String> {
    (!run.steps.is_empty()).then(|| format::bytes(bytes))
}

/// Whole-run times, each after the first with its speed-up.
fn predictions(runs: &[Run], rate: f64) -> Vec<String> {
    let total = |run: &Run| run.predicted_step_seconds(rate).sum::<f64>();
    let base = runs.first().map_or(0.0, total);
    let one = |(index, run): (usize, &Run)| {
        let seconds = total(run);
        if run.steps.is_empty() || !seconds.is_finite() {
            "–".to_owned()
        } else if index > 0 && seconds > 0.0 && base > 0.0 {
            format!(
                "{} ({:.1}× as fast)",
                format::seconds(seconds),
                base / seconds
            )
        } else {
            format::seconds(seconds)
        }
    };
    runs.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{RunSummary, StepRecord};

    fn run(name: &str, loss: f32, sent: u64) -> Run {
        let summary = RunSummary {
            name: name.into(),
            final_validation_loss: Some(loss),
            config: serde_json::json!({"lr": 0.006}),
            ..RunSummary::default()
        };
        let record = StepRecord {
            bytes_sent: sent,
            bytes_received: sent,
            dense_equivalent_bytes: 4_000_000,
            density: 1.0,
            step_seconds: 0.1,
            compute_seconds: 0.08,
            ..StepRecord::default()
        };
        let steps = (0..10)
            .map(|step| StepRecord {
                step,
                ..record.clone()
            })
            .collect();
        Run::new(Some(summary), &[steps], String::new())
    }

    #[test]
    fn the_table_compares_with_the_first_run() {
        let text = closing_table(&[run("dense", 2.0, 4_000_000), run("arc", 2.02, 200_000)]);
        for expected in [
            "dense",
            "arc",
            "2.0000",
            "2.0200 (+1.0 %)",
            "40 MB",
            "2 MB",
            "1/20",
            "100 ms",
            "as fast)",
        ] {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
        assert!(
            text.lines().take(30).all(|line| line.chars().count() < 130),
            "{text}"
        );
    }

    #[test]
    fn nothing_known_is_no_row_and_never_nan() {
        let text = closing_table(&[Run::new(None, &[], "empty".into())]);
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        assert!(!text.contains("validation loss"), "{text}");
        assert_eq!(closing_table(&[]), "");
    }
}
