//! The session of one worker with all shards: pipes buckets through QUIC while the trainer computes.
//!
//! # Who runs where
//!
//! | thread | does |
//! |---|---|
//! | trainer's | [`Reducer::push`] copies a gradient into the inbox and returns; [`Reducer::finish`] waits |
//! | `arc-engine` | owns the order of events: runs the [`Member`] (compression) and hands frames to streams |
//! | tokio's, [`NetConfig::io_threads`] of them | QUIC: one task for each round in flight, one per shard that keeps it connected |
//!
//! So compression and sending overlap the trainer's backward, and several buckets are in flight over all
//! shards at once. The engine takes frames from shards before gradients from the trainer: an answer that waits
//! keeps a link idle, a gradient that waits costs nothing yet.
//!
//! # Connections
//!
//! ```text
//! supervisor of a shard ── dial, Hello, Welcome ──► Up ──► engine: this connection's frames from here on
//!        ▲                                                   │
//!        └── pause, 50 ms doubling to 500 ms ◄── Down ◄── connection ends
//! ```
//!
//! Connections of a shard are numbered, and what one of them brings is dropped once it is down: the machine has the
//! unanswered frames of its open rounds sent again on the next one. The other shards' connections go on meanwhile.
//!
//! # Priorities
//!
//! Bucket 0 holds the tensors that backward produces first, those at the end of the network; the next forward
//! needs the *highest* bucket first. Streams therefore have their bucket's number as priority: once bucket 9 is
//! complete, its frames overtake what is left of bucket 0. Answers that a restarted shard is told go before all rounds,
//! and the control stream before everything.
//!
//! # Errors
//!
//! The first failure is kept and ends the session: every later call returns it. Nothing waits without bound: a lost shard
//! shows as idle timeout (3 s) and is dialled for [`NetConfig::reconnect_timeout`], and a shard that keeps the connection
//! but does not answer shows as [`ReduceError::Stalled`].

mod config;
mod dial;
mod engine;
mod error;
mod link;
mod shared;
mod supervisor;

pub use config::{NetConfig, NetEvent, NetObserver};
pub use error::ConnectError;

use crate::backend::{DeviceGradient, Lent, MakeBackend, on_cpu};
use crate::member::{Member, MemberConfig};
use crate::reducer::{LiveRanks, ReduceError, Reducer, StepStart, TrainReport};
use crate::step::{ByteCounts, StepError, StepMachine, StepOutcome, TensorResult, WorkerState};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::ids::{Rank, RunId, ShardId, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec};
use arc_topk_common::wire::Control;
use arc_topk_transport::{ConnectionSummary, Endpoint, LEAVE_CODE, VarInt, summary};
use dial::{Dialer, Dialled};
use shared::{Attempt, Core, Pushed, Shared, Work};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use supervisor::Supervisor;
use tokio::runtime::Runtime;
use tokio::task::AbortHandle;

/// How long a closing session waits for its close frames to be taken. A lost shard never takes them.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A [`Reducer`] over QUIC. See the module.
///
/// Dropped without [`Reducer::leave`], it closes its connections at once, and the shards count this worker as lost.
pub struct QuicReducer {
    plan: Arc<Plan>,
    run: RunId,
    rank: Rank,
    world: u16,
    shared: Arc<Shared>,
    engine: Option<JoinHandle<()>>,
    runtime: Option<Runtime>,
    supervisors: Vec<AbortHandle>,
    progress_timeout: Duration,
    pushed: Vec<bool>,
    /// The open step.
    open: Option<Attempt>,
    behind: bool,
    start_step: Step,
    needs_snapshot: bool,
    totals: Totals,
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
        Self::connect_with(config, spec, &on_cpu(Arc::new(Fast)))
    }

    /// As [`QuicReducer::connect`], on a backend of the caller's.
    ///
    /// # Errors
    /// As [`QuicReducer::connect`].
    pub fn connect_with(
        config: NetConfig,
        spec: PlanSpec,
        backend: &MakeBackend,
    ) -> Result<Self, ConnectError> {
        if usize::from(spec.shards) != config.shards.len() {
            return Err(ConnectError::ShardCount {
                plan: spec.shards,
                addresses: config.shards.len(),
            });
        }
        let plan = Arc::new(Plan::build(spec)?);
        if config.shards.is_empty() {
            return Err(ConnectError::ShardCount {
                plan: plan.spec.shards,
                addresses: 0,
            });
        }
        // Before anybody waits for this worker.
        let backend = backend(&plan)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.io_threads.max(1))
            .thread_name("arc-io")
            .enable_all()
            .build()
            .map_err(|e| ConnectError::Runtime(e.to_string()))?;
        let dialer = Arc::new(Dialer::new(config, Arc::clone(&plan)));
        let first = runtime.block_on(dialer.join())?;
        let (welcome, update) = (&first.welcome, dialer.config.start_update);
        let epoch = welcome.place.epoch;
        let machine =
            StepMachine::with_backend(Arc::clone(&plan), backend, epoch, welcome.step, update);
        let mut out = Vec::new();
        let mut member = Member::new(machine, MemberConfig::new(welcome), &mut out);
        let others = runtime.block_on(dialer.join_others(|shard| member.intent(shard)));
        let others = match others {
            Ok(others) => others,
            Err(error) => {
                runtime.block_on(first.hang_up());
                return Err(error);
            }
        };
        let core = Core {
            member,
            out,
            attempt: 0,
        };
        Self::start(dialer, plan, runtime, core, first, others)
    }

    fn start(
        dialer: Arc<Dialer>,
        plan: Arc<Plan>,
        runtime: Runtime,
        core: Core,
        first: Dialled,
        others: Vec<Dialled>,
    ) -> Result<Self, ConnectError> {
        let config = &dialer.config;
        let welcome = first.welcome.clone();
        let progress_timeout = config.progress_timeout;
        let shared = Arc::new(Shared::new(core, config.queue_bytes));
        let observer = config.observer.clone();
        let handle = runtime.handle().clone();
        let engine = engine::spawn(&plan, Arc::clone(&shared), handle, observer)
            .map_err(|e| ConnectError::Runtime(e.to_string()))?;
        let _opening_spawns = runtime.enter();
        let supervise = |dialled: Dialled| {
            let supervisor = Supervisor {
                dialer: Arc::clone(&dialer),
                shared: Arc::clone(&shared),
                shard: dialled.shard,
            };
            // Before the trainer's first call: the machine takes shard 0 to be there from the start.
            let served = supervisor.open(dialled, 0);
            runtime.spawn(supervisor.run(served)).abort_handle()
        };
        let supervisors = std::iter::once(first)
            .chain(others)
            .map(supervise)
            .collect();
        Ok(Self {
            pushed: vec![false; plan.tensors.len()],
            run: welcome.place.run,
            rank: welcome.place.rank,
            world: welcome.place.members.len() as u16,
            plan,
            shared,
            engine: Some(engine),
            runtime: Some(runtime),
            supervisors,
            progress_timeout,
            open: None,
            behind: false,
            start_step: welcome.step,
            needs_snapshot: welcome.snapshot,
            totals: Totals::default(),
        })
    }

    /// Figures of the newest connection with every shard, for metrics.
    #[must_use]
    pub fn connections(&self) -> Vec<(ShardId, ConnectionSummary)> {
        let peers = self.shared.peers();
        let peers = peers.iter();
        peers
            .map(|(shard, peer)| (*shard, summary(&peer.connection)))
            .collect()
    }

    /// Measure energies and norms in every `steps`-th step; see [`StepMachine::set_measure_every`].
    pub fn set_measure_every(&mut self, steps: u64) {
        self.shared
            .core()
            .member
            .machine_mut()
            .set_measure_every(steps);
    }

    /// One update's gradients were averaged by other means, on all workers alike: see [`StepMachine::pass_update`].
    ///
    /// # Errors
    /// If a step is open.
    pub fn pass_update(&mut self) -> Result<(), ReduceError> {
        let mut core = self.shared.core();
        Ok(core.member.machine_mut().pass_update()?)
    }

    /// Replaces what this worker has not sent of a tensor: see [`StepMachine::swap_residual`].
    ///
    /// # Errors
    /// As there, or if there is no such tensor.
    pub fn swap_residual(
        &mut self,
        tensor: TensorId,
        values: Vec<f32>,
    ) -> Result<Vec<f32>, ReduceError> {
        if tensor.index() >= self.plan.tensors.len() {
            return Err(ReduceError::Step(StepError::UnknownTensor {
                tensor: tensor.0,
                tensors: self.plan.tensors.len(),
            }));
        }
        let mut core = self.shared.core();
        Ok(core.member.machine_mut().swap_residual(tensor, values)?)
    }

    /// Forgets the open step, whatever of it has come, and ends all loans: feedback state is what it was when the step began, to the
    /// bit. Call it where a step breaks off and what was lent may be used for something else before the next one begins. Shards
    /// that have got frames of the step do not take others in their place.
    pub fn abandon(&mut self) {
        if self.open.take().is_some() {
            self.shared.core().abandon();
        }
    }

    /// No step is open; if the session has failed, that is why.
    fn not_begun(&self) -> ReduceError {
        let failure = self.shared.check().err();
        failure.unwrap_or(ReduceError::Step(StepError::NotBegun))
    }

    /// The attempt that a gradient is for.
    fn check_push(&mut self, tensor: TensorId, elements: usize) -> Result<Attempt, ReduceError> {
        let Some(planned) = self.plan.tensors.get(tensor.index()) else {
            return Err(ReduceError::Step(StepError::UnknownTensor {
                tensor: tensor.0,
                tensors: self.plan.tensors.len(),
            }));
        };
        let Some(attempt) = self.open else {
            return Err(self.not_begun());
        };
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
                step: self.shared.core().member.machine().step(),
            }));
        }
        Ok(attempt)
    }

    fn shut_down(&mut self, code: u32, reason: &str) {
        self.shared.close();
        // None of them dials again.
        for supervisor in self.supervisors.drain(..) {
            supervisor.abort();
        }
        let peers = std::mem::take(&mut *self.shared.peers());
        for peer in peers.values() {
            peer.connection
                .close(VarInt::from_u32(code), reason.as_bytes());
        }
        if let Some(engine) = self.engine.take() {
            let _panicked_already_reported = engine.join();
        }
        if let Some(runtime) = self.runtime.take() {
            let endpoints: Vec<Endpoint> = peers.into_values().map(|peer| peer.endpoint).collect();
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

    fn run(&self) -> Option<RunId> {
        Some(self.run)
    }

    fn members(&self) -> Vec<Rank> {
        self.shared.core().member.place().members.clone()
    }

    fn live_ranks(&self) -> LiveRanks {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || {
            let core = shared.core();
            let (place, away) = (core.member.place(), core.member.away());
            let members = place.members.iter().copied();
            members.filter(|rank| !away.contains(rank)).collect()
        })
    }

    fn live_workers(&self) -> u16 {
        let core = self.shared.core();
        (core.member.place().members.len() - core.member.away().len()) as u16
    }

    fn is_leader(&self) -> bool {
        self.shared.core().member.leader() == self.rank
    }

    fn begin(&mut self) -> Result<StepStart, ReduceError> {
        self.shared.check()?;
        self.pushed.fill(false);
        let mut core = self.shared.core();
        core.attempt += 1;
        let Core {
            member,
            out,
            attempt,
        } = &mut *core;
        self.behind = member.begin(out);
        self.open = Some(*attempt);
        drop(core);
        self.shared.begin();
        Ok(StepStart {
            behind: self.behind,
        })
    }

    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
        let attempt = self.check_push(tensor, gradient.len())?;
        if self.behind {
            // Nobody takes it any more.
            return self.shared.check();
        }
        self.shared.push(attempt, tensor, gradient)
    }

    fn lend(&mut self, tensor: TensorId, gradient: Lent) -> Result<(), ReduceError> {
        let attempt = self.check_push(tensor, gradient.elements())?;
        if self.behind {
            return self.shared.check();
        }
        self.shared.lend(attempt, tensor, Pushed::Lent(gradient))
    }

    fn lend_on_device(
        &mut self,
        tensor: TensorId,
        gradient: DeviceGradient,
    ) -> Result<(), ReduceError> {
        let attempt = self.check_push(tensor, gradient.elements())?;
        if self.behind {
            return self.shared.check();
        }
        self.shared
            .lend(attempt, tensor, Pushed::OnDevice(gradient))
    }

    fn finished(&mut self) -> Option<u64> {
        self.shared.core().member.finished()
    }

    fn check_device(&self) -> Result<(), ReduceError> {
        Ok(self.shared.core().member.machine().check_device()?)
    }

    fn give_back(&mut self) -> bool {
        // What was lent for an open step may still lie in the queue.
        if self.open.is_some() {
            return false;
        }
        self.shared.core().member.give_back();
        true
    }

    fn finish(&mut self) -> Result<StepOutcome, ReduceError> {
        let Some(attempt) = self.open else {
            return Err(self.not_begun());
        };
        let started = Instant::now();
        self.shared.flush(attempt);
        let complete = self.shared.wait_complete(attempt, self.progress_timeout);
        if let Err(error) = complete {
            // The job has ended for this worker, whose last state may still be asked for.
            self.abandon();
            return Err(error);
        }
        let wait_seconds = started.elapsed().as_secs_f64();
        let committing = Instant::now();
        let mut core = self.shared.core();
        let mut outcome = core.member.commit();
        core.attempt += 1;
        self.open = None;
        core.member.machine().check_device()?;
        drop(core);
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
        self.shared.core().member.for_each_result(f);
    }

    fn export_state(&mut self) -> WorkerState {
        self.shared.core().member.export_state()
    }

    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError> {
        if state.step != self.start_step {
            return Err(ReduceError::StartStep {
                joined: self.start_step,
                state: state.step,
            });
        }
        self.shared.core().member.import_state(state)?;
        self.needs_snapshot = false;
        Ok(())
    }

    fn needs_snapshot(&self) -> Option<(RunId, Step)> {
        self.needs_snapshot.then_some((self.run, self.start_step))
    }

    fn donation_due(&self) -> bool {
        self.shared.core().member.donation_due()
    }

    fn donating(&mut self, step: Step) {
        self.shared
            .tell(|member, out| member.donation_taken(step, out));
    }

    fn donation_ended(&mut self, step: Step, stored: bool) {
        self.shared.tell(|member, out| {
            if stored {
                member.donated(step, out);
            } else {
                member.donation_failed();
            }
        });
    }

    fn step_aside(&mut self) {
        self.shared.tell(Member::step_aside);
    }

    fn digest(&mut self, step: Step, digest: [u8; 32]) {
        let message = Control::Digest { step, digest };
        self.shared
            .tell(|member, out| member.tell_coordinator(message, out));
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
        self.shared
            .tell(|member, out| member.tell_coordinator(message, out));
    }

    fn leave(mut self: Box<Self>) {
        self.shared.leave();
        self.shared.tell(Member::leave);
        let (reply, writers) = mpsc::channel();
        self.shared.after_all(Work::Left(reply));
        if let Some(runtime) = &self.runtime
            && let Ok(writers) = writers.recv_timeout(link::LEAVE_TIMEOUT)
        {
            runtime.block_on(link::left(writers));
        }
        self.shut_down(LEAVE_CODE, "left in order");
    }
}

impl Drop for QuicReducer {
    fn drop(&mut self) {
        self.shut_down(0, "the worker ended without leaving");
    }
}
