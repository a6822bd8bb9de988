//! The session of one worker with all shards: pipes buckets through QUIC while the trainer computes.
//!
//! # Who runs where
//!
//! | thread | does |
//! |---|---|
//! | trainer's | [`Reducer::push`] copies a gradient into the inbox and returns; [`Reducer::finish`] waits |
//! | `arc-engine` | owns the order of events: runs the [`StepMachine`] (compression) and hands frames to streams |
//! | tokio's, [`NetConfig::io_threads`] of them | QUIC: one task for each round in flight, one per control stream |
//!
//! So compression and sending overlap the trainer's backward, and several buckets are in flight over all
//! shards at once. The engine takes frames from shards before gradients from the trainer: an answer that waits
//! keeps a link idle, a gradient that waits costs nothing yet.
//!
//! # Priorities
//!
//! Bucket 0 holds the tensors that backward produces first, those at the end of the network; the next forward
//! needs the *highest* bucket first. Streams therefore have their bucket's number as priority: once bucket 9 is
//! complete, its frames overtake what is left of bucket 0. The control stream is above all.
//!
//! # Errors
//!
//! The first failure is kept and ends the session: every later call returns it. Nothing waits without bound:
//! a lost shard shows as idle timeout (3 s), and a shard that keeps the connection but does not answer as
//! [`ReduceError::Stalled`].

mod connect;
mod engine;
mod error;
mod link;
mod shared;

pub use error::ConnectError;

use crate::backend::{Backend, CpuBackend};
use crate::reducer::{ReduceError, Reducer, TrainReport};
use crate::step::{ByteCounts, StepError, StepMachine, StepOutcome, TensorResult, WorkerState};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::ids::{Epoch, Rank, ShardId, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec};
use arc_topk_common::wire::Control;
use arc_topk_transport::{
    Connection, ConnectionSummary, Endpoint, IdentitySource, LEAVE_CODE, TransportConfig, VarInt,
    summary,
};
use link::{ControlOut, Link};
use shared::Shared;
use std::fmt;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// How long a closing session waits for its close frames to be taken. A lost shard never takes them.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// What a session tells about itself while it runs.
#[derive(Clone, PartialEq, Debug)]
pub enum NetEvent {
    /// A shard does not answer yet; it is tried again.
    Retrying {
        /// Shard.
        shard: ShardId,
        /// Cause, for people.
        cause: String,
    },
    /// Shard 0 waits for the other workers.
    Waiting {
        /// Workers that are there.
        joined: u16,
        /// Workers that the job needs.
        world: u16,
    },
    /// Workers left or were lost.
    Membership {
        /// As this shard sees it.
        shard: ShardId,
        /// New epoch.
        epoch: Epoch,
        /// Live ranks, ascending.
        members: Vec<Rank>,
        /// What happened, for people.
        reason: String,
    },
}

/// Receives [`NetEvent`]s, on any thread; must not block.
pub type NetObserver = Arc<dyn Fn(&NetEvent) + Send + Sync>;

/// How a worker joins a job.
#[derive(Clone)]
pub struct NetConfig {
    /// `HOST:PORT` of every shard, in the same order on all workers. Certificates must name HOST.
    pub shards: Vec<String>,
    /// Certificate, key and CA of this worker; every connection that begins takes the newest.
    pub identity: IdentitySource,
    /// Job name.
    pub job: String,
    /// Rank to ask for; `None` takes the lowest free one.
    pub rank: Option<Rank>,
    /// World size to insist on; `None` takes the shard's.
    pub world: Option<u16>,
    /// First step: 0, or that of the checkpoint. All workers must agree.
    pub start_step: Step,
    /// First update (skipped steps not counted): 0, or that of the checkpoint.
    pub start_update: u64,
    /// How long shards are tried before giving up: they may start after the workers.
    pub connect_timeout: Duration,
    /// How long shard 0 may wait for the other workers.
    pub join_timeout: Duration,
    /// How long no shard may answer, while rounds are open, before the step fails. Must exceed the longest
    /// time by which workers drift apart (a validation pass on one of them, say).
    pub progress_timeout: Duration,
    /// Threads for QUIC.
    pub io_threads: usize,
    /// Bytes of gradients that may wait for the engine before [`Reducer::push`] blocks.
    pub queue_bytes: usize,
    /// Tuning of QUIC.
    pub transport: TransportConfig,
    /// Told of waiting, retries and membership.
    pub observer: Option<NetObserver>,
}

impl NetConfig {
    /// Joins `job` at `shards` with every other setting at its default.
    #[must_use]
    pub fn new(job: &str, shards: &[String], identity: impl Into<IdentitySource>) -> Self {
        Self {
            shards: shards.to_vec(),
            identity: identity.into(),
            job: job.to_owned(),
            rank: None,
            world: None,
            start_step: Step(0),
            start_update: 0,
            connect_timeout: Duration::from_secs(30),
            join_timeout: Duration::from_secs(600),
            progress_timeout: Duration::from_secs(600),
            io_threads: 2,
            queue_bytes: 128 << 20,
            transport: TransportConfig::default(),
            observer: None,
        }
    }

    fn observe(&self, event: &NetEvent) {
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }
}

impl fmt::Debug for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetConfig")
            .field("shards", &self.shards)
            .field("job", &self.job)
            .field("rank", &self.rank)
            .field("world", &self.world)
            .finish_non_exhaustive()
    }
}

/// A [`Reducer`] over QUIC. See the module.
///
/// Dropped without [`Reducer::leave`], it closes its connections at once, and the shards count this worker as lost.
pub struct QuicReducer {
    plan: Arc<Plan>,
    rank: Rank,
    world: u16,
    shared: Arc<Shared>,
    engine: Option<JoinHandle<()>>,
    runtime: Option<Runtime>,
    peers: Vec<Peer>,
    controls: Vec<ControlOut>,
    progress_timeout: Duration,
    pushed: Vec<bool>,
    open: bool,
    start_step: Step,
    totals: Totals,
}

/// A connected shard.
struct Peer {
    shard: ShardId,
    connection: Connection,
    /// Drives the connection's socket.
    endpoint: Endpoint,
}

/// Sums over the session, for reports.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    sent: ByteCounts,
    received: ByteCounts,
    dense_equivalent_bytes: u64,
    captured_energy: Option<f32>,
    residual_ratio: Option<f32>,
}

impl Totals {
    fn add(&mut self, outcome: &StepOutcome) {
        let stats = &outcome.stats;
        self.sent += stats.sent;
        self.received += stats.received;
        self.dense_equivalent_bytes += stats.dense_equivalent_bytes;
        self.captured_energy = stats.captured_energy.or(self.captured_energy);
        self.residual_ratio = stats.residual_ratio().or(self.residual_ratio);
    }
}

impl QuicReducer {
    /// Joins the job and returns when all workers are there. Computes on the CPU. Must not be called inside a
    /// tokio runtime: it has its own.
    ///
    /// # Errors
    /// The plan is not valid, a shard cannot be reached or refuses this worker, or the others do not come.
    pub fn connect(config: NetConfig, spec: PlanSpec) -> Result<Self, ConnectError> {
        Self::connect_with(config, spec, |plan| {
            Box::new(CpuBackend::new(plan, Arc::new(Fast)))
        })
    }

    /// As [`QuicReducer::connect`], on a backend of the caller's.
    ///
    /// # Errors
    /// As [`QuicReducer::connect`].
    pub fn connect_with(
        config: NetConfig,
        spec: PlanSpec,
        backend: impl FnOnce(&Plan) -> Box<dyn Backend>,
    ) -> Result<Self, ConnectError> {
        if usize::from(spec.shards) != config.shards.len() {
            return Err(ConnectError::ShardCount {
                plan: spec.shards,
                addresses: config.shards.len(),
            });
        }
        let plan = Arc::new(Plan::build(spec)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.io_threads.max(1))
            .thread_name("arc-io")
            .enable_all()
            .build()
            .map_err(|e| ConnectError::Runtime(e.to_string()))?;
        let (joined, welcome) = runtime.block_on(connect::join_all(&config, &plan))?;
        let mut machine = StepMachine::with_backend(
            Arc::clone(&plan),
            backend(&plan),
            welcome.epoch,
            welcome.start_step,
            config.start_update,
        );
        machine.set_epoch(welcome.epoch);
        let shared = Arc::new(Shared::new(machine, config.queue_bytes));
        let mut controls = Vec::with_capacity(joined.len());
        let mut peers = Vec::with_capacity(joined.len());
        let mut links = Vec::with_capacity(joined.len());
        for joined in joined {
            controls.push(link::spawn_control(
                runtime.handle(),
                &shared,
                joined.shard,
                joined.control.sender,
                joined.control.receiver,
                config.observer.clone(),
            ));
            links.push(Link {
                shard: joined.shard,
                connection: joined.connection.clone(),
                peer: joined.peer.into(),
            });
            peers.push(Peer {
                shard: joined.shard,
                connection: joined.connection,
                endpoint: joined.endpoint,
            });
        }
        let engine = engine::spawn(&plan, Arc::clone(&shared), links, runtime.handle().clone())
            .map_err(|e| ConnectError::Runtime(e.to_string()))?;
        Ok(Self {
            pushed: vec![false; plan.tensors.len()],
            plan,
            rank: welcome.rank,
            world: welcome.world,
            shared,
            engine: Some(engine),
            runtime: Some(runtime),
            peers,
            controls,
            progress_timeout: config.progress_timeout,
            open: false,
            start_step: welcome.start_step,
            totals: Totals::default(),
        })
    }

    /// Figures of the connection with every shard, for metrics.
    #[must_use]
    pub fn connections(&self) -> Vec<(ShardId, ConnectionSummary)> {
        self.peers
            .iter()
            .map(|peer| (peer.shard, summary(&peer.connection)))
            .collect()
    }

    /// Live ranks by the latest news from shard 0, ascending; `None` while all that started are there.
    #[must_use]
    pub fn members(&self) -> Option<Vec<Rank>> {
        self.shared.members()
    }

    /// Measure energies and norms in every `steps`-th step; see [`StepMachine::set_measure_every`].
    pub fn set_measure_every(&mut self, steps: u64) {
        self.shared.machine().set_measure_every(steps);
    }

    fn check_push(&mut self, tensor: TensorId, elements: usize) -> Result<(), ReduceError> {
        let Some(planned) = self.plan.tensors.get(tensor.index()) else {
            return Err(ReduceError::Step(StepError::UnknownTensor {
                tensor: tensor.0,
                tensors: self.plan.tensors.len(),
            }));
        };
        if !self.open {
            return Err(ReduceError::Step(StepError::NotBegun));
        }
        if planned.elements != elements {
            return Err(ReduceError::Step(StepError::GradientLength {
                tensor: planned.spec.name.clone(),
                expected: planned.elements,
                actual: elements,
            }));
        }
        if std::mem::replace(&mut self.pushed[tensor.index()], true) {
            return Err(ReduceError::Step(StepError::FilledTwice {
                tensor: planned.spec.name.clone(),
                step: self.shared.machine().step(),
            }));
        }
        Ok(())
    }

    fn shut_down(&mut self, code: u32, reason: &str) {
        self.shared.close();
        for peer in &self.peers {
            peer.connection
                .close(VarInt::from_u32(code), reason.as_bytes());
        }
        if let Some(engine) = self.engine.take() {
            let _panicked_already_reported = engine.join();
        }
        if let Some(runtime) = self.runtime.take() {
            let endpoints: Vec<Endpoint> = self.peers.drain(..).map(|peer| peer.endpoint).collect();
            let (closed, all_closed) = mpsc::channel();
            // Not `block_on`: whoever drops this may do so inside a runtime of his own.
            runtime.spawn(async move {
                for endpoint in endpoints {
                    endpoint.wait_idle().await;
                }
                // Too late is no failure.
                let _late = closed.send(());
            });
            let _lost_shard_never_answers = all_closed.recv_timeout(CLOSE_TIMEOUT);
            runtime.shutdown_background();
        }
    }
}

impl Reducer for QuicReducer {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world(&self) -> u16 {
        self.world
    }

    fn plan(&self) -> &Plan {
        &self.plan
    }

    fn start_step(&self) -> Step {
        self.start_step
    }

    fn begin(&mut self) -> Result<(), ReduceError> {
        self.shared.check()?;
        self.pushed.fill(false);
        self.open = true;
        self.shared.begin();
        Ok(())
    }

    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
        self.check_push(tensor, gradient.len())?;
        self.shared.push(tensor, gradient)
    }

    fn finish(&mut self) -> Result<StepOutcome, ReduceError> {
        if !self.open {
            return Err(ReduceError::Step(StepError::NotBegun));
        }
        let started = Instant::now();
        self.shared.flush();
        self.shared.wait_complete(self.progress_timeout)?;
        let wait_seconds = started.elapsed().as_secs_f64();
        let committing = Instant::now();
        let mut outcome = self.shared.machine().commit();
        self.open = false;
        let (sent, received) = self.shared.control.take();
        outcome.stats.sent.control += sent;
        outcome.stats.received.control += received;
        let compress = self.shared.take_compress_time() + committing.elapsed();
        outcome.stats.compress_seconds = compress.as_secs_f64();
        outcome.stats.wait_seconds = wait_seconds;
        self.totals.add(&outcome);
        Ok(outcome)
    }

    fn for_each_result(&mut self, f: &mut dyn FnMut(TensorResult<'_>)) {
        self.shared.machine().for_each_result(f);
    }

    fn export_state(&mut self) -> WorkerState {
        self.shared.machine().export_state()
    }

    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError> {
        if state.step != self.start_step {
            return Err(ReduceError::StartStep {
                joined: self.start_step,
                state: state.step,
            });
        }
        self.shared.machine().import_state(state)?;
        Ok(())
    }

    fn report(&mut self, report: TrainReport) {
        let message = Control::Report {
            step: report.step,
            loss: report.loss,
            step_seconds: report.step_seconds,
            wait_seconds: report.wait_seconds,
            bytes_sent: self.totals.sent.total(),
            bytes_received: self.totals.received.total(),
            bytes_dense_equivalent: self.totals.dense_equivalent_bytes,
            captured_energy: self.totals.captured_energy.unwrap_or(f32::NAN),
            residual_ratio: self.totals.residual_ratio.unwrap_or(f32::NAN),
        };
        self.controls[0].send(message);
    }

    fn leave(mut self: Box<Self>) {
        // From here on a closing shard is no failure.
        self.shared.close();
        let controls = std::mem::take(&mut self.controls);
        if let Some(runtime) = &self.runtime {
            runtime.block_on(link::leave(controls));
        }
        self.shut_down(LEAVE_CODE, "left in order");
    }
}

impl Drop for QuicReducer {
    fn drop(&mut self) {
        self.shut_down(0, "the worker ended without leaving");
    }
}
