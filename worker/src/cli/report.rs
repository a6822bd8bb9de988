//! `arc-worker report`: the page and the table from finished runs.

use super::{CliError, print};
use crate::report::{Run, closing_table, write_report};
use clap::Args;
use std::path::PathBuf;

/// Report finished runs: a table here, and an HTML page with plots.
///
/// A run is a directory that `train --run-dir` or `local --run-dir` wrote. The first one is what the others are
/// compared with. Runs that were cut short are reported up to their last step.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  arc-worker report runs/demo/dense runs/demo/arc --out report.html"
)]
pub(super) struct ReportCommand {
    /// Directories of runs.
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where the page goes.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
}

/// Runs the command.
pub(super) fn run(command: &ReportCommand) -> Result<(), CliError> {
    let runs = command
        .runs
        .iter()
        .map(|dir| Run::load(dir))
        .collect::<Result<Vec<_>, _>>()?;
    write_report(&command.out, &runs)?;
    print(&format!(
        "{}\nreport: {}\n",
        closing_table(&runs),
        command.out.display()
    ))
}
