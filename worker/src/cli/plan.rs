//! `arc-worker plan`: bytes and seconds of a step before anything is run.

use super::error::CliError;
use super::print;
use crate::report::format;
use crate::train::parameters;
use arc_topk_common::config::{AlgorithmConfig, CommonArgs, ModelPreset, Task, TrainArgs};
use arc_topk_common::plan::predict::{Network, Placement, Prediction, table};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use clap::{Args, Parser};
use comfy_table::{Cell, CellAlignment, Table, presets};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Predict the bytes and the communication time of a step, for dense training and several densities.
///
/// Nothing is run and no network is touched. The model of the network is plain: a link carries its rate in both directions
/// at once, the busiest link decides, and a round trip is paid per phase. Compression and computing are left out. With an
/// --energy below 1 a step takes the whole density at most: what is predicted is an upper bound then.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct PlanCommand {
    #[command(flatten)]
    common: CommonArgs,
    /// What is trained.
    #[arg(long, env = "ARC_TASK", value_enum, default_value_t = Task::Lm, help_heading = "Model")]
    task: Task,
    /// Size of the decoder, with the vocabulary of its preset.
    #[arg(long, env = "ARC_MODEL", value_enum, default_value_t = ModelPreset::M60, help_heading = "Model")]
    model: ModelPreset,
    /// Tensors of any model instead, one a line: NAME 4096x1024, in the order of registration.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["task", "model"], help_heading = "Model")]
    shapes: Option<PathBuf>,
    /// Rates of each machine's link, comma-separated: 100mbit, 1gbit, 25gbit.
    #[arg(
        long,
        value_name = "RATE,…",
        value_delimiter = ',',
        default_value = "1gbit,100mbit",
        help_heading = "Network"
    )]
    rate: Vec<Rate>,
    /// Round trip between machines in milliseconds.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 0.2,
        help_heading = "Network"
    )]
    round_trip_ms: f64,
    /// Workers of the job.
    #[arg(long, env = "ARC_WORKERS", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=4096), help_heading = "Network")]
    workers: u16,
    /// Shards of the job.
    #[arg(long, env = "ARC_SHARDS", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "Network")]
    shards: u16,
    /// Where the shards run.
    #[arg(long, value_enum, default_value_t = Placement::CoLocated, help_heading = "Network")]
    placement: Placement,
    /// Densities to predict, comma-separated, instead of a few around --density.
    #[arg(
        long,
        value_name = "MU,…",
        value_delimiter = ',',
        help_heading = "Algorithm (must be equal on all workers)"
    )]
    densities: Vec<f32>,
    #[command(flatten)]
    algorithm: AlgorithmConfig,
    /// Prints the predictions as JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  arc-worker plan --model 60m --rate 1gbit,200mbit --workers 4 --shards 4
  arc-worker plan --model 1b --wire-up bf16 --densities 0.2,0.05
  printf 'embedding 50257x768\\nhead 50257x768\\n' > shapes.txt; arc-worker plan --shapes shapes.txt";

/// A link's rate in bit/s.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Rate(f64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.to_ascii_lowercase();
        // "2.5gbps" is short for "2.5gbit/s".
        let bare = lower.trim_end_matches("/s").trim_end_matches("bit");
        let bare = bare.strip_suffix("bps").unwrap_or(bare);
        let units = [("k", 1e3), ("m", 1e6), ("g", 1e9), ("t", 1e12)];
        let (number, unit) = units
            .iter()
            .find_map(|(suffix, unit)| Some((bare.strip_suffix(suffix)?, *unit)))
            .unwrap_or((bare, 1.0));
        match number.trim().parse::<f64>() {
            Ok(value) if value.is_finite() && value > 0.0 => Ok(Self(value * unit)),
            _ => Err("write a rate in bits, such as 100mbit or 2.5gbit".to_owned()),
        }
    }
}

/// Runs the command.
pub(super) fn run(command: &PlanCommand) -> Result<(), CliError> {
    command.algorithm.validate()?;
    for density in &command.densities {
        arc_topk_common::config::check_density(*density)?;
    }
    if !(command.round_trip_ms.is_finite() && command.round_trip_ms >= 0.0) {
        let argument = command.round_trip_ms.to_string();
        return Err(CliError::Argument {
            what: "a round trip",
            argument,
            example: "milliseconds, such as --round-trip-ms 0.2",
        });
    }
    let tensors = match &command.shapes {
        Some(file) => read_shapes(file)?,
        None => preset(command)?,
    };
    let elements: u64 = tensors
        .iter()
        .map(|tensor| tensor.shape.iter().product::<u64>())
        .sum();
    let spec = PlanSpec {
        trainer: String::new(),
        algorithm: command.algorithm.clone(),
        shards: command.shards,
        tensors,
    };
    let densities = densities(command);
    let mut predictions = Vec::new();
    for rate in &command.rate {
        let network = Network {
            workers: command.workers,
            placement: command.placement,
            bits_per_second: rate.0,
            round_trip_seconds: command.round_trip_ms / 1e3,
        };
        predictions.push((rate.0, table(&spec, &densities, &network)?));
    }
    if command.json {
        let all: Vec<_> = predictions
            .iter()
            .map(|(rate, rows)| serde_json::json!({ "bits_per_second": rate, "predictions": rows }))
            .collect();
        return print(&format!(
            "{}\n",
            serde_json::json!({ "elements": elements, "workers": command.workers, "shards": command.shards, "rates": all })
        ));
    }
    print(&text(command, elements, &predictions))
}

/// The densities asked for, or those of the published tables and the one that is set.
fn densities(command: &PlanCommand) -> Vec<f32> {
    if !command.densities.is_empty() {
        return command.densities.clone();
    }
    let mut all = vec![0.4, 0.2, 0.1, 0.05, 0.02, command.algorithm.density];
    all.sort_by(|a, b| b.total_cmp(a));
    all.dedup();
    all
}

/// The built-in trainer's parameters. LLaMA's presets are published with 32000 tokens, so those are counted here.
fn preset(command: &PlanCommand) -> Result<Vec<TensorSpec>, CliError> {
    #[derive(Parser)]
    struct Defaults {
        #[command(flatten)]
        train: TrainArgs,
    }
    let mut train = Defaults::try_parse_from(["plan"])
        .map_err(arc_topk_common::config::SettingsError::from)?
        .train;
    (train.task, train.model) = (command.task, command.model);
    train.vocab = Some(command.model.shape().vocab);
    Ok(parameters(&train)?)
}

/// `NAME AxBxC` per line; empty lines and `#` comments are skipped.
fn read_shapes(file: &Path) -> Result<Vec<TensorSpec>, CliError> {
    let text = std::fs::read_to_string(file);
    let text = text.map_err(|source| CliError::File {
        action: "read",
        path: file.to_owned(),
        source,
    })?;
    let lines = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim());
    lines
        .filter(|line| !line.is_empty())
        .map(parse_shape)
        .collect()
}

fn parse_shape(line: &str) -> Result<TensorSpec, CliError> {
    let wrong = || CliError::Argument {
        what: "a tensor",
        argument: line.to_owned(),
        example: "a name and a shape, such as `layers.0.wq 512x512`",
    };
    let (name, shape) = line.split_once(char::is_whitespace).ok_or_else(wrong)?;
    let sizes = shape
        .trim()
        .split('x')
        .map(|size| size.parse().ok().filter(|size| *size > 0));
    let shape = sizes.collect::<Option<Vec<u64>>>().ok_or_else(wrong)?;
    Ok(TensorSpec {
        name: name.to_owned(),
        shape,
        dtype: DType::F32,
        density: None,
    })
}

fn text(command: &PlanCommand, elements: u64, predictions: &[(f64, Vec<Prediction>)]) -> String {
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let mut head = vec![
        Cell::new("exchange"),
        Cell::new("sent"),
        Cell::new("received"),
        Cell::new("of dense f32"),
    ];
    head.extend(
        predictions
            .iter()
            .map(|(rate, _)| right(format!("step at {}", format::rate(*rate)))),
    );
    table.set_header(head);
    let rows = predictions.first().map_or(&[][..], |(_, rows)| rows);
    for (index, row) in rows.iter().enumerate() {
        let mut cells = vec![
            Cell::new(&row.name),
            right(format::bytes(row.bytes_up as f64)),
            right(format::bytes(row.bytes_down as f64)),
            right(format::ratio(1.0 / row.reduction)),
        ];
        cells.extend(
            predictions
                .iter()
                .map(|(_, rows)| right(format::seconds(rows[index].seconds))),
        );
        table.add_row(cells);
    }
    let bound = if command.algorithm.energy < 1.0 {
        format!(
            "With energy {} rows of arc are upper bounds: a step takes fewer where fewer hold it.\n",
            command.algorithm.energy
        )
    } else {
        String::new()
    };
    format!(
        "{} parameters, {} workers, {} shards ({}). Per worker and step, after the warm-up; time is communication alone.\n{table}\n{bound}",
        format::count(elements as f64),
        command.workers,
        command.shards,
        match command.placement {
            Placement::Separate => "on machines of their own",
            Placement::CoLocated => "on the workers' machines",
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_people_write_them() {
        for (text, expected) in [
            ("1gbit", 1e9),
            ("100Mbit/s", 1e8),
            ("2.5Gbps", 2.5e9),
            ("1e6", 1e6),
            ("64k", 64e3),
        ] {
            assert_eq!(text.parse(), Ok(Rate(expected)), "{text}");
        }
        for text in ["", "fast", "-1gbit", "0", "inf"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn shapes_are_read_and_complaints_quote_the_line() {
        let tensor = parse_shape("layers.0.wq  512x512").unwrap();
        assert_eq!(
            (tensor.name.as_str(), tensor.shape),
            ("layers.0.wq", vec![512, 512])
        );
        for line in ["lonely", "a 3x", "a 0x2", "a 2,3"] {
            assert!(
                parse_shape(line).unwrap_err().to_string().contains(line),
                "{line}"
            );
        }
    }
}
