//! A job's processes on this machine, from their certificates to their last log line.
//!
//! Shards first, on ports of the system's choice, then workers. When all workers have ended the shards are asked to.
//! A worker that fails is reported and the others go on: the shards close its rounds with those present. If the job's
//! [`RestartPolicy`] says so, it is started again and joins them; so is a shard, on its port, and is told by the workers
//! what it must know.

use super::error::CliError;
use super::lives::Lives;
use super::process::{Errors, Output, Process, tail};
use super::progress::Progress;
use super::stop::Signals;
use super::words::flags;
use crate::record::{STEPS_FILE, SUMMARY_FILE, StepRecord, worker_directories};
use arc_topk_common::config::{AlgorithmConfig, ElasticArgs, RestartPolicy, TrainArgs};
use arc_topk_transport::certs::{CertRequest, JobCerts, make_job_certs};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep_until, timeout_at};

const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// A worker ends between steps, and may write a checkpoint first.
const WORKER_GRACE: Duration = Duration::from_secs(20);
const SHARD_GRACE: Duration = Duration::from_secs(5);
const FOREVER: Duration = Duration::from_secs(365 * 86_400);

/// What to start.
#[derive(Clone, Debug)]
pub(super) struct JobSpec {
    /// What people call the run.
    pub(super) name: String,
    /// Name by which shards tell jobs apart.
    pub(super) job: String,
    /// Log filter of all processes.
    pub(super) log: String,
    /// Workers to start.
    pub(super) workers: u16,
    /// Shards to start.
    pub(super) shards: u16,
    /// Address of shard 0's live page.
    pub(super) admin: Option<SocketAddr>,
    /// What workers are told.
    pub(super) train: TrainArgs,
    /// What workers are told.
    pub(super) algorithm: AlgorithmConfig,
    /// Workers that come, go or lag.
    pub(super) elastic: ElasticArgs,
    /// What becomes of processes that die.
    pub(super) restart: RestartPolicy,
    /// Directory of the run: `worker-<rank>/` and `logs/`.
    pub(super) dir: PathBuf,
    /// Most milliseconds by which a shard delays each answer, at random. For tests.
    pub(super) chaos_delay_ms: u64,
    /// A program to run as every worker; empty for the built-in trainer.
    pub(super) program: Vec<OsString>,
}

/// Runs the job to its end, showing `progress`.
///
/// # Errors
/// A process cannot be started, or failed ([`CliError::Job`]); a signal came ([`CliError::Interrupted`]).
pub(super) async fn run(spec: &JobSpec, progress: &mut Progress) -> Result<(), CliError> {
    // Taken over before anything is started: from here on a signal ends the job in order.
    let mut signals = Signals::new().map_err(|source| CliError::System {
        action: "catch signals",
        source,
    })?;
    let mut job = Job::prepare(spec)?;
    let ended = tokio::select! {
        ready = job.start_shards() => ready,
        () = signals.next() => Err(CliError::Interrupted),
    };
    let page = ended?;
    if let Some(page) = page {
        progress.message(None, &format!("live page at http://{page}/"));
    }
    job.start_workers()?;
    let interrupted = job.watch_workers(&mut signals, progress).await;
    job.end_shards().await;
    progress.finish();
    if interrupted {
        return Err(CliError::Interrupted);
    }
    match job.failed {
        0 => Ok(()),
        // Training reached its last step, if with fewer workers.
        _ if spec.restart == RestartPolicy::OnFailure && job.done => Ok(()),
        failed => Err(CliError::Job {
            failed,
            logs: spec.dir.join("logs"),
        }),
    }
}

struct Job<'a> {
    spec: &'a JobSpec,
    executable: PathBuf,
    certs: JobCerts,
    /// Removed with its keys when the job is over.
    _certs_dir: tempfile::TempDir,
    /// Shards, then workers.
    processes: Vec<Process>,
    ended: Vec<bool>,
    lives: Vec<Lives>,
    /// Some worker reached the last step.
    done: bool,
    events: UnboundedReceiver<(usize, Output)>,
    sender: UnboundedSender<(usize, Output)>,
    addresses: Vec<String>,
    pages: Vec<Option<SocketAddr>>,
    /// Where programs may make a process group.
    meeting_port: u16,
    failed: usize,
}

impl<'a> Job<'a> {
    fn prepare(spec: &'a JobSpec) -> Result<Self, CliError> {
        let logs = spec.dir.join("logs");
        let created = std::fs::create_dir_all(&logs);
        created.map_err(|source| CliError::File {
            action: "create",
            path: logs,
            source,
        })?;
        if !spec.train.resume {
            forget_records(&spec.dir)?;
            check_unused(&spec.snapshots())?;
        }
        let executable = std::env::current_exe();
        let executable = executable.map_err(|source| CliError::System {
            action: "find this program's file",
            source,
        })?;
        let certs_dir = tempfile::Builder::new().prefix("arc-certs-").tempdir();
        let certs_dir = certs_dir.map_err(|source| CliError::System {
            action: "make a temporary directory",
            source,
        })?;
        let certs = make_job_certs(certs_dir.path(), &CertRequest::new(&spec.job, &[], 30))?;
        let (sender, events) = unbounded_channel();
        Ok(Self {
            spec,
            executable,
            certs,
            _certs_dir: certs_dir,
            processes: Vec::new(),
            ended: Vec::new(),
            lives: Vec::new(),
            done: false,
            events,
            sender,
            addresses: vec![String::new(); usize::from(spec.shards)],
            pages: vec![None; usize::from(spec.shards)],
            meeting_port: free_port(),
            failed: 0,
        })
    }

    fn start(&mut self, name: String, command: Command) -> Result<(), CliError> {
        let index = self.processes.len();
        let process = self.spawn(index, name, command, 0)?;
        self.processes.push(process);
        self.ended.push(false);
        let least = if self.is_program(index) {
            Lives::LEAST_LIFE_OF_PROGRAM
        } else {
            Lives::LEAST_LIFE
        };
        self.lives
            .push(Lives::new(std::time::Instant::now(), least));
        Ok(())
    }

    fn spawn(
        &self,
        index: usize,
        name: String,
        command: Command,
        life: usize,
    ) -> Result<Process, CliError> {
        let mut file = name.replace(' ', "-");
        if life > 0 {
            file += &format!(".{life}");
        }
        let log = self.spec.dir.join("logs").join(format!("{file}.log"));
        let errors = if self.is_program(index) {
            Errors::Shown
        } else {
            Errors::Logged
        };
        Process::start(index, name, command, log, errors, self.sender.clone())
    }

    /// Starts a process that has died once more, if it is to be and has not died too often.
    fn start_again(&mut self, index: usize, status: ExitStatus, progress: &mut Progress) -> bool {
        if self.spec.restart == RestartPolicy::Never || self.done {
            return false;
        }
        let Some(life) = self.lives[index].next(std::time::Instant::now(), status) else {
            return false;
        };
        let name = self.processes[index].name.clone();
        let shards = usize::from(self.spec.shards);
        let command = match index.checked_sub(shards) {
            None => self.shard(index as u16),
            Some(rank) if self.spec.program.is_empty() => self.trainer(rank as u16, true),
            Some(rank) => self.user_program(rank as u16),
        };
        match self.spawn(index, name, command, life) {
            Ok(process) => {
                progress.complaint(&format!("arc-worker: {} is started again", process.name));
                self.processes[index] = process;
                true
            }
            Err(error) => {
                progress.complaint(&format!("arc-worker: {error}"));
                false
            }
        }
    }

    /// Whether the process is a worker that runs somebody's program.
    fn is_program(&self, index: usize) -> bool {
        index >= usize::from(self.spec.shards) && !self.spec.program.is_empty()
    }

    /// This program again, told by flags alone.
    fn itself(&self, subcommand: &str) -> Command {
        let mut command = own_environment(Command::new(&self.executable));
        command.arg(subcommand).arg("--until-stdin-ends");
        command
            .arg(format!("--log={}", self.spec.log))
            .arg(format!("--job={}", self.spec.job));
        command
    }

    /// Starts all shards and waits until workers can connect. Returns the address of shard 0's page.
    async fn start_shards(&mut self) -> Result<Option<SocketAddr>, CliError> {
        for shard in 0..self.spec.shards {
            let command = self.shard(shard);
            self.start(format!("shard {shard}"), command)?;
        }
        self.await_shards().await
    }

    /// A shard: on a port of the system's choice, or on the one that it had.
    fn shard(&self, shard: u16) -> Command {
        let spec = self.spec;
        let mut command = self.itself("ps");
        let at = usize::from(shard);
        let admin = match (spec.admin, self.pages[at]) {
            (None, _) => "off".to_owned(),
            (_, Some(page)) => page.to_string(),
            (Some(address), None) if shard == 0 => free_or_any(address).to_string(),
            (Some(address), None) => format!("{}:0", address.ip()),
        };
        let listen = match self.addresses[at].as_str() {
            "" => "127.0.0.1:0",
            known => known,
        };
        command
            .arg("--ready-json")
            .arg(format!("--listen={listen}"))
            .arg(format!("--admin={admin}"));
        command
            .arg(format!("--shard={shard}"))
            .arg(format!("--shards={}", spec.shards))
            .arg(format!("--workers={}", spec.workers))
            .args(flags(&spec.elastic, &[]));
        if self.addresses[at].is_empty() {
            // No job can be running yet.
            command.arg("--start-grace-seconds=0");
        }
        if spec.train.snapshot_every > 0 || spec.snapshots().is_dir() {
            let dir = spec.snapshots().join(format!("shard-{shard}"));
            command.arg("--snapshot-dir").arg(dir);
        }
        if spec.chaos_delay_ms > 0 {
            command.arg(format!("--chaos-delay-ms={}", spec.chaos_delay_ms));
        }
        command.arg("--certs").arg(&self.certs.shard);
        command
    }

    async fn await_shards(&mut self) -> Result<Option<SocketAddr>, CliError> {
        let deadline = Instant::now() + READY_TIMEOUT;
        while self.addresses.iter().any(String::is_empty) {
            let event = timeout_at(deadline, self.events.recv()).await;
            let Ok(Some((shard, output))) = event else {
                let late = self
                    .addresses
                    .iter()
                    .position(String::is_empty)
                    .unwrap_or(0);
                return Err(self.not_ready(
                    late,
                    format!("it said nothing for {} s", READY_TIMEOUT.as_secs()),
                ));
            };
            match output {
                Output::Ended(status) => {
                    return Err(self.not_ready(shard, format!("it ended with {status}")));
                }
                Output::Line(line) => {
                    let ready: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                    if let Some(address) = ready["quic"].as_str() {
                        address.clone_into(&mut self.addresses[shard]);
                    }
                    let page = ready["admin"].as_str();
                    self.pages[shard] = page.and_then(|address| address.parse().ok());
                }
            }
        }
        Ok(self.pages[0])
    }

    fn not_ready(&self, index: usize, reason: String) -> CliError {
        let process = &self.processes[index];
        CliError::NotReady {
            who: process.name.clone(),
            reason,
            tail: tail(&process.log),
        }
    }

    fn start_workers(&mut self) -> Result<(), CliError> {
        for rank in 0..self.spec.workers {
            let command = if self.spec.program.is_empty() {
                self.trainer(rank, false)
            } else {
                self.user_program(rank)
            };
            self.start(format!("worker {rank}"), command)?;
        }
        Ok(())
    }

    fn worker_dir(&self, rank: u16) -> PathBuf {
        self.spec.dir.join(format!("worker-{rank}"))
    }

    fn trainer(&self, rank: u16, again: bool) -> Command {
        let spec = self.spec;
        let mut command = self.itself("train");
        let mut train = spec.train.clone();
        // Should all workers have died, the job goes on from where it was.
        train.resume |= again && (train.snapshot_every > 0 || train.checkpoint_dir.is_some());
        command
            .args(flags(&train, &["run_dir", "json"]))
            .args(flags(&spec.algorithm, &[]));
        command
            .arg("--json")
            .arg("--run-dir")
            .arg(spec.dir.join("worker-{rank}"))
            .arg("--certs")
            .arg(&self.certs.worker);
        command.arg(format!("--shard-addresses={}", self.addresses.join(",")));
        command
            .arg(format!("--rank={rank}"))
            .arg(format!("--workers={}", spec.workers))
            .arg("--admin=off");
        if spec.restart == RestartPolicy::Never {
            // Long enough for a connection, too short to wait for what nobody starts again.
            command.arg("--reconnect-timeout-seconds=10");
        }
        command
    }

    /// A program that reads from its environment how to join.
    fn user_program(&self, rank: u16) -> Command {
        let mut command = own_environment(Command::new(&self.spec.program[0]));
        command.args(&self.spec.program[1..]);
        command
            .env("ARC_SHARD_ADDRESSES", self.addresses.join(","))
            .env("ARC_CERTS", &self.certs.worker);
        command
            .env("ARC_JOB", &self.spec.job)
            .env("ARC_LOG", &self.spec.log);
        command
            .env("ARC_RANK", rank.to_string())
            .env("ARC_WORKERS", self.spec.workers.to_string());
        command.env("ARC_RUN_DIR", self.worker_dir(rank));
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            // As torchrun does it; more threads than cores slow all workers down.
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let threads = (cores / usize::from(self.spec.workers)).max(1);
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
        // torchrun's names, for programs that make a process group as well.
        command
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", self.spec.workers.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", self.meeting_port.to_string());
        command
    }

    /// Until all workers have ended. Whether a signal ended them.
    async fn watch_workers(&mut self, signals: &mut Signals, progress: &mut Progress) -> bool {
        let shards = usize::from(self.spec.shards);
        let mut deadline = Instant::now() + FOREVER;
        let mut interrupted = false;
        while self.ended[shards..].contains(&false) {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some((index, output)) => self.note(index, output, interrupted, progress),
                    None => break,
                },
                () = signals.next() => {
                    let again = std::mem::replace(&mut interrupted, true);
                    deadline = Instant::now() + if again { Duration::ZERO } else { WORKER_GRACE };
                    if !again {
                        progress.message(None, "stopping; once more to stop at once");
                        let end = if self.spec.program.is_empty() { Process::ask_to_end } else { Process::terminate };
                        self.processes[shards..].iter_mut().for_each(end);
                    }
                }
                () = sleep_until(deadline) => {
                    self.processes[shards..].iter_mut().for_each(Process::kill);
                    deadline = Instant::now() + FOREVER;
                }
            }
        }
        interrupted
    }

    /// Takes note of what a process did while workers run.
    fn note(&mut self, index: usize, output: Output, stopping: bool, progress: &mut Progress) {
        let rank = index.checked_sub(usize::from(self.spec.shards));
        match (output, rank) {
            (Output::Line(line), Some(rank)) => {
                self.lives[index].took_part |= worker_line(rank, &line, progress);
            }
            (Output::Line(_), None) => {}
            (Output::Ended(status), _) => {
                let dismissed = self.lives[index].dismissed;
                if status.success() && rank.is_some() {
                    self.done = true;
                }
                // A shard that was asked to end, in the middle of a job, is missed as one that died is.
                let finished = status.success() && (rank.is_some() || self.done);
                if finished || stopping || dismissed {
                    self.ended[index] = true;
                } else {
                    progress.complaint(&complaint(&self.processes[index], status));
                    if !self.start_again(index, status, progress) {
                        self.ended[index] = true;
                        self.failed += 1;
                        self.say_who_is_left(rank, progress);
                    }
                }
                if self.done {
                    self.dismiss_latecomers();
                }
            }
        }
    }

    fn say_who_is_left(&self, rank: Option<usize>, progress: &mut Progress) {
        let workers = &self.ended[usize::from(self.spec.shards)..];
        let left = workers.iter().filter(|ended| !**ended).count();
        if rank.is_some() && left > 0 {
            progress.complaint(&format!(
                "arc-worker: it is not started again; the other workers go on, {left} of {}",
                self.spec.workers
            ));
        }
    }

    /// Those that were started again and have not got into the job: it is over, and they would wait for another one.
    fn dismiss_latecomers(&mut self) {
        for index in usize::from(self.spec.shards)..self.processes.len() {
            let life = &mut self.lives[index];
            if !self.ended[index] && life.is_again() && !life.took_part && !life.dismissed {
                life.dismissed = true;
                self.processes[index].terminate();
            }
        }
    }

    /// Asks the shards to end, and sees to it that they do.
    async fn end_shards(&mut self) {
        let shards = usize::from(self.spec.shards);
        self.processes[..shards]
            .iter_mut()
            .for_each(Process::ask_to_end);
        let deadline = Instant::now() + SHARD_GRACE;
        while self.ended[..shards].contains(&false) {
            match timeout_at(deadline, self.events.recv()).await {
                Ok(Some((index, Output::Ended(_)))) => self.ended[index] = true,
                Ok(Some(_)) => {}
                // Dropping the job kills what is left.
                _ => break,
            }
        }
    }
}

impl JobSpec {
    /// Directory of the shards' snapshots.
    fn snapshots(&self) -> PathBuf {
        self.dir.join("snapshots")
    }
}

/// A worker's line: a step or a message as JSON, or whatever a user's program prints. Whether it was a step.
fn worker_line(slot: usize, line: &str, progress: &mut Progress) -> bool {
    let fields: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    let rank = fields["rank"].as_u64();
    let rank = rank
        .and_then(|rank| usize::try_from(rank).ok())
        .unwrap_or(slot);
    match fields["event"].as_str() {
        Some("step") => {
            if let Ok(record) = serde_json::from_value::<StepRecord>(fields) {
                progress.step(rank, &record);
            }
            return true;
        }
        Some("message") => {
            progress.message(Some(rank), fields["text"].as_str().unwrap_or_default())
        }
        Some(_) => {}
        None => progress.complaint(&format!("[{slot}] {line}")),
    }
    false
}

fn complaint(process: &Process, status: ExitStatus) -> String {
    format!(
        "arc-worker: {} ended with {status}; the end of its log {}:\n{}",
        process.name,
        process.log.display(),
        tail(&process.log)
    )
}

/// Without this program's own settings, which reach the other processes as flags.
fn own_environment(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ARC_") {
            command.env_remove(name);
        }
    }
    command
}

/// `address`, or any free port of its host if it is taken: a second job on this machine must not fail for its page.
fn free_or_any(address: SocketAddr) -> SocketAddr {
    match std::net::TcpListener::bind(address) {
        Ok(_) => address,
        Err(_) => SocketAddr::new(address.ip(), 0),
    }
}

/// A port that nobody listens on now; 0 if there is none.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0));
    let address = listener.and_then(|listener| listener.local_addr());
    address.map_or(0, |address| address.port())
}

/// Snapshots of an earlier run must neither be taken for this one's nor push its own out.
fn check_unused(snapshots: &Path) -> Result<(), CliError> {
    let held = |dir: std::fs::DirEntry| {
        let entries = std::fs::read_dir(dir.path());
        entries.is_ok_and(|mut entries| entries.next().is_some())
    };
    let dirs = std::fs::read_dir(snapshots).into_iter().flatten();
    if dirs.flatten().any(held) {
        let dir = snapshots.to_owned();
        return Err(CliError::SnapshotsInUse { dir });
    }
    Ok(())
}

/// Removes the records of an earlier run with more workers, which would be taken for this one's.
fn forget_records(dir: &Path) -> Result<(), CliError> {
    for worker in worker_directories(dir)? {
        for file in [STEPS_FILE, SUMMARY_FILE] {
            let path = worker.join(file);
            if path.exists() {
                std::fs::remove_file(&path).map_err(|source| CliError::File {
                    action: "remove",
                    path,
                    source,
                })?;
            }
        }
    }
    Ok(())
}
