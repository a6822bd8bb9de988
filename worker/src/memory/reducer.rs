//! One worker of a job in memory, as a trainer sees it.

use super::network::{Delivery, Network};
use super::{Job, MemoryError, MemoryOptions, accept};
use crate::reducer::{ReduceError, Reducer, StepStart, TrainReport};
use crate::step::{Outgoing, StepMachine, StepOutcome, TensorResult, WorkerState};
use arc_topk_common::ids::{Rank, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanSpec};
use arc_topk_ps::shard::Report;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The shards and every worker's mail, shared by the reducers of a job.
struct Hub {
    state: Mutex<HubState>,
    /// Somebody got mail.
    mail: Condvar,
}

struct HubState {
    network: Network,
    inboxes: Vec<VecDeque<Delivery>>,
}

/// [`Reducer`] of one worker. The others run in other threads; results do not depend on how the threads interleave.
/// Dropping one without [`Reducer::leave`] counts as losing that worker.
pub struct MemoryReducer {
    rank: Rank,
    world: u16,
    machine: StepMachine,
    hub: Arc<Hub>,
    out: Vec<Outgoing>,
    left: bool,
    compress: Duration,
    last: Option<StepOutcome>,
    bytes_sent: u64,
    bytes_received: u64,
    bytes_dense_equivalent: u64,
}

impl HubState {
    /// Runs `event` on the shards and sorts their answers into the inboxes.
    fn run(&mut self, event: impl FnOnce(&mut Network, &mut dyn FnMut(Rank, Delivery))) {
        let inboxes = &mut self.inboxes;
        event(&mut self.network, &mut |rank, delivery| {
            inboxes[rank.index()].push_back(delivery)
        });
    }
}

impl MemoryReducer {
    /// Training on one machine alone: one worker, and shards that average it with nobody.
    ///
    /// # Errors
    /// If the spec gives no plan.
    pub fn alone(spec: PlanSpec, options: &MemoryOptions) -> Result<Self, MemoryError> {
        let mut reducers = Self::all(Job::start(spec, 1, options)?);
        Ok(reducers.pop().expect("a job of one worker has one reducer"))
    }

    pub(super) fn all(job: Job) -> Vec<Self> {
        let world = job.machines.len() as u16;
        let inboxes = (0..world).map(|_| VecDeque::new()).collect();
        let hub = Arc::new(Hub {
            state: Mutex::new(HubState {
                network: job.network,
                inboxes,
            }),
            mail: Condvar::new(),
        });
        let reducer = |(rank, machine)| Self {
            rank: Rank(rank),
            world,
            machine,
            hub: Arc::clone(&hub),
            out: Vec::new(),
            left: false,
            compress: Duration::ZERO,
            last: None,
            bytes_sent: 0,
            bytes_received: 0,
            bytes_dense_equivalent: 0,
        };
        (0..).zip(job.machines).map(reducer).collect()
    }

    /// The machine, to set what is measured.
    pub fn machine_mut(&mut self) -> &mut StepMachine {
        &mut self.machine
    }

    fn lock(&self) -> MutexGuard<'_, HubState> {
        // A panic in another worker's thread must not stop this one: the machines never panic half-way.
        self.hub
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn send(&mut self) {
        if self.out.is_empty() {
            return;
        }
        let frames = core::mem::take(&mut self.out);
        let mut state = self.lock();
        for frame in frames {
            state.run(|network, deliver| network.frame(self.rank, frame, deliver));
        }
        drop(state);
        self.hub.mail.notify_all();
    }

    /// Takes what has come; waits for something if `wait`. Returns the seconds of waiting.
    fn receive(&mut self, wait: bool) -> Result<f64, ReduceError> {
        let start = Instant::now();
        let mut state = self.lock();
        while wait && state.inboxes[self.rank.index()].is_empty() {
            state = self
                .hub
                .mail
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        let mail = core::mem::take(&mut state.inboxes[self.rank.index()]);
        drop(state);
        let waited = start.elapsed();
        let working = Instant::now();
        for delivery in mail {
            accept(&mut self.machine, delivery, &mut self.out)?;
        }
        self.compress += working.elapsed();
        self.send();
        Ok(waited.as_secs_f64())
    }

    fn remove(&mut self, in_order: bool) {
        if core::mem::replace(&mut self.left, true) {
            return;
        }
        self.lock()
            .run(|network, deliver| network.remove(self.rank, in_order, deliver));
        self.hub.mail.notify_all();
    }
}

impl Reducer for MemoryReducer {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world(&self) -> u16 {
        self.world
    }

    fn plan(&self) -> &Plan {
        self.machine.plan()
    }

    fn start_step(&self) -> Step {
        self.machine.step()
    }

    fn begin(&mut self) -> Result<StepStart, ReduceError> {
        self.compress = Duration::ZERO;
        self.machine.begin();
        Ok(StepStart::default())
    }

    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
        let start = Instant::now();
        self.machine.fill(tensor, gradient, &mut self.out)?;
        self.compress += start.elapsed();
        self.send();
        self.receive(false)?;
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutcome, ReduceError> {
        let mut wait_seconds = 0.0;
        let start = Instant::now();
        self.machine.flush(&mut self.out)?;
        self.compress += start.elapsed();
        self.send();
        while !self.machine.is_complete() {
            wait_seconds += self.receive(true)?;
        }
        let start = Instant::now();
        let mut outcome = self.machine.commit();
        self.machine.check_device()?;
        self.compress += start.elapsed();
        outcome.stats.compress_seconds = self.compress.as_secs_f64();
        outcome.stats.wait_seconds = wait_seconds;
        self.bytes_sent += outcome.stats.sent.total();
        self.bytes_received += outcome.stats.received.total();
        self.bytes_dense_equivalent += outcome.stats.dense_equivalent_bytes;
        self.last = Some(outcome);
        Ok(outcome)
    }

    fn for_each_result(&mut self, f: &mut dyn FnMut(TensorResult<'_>)) {
        self.machine.for_each_result(f);
    }

    fn export_state(&mut self) -> WorkerState {
        self.machine.export_state()
    }

    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError> {
        Ok(self.machine.import_state(state)?)
    }

    fn report(&mut self, report: TrainReport) {
        let stats = self.last.map(|outcome| outcome.stats).unwrap_or_default();
        let report = Report {
            step: report.step,
            loss: report.loss,
            step_seconds: report.step_seconds,
            wait_seconds: report.wait_seconds,
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
            bytes_dense_equivalent: self.bytes_dense_equivalent,
            captured_energy: stats.captured_energy.unwrap_or(f32::NAN),
            residual_ratio: stats.residual_ratio().unwrap_or(f32::NAN),
        };
        self.lock()
            .run(|network, deliver| network.report(self.rank, report, deliver));
    }

    fn leave(mut self: Box<Self>) {
        self.remove(true);
    }
}

impl Drop for MemoryReducer {
    fn drop(&mut self) {
        self.remove(false);
    }
}
