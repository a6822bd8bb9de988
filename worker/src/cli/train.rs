//! `arc-worker train`: one worker of a job, or a run without shards.

use super::error::CliError;
use super::metered::{self, MeteredReducer, Pages};
use super::progress::{Progress, emit};
use super::stop::Stop;
use super::{compressor_name, print, start_log};
use crate::record::{RunSummary, StepRecord};
use crate::reducer::Reducer;
use crate::report::{Run, closing_table};
use crate::session::{ConnectError, NetConfig, NetEvent, QuicReducer};
use crate::store::{StoreClient, StoreConfig};
use crate::train::{
    self, CheckpointError, LocalReducer, Observer, SnapshotStore, TrainConfig, TrainError,
    agreed_settings, data::Dataset, parameters, resume_point, use_threads,
};
use arc_topk_common::config::{
    AlgorithmConfig, CertArgs, CommonArgs, PeerArgs, TrainArgs, require,
};
use arc_topk_common::ids::{Rank, Step};
use arc_topk_common::metrics::{SnapshotEnd, WorkerMetrics};
use arc_topk_common::plan::PlanSpec;
use arc_topk_common::wire::{JoinWhen, RefusalCode};
use arc_topk_transport::IdentitySource;
use arc_topk_transport::certs::Role;
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Train as one worker of a job, or alone.
///
/// With --shard-addresses this worker joins the job that those shards serve, and starts when all workers are there; if the
/// job runs already, it takes its state from another worker and goes on with it. A worker without which the job has gone on
/// for too long joins again by itself. `{rank}` in --run-dir stands for the rank that it is given. Without
/// --shard-addresses it trains by itself: nothing is compressed and nothing is sent.
#[derive(Args, Debug)]
#[command(
    after_help = EXAMPLES,
    mut_arg("shard_addresses", |arg| arg.required(false)),
)]
pub(super) struct TrainCommand {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    peers: PeerArgs,
    #[command(flatten)]
    certs: CertArgs,
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    algorithm: AlgorithmConfig,
    /// End when standard input ends, as it does when the process that started this one dies.
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

const EXAMPLES: &str = "\
Examples:
  arc-worker train --data text.txt --steps 500                       alone on this machine
  arc-worker train --shard-addresses ps0:7400,ps1:7400 --certs certs/worker --data text.txt --density 0.2
  ARC_SHARD_ADDRESSES=ps0:7400 ARC_RANK=3 arc-worker train --config job.toml
  arc-worker train --checkpoint-dir ckpt --checkpoint-every 100 --resume

Exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 stopped by a signal (after a checkpoint, if those are kept).";

/// Runs the command.
pub(super) fn run(command: &TrainCommand) -> Result<(), CliError> {
    // First of all: the number of threads is read when the first one is started.
    // SAFETY: reading the settings has started no thread.
    #[allow(unsafe_code, reason = "as said above")]
    unsafe {
        use_threads(command.train.threads);
    }
    command.common.validate()?;
    command.train.validate()?;
    command.algorithm.validate()?;
    start_log(&command.common.log)?;
    let stop = Stop::listen(command.until_stdin_ends)?;
    let shards = u16::try_from(command.peers.shard_addresses.len()).unwrap_or(u16::MAX);
    let tensors = parameters(&command.train)?;
    // Before anything is joined: a worker without data would be lost to the others.
    let data = Arc::new(Dataset::load(&command.train).map_err(TrainError::from)?);
    let spec = PlanSpec {
        trainer: agreed_settings(&command.train),
        algorithm: command.algorithm.clone(),
        shards: shards.max(1),
        tensors,
    };
    let metrics = Arc::new(WorkerMetrics::new());
    metrics.expect_shards(shards);
    let pages = Arc::new(Pages::new(Arc::clone(&metrics)));
    if let Some(address) = command.peers.admin.0 {
        let bound = metered::serve(address, Arc::clone(&pages))?;
        tracing::info!("metrics at http://{bound}/metrics");
    }
    let mut config = TrainConfig::new(&compressor_name(&command.algorithm), command.train.clone());
    if shards == 0 {
        config.name = "alone".to_owned();
    }
    let mut watch = Watch {
        rank: 0,
        progress: Progress::new(&config.name, 1, command.train.steps, command.train.json),
        pages,
        stop,
        steps: Vec::new(),
    };
    let summary = if shards == 0 {
        command.train_alone(config, spec, data, &mut watch)?
    } else {
        command.peers.validate()?;
        command.train_in_job(&config, &spec, &data, &mut watch, &metrics)?
    };
    watch.progress.finish();
    watch.conclude(&command.train, summary)
}

impl TrainCommand {
    fn train_alone(
        &self,
        mut config: TrainConfig,
        spec: PlanSpec,
        data: Arc<Dataset>,
        watch: &mut Watch,
    ) -> Result<RunSummary, CliError> {
        let advice =
            "without shards there are no snapshots to go on from; pass --checkpoint-dir DIR";
        let kept = !self.train.resume || self.train.checkpoint_dir.is_some();
        require(kept, "checkpoint_dir", "not set", "a directory", advice)?;
        let mut reducer = LocalReducer::new(spec)?;
        config.args.run_dir = own_directory(self.train.run_dir.as_deref(), Rank(0));
        watch.joined(Rank(0));
        Ok(train::run_on(&config, data, &mut reducer, watch)?)
    }

    /// Trains until the job's end, joining again whenever the job has gone on without this worker.
    fn train_in_job(
        &self,
        config: &TrainConfig,
        spec: &PlanSpec,
        data: &Arc<Dataset>,
        watch: &mut Watch,
        metrics: &Arc<WorkerMetrics>,
    ) -> Result<RunSummary, CliError> {
        let [ca, cert, key] = self.certs.paths("worker")?;
        let identity = IdentitySource::files(&ca, &cert, &key, Role::Worker)?;
        watch.pages.shows(&identity);
        let store = StoreConfig::new(&self.peers.shard_addresses, identity.clone());
        let store: Arc<dyn SnapshotStore> = Arc::new(StoreClient::new(store)?);
        let mut config = TrainConfig {
            store: Some(Arc::clone(&store)),
            ..config.clone()
        };
        let mut net = self.net_config(identity, metrics);
        let mut no_checkpoint = self.look_for_state(&*store, &mut net, &mut config)?;
        let mut rejoins = Rejoins::default();
        let mut looked_again = None;
        loop {
            let before = watch.steps.len();
            let error = match self.take_part(&net, &config, spec, data, watch) {
                Ok(summary) => return Ok(summary),
                Err(error) if may_join_again(&error) => error,
                // The job for which it waited may have ended, with a newer snapshot than it knows of.
                Err(error)
                    if refused_with(&error, RefusalCode::Step)
                        && looked_again != Some(net.start_step) =>
                {
                    looked_again = Some(net.start_step);
                    watch.progress.complaint(&format!(
                        "arc-worker: {error}; looking where to go on from, and joining again"
                    ));
                    no_checkpoint = self.look_for_state(&*store, &mut net, &mut config)?;
                    continue;
                }
                Err(error) => return Err(without_state(error, net.when, no_checkpoint)),
            };
            metrics.superseded();
            let Some(pause) = rejoins.next_pause(watch.steps.len() - before) else {
                return Err(error);
            };
            let seconds = pause.as_secs();
            watch.progress.complaint(&format!(
                "arc-worker: {error}; joining again in {seconds} s"
            ));
            watch.stop.end_at_once();
            std::thread::sleep(pause);
            // As a newcomer, with whatever rank it is given and the state of a member.
            net.rank = None;
            net.when = JoinWhen::Running;
            config.snapshot = None;
        }
    }

    /// Finds out from where this worker would start a job, and asks for that. What keeps it from starting one, if it can
    /// still join one that runs: checkpoints that not all ranks have.
    fn look_for_state(
        &self,
        store: &dyn SnapshotStore,
        net: &mut NetConfig,
        config: &mut TrainConfig,
    ) -> Result<Option<CheckpointError>, CliError> {
        let mut message = |text: &str| tracing::warn!("{text}");
        let point = match resume_point(&self.train, self.peers.rank, Some(store), &mut message) {
            Ok(point) => point,
            Err(TrainError::Checkpoint(error @ CheckpointError::NotCommon { .. })) => {
                net.when = JoinWhen::Running;
                return Ok(Some(error));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(point) = point {
            net.start_step = Step(point.step);
            net.start_update = point.update;
            net.rank = net.rank.or(point.only_rank.map(Rank));
            config.snapshot = point.snapshot;
        }
        Ok(None)
    }

    /// Joins the job and trains until its end, or until the job goes on without this worker.
    fn take_part(
        &self,
        net: &NetConfig,
        config: &TrainConfig,
        spec: &PlanSpec,
        data: &Arc<Dataset>,
        watch: &mut Watch,
    ) -> Result<RunSummary, CliError> {
        let session = QuicReducer::connect(net.clone(), spec.clone())?;
        let metrics = Arc::clone(&watch.pages.metrics);
        if session.needs_snapshot().is_some() {
            metrics.joined_running_job();
        }
        set_members(&metrics, &session.members());
        let mut reducer: Box<dyn Reducer> = Box::new(MeteredReducer::new(session, metrics));
        watch.joined(reducer.rank());
        let mut config = config.clone();
        config.args.run_dir = own_directory(self.train.run_dir.as_deref(), reducer.rank());
        let summary = train::run_on(&config, Arc::clone(data), reducer.as_mut(), watch)?;
        reducer.leave();
        Ok(summary)
    }

    fn net_config(&self, identity: IdentitySource, metrics: &Arc<WorkerMetrics>) -> NetConfig {
        let metrics = Arc::clone(metrics);
        NetConfig {
            rank: self.peers.rank.map(Rank),
            world: self.peers.workers,
            when: JoinWhen::Any,
            connect_timeout: Duration::from_secs_f64(self.peers.connect_timeout_seconds),
            reconnect_timeout: Duration::from_secs_f64(self.peers.reconnect_timeout_seconds),
            progress_timeout: Duration::from_secs_f64(self.peers.progress_timeout_seconds),
            observer: Some(Arc::new(move |event| note_event(event, &metrics))),
            ..NetConfig::new(&self.common.job, &self.peers.shard_addresses, identity)
        }
    }
}

/// Whether the job goes on and takes this worker in again.
fn may_join_again(error: &CliError) -> bool {
    match error {
        CliError::Train(error) => error.may_join_again(),
        _ => refused_with(error, RefusalCode::Superseded),
    }
}

/// Whether shards gave no place for this reason.
fn refused_with(error: &CliError, why: RefusalCode) -> bool {
    matches!(error, CliError::Connect(ConnectError::Refused { code, .. }) if *code == why)
}

/// What is to be said of a worker that could only have joined a job that runs: why it could not start one.
fn without_state(
    error: CliError,
    when: JoinWhen,
    no_checkpoint: Option<CheckpointError>,
) -> CliError {
    if when != JoinWhen::Running || !refused_with(&error, RefusalCode::World) {
        return error;
    }
    match no_checkpoint {
        Some(error) => TrainError::from(error).into(),
        None => CliError::NothingToJoin,
    }
}

/// How often a worker has joined again, and how long it pauses before it does.
#[derive(Debug, Default)]
struct Rejoins {
    /// Since it last made good progress.
    in_a_row: u32,
}

impl Rejoins {
    /// Steps after which a session counts as a success.
    const PROGRESS: usize = 50;
    const MOST: u32 = 6;

    /// The pause before the next attempt, if there is to be one, after a session of `steps` steps.
    fn next_pause(&mut self, steps: usize) -> Option<Duration> {
        if steps >= Self::PROGRESS {
            self.in_a_row = 0;
        }
        self.in_a_row += 1;
        (self.in_a_row <= Self::MOST).then(|| Duration::from_secs(1 << (self.in_a_row - 1)))
    }
}

/// The directory for the records of `rank`: `{rank}` in its name stands for that.
fn own_directory(template: Option<&Path>, rank: Rank) -> Option<PathBuf> {
    template.map(|path| {
        path.to_str().map_or_else(
            || path.to_owned(),
            |path| PathBuf::from(path.replace("{rank}", &rank.to_string())),
        )
    })
}

fn set_members(metrics: &WorkerMetrics, members: &[Rank]) {
    metrics.set_members(u16::try_from(members.len()).unwrap_or(u16::MAX));
}

fn note_event(event: &NetEvent, metrics: &WorkerMetrics) {
    match event {
        NetEvent::Membership { members, .. } => {
            set_members(metrics, members);
        }
        NetEvent::ShardBack { shard, after } => {
            metrics.reconnected(shard.0, after.as_secs_f64());
        }
        NetEvent::DigestsDiffer { .. } => metrics.digests_differ(),
        _ => {}
    }
    log_event(event);
}

fn log_event(event: &NetEvent) {
    match event {
        NetEvent::Waiting { joined, world } if joined > world => {
            tracing::warn!(
                joined,
                most = world,
                "the job is full: this worker waits until another one leaves; raise --max-workers of all shards for more"
            )
        }
        NetEvent::Waiting { joined, world } => {
            tracing::info!(
                joined,
                world,
                "waiting for a place in the job: so many of so many workers are there, this one counted"
            )
        }
        // The session logs these itself.
        NetEvent::Retrying { .. }
        | NetEvent::Membership { .. }
        | NetEvent::ShardLost { .. }
        | NetEvent::ShardBack { .. }
        | NetEvent::DigestsDiffer { .. } => {}
    }
}

/// Shows the run, counts it, and stops it when asked.
struct Watch {
    rank: usize,
    progress: Progress,
    pages: Arc<Pages>,
    stop: Stop,
    steps: Vec<StepRecord>,
}

impl Watch {
    /// The worker is a member of its job.
    fn joined(&mut self, rank: Rank) {
        self.stop.end_in_order();
        self.pages.joined(rank);
        self.rank = usize::from(rank.0);
    }

    /// The table or the summary, and the reason if a signal ended the run.
    fn conclude(self, args: &TrainArgs, summary: RunSummary) -> Result<(), CliError> {
        if args.json {
            emit(&serde_json::json!({ "event": "summary", "rank": self.rank, "summary": summary }));
        } else {
            let run = Run::new(Some(summary), &[self.steps], "run".to_owned());
            print(&format!("\n{}", closing_table(&[run])))?;
        }
        if self.stop.asked() {
            Err(CliError::Interrupted)
        } else {
            Ok(())
        }
    }
}

impl Observer for Watch {
    fn on_step(&mut self, record: &StepRecord) {
        self.pages.step(record);
        self.progress.step(self.rank, record);
        self.steps.push(record.clone());
    }

    fn on_snapshot(&mut self, end: SnapshotEnd, bytes: u64, seconds: f64) {
        self.pages.metrics.snapshot_ended(end);
        if end == SnapshotEnd::Stored {
            self.pages.metrics.snapshot_uploaded(bytes, seconds);
        }
    }

    fn on_message(&mut self, text: &str) {
        tracing::debug!(text, "trainer");
        self.progress.message(Some(self.rank), text);
    }

    fn should_stop(&mut self) -> bool {
        self.stop.asked()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::reducer::ReduceError;

    #[test]
    fn a_worker_joins_again_ever_more_slowly_and_not_for_ever() {
        let mut rejoins = Rejoins::default();
        let mut pauses = Vec::new();
        while let Some(pause) = rejoins.next_pause(0) {
            pauses.push(pause.as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32]);
        assert_eq!(
            rejoins.next_pause(Rejoins::PROGRESS),
            Some(Duration::from_secs(1))
        );
    }

    #[test]
    fn only_a_job_that_goes_on_is_joined_again() {
        let superseded = ReduceError::Superseded {
            shard: 0,
            detail: String::new(),
        };
        assert!(may_join_again(&TrainError::from(superseded).into()));
        let ended = ReduceError::Ended {
            detail: String::new(),
        };
        assert!(!may_join_again(&TrainError::from(ended).into()));
        assert!(!may_join_again(&CliError::NothingToJoin));
    }

    #[test]
    fn one_that_can_only_join_says_why_it_could_not_start() {
        let refused = |code| {
            CliError::from(ConnectError::Refused {
                shard: 0,
                address: String::new(),
                code,
                detail: String::new(),
            })
        };
        let not_common = || CheckpointError::NotCommon {
            directory: PathBuf::new(),
            step: 3,
            rank: 1,
            has: vec![2],
        };
        let said = |error, when, why| without_state(error, when, why).to_string();
        // It could have started one.
        let world = || refused(RefusalCode::World);
        assert_eq!(said(world(), JoinWhen::Any, None), world().to_string());
        let when = JoinWhen::Running;
        assert_eq!(
            said(world(), when, None),
            CliError::NothingToJoin.to_string()
        );
        let told = said(world(), when, Some(not_common()));
        assert!(told.contains("no checkpoint of step 3"), "{told}");
        let plan = || refused(RefusalCode::Plan);
        assert_eq!(said(plan(), when, Some(not_common())), plan().to_string());
    }

    #[test]
    fn records_go_to_the_ranks_own_directory() {
        let own = |path: &str| own_directory(Some(Path::new(path)), Rank(5)).unwrap();
        assert_eq!(own("runs/worker-{rank}"), Path::new("runs/worker-5"));
        assert_eq!(own("runs/x"), Path::new("runs/x"));
        assert_eq!(own_directory(None, Rank(5)), None);
    }
}
