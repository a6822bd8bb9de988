//! A table of validation losses by compressor, feedback rule, optimizer, density and wire type, each cell at its
//! best of several learning rates: what the defaults rest on. `make bench-loss` runs it.
//!
//! Every run holds four logical workers in one thread, with the real step and shard machines and no sockets; two runs
//! go on at a time. Results are appended to `loss_table.jsonl` as they come, and runs that are there already are not
//! repeated, so the program can be stopped and started again. The first seed tries all rates, the others the best. At the end (or with `--table-only`) it writes
//! `loss_table.md`, `loss_table.csv` and `loss_curves.csv` beside it.

mod cells;
mod job;
mod table;

use arc_topk_common::config::train::{OptimizerChoice, TrainArgs};
use arc_topk_worker::train::{data::Dataset, use_threads};
use cells::{Cell, default_cells, energy_cells};
use clap::Parser;
use job::{RunResult, RunSettings, settings_hash};
use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

type AnyError = Box<dyn Error + Send + Sync>;

/// Texts that are looked for when `--data` is not given.
const USUAL_TEXTS: [&str; 2] = [".data/shakespeare.txt", ".data/text"];

#[derive(Parser)]
#[command(about = "Validation loss by compressor, feedback, optimizer, density and wire type")]
struct Cli {
    #[command(flatten)]
    train: TrainArgs,
    /// Directory for the results.
    #[arg(long, default_value = "runs/loss_table")]
    out: PathBuf,
    /// Seeds, each a run per cell and rate.
    #[arg(long, value_delimiter = ',', default_value = "0,1")]
    seeds: Vec<u64>,
    /// Learning rates of AdamW in either form.
    #[arg(long, value_delimiter = ',', default_value = "0.001,0.002,0.004,0.008")]
    rates: Vec<f32>,
    /// Learning rates of SGD.
    #[arg(long, value_delimiter = ',', default_value = "0.03,0.1,0.3,1.0")]
    sgd_rates: Vec<f32>,
    /// Run every seed at every rate, instead of only the first seed at all and the others at its best.
    #[arg(long)]
    all_rates: bool,
    /// Only cells whose name contains one of these texts.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only cells of these names, whole.
    #[arg(long, value_delimiter = ',', conflicts_with = "only")]
    cells: Vec<String>,
    /// A look that takes minutes: 60 steps, one seed, one rate.
    #[arg(long)]
    quick: bool,
    /// Runs at a time, one thread each.
    #[arg(long, default_value_t = 2)]
    parallel: usize,
    /// Logical workers of a run.
    #[arg(long, default_value_t = 4)]
    workers: u16,
    /// Shards of a run.
    #[arg(long, default_value_t = 2)]
    shards: u16,
    /// Dense updates before compression starts, instead of the algorithm's default.
    #[arg(long)]
    warmup_updates: Option<u64>,
    /// Print the cells' names and stop.
    #[arg(long)]
    list: bool,
    /// Train nothing; make the table from the results that are there.
    #[arg(long)]
    table_only: bool,
}

fn main() -> Result<(), AnyError> {
    // SAFETY: no thread has been started yet.
    #[allow(unsafe_code, reason = "each run has one thread of its own")]
    unsafe {
        use_threads(1);
    }
    let mut cli = Cli::parse();
    settle(&mut cli)?;
    let cells = chosen_cells(&cli);
    let names: Vec<String> = cells.iter().map(Cell::name).collect();
    if cli.list {
        names.iter().for_each(|name| println!("{name}"));
        return Ok(());
    }
    fs::create_dir_all(&cli.out)?;
    let data = Arc::new(Dataset::load(&cli.train)?);
    println!("{}", data.description());
    let results = Results {
        path: cli.out.join("loss_table.jsonl"),
        settings: RunSettings {
            train: cli.train.clone(),
            workers: cli.workers,
            shards: cli.shards,
        },
        data,
    };
    if !cli.table_only {
        train_all(&cli, &cells, &results)?;
    }
    write_tables(&cli, &names, &results.read()?)
}

/// Where results are kept, and what they are results of.
struct Results {
    path: PathBuf,
    settings: RunSettings,
    data: Arc<Dataset>,
}

impl Results {
    fn hash(&self) -> String {
        settings_hash(&self.settings, &self.data)
    }

    /// Those of runs with these settings on this data.
    fn read(&self) -> Result<Vec<RunResult>, AnyError> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let lines: Result<Vec<RunResult>, AnyError> = text
            .lines()
            .map(|line| Ok(serde_json::from_str(line)?))
            .collect();
        let (mut all, ours) = (lines?, self.hash());
        all.retain(|run| run.settings == ours);
        Ok(all)
    }
}

/// Runs short enough, of batches small enough, that one takes about half a minute of one core.
fn settle(cli: &mut Cli) -> Result<(), AnyError> {
    let defaults = std::env::args().collect::<Vec<_>>();
    let given = |flag: &str| {
        defaults
            .iter()
            .any(|arg| arg == flag || arg.starts_with(&format!("{flag}=")))
    };
    if !given("--batch") {
        cli.train.batch = 4;
    }
    if !given("--steps") {
        cli.train.steps = if cli.quick { 60 } else { 200 };
    }
    if !given("--context") {
        cli.train.context = Some(64);
    }
    if !given("--validate-batches") {
        cli.train.validate_batches = 32;
    }
    if cli.quick {
        cli.seeds.truncate(1);
        cli.rates = vec![cli.rates[cli.rates.len() / 2]];
        cli.sgd_rates = vec![cli.sgd_rates[cli.sgd_rates.len() / 2]];
    }
    if cli.train.data.is_none() {
        let found = USUAL_TEXTS
            .into_iter()
            .map(PathBuf::from)
            .find(|path| path.exists());
        cli.train.data =
            Some(found.ok_or("no text: run `make data`, or pass --data FILE (or --data builtin)")?);
    }
    cli.train.validate()?;
    Ok(())
}

fn chosen_cells(cli: &Cli) -> Vec<Cell> {
    let mut cells = default_cells();
    if cli.list || !(cli.cells.is_empty() && cli.only.is_empty()) {
        cells.extend(energy_cells());
    }
    cells.retain(|cell| {
        let name = cell.name();
        let part = cli.only.is_empty() || cli.only.iter().any(|text| name.contains(text.as_str()));
        part && (cli.cells.is_empty() || cli.cells.contains(&name))
    });
    if let Some(updates) = cli.warmup_updates {
        cells
            .iter_mut()
            .for_each(|cell| cell.algorithm.warmup_updates = updates);
    }
    cells
}

struct Task<'a> {
    cell: &'a Cell,
    lr: f32,
    seed: u64,
}

/// The first seed tries every rate; the others then run at each cell's best, unless all rates were asked for.
fn train_all(cli: &Cli, cells: &[Cell], results: &Results) -> Result<(), AnyError> {
    let (first, others) = cli.seeds.split_at(1.min(cli.seeds.len()));
    let mut tasks = Vec::new();
    for &seed in if cli.all_rates { &cli.seeds } else { first } {
        for cell in cells {
            let rates = if cell.optimizer == OptimizerChoice::Sgd {
                &cli.sgd_rates
            } else {
                &cli.rates
            };
            tasks.extend(rates.iter().map(|&lr| Task { cell, lr, seed }));
        }
    }
    train_tasks(cli, tasks, results)?;
    if cli.all_rates || others.is_empty() {
        return Ok(());
    }
    let tried: Vec<RunResult> = results
        .read()?
        .into_iter()
        .filter(|run| first.contains(&run.seed))
        .collect();
    let names: Vec<String> = cells.iter().map(Cell::name).collect();
    let best: HashMap<String, f32> = table::rows(&tried, &names)
        .iter()
        .map(|row| (row.cell.to_owned(), row.lr))
        .collect();
    let mut tasks = Vec::new();
    for &seed in others {
        let known = cells
            .iter()
            .filter_map(|cell| Some((cell, *best.get(&cell.name())?)));
        tasks.extend(known.map(|(cell, lr)| Task { cell, lr, seed }));
    }
    train_tasks(cli, tasks, results)
}

/// Runs what has no result yet, several at a time.
fn train_tasks(cli: &Cli, mut tasks: Vec<Task<'_>>, results: &Results) -> Result<(), AnyError> {
    let done: HashSet<String> = results.read()?.iter().map(RunResult::own_key).collect();
    let hash = results.hash();
    tasks.retain(|task| {
        !done.contains(&RunResult::key(
            &task.cell.name(),
            task.lr,
            task.seed,
            &hash,
        ))
    });
    println!("{} runs to do (settings {hash})", tasks.len());
    let file = Mutex::new(
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&results.path)?,
    );
    let (next, start) = (AtomicUsize::new(0), Instant::now());
    let first_error = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..cli.parallel.max(1) {
            scope.spawn(|| {
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = run_task(task, results, &file) {
                        *first_error.lock().expect("no holder panics") = Some(error);
                        next.store(tasks.len(), Ordering::Relaxed);
                    }
                    let begun = next.load(Ordering::Relaxed).min(tasks.len());
                    println!(
                        "  {begun} of {} begun after {:.0} s",
                        tasks.len(),
                        start.elapsed().as_secs_f64()
                    );
                }
            });
        }
    });
    first_error
        .into_inner()
        .expect("no holder panics")
        .map_or(Ok(()), Err)
}

fn run_task(task: &Task<'_>, results: &Results, file: &Mutex<fs::File>) -> Result<(), AnyError> {
    // A pool of its own, so that the other run's mathematics does not queue behind this one's.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let result = pool.install(|| {
        job::train(
            task.cell,
            task.lr,
            task.seed,
            &results.settings,
            &results.data,
        )
    })?;
    let loss = result
        .validation_loss
        .map_or("diverged".to_owned(), |loss| format!("{loss:.4}"));
    println!(
        "{:50} lr {:<6} seed {} → {loss} in {:.0} s",
        result.cell, task.lr, task.seed, result.seconds
    );
    let mut line = serde_json::to_vec(&result)?;
    line.push(b'\n');
    file.lock().expect("no holder panics").write_all(&line)?;
    Ok(())
}

fn write_tables(cli: &Cli, names: &[String], results: &[RunResult]) -> Result<(), AnyError> {
    let context = cli.train.model_shape().context;
    let rows = table::rows(results, names);
    let header = format!(
        "{} steps, {} workers, batches of {}×{context} tokens each, seeds {:?}; bytes are those of one worker, sketches and headers included.",
        cli.train.steps, cli.workers, cli.train.batch, cli.seeds
    );
    let markdown = table::markdown(&rows, &header);
    print!("{markdown}");
    fs::write(cli.out.join("loss_table.md"), markdown)?;
    fs::write(cli.out.join("loss_table.csv"), table::csv(results))?;
    fs::write(cli.out.join("loss_curves.csv"), table::curves(&rows))?;
    Ok(())
}
