//! `arc-worker train`: one worker of a job, or a run without shards.

use super::error::CliError;
use super::metered::{self, MeteredReducer, Pages};
use super::progress::{Progress, emit};
use super::stop::Stop;
use super::{compressor_name, print, start_log};
use crate::record::{RunSummary, StepRecord};
use crate::reducer::Reducer;
use crate::report::{Run, closing_table};
use crate::session::{NetConfig, NetEvent, QuicReducer};
use crate::train::{
    self, LocalReducer, Observer, TrainConfig, TrainError, agreed_settings, data::Dataset,
    parameters, resume_point, use_threads,
};
use arc_topk_common::config::{AlgorithmConfig, CertArgs, CommonArgs, PeerArgs, TrainArgs};
use arc_topk_common::ids::{Rank, Step};
use arc_topk_common::metrics::WorkerMetrics;
use arc_topk_common::plan::PlanSpec;
use arc_topk_transport::IdentitySource;
use arc_topk_transport::certs::Role;
use clap::Args;
use std::sync::Arc;
use std::time::Duration;

/// Train as one worker of a job, or alone.
///
/// With --shard-addresses this worker joins the job that those shards serve, and starts when all workers are there.
/// Without, it trains by itself: nothing is compressed and nothing is sent.
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
    let pages = Arc::new(Pages::new(Arc::clone(&metrics)));
    if let Some(address) = command.peers.admin.0 {
        let bound = metered::serve(address, Arc::clone(&pages))?;
        tracing::info!("metrics at http://{bound}/metrics");
    }
    let mut reducer: Box<dyn Reducer> = if shards == 0 {
        Box::new(LocalReducer::new(spec)?)
    } else {
        command.peers.validate()?;
        let session = QuicReducer::connect(command.net_config()?, spec)?;
        Box::new(MeteredReducer::new(session, metrics))
    };
    stop.end_in_order();
    pages.joined(reducer.rank());
    let rank = usize::from(reducer.rank().0);
    let config = TrainConfig {
        name: if shards == 0 {
            "alone".to_owned()
        } else {
            compressor_name(&command.algorithm)
        },
        args: command.train.clone(),
    };
    let mut watch = Watch {
        rank,
        progress: Progress::new(&config.name, 1, command.train.steps, command.train.json),
        pages,
        stop,
        steps: Vec::new(),
    };
    let summary = train::run_on(&config, data, reducer.as_mut(), &mut watch)?;
    reducer.leave();
    watch.progress.finish();
    watch.conclude(&command.train, summary)
}

impl TrainCommand {
    fn net_config(&self) -> Result<NetConfig, CliError> {
        let [ca, cert, key] = self.certs.paths("worker")?;
        let identity = IdentitySource::files(&ca, &cert, &key, Role::Worker)?;
        let mut message = |text: &str| tracing::warn!("{text}");
        let point = resume_point(&self.train, self.peers.rank, &mut message);
        let point = point.map_err(TrainError::from)?;
        let rank = self.peers.rank.or(point.and_then(|point| point.only_rank));
        Ok(NetConfig {
            start_step: Step(point.map_or(0, |point| point.step)),
            start_update: point.map_or(0, |point| point.update),
            rank: rank.map(Rank),
            world: self.peers.workers,
            connect_timeout: Duration::from_secs_f64(self.peers.connect_timeout_seconds),
            progress_timeout: Duration::from_secs_f64(self.peers.progress_timeout_seconds),
            reconnect_timeout: Duration::from_secs_f64(self.peers.reconnect_timeout_seconds),
            observer: Some(Arc::new(log_event)),
            ..NetConfig::new(&self.common.job, &self.peers.shard_addresses, identity)
        })
    }
}

fn log_event(event: &NetEvent) {
    match event {
        NetEvent::Retrying { shard, cause } => {
            tracing::info!(shard = shard.0, cause, "shard does not answer yet")
        }
        NetEvent::Waiting { joined, world } => {
            tracing::info!(joined, world, "waiting for the other workers")
        }
        // The session logs these itself.
        NetEvent::Membership { .. }
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

    fn on_message(&mut self, text: &str) {
        tracing::debug!(text, "trainer");
        self.progress.message(Some(self.rank), text);
    }

    fn should_stop(&mut self) -> bool {
        self.stop.asked()
    }
}
