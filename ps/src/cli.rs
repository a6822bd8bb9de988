//! `arc-ps`: serve (the default), certs, completions. `arc-worker ps …` runs the same.

use crate::server::{ServeError, ServeOptions, Server, Timeouts};
use crate::shard::ShardConfig;
use crate::store::StoreOptions;
use arc_topk_common::config::{
    CertArgs, CommonArgs, SettingError, SettingsError, ShardArgs, read_settings,
};
use arc_topk_common::ids::ShardId;
use arc_topk_transport::certs::{CertRequest, JobCerts, Role, make_job_certs, renew_job_certs};
use arc_topk_transport::{IdentitySource, TransportConfig, TransportError};
use clap::{Args, Command, CommandFactory, Parser};
use clap_complete::Shell;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// One shard of arc-topk's parameter server.
///
/// Collects the workers of a job, averages the sketches of their gradients, chooses the rows that travel, and
/// averages those. Shard 0 also gives the workers their ranks. It keeps no training state but the snapshots that
/// workers put there.
#[derive(Parser, Debug)]
#[command(name = "arc-ps", version, after_help = SERVE_EXAMPLES)]
struct ServeCommand {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    certs: CertArgs,
    #[command(flatten)]
    shard: ShardArgs,
    #[command(flatten)]
    ready: ReadyArgs,
}

#[derive(Args, Debug)]
struct ReadyArgs {
    /// Print one line of JSON with the bound addresses once workers can connect.
    #[arg(long, hide = true)]
    ready_json: bool,
    /// End when standard input ends, as it does when the process that started this one dies.
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
    /// Handle every frame after a random delay of up to so many milliseconds. For tests.
    #[arg(long, hide = true, value_name = "MS", default_value_t = 0)]
    chaos_delay_ms: u64,
}

const SERVE_EXAMPLES: &str = "\
Examples:
  arc-ps certs --out certs --host ps0.lan --host ps1.lan
  arc-ps --certs certs --shards 2 --shard 0 --workers 4      on ps0.lan
  arc-ps --certs certs --shards 2 --shard 1 --workers 4      on ps1.lan

Other commands: arc-ps certs, arc-ps completions (each with --help).";

/// Make a job's certificates: an authority, and identities for its shards and its workers.
///
/// Workers and shards prove to each other by them that they belong to one job (mutual TLS 1.3). Keys are readable by their
/// owner alone. The authority's key is needed only to make more: keep it off the machines of the job. Processes that run
/// take new files at the old places: a shard within 10 s (SIGHUP: at once), a worker when it next connects.
#[derive(Parser, Debug)]
#[command(name = "certs", bin_name = "arc-ps certs", version)]
struct CertsCommand {
    #[command(flatten)]
    common: CommonArgs,
    /// Directory to make them in.
    #[arg(long, value_name = "DIR", default_value = "certs")]
    out: PathBuf,
    /// DNS name or address under which workers dial a shard; once for each. localhost, 127.0.0.1 and ::1 are always in.
    #[arg(long = "host", value_name = "HOST", value_delimiter = ',')]
    hosts: Vec<String>,
    /// Days for which they are valid.
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
    /// Make new certificates for shards and workers from the authority that is there. Peers with the old ones can still
    /// connect, and the hosts of the old ones stay in. A ca.pem to which another authority's was added goes to all.
    #[arg(long, conflicts_with = "force")]
    renew: bool,
    /// Replace the authority and all certificates; peers with the old ones can then no longer connect.
    #[arg(long)]
    force: bool,
}

/// Print a completion script for a shell, to be sourced or put where the shell looks for it.
#[derive(Parser, Debug)]
#[command(name = "completions", bin_name = "arc-ps completions", version)]
struct CompletionsCommand {
    /// Shell.
    shell: Shell,
}

/// Why a command failed. Every text names cause and remedy.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error(
        "--log {filter:?} is not a filter: {problem}; write a level such as info, or info,arc_topk_ps=debug"
    )]
    Log { filter: String, problem: String },
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("{what}: {source}")]
    System {
        what: &'static str,
        source: io::Error,
    },
}

/// Runs `arc-ps` with `args`, program name first. Prints errors to standard error.
///
/// # Exit status
/// 0 done, 1 failed, 2 wrong usage.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut words: Vec<OsString> = args.into_iter().collect();
    let command = words
        .get(1)
        .and_then(|word| word.to_str())
        .unwrap_or_default()
        .to_owned();
    if ["serve", "certs", "completions", "help"].contains(&command.as_str()) {
        words.remove(1);
    }
    let done = match command.as_str() {
        "certs" => certs(words),
        "completions" => completions(words),
        "help" | "--help" | "-h" => help(),
        _ => serve(words),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::Settings(SettingsError::Flags(error))) => {
            // --help and --version are "errors" of status 0; a closed pipe is nobody to tell.
            let _unheard = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
        Err(error) => {
            eprintln!("arc-ps: {error}");
            let usage = matches!(
                error,
                CliError::Settings(_) | CliError::Setting(_) | CliError::Log { .. }
            );
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

/// All commands in one tree, for help and completions; [`run`] parses each on its own.
fn whole_command() -> Command {
    ServeCommand::command()
        .subcommand(CertsCommand::command())
        .subcommand(CompletionsCommand::command())
        .subcommand_negates_reqs(true)
        .args_conflicts_with_subcommands(true)
        .disable_help_subcommand(true)
}

fn help() -> Result<(), CliError> {
    // A reader that went away is no failure.
    let _closed = whole_command().print_long_help();
    Ok(())
}

fn completions(words: Vec<OsString>) -> Result<(), CliError> {
    let command = CompletionsCommand::try_parse_from(words).map_err(SettingsError::from)?;
    let mut script = Vec::new();
    clap_complete::generate(command.shell, &mut whole_command(), "arc-ps", &mut script);
    print(&String::from_utf8_lossy(&script))
}

fn certs(words: Vec<OsString>) -> Result<(), CliError> {
    let command: CertsCommand = read_settings(words)?;
    command.common.validate()?;
    let mut request = CertRequest::new(&command.common.job, &command.hosts, command.days);
    request.force = command.force;
    if command.renew {
        let (made, end) = renew_job_certs(&command.out, &request)?;
        return print(&renewed(&made, &end.date().to_string()));
    }
    let made = make_job_certs(&command.out, &request)?;
    let out = command.out.display();
    let hosts: Vec<&str> = command
        .hosts
        .iter()
        .map(String::as_str)
        .chain(["localhost"])
        .collect();
    print(&format!(
        "Certificates of job {:?}, valid for {} days, are in {out}:\n\
         \n\
         \x20 {shard}   copy to every machine that runs arc-ps; start with --certs {shard}\n\
         \x20 {worker}  copy to every machine that runs a worker; start with --certs {worker}\n\
         \x20 {out}/ca-key.pem  the authority's key: keep it here, copy it nowhere\n\
         \n\
         Workers may dial the shards as {hosts}. On one machine, --certs {out} serves both.\n",
        command.common.job,
        command.days,
        shard = made.shard.display(),
        worker = made.worker.display(),
        hosts = hosts.join(", "),
    ))
}

fn renewed(made: &JobCerts, end: &str) -> String {
    format!(
        "New certificates of the same authority, valid until {end}, are in\n\
         \n\
         \x20 {shard}   copy over the files on every machine that runs arc-ps\n\
         \x20 {worker}  copy over the files on every machine that runs a worker\n\
         \n\
         Nothing needs a restart: shards take them within 10 s (SIGHUP: at once), workers when they next connect.\n",
        shard = made.shard.display(),
        worker = made.worker.display(),
    )
}

fn serve(words: Vec<OsString>) -> Result<(), CliError> {
    let command: ServeCommand = read_settings(words)?;
    command.common.validate()?;
    command.shard.validate()?;
    start_log(&command.common.log)?;
    let [ca, cert, key] = command.certs.paths("shard")?;
    let options = ServeOptions {
        listen: command.shard.listen,
        admin: command.shard.admin.0,
        identity: IdentitySource::files(&ca, &cert, &key, Role::Shard)?,
        transport: TransportConfig::default(),
        shard: ShardConfig {
            min_workers: command.shard.min_workers,
            max_workers: command.shard.elastic.most_workers(command.shard.workers),
            quorum: command.shard.elastic.quorum,
            straggler_timeout: Duration::from_secs_f64(
                command.shard.elastic.straggler_timeout_seconds,
            ),
            resync: command.shard.elastic.resync,
            start_grace: Duration::from_secs_f64(command.shard.start_grace_seconds),
            ..ShardConfig::new(
                &command.common.job,
                ShardId(command.shard.shard),
                command.shard.shards,
                command.shard.workers,
            )
        },
        timeouts: Timeouts::default(),
        chaos_delay: Duration::from_millis(command.ready.chaos_delay_ms),
        store: StoreOptions {
            dir: command.shard.snapshots.snapshot_dir.clone(),
            keep: usize::from(command.shard.snapshots.snapshot_keep),
            limit_bytes: command.shard.snapshots.snapshot_limit_bytes,
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|source| CliError::System {
        what: "cannot start the runtime",
        source,
    })?;
    runtime.block_on(until_stopped(options, &command.ready))?;
    // A reader of standard input cannot be cancelled and must not hold up the end.
    runtime.shutdown_background();
    Ok(())
}

async fn until_stopped(options: ServeOptions, ready: &ReadyArgs) -> Result<(), CliError> {
    let shard = options.shard.clone();
    let mut stop = stop_signals(ready.until_stdin_ends)?;
    let mut renew = signal(SignalKind::hangup()).map_err(no_signals)?;
    let server = Server::start(options).await?;
    let (quic, admin) = (server.quic_address(), server.admin_address());
    tracing::info!(
        shard = shard.shard.0,
        shards = shard.shards,
        job = shard.job,
        workers = shard.world,
        %quic,
        page = admin.map(|admin| format!("http://{admin}/")),
        "ready for workers"
    );
    if ready.ready_json {
        let line = serde_json::json!({ "ready": true, "shard": shard.shard, "quic": quic, "admin": admin });
        print(&format!("{line}\n"))?;
    }
    let reason = loop {
        tokio::select! {
            // Every sender is held by a task that lives as long as the process.
            reason = stop.recv() => break reason.unwrap_or("end"),
            Some(()) = renew.recv() => server.renew_identity(),
        }
    };
    tracing::info!(reason, "stopping");
    server.shutdown(reason).await;
    Ok(())
}

fn no_signals(source: io::Error) -> CliError {
    CliError::System {
        what: "cannot catch signals",
        source,
    }
}

/// Says when to stop, and why. A second signal ends the process at once.
fn stop_signals(
    until_stdin_ends: bool,
) -> Result<tokio::sync::mpsc::Receiver<&'static str>, CliError> {
    let (stop, stopped) = tokio::sync::mpsc::channel(1);
    for (kind, name) in [
        (SignalKind::terminate(), "SIGTERM"),
        (SignalKind::interrupt(), "SIGINT"),
    ] {
        let mut signals = signal(kind).map_err(no_signals)?;
        let stop = stop.clone();
        tokio::spawn(async move {
            signals.recv().await;
            let _stopping_already = stop.try_send(name);
            signals.recv().await;
            std::process::exit(130);
        });
    }
    if until_stdin_ends {
        std::thread::spawn(move || {
            let _ended = io::copy(&mut io::stdin(), &mut io::sink());
            let _stopping_already = stop.try_send("the process that started this one ended");
        });
    }
    Ok(stopped)
}

fn start_log(filter: &str) -> Result<(), CliError> {
    let log = |problem: String| CliError::Log {
        filter: filter.to_owned(),
        problem,
    };
    let parsed =
        tracing_subscriber::EnvFilter::try_new(filter).map_err(|error| log(error.to_string()))?;
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

/// To standard output. A reader that went away is no failure.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::System {
            what: "cannot write to standard output",
            source: error,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_well_formed() {
        whole_command().debug_assert();
        CertsCommand::command().debug_assert();
        ServeCommand::command().debug_assert();
    }
}
