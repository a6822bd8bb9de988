//! The job: its processes by slot, shards first, and what they said.

use super::AnyError;
use super::lab::Lab;
use super::process::{Line, Process};
use super::timeline::{Seen, live_since, median_gap};
use arc_topk_transport::certs::{CertRequest, JobCerts, make_job_certs};
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// A model of a few thousand parameters on the built-in text.
const MODEL: [&str; 13] = [
    "--data=builtin",
    "--hidden=32",
    "--intermediate=64",
    "--layers=1",
    "--heads=2",
    "--context=32",
    "--batch=2",
    "--warmup-updates=2",
    "--threads=1",
    "--digest-every=1",
    "--validate-every=0",
    "--validate-batches=32",
    "--admin=off",
];
/// What starts dead processes again takes its time.
const RESTART_AFTER: Duration = Duration::from_millis(200);
/// With no step of anybody for so long the job hangs.
const HANGS_AFTER: Duration = Duration::from_secs(90);
/// What a worker may take for its end after another one has ended.
const LAST_GRACE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);
/// Slots for workers that are added.
const SPARE: usize = 2;

pub(crate) struct Settings {
    pub(crate) program: PathBuf,
    pub(crate) workers: u16,
    pub(crate) shards: u16,
    pub(crate) steps: u64,
    pub(crate) seed: u64,
    pub(crate) pace_ms: u64,
    pub(crate) log: String,
    pub(crate) train: Vec<String>,
    pub(crate) dir: PathBuf,
}

impl Settings {
    /// Processes that there can be: shards, workers, and those that are added.
    pub(crate) fn slots(&self) -> usize {
        usize::from(self.shards) + usize::from(self.workers) + SPARE
    }
}

#[derive(Default)]
struct Slot {
    process: Option<Process>,
    life: usize,
    /// It is to run: it was started, and not removed.
    wanted: bool,
    /// This life was killed by this program, so that its end is no surprise.
    killed: bool,
    /// When the process was last killed.
    killed_at: Option<Instant>,
    restart_at: Option<Instant>,
    /// When this life of a shard could be dialled, or this life of a worker did its first step.
    ready_at: Option<Instant>,
    /// Of a shard; on loopback the port that it was given.
    address: String,
    steps: Vec<Seen>,
    digest: Option<String>,
    ended: bool,
}

/// What the job came to.
pub(crate) struct End {
    pub(crate) validation: Option<(u64, f32)>,
    /// Of the parameters of all workers that reached the end.
    pub(crate) digests: BTreeSet<String>,
    pub(crate) finished: usize,
    pub(crate) complaints: Vec<String>,
    /// Workers that joined again by themselves, since the job had gone on without them.
    pub(crate) rejoins: usize,
    pub(crate) median_step: Duration,
    pub(crate) seconds: f64,
}

pub(crate) struct Job<'a> {
    settings: &'a Settings,
    lab: &'a Lab,
    certs: JobCerts,
    slots: Vec<Slot>,
    lines: Receiver<Line>,
    sender: Sender<Line>,
    validation: BTreeMap<u64, f32>,
    complaints: Vec<String>,
    started: Instant,
    limit: Instant,
    last_step: Instant,
    done_at: Option<Instant>,
    stop: Arc<AtomicBool>,
}

impl<'a> Job<'a> {
    /// Starts shards, and once they can be dialled workers.
    pub(crate) fn start(
        settings: &'a Settings,
        lab: &'a Lab,
        limit: Instant,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, AnyError> {
        std::fs::create_dir_all(settings.dir.join("logs"))?;
        let shards = usize::from(settings.shards);
        let hosts: Vec<String> = (0..shards)
            .map(|shard| lab.address(shard).to_string())
            .collect();
        let certs = make_job_certs(
            &settings.dir.join("certs"),
            &CertRequest::new("chaos", &hosts, 30),
        )?;
        let (sender, lines) = channel();
        let mut job = Self {
            settings,
            lab,
            certs,
            slots: (0..settings.slots()).map(|_| Slot::default()).collect(),
            lines,
            sender,
            validation: BTreeMap::new(),
            complaints: Vec::new(),
            started: Instant::now(),
            limit,
            last_step: Instant::now(),
            done_at: None,
            stop,
        };
        for (shard, host) in hosts.iter().enumerate().take(shards) {
            job.slots[shard].address = format!("{host}:0");
            job.begin(shard)?;
        }
        while !job.slots[..shards]
            .iter()
            .all(|slot| slot.ready_at.is_some())
        {
            job.pump(LOOK)?;
        }
        for worker in shards..shards + usize::from(settings.workers) {
            job.begin(worker)?;
        }
        Ok(job)
    }

    /// Starts the process of a slot, or a further life of it.
    fn begin(&mut self, index: usize) -> Result<(), AnyError> {
        let mut command = self.lab.command(index, &self.settings.program);
        let shard = index < usize::from(self.settings.shards);
        let words = if shard {
            self.shard(index)
        } else {
            self.worker(index)
        };
        command.args(words);
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ARC_"))
        {
            command.env_remove(name);
        }
        let life = self.slots[index].life + 1;
        let log = self
            .settings
            .dir
            .join("logs")
            .join(format!("{}.{life}.log", self.name(index).replace(' ', "-")));
        let process = Process::start(command, &log, index, life, self.sender.clone())?;
        let slot = &mut self.slots[index];
        (slot.process, slot.life, slot.wanted) = (Some(process), life, true);
        (slot.killed, slot.restart_at, slot.ready_at) = (false, None, None);
        (slot.ended, slot.digest) = (false, None);
        slot.steps.clear();
        Ok(())
    }

    fn shard(&self, shard: usize) -> Vec<String> {
        let settings = self.settings;
        let mut words = common("ps", settings);
        words.extend([
            "--ready-json".to_owned(),
            "--admin=off".to_owned(),
            format!("--listen={}", self.slots[shard].address),
            format!("--shard={shard}"),
            format!("--shards={}", settings.shards),
            format!("--workers={}", settings.workers),
            format!("--max-workers={}", usize::from(settings.workers) + SPARE),
            format!("--chaos-delay-ms={}", settings.pace_ms),
            format!("--certs={}", self.certs.shard.display()),
        ]);
        words
    }

    fn worker(&self, index: usize) -> Vec<String> {
        let settings = self.settings;
        let shards = usize::from(settings.shards);
        let addresses: Vec<&str> = self.slots[..shards]
            .iter()
            .map(|slot| slot.address.as_str())
            .collect();
        let mut words = common("train", settings);
        words.extend(MODEL.map(str::to_owned));
        words.extend([
            "--json".to_owned(),
            format!("--run-dir={}", settings.dir.join("worker-{rank}").display()),
            format!("--certs={}", self.certs.worker.display()),
            format!("--shard-addresses={}", addresses.join(",")),
            format!("--steps={}", settings.steps),
            format!("--seed={}", settings.seed),
        ]);
        let rank = index - shards;
        if rank < usize::from(settings.workers) {
            words.push(format!("--rank={rank}"));
        }
        words.extend(settings.train.iter().cloned());
        words
    }

    /// What people call a slot's process.
    pub(crate) fn name(&self, index: usize) -> String {
        match index.checked_sub(usize::from(self.settings.shards)) {
            None => format!("shard {index}"),
            Some(worker) => format!("worker {worker}"),
        }
    }

    /// Takes note of what happens for so long, and starts again what was killed.
    pub(crate) fn pump(&mut self, time: Duration) -> Result<(), AnyError> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if let Ok(line) = self.lines.recv_timeout(left.min(LOOK)) {
                self.note(&line);
            }
            while let Ok(line) = self.lines.try_recv() {
                self.note(&line);
            }
            self.look_after_processes()?;
            let now = Instant::now();
            if self.stop.load(Ordering::Relaxed) {
                return Err("stopped by a signal".into());
            }
            if now > self.limit {
                return Err(
                    "the time for this run is over; raise --limit-seconds, or lower --kills".into(),
                );
            }
            if self.done_at.is_none() && now - self.last_step > HANGS_AFTER {
                let logs = self.settings.dir.join("logs");
                return Err(format!(
                    "no worker has done a step for {} s after step {}; logs are in {}",
                    HANGS_AFTER.as_secs(),
                    self.newest_step(),
                    logs.display()
                )
                .into());
            }
            if now >= until {
                return Ok(());
            }
        }
    }

    fn note(&mut self, line: &Line) {
        let slot = &mut self.slots[line.slot];
        if line.life != slot.life {
            return;
        }
        let fields: serde_json::Value = serde_json::from_str(&line.text).unwrap_or_default();
        if let Some(address) = fields["quic"].as_str() {
            address.clone_into(&mut slot.address);
            slot.ready_at = Some(line.at);
        }
        match fields["event"].as_str() {
            Some("step") => {
                let step = fields["step"].as_u64().unwrap_or(0);
                let live = fields["behind"] == false;
                slot.ready_at.get_or_insert(line.at);
                slot.steps.push(Seen {
                    at: line.at,
                    step,
                    live,
                });
                self.last_step = line.at;
                if let Some(loss) = fields["validation_loss"].as_f64() {
                    self.validation.insert(step, loss as f32);
                }
            }
            Some("summary") => {
                let digest = fields["summary"]["digest"].as_str();
                slot.digest = digest.map(str::to_owned);
            }
            _ => {}
        }
    }

    fn look_after_processes(&mut self) -> Result<(), AnyError> {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if slot.restart_at.is_some_and(|at| at <= Instant::now()) && self.done_at.is_none() {
                self.begin(index)?;
                continue;
            }
            let status = slot.process.as_mut().and_then(Process::ended);
            let Some(status) = status.filter(|_| !slot.ended) else {
                continue;
            };
            slot.ended = true;
            self.note_end(index, status);
        }
        Ok(())
    }

    fn note_end(&mut self, index: usize, status: ExitStatus) {
        let name = self.name(index);
        let worker = index >= usize::from(self.settings.shards);
        let slot = &mut self.slots[index];
        if worker && status.success() {
            self.done_at.get_or_insert(Instant::now());
            return;
        }
        // One that had not got in yet when the job ended finds no job.
        let too_late = self.done_at.is_some() && slot.ready_at.is_none();
        if slot.wanted && !slot.killed && !too_late {
            let log = slot
                .process
                .as_ref()
                .map(|process| process.log.display().to_string());
            let complaint = format!(
                "{name} ended by itself with {status}; its log: {}",
                log.unwrap_or_default()
            );
            eprintln!("chaos: {complaint}");
            self.complaints.push(complaint);
        }
        if slot.wanted {
            slot.restart_at = Some(Instant::now() + RESTART_AFTER);
        }
    }

    /// SIGKILL to a process, which is started again a little later. Whether it ran.
    pub(crate) fn kill(&mut self, index: usize) -> bool {
        self.end(index, Signal::KILL)
    }

    /// SIGTERM to a process, which says goodbye and is started again a little later. Whether it ran.
    pub(crate) fn replace(&mut self, index: usize) -> bool {
        self.end(index, Signal::TERM)
    }

    fn end(&mut self, index: usize, signal: Signal) -> bool {
        let slot = &mut self.slots[index];
        if slot.killed || slot.ended {
            return false;
        }
        (slot.killed, slot.ready_at) = (true, None);
        slot.killed_at = Some(Instant::now());
        self.signal(index, signal);
        true
    }

    pub(crate) fn signal(&mut self, index: usize, signal: Signal) {
        if let Some(process) = &mut self.slots[index].process {
            process.signal(signal);
        }
    }

    /// Starts a worker in a slot that has none.
    pub(crate) fn add(&mut self) -> Result<Option<usize>, AnyError> {
        let workers = usize::from(self.settings.shards)..self.slots.len();
        let vacant = workers.rev().find(|index| !self.slots[*index].wanted);
        if let Some(index) = vacant {
            self.begin(index)?;
        }
        Ok(vacant)
    }

    /// Asks a worker to leave.
    pub(crate) fn remove(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.wanted = false;
        if let Some(process) = &mut slot.process {
            process.ask_to_end();
        }
    }

    /// Workers that are to run.
    pub(crate) fn workers(&self) -> Vec<usize> {
        let workers = usize::from(self.settings.shards)..self.slots.len();
        workers.filter(|index| self.slots[*index].wanted).collect()
    }

    /// Processes that run and are ready: shards that can be dialled, workers that have done a step.
    pub(crate) fn ready(&self) -> Vec<usize> {
        let all = 0..self.slots.len();
        let is_ready = |slot: &Slot| slot.wanted && !slot.ended && slot.ready_at.is_some();
        all.filter(|index| is_ready(&self.slots[*index])).collect()
    }

    pub(crate) fn shards(&self) -> usize {
        usize::from(self.settings.shards)
    }

    pub(crate) fn steps_of(&self, index: usize) -> &[Seen] {
        &self.slots[index].steps
    }

    /// From its last kill until it was ready again.
    pub(crate) fn downtime(&self, index: usize) -> Duration {
        let slot = &self.slots[index];
        let times = slot.killed_at.zip(slot.ready_at);
        times.map_or(Duration::ZERO, |(killed, ready)| {
            ready.saturating_duration_since(killed)
        })
    }

    /// The usual time of a step, of those that run.
    pub(crate) fn median_step(&self) -> Duration {
        median_gap(self.slots.iter().map(|slot| slot.steps.as_slice()))
    }

    pub(crate) fn newest_step(&self) -> u64 {
        let newest = self.slots.iter().filter_map(|slot| slot.steps.last());
        newest.map(|seen| seen.step).max().unwrap_or(0)
    }

    pub(crate) fn steps_left(&self) -> u64 {
        match self.done_at {
            Some(_) => 0,
            None => self.settings.steps.saturating_sub(self.newest_step() + 1),
        }
    }

    /// Waits until everybody who is to run takes part: `steps` live steps of each worker since `since` and since all shards
    /// were ready. Whether it came to that.
    pub(crate) fn await_all(
        &mut self,
        since: Instant,
        steps: usize,
        time: Duration,
    ) -> Result<bool, AnyError> {
        let until = Instant::now() + time;
        while Instant::now() < until && self.done_at.is_none() {
            if self.all_take_part(since, steps) {
                return Ok(true);
            }
            self.pump(LOOK)?;
        }
        Ok(self.done_at.is_some())
    }

    fn all_take_part(&self, since: Instant, steps: usize) -> bool {
        let mut since = since;
        for slot in &self.slots[..self.shards()] {
            let Some(ready) = slot.ready_at else {
                return false;
            };
            since = since.max(ready);
        }
        let newest = self.newest_step();
        self.workers().into_iter().all(|index| {
            let slot = &self.slots[index];
            let near = slot
                .steps
                .last()
                .is_some_and(|seen| seen.step + 3 >= newest);
            slot.ready_at.is_some() && near && live_since(&slot.steps, since) >= steps
        })
    }

    /// What each worker is at, for people.
    pub(crate) fn describe(&self) -> String {
        let words = (0..self.slots.len())
            .filter(|index| self.slots[*index].wanted)
            .map(|index| {
                let slot = &self.slots[index];
                let at = match slot.steps.last() {
                    _ if slot.ready_at.is_none() => "not ready".to_owned(),
                    Some(seen) => format!(
                        "step {}{}",
                        seen.step,
                        if seen.live { "" } else { ", behind" }
                    ),
                    None => "ready".to_owned(),
                };
                format!("{} (life {}): {at}", self.name(index), slot.life)
            });
        words.collect::<Vec<_>>().join("; ")
    }

    /// Lets the job run to its end.
    pub(crate) fn finish(mut self) -> Result<End, AnyError> {
        while self.done_at.is_none() {
            self.pump(LOOK)?;
        }
        let until = Instant::now() + LAST_GRACE;
        while Instant::now() < until && self.workers().iter().any(|index| self.is_awaited(*index)) {
            self.pump(LOOK)?;
        }
        // What they wrote last may still be on its way.
        self.pump(Duration::from_millis(300))?;
        for index in self.workers() {
            if self.is_awaited(index) {
                let name = self.name(index);
                self.complaints.push(format!(
                    "{name} had not ended {} s after another",
                    LAST_GRACE.as_secs()
                ));
            }
        }
        let median_step = self.median_step();
        let finished: Vec<String> = self
            .slots
            .iter()
            .filter(|slot| slot.wanted)
            .filter_map(|slot| slot.digest.clone())
            .collect();
        let mut end = End {
            validation: self
                .validation
                .last_key_value()
                .map(|(step, loss)| (*step, *loss)),
            digests: finished.iter().cloned().collect(),
            finished: finished.len(),
            complaints: std::mem::take(&mut self.complaints),
            rejoins: 0,
            median_step,
            seconds: self.started.elapsed().as_secs_f64(),
        };
        self.read_logs(&mut end)?;
        Ok(end)
    }

    /// It took part and has not ended.
    fn is_awaited(&self, index: usize) -> bool {
        let slot = &self.slots[index];
        !slot.ended && slot.ready_at.is_some()
    }

    fn read_logs(&self, end: &mut End) -> Result<(), AnyError> {
        for entry in std::fs::read_dir(self.settings.dir.join("logs"))? {
            let path = entry?.path();
            let text = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
            end.rejoins += text.matches("joining again in").count();
            for sign in ["panicked at", "the parameters of workers are not the same"] {
                if text.contains(sign) {
                    end.complaints.push(format!("{}: {sign}", path.display()));
                }
            }
        }
        Ok(())
    }
}

fn common(subcommand: &str, settings: &Settings) -> Vec<String> {
    let words = [subcommand, "--until-stdin-ends", "--job=chaos"].map(str::to_owned);
    let mut words = words.to_vec();
    words.push(format!("--log={}", settings.log));
    words
}
