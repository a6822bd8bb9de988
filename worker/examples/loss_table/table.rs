//! From the results file to a table: each cell at its best rate, averaged over seeds.

use crate::job::RunResult;
use std::collections::BTreeMap;
use std::fmt::Write;

/// A cell at its best learning rate.
pub(crate) struct Row<'a> {
    pub(crate) cell: &'a str,
    pub(crate) lr: f32,
    /// Validation loss of every seed.
    pub(crate) losses: Vec<f32>,
    /// Rates that were tried, ascending, with the mean loss of each.
    pub(crate) rates: Vec<(f32, Option<f32>)>,
    pub(crate) runs: Vec<&'a RunResult>,
}

impl Row<'_> {
    pub(crate) fn mean(&self) -> Option<f32> {
        mean(&self.losses)
    }
}

fn mean(values: &[f32]) -> Option<f32> {
    (!values.is_empty()).then(|| values.iter().sum::<f32>() / values.len() as f32)
}

/// Rows in the order of `order`. A rate counts by the mean of its seeds; one that diverged with any seed is out.
pub(crate) fn rows<'a>(results: &'a [RunResult], order: &[String]) -> Vec<Row<'a>> {
    let mut rows = Vec::new();
    for cell in order {
        let mut rates: BTreeMap<u32, Vec<&RunResult>> = BTreeMap::new();
        for run in results.iter().filter(|run| run.cell == *cell) {
            // Positive floats order like their bits.
            rates.entry(run.lr.to_bits()).or_default().push(run);
        }
        let loss = |runs: &[&RunResult]| -> Option<f32> {
            let losses: Option<Vec<f32>> = runs.iter().map(|run| run.validation_loss).collect();
            mean(&losses?)
        };
        // Only rates with as many seeds as the fullest compare fairly.
        let seeds = rates.values().map(Vec::len).max().unwrap_or(0);
        let full = rates.iter().filter(|(_, runs)| runs.len() == seeds);
        let key = |runs: &[&RunResult]| loss(runs).unwrap_or(f32::INFINITY);
        let Some((_, best)) = full.min_by(|a, b| key(a.1).total_cmp(&key(b.1))) else {
            continue;
        };
        rows.push(Row {
            cell: &best[0].cell,
            lr: best[0].lr,
            losses: best.iter().filter_map(|run| run.validation_loss).collect(),
            rates: rates
                .values()
                .map(|runs| (runs[0].lr, loss(runs)))
                .collect(),
            runs: best.clone(),
        });
    }
    rows
}

/// The table as Markdown. Ratios are to the first row (dense).
pub(crate) fn markdown(rows: &[Row<'_>], header: &str) -> String {
    let mut out = format!("{header}\n\n");
    out.push_str("| cell | best rate | validation loss | ± | against dense | bytes/step up | down | fewer bytes, steady | whole run | energy | other rates |\n");
    out.push_str("|---|---|---|---|---|---|---|---|---|---|---|\n");
    let dense = rows
        .iter()
        .find(|row| row.cell == "dense adamw")
        .and_then(Row::mean);
    for row in rows {
        let run = row.runs[0];
        let loss = row
            .mean()
            .map_or("diverged".to_owned(), |loss| format!("{loss:.4}"));
        let spread = row.losses.iter().copied().fold(f32::NEG_INFINITY, f32::max)
            - row.losses.iter().copied().fold(f32::INFINITY, f32::min);
        let spread = if row.losses.len() > 1 {
            format!("{:.4}", spread / 2.0)
        } else {
            "–".to_owned()
        };
        let against = match (row.mean(), dense) {
            (Some(loss), Some(dense)) => format!("{:+.2} %", (loss / dense - 1.0) * 100.0),
            _ => "–".to_owned(),
        };
        let both = |sent: u64, received: u64| (sent + received).max(1) as f64;
        let steady =
            2.0 * run.dense_bytes_per_step as f64 / both(run.steady_sent, run.steady_received);
        let steps = run.curve.last().map_or(run.steps, |(step, ..)| *step);
        let whole = 2.0 * (run.dense_bytes_per_step * steps) as f64
            / both(run.bytes_sent, run.bytes_received);
        let energy = run
            .captured_energy
            .map_or("–".to_owned(), |energy| format!("{energy:.2}"));
        let rates: Vec<String> = row
            .rates
            .iter()
            .map(|(lr, loss)| {
                format!(
                    "{lr}: {}",
                    loss.map_or("–".to_owned(), |l| format!("{l:.3}"))
                )
            })
            .collect();
        let _ = writeln!(
            out,
            "| {} | {} | {loss} | {spread} | {against} | {} | {} | {steady:.1}× | {whole:.1}× | {energy} | {} |",
            row.cell,
            row.lr,
            run.steady_sent,
            run.steady_received,
            rates.join(", ")
        );
    }
    out
}

/// All runs, one line each.
pub(crate) fn csv(results: &[RunResult]) -> String {
    let mut out = String::from(
        "cell,lr,seed,steps,validation_loss,bytes_sent,bytes_received,steady_sent,steady_received,dense_bytes_per_step,seconds\n",
    );
    for run in results {
        let loss = run
            .validation_loss
            .map_or(String::new(), |loss| loss.to_string());
        let _ = writeln!(
            out,
            "{},{},{},{},{loss},{},{},{},{},{},{:.1}",
            run.cell,
            run.lr,
            run.seed,
            run.steps,
            run.bytes_sent,
            run.bytes_received,
            run.steady_sent,
            run.steady_received,
            run.dense_bytes_per_step,
            run.seconds
        );
    }
    out
}

/// Validation curves of every cell at its best rate, for plots.
pub(crate) fn curves(rows: &[Row<'_>]) -> String {
    let mut out = String::from("cell,lr,seed,step,validation_loss,bytes_sent\n");
    for run in rows.iter().flat_map(|row| &row.runs) {
        for (step, loss, bytes) in &run.curve {
            let loss = loss.map_or(String::new(), |loss| loss.to_string());
            let _ = writeln!(
                out,
                "{},{},{},{step},{loss},{bytes}",
                run.cell, run.lr, run.seed
            );
        }
    }
    out
}
