//! Real processes, killed for real: one job of shards and workers, disturbed by a seeded schedule of faults, beside the same
//! job undisturbed. `make chaos` runs it.
//!
//! Processes are killed with SIGKILL and started again, stopped for 6 s, added and removed. As root with `ip` and `nft` every
//! process has a network namespace and an address of its own, packets are lost for the whole run, and links are cut for
//! 8 s; elsewhere all is on loopback, and it says so. For each fault it measures how long steps stalled. The end is a
//! table, whether all workers hold the same parameters, and the loss beside that of undisturbed runs.

mod faults;
mod job;
mod lab;
mod process;
mod table;
mod timeline;

use clap::Parser;
use faults::Chaos;
use job::{End, Job, Settings};
use lab::Lab;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

type AnyError = Box<dyn Error + Send + Sync>;

#[derive(Parser, Debug)]
#[command(
    about = "Kill, stop, add, remove and cut off the processes of a job, and measure what that costs"
)]
struct Cli {
    /// Processes to kill with SIGKILL, beside which all other faults happen.
    #[arg(long, default_value_t = 20)]
    kills: usize,
    /// Rolling upgrades before that: each shard in turn is asked to end, and started again.
    #[arg(long, default_value_t = 1)]
    upgrades: u16,
    /// Workers at the start.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(2..=64))]
    workers: u16,
    /// Shards.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..=16))]
    shards: u16,
    /// Steps of the job; 0 takes 30 for each kill, and 300. If they are done before the faults are, fewer faults happen.
    #[arg(long, default_value_t = 0)]
    steps: u64,
    /// Seed of the schedule of faults, and of training; undisturbed runs take this and the next ones.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Undisturbed runs, whose losses say what noise is.
    #[arg(long, default_value_t = 3)]
    undisturbed: u64,
    /// Most milliseconds by which a shard delays each answer of the disturbed run, so that steps last as long as the faults.
    #[arg(long, default_value_t = 20)]
    pace_ms: u64,
    /// Per mille of all packets that are lost in the whole run, where there are network namespaces.
    #[arg(long, default_value_t = 10)]
    loss_per_mille: u32,
    /// Stay on loopback, also where there could be network namespaces.
    #[arg(long)]
    loopback: bool,
    /// Kill a random process every so many seconds on average, whether or not the job has healed, instead of one fault
    /// after the other; two workers at least are left alone.
    #[arg(long, value_name = "SECONDS")]
    every: Option<f64>,
    /// Seconds after which no further fault begins.
    #[arg(long, default_value_t = 1800)]
    fault_seconds: u64,
    /// Seconds after which each run is given up.
    #[arg(long, default_value_t = 2400)]
    limit_seconds: u64,
    /// Directory for records and logs; a directory in it is replaced.
    #[arg(long, default_value = "runs/chaos")]
    out: PathBuf,
    /// What the processes log.
    #[arg(long, default_value = "info")]
    log: String,
    /// The program `arc-worker`; otherwise the one that was built beside this one.
    #[arg(long)]
    program: Option<PathBuf>,
    /// More arguments for every worker, such as `-- --feedback none`.
    #[arg(last = true)]
    train: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the job survived everything.
fn run(cli: &Cli) -> Result<bool, AnyError> {
    let stop = Arc::new(AtomicBool::new(false));
    listen(Arc::clone(&stop))?;
    let mut settings = Settings {
        program: program(cli)?,
        workers: cli.workers,
        shards: cli.shards,
        steps: match cli.steps {
            0 => 300 + 30 * cli.kills as u64,
            steps => steps,
        },
        seed: cli.seed,
        pace_ms: cli.pace_ms,
        log: cli.log.clone(),
        train: cli.train.clone(),
        dir: fresh(&cli.out.join("disturbed"))?,
    };
    let lab = Lab::build(settings.slots(), cli.loss_per_mille, cli.loopback)?;
    eprintln!("chaos: {}", lab.description());
    let limit = Duration::from_secs(cli.limit_seconds);
    let mut job = Job::start(&settings, &lab, Instant::now() + limit, Arc::clone(&stop))?;
    let mut chaos = Chaos::new(cli.seed, cli.kills, lab.can_cut());
    (0..cli.upgrades).try_for_each(|_| chaos.upgrade(&mut job, &lab))?;
    let last = Instant::now() + Duration::from_secs(cli.fault_seconds);
    match cli.every {
        None => chaos.run(&mut job, &lab, last)?,
        Some(seconds) => chaos.rain(&mut job, Duration::try_from_secs_f64(seconds)?, last)?,
    }
    chaos.make_up(&mut job, usize::from(cli.workers))?;
    let end = job.finish()?;
    drop(lab);
    settings.pace_ms = 0;
    let mut undisturbed = Vec::new();
    for seed in cli.seed..cli.seed + cli.undisturbed {
        (settings.seed, settings.dir) = (seed, fresh(&cli.out.join(format!("seed-{seed}")))?);
        eprintln!("chaos: undisturbed run with seed {seed}");
        let lab = Lab::loopback();
        let job = Job::start(&settings, &lab, Instant::now() + limit, Arc::clone(&stop))?;
        undisturbed.push(job.finish()?);
    }
    let text = table::report(&chaos, &end, &undisturbed);
    print!("{text}");
    std::fs::write(cli.out.join("table.md"), text)?;
    Ok(survived(&chaos, &end))
}

fn survived(chaos: &Chaos, end: &End) -> bool {
    chaos.unhealed == 0 && end.complaints.is_empty() && end.digests.len() == 1
}

/// Sets `stop` at the first signal, so that processes and namespaces are cleaned up.
fn listen(stop: Arc<AtomicBool>) -> Result<(), AnyError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let Ok(mut term) = signal(SignalKind::terminate()) else {
                return;
            };
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = term.recv() => {}
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
    Ok(())
}

/// `arc-worker`, as it was built beside this program.
fn program(cli: &Cli) -> Result<PathBuf, AnyError> {
    if let Some(program) = &cli.program {
        return Ok(program.clone());
    }
    let own = std::env::current_exe()?;
    let beside = own
        .parent()
        .and_then(Path::parent)
        .map(|dir| dir.join("arc-worker"));
    beside.filter(|path| path.is_file()).ok_or_else(|| {
        format!(
            "{} has no arc-worker beside its directory; build it (`cargo build -p arc-topk-worker --bin arc-worker`) or pass --program",
            own.display()
        )
        .into()
    })
}

/// An empty directory.
fn fresh(dir: &Path) -> Result<PathBuf, AnyError> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    Ok(dir.to_owned())
}
