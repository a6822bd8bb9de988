//! `arc-sim`: runs seeds until one fails, and shows how to see it again.

use arc_topk_sim::coverage::Coverage;
use arc_topk_sim::sabotage::Sabotage;
use arc_topk_sim::trace::Level;
use arc_topk_sim::{Outcome, run, run_and_explain};
use clap::Parser;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often a long run says how far it is.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// Simulates jobs with faults, one per seed, and checks after every event that nothing is lost, counted twice or different
/// between workers.
#[derive(Parser)]
#[command(name = "arc-sim", version)]
struct Arguments {
    /// Runs this seed alone.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Prints all that happens; with --seed.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Runs these seeds, as FIRST..END.
    #[arg(long, default_value = "0..1000", value_parser = seed_range, overrides_with = "seeds")]
    seeds: (u64, u64),
    /// Threads; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Begins no further seed after so many seconds; 0: runs them all.
    #[arg(long, default_value_t = 0, conflicts_with = "seed")]
    seconds: u64,
    /// Goes on after a seed that fails.
    #[arg(long)]
    keep_going: bool,
    /// A line per seed.
    #[arg(short, long)]
    verbose: bool,
    /// Puts this bug into the job: seeds must fail.
    #[arg(long, value_enum)]
    sabotage: Option<Sabotage>,
}

fn seed_range(text: &str) -> Result<(u64, u64), String> {
    let (first, end) = text
        .split_once("..")
        .ok_or("write FIRST..END, as in 0..1000")?;
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|error| format!("{text:?}: {error}"))
    };
    Ok((number(first)?, number(end)?))
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Panics are findings: they are reported with their seed.
    std::panic::set_hook(Box::new(|_| {}));
    if let Some(seed) = arguments.seed {
        let level = if arguments.trace {
            Level::Print
        } else {
            Level::Last
        };
        let outcome = on_own_pool(|| run(seed, arguments.sabotage, level));
        print!("{}", outcome.coverage);
        return report(&[outcome], &arguments);
    }
    let start = Instant::now();
    let (coverage, failed) = run_all(&arguments);
    print!("{coverage}");
    let seconds = start.elapsed().as_secs_f64();
    let seeds = coverage.of("seeds");
    println!(
        "{seeds} seeds in {seconds:.1} s, {:.0} a second",
        seeds as f64 / seconds
    );
    report(&failed, &arguments)
}

fn run_all(arguments: &Arguments) -> (Coverage, Vec<Outcome>) {
    let threads = match arguments.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let next = AtomicU64::new(arguments.seeds.0);
    let stop = AtomicBool::new(false);
    let start = Instant::now();
    let said = Mutex::new(start);
    let total = Mutex::new((Coverage::default(), Vec::new()));
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= arguments.seeds.1 {
                break;
            }
            let outcome = run_and_explain(seed, arguments.sabotage);
            let failed = outcome.violation.is_some();
            if arguments.verbose || (failed && arguments.keep_going) {
                println!("{}", line(&outcome));
            }
            let mut total = total.lock().expect("no thread panics while it adds up");
            total.0 += &outcome.coverage;
            if failed {
                total.1.push(outcome);
            }
            let late = arguments.seconds > 0 && start.elapsed().as_secs() >= arguments.seconds;
            if late || failed && !arguments.keep_going {
                stop.store(true, Ordering::Relaxed);
            }
            say_how_far(&said, seed, &total.0, total.1.len());
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| on_own_pool(work));
        }
    });
    total
        .into_inner()
        .expect("no thread panics while it adds up")
}

/// A line now and then, for whoever waits.
fn say_how_far(said: &Mutex<Instant>, seed: u64, coverage: &Coverage, failed: usize) {
    let mut said = said.lock().expect("no thread panics while it says so");
    if said.elapsed() >= SAY_EVERY {
        *said = Instant::now();
        let (seeds, steps) = (coverage.of("seeds"), coverage.of("steps applied"));
        eprintln!("at seed {seed}: {seeds} seeds, {steps} steps applied, {failed} seeds failed");
    }
}

/// Kernels are parallel; seeds are what is run side by side here.
fn on_own_pool<T>(work: impl FnOnce() -> T) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .use_current_thread()
        .build();
    let result = work();
    drop(pool);
    result
}

fn line(outcome: &Outcome) -> String {
    let of = |what| outcome.coverage.of(what);
    let verdict = outcome.violation.as_ref().map_or_else(
        || "ok".to_owned(),
        |violation| format!("FAILED {}: {}", violation.invariant, violation.detail),
    );
    format!(
        "seed {}: {} events, {} s, {} steps applied, {} superseded, {verdict}",
        outcome.seed,
        of("events"),
        of("virtual seconds"),
        of("steps applied"),
        of("superseded"),
    )
}

fn report(failed: &[Outcome], arguments: &Arguments) -> ExitCode {
    let broken = failed.iter().filter(|outcome| outcome.violation.is_some());
    let Some(first) = broken.min_by_key(|outcome| outcome.seed) else {
        return ExitCode::SUCCESS;
    };
    let violation = first.violation.as_ref().expect("found by it");
    if !arguments.trace {
        first.trace.iter().for_each(|line| println!("{line}"));
    }
    println!("seed {} FAILED: {}", first.seed, violation.invariant);
    println!("  {}", violation.detail);
    let sabotage = arguments
        .sabotage
        .map(|sabotage| {
            format!(
                " --sabotage {}",
                clap::ValueEnum::to_possible_value(&sabotage)
                    .map_or_else(String::new, |v| v.get_name().to_owned())
            )
        })
        .unwrap_or_default();
    println!(
        "see it again: cargo run -p arc-topk-sim -- --seed {}{sabotage} --trace",
        first.seed
    );
    ExitCode::FAILURE
}
