//! `arc-worker`: train, local, demo, plan, report, ps, completions.
//!
//! | module | room for |
//! |---|---|
//! | `train` | one worker of a job, or a run without shards |
//! | `local` | a whole job on this machine, the comparison, the demo |
//! | `job` | a job's processes from start to end |
//! | `lives` | when one that died is started again |
//! | `process` | one of those processes: its log, its end |
//! | `words` | settings as the command line of such a process |
//! | `progress` | bars, lines and JSON from step records |
//! | `metered` | a reducer that counts for Prometheus |
//! | `plan` | bytes and seconds of a step before anything is run |
//! | `report` | the page and the table from finished runs |
//! | `stop` | signals |

mod error;
mod job;
mod lives;
mod local;
mod metered;
mod plan;
mod process;
mod progress;
mod report;
mod stop;
mod train;
mod words;

use arc_topk_common::config::{AlgorithmConfig, SettingsError, read_settings};
use clap::{CommandFactory, Parser, Subcommand};
use error::CliError;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

/// Train with compressed gradients through sharded parameter servers.
///
/// A job is one or more shards (`arc-ps`, or `arc-worker ps`) and some workers (`arc-worker train`). `arc-worker local`
/// starts all of them on this machine. Settings come from flags, then the environment (ARC_…), then a TOML file
/// (--config FILE), then defaults; every flag's name with underscores is a key of that file.
#[derive(Parser, Debug)]
#[command(name = "arc-worker", version, after_help = EXAMPLES, subcommand_required = true, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Commands,
}

const EXAMPLES: &str = "\
Examples:
  arc-worker demo                                   dense beside ARC-Top-K on this machine, with a report
  arc-worker local --workers 4 --shards 2 --steps 300 --data text.txt
  arc-worker plan --model 60m --rate 1gbit          what a step would cost
  arc-worker train --shard-addresses ps0:7400,ps1:7400 --certs certs/worker --data text.txt

Exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 stopped by a signal.";

#[derive(Subcommand, Debug)]
enum Commands {
    Train(Box<train::TrainCommand>),
    Local(Box<local::LocalCommand>),
    Demo(Box<local::DemoCommand>),
    Plan(Box<plan::PlanCommand>),
    Report(report::ReportCommand),
    /// Run a shard, or make certificates: the same as `arc-ps`. See `arc-worker ps --help`.
    #[command(disable_help_flag = true)]
    Ps {
        /// What `arc-ps` is told.
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "ARGUMENTS"
        )]
        arguments: Vec<OsString>,
    },
    /// Print a completion script for a shell, to be sourced or put where the shell looks for it.
    #[command(
        after_help = "Example:\n  arc-worker completions bash > ~/.local/share/bash-completion/completions/arc-worker"
    )]
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
}

/// Runs `arc-worker` with `args`, program name first. Prints errors to standard error.
///
/// # Exit status
/// 0 done, 1 failed, 2 wrong usage or settings, 130 stopped by a signal.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let words: Vec<OsString> = args.into_iter().collect();
    if words.get(1).is_some_and(|word| word == "ps") {
        // arc-ps reads its own settings, `--config` included.
        return shard(words.into_iter().skip(2));
    }
    match read_settings::<Arguments>(words)
        .map_err(CliError::from)
        .and_then(|a| dispatch(a.command))
    {
        Ok(code) => code,
        Err(error) => {
            match &error {
                // --help and --version are "errors" of status 0; a closed pipe is nobody to tell.
                CliError::Settings(SettingsError::Flags(flags)) => drop(flags.print()),
                other => eprintln!("arc-worker: {other}"),
            }
            error.exit_code()
        }
    }
}

fn shard(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    arc_topk_ps::cli::run(std::iter::once(OsString::from("arc-worker ps")).chain(arguments))
}

fn dispatch(command: Commands) -> Result<ExitCode, CliError> {
    match command {
        Commands::Train(command) => train::run(&command)?,
        Commands::Local(command) => local::run(&command)?,
        Commands::Demo(command) => local::demo(&command)?,
        Commands::Plan(command) => plan::run(&command)?,
        Commands::Report(command) => report::run(&command)?,
        Commands::Ps { arguments } => return Ok(shard(arguments.into_iter())),
        Commands::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "arc-worker", &mut script);
            print(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Logs to standard error.
fn start_log(filter: &str) -> Result<(), CliError> {
    let parsed = tracing_subscriber::EnvFilter::try_new(filter).map_err(|error| CliError::Log {
        filter: filter.to_owned(),
        problem: error.to_string(),
    })?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .finish();
    // A program that calls this one may have a log of its own already: that one stays.
    let _own_log = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

/// The compressor as its flag spells it: what runs are called.
fn compressor_name(algorithm: &AlgorithmConfig) -> String {
    format!("{:?}", algorithm.compressor).to_lowercase()
}

/// To standard output. A reader that went away is no failure.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => Err(CliError::System {
            action: "write to standard output",
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_well_formed() {
        Arguments::command().debug_assert();
    }
}
