//! A whole job in one process, without sockets: the same worker and shard machines as in production, wired directly.
//!
//! | type | for |
//! |---|---|
//! | [`MemoryCluster`] | N workers in one thread: tests, simulations, tables of losses. Frames can be delivered in a seeded random order |
//! | [`MemoryReducer`] | the [`Reducer`](crate::reducer::Reducer) of one worker: N of them in N threads, or one alone for training on one machine |
//!
//! Frames are handed over as reference-counted bytes, so nothing is copied on the way.

mod network;
mod reducer;

pub use reducer::MemoryReducer;

use crate::backend::{DeviceFault, Gradient, MakeBackend, on_cpu};
use crate::reducer::ReduceError;
use crate::step::{Outgoing, StepError, StepMachine, StepOutcome};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::ids::{Epoch, Rank, ShardId, Step, TensorId};
use arc_topk_common::plan::{Plan, PlanError, PlanSpec};
use arc_topk_common::wire::Place;
use arc_topk_ps::shard::Shard;
use network::{Delivery, Network};
use std::collections::VecDeque;
use std::sync::Arc;

/// Settings of a job in memory.
#[derive(Clone)]
pub struct MemoryOptions {
    /// Where the workers compress.
    pub backend: MakeBackend,
    /// Deliver frames in a random order drawn from this seed; `None`: first come, first served. Results do not depend on it.
    pub order_seed: Option<u64>,
    /// Fewer live workers than this end the job.
    pub min_workers: u16,
    /// First step.
    pub start: Step,
    /// Its update number.
    pub update: u64,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self {
            backend: on_cpu(Arc::new(Fast)),
            order_seed: None,
            min_workers: 1,
            start: Step(0),
            update: 0,
        }
    }
}

/// Why a job in memory did not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The spec gives no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A worker's device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceFault),
    /// No workers were asked for.
    #[error("a job needs at least one worker: pass 1 or more")]
    NoWorkers,
    /// A call names a worker that is not there (any more).
    #[error("worker {rank} is not in the job: it was lost, or the world is smaller")]
    NoSuchWorker {
        /// Rank.
        rank: Rank,
    },
    /// A worker failed.
    #[error("worker {rank}: {source}")]
    Worker {
        /// Rank.
        rank: Rank,
        /// Cause.
        source: ReduceError,
    },
    /// Every frame was delivered, but a round is still open.
    #[error(
        "worker {rank} still waits in step {step} although nothing is on its way: a shard or worker machine has a bug; please report it with the plan"
    )]
    Stalled {
        /// Rank.
        rank: Rank,
        /// Step.
        step: Step,
    },
}

/// A frame on its way.
enum Packet {
    Up(Rank, Outgoing),
    Down(Rank, Delivery),
}

/// N workers and S shards in one thread.
pub struct MemoryCluster {
    plan: Arc<Plan>,
    workers: Vec<Option<StepMachine>>,
    network: Network,
    packets: VecDeque<Packet>,
    random: Option<u64>,
    out: Vec<Outgoing>,
}

impl MemoryCluster {
    /// Starts a job of `workers` workers and `spec.shards` shards.
    ///
    /// # Errors
    /// If the spec gives no plan, there are no workers, or a shard refuses the job.
    pub fn new(spec: PlanSpec, workers: u16, options: &MemoryOptions) -> Result<Self, MemoryError> {
        let job = Job::start(spec, workers, options)?;
        Ok(Self {
            plan: job.plan,
            workers: job.machines.into_iter().map(Some).collect(),
            network: job.network,
            packets: VecDeque::new(),
            random: options.order_seed,
            out: Vec::new(),
        })
    }

    /// The job as one [`Reducer`](crate::reducer::Reducer) per worker, in rank order, for a thread each.
    ///
    /// # Errors
    /// As [`MemoryCluster::new`].
    pub fn reducers(
        spec: PlanSpec,
        workers: u16,
        options: &MemoryOptions,
    ) -> Result<Vec<MemoryReducer>, MemoryError> {
        Ok(MemoryReducer::all(Job::start(spec, workers, options)?))
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// A live worker's machine, to read results and state.
    #[must_use]
    pub fn worker(&self, rank: Rank) -> Option<&StepMachine> {
        self.workers.get(rank.index())?.as_ref()
    }

    /// A live worker's machine, to import state or set what is measured.
    pub fn worker_mut(&mut self, rank: Rank) -> Option<&mut StepMachine> {
        self.workers.get_mut(rank.index())?.as_mut()
    }

    /// A shard's machine, to look at.
    ///
    /// # Panics
    /// If the plan has no such shard.
    #[must_use]
    pub fn shard(&self, shard: ShardId) -> &Shard {
        self.network.shard(shard)
    }

    /// A whole step. `gradient` gives each worker's gradient of each tensor; `None` counts as zeros. Tensors are asked
    /// for in the order of backward. Outcomes are by rank; `None` of lost workers.
    ///
    /// # Errors
    /// If a gradient has the wrong length or a worker is refused.
    pub fn step<'g>(
        &mut self,
        mut gradient: impl FnMut(Rank, TensorId) -> Option<&'g [f32]>,
    ) -> Result<Vec<Option<StepOutcome>>, MemoryError> {
        self.begin();
        let plan = Arc::clone(&self.plan);
        for tensor in plan.buckets.iter().flat_map(|bucket| &bucket.tensors) {
            for rank in (0..self.workers.len() as u16).map(Rank) {
                if self.workers[rank.index()].is_some() {
                    let gradient = gradient(rank, *tensor).map_or(Gradient::Absent, Gradient::F32);
                    self.push(rank, *tensor, gradient)?;
                }
            }
            let some = self.packets.len() / 2;
            self.deliver(if self.random.is_some() {
                some
            } else {
                usize::MAX
            })?;
        }
        self.finish()
    }

    /// Opens a step on every worker.
    pub fn begin(&mut self) {
        self.workers
            .iter_mut()
            .flatten()
            .for_each(StepMachine::begin);
    }

    /// Hands a gradient to a worker. Its frames are queued.
    ///
    /// # Errors
    /// If the worker is not there or the gradient does not fit.
    pub fn push(
        &mut self,
        rank: Rank,
        tensor: TensorId,
        gradient: Gradient<'_>,
    ) -> Result<(), MemoryError> {
        let Some(Some(machine)) = self.workers.get_mut(rank.index()) else {
            return Err(MemoryError::NoSuchWorker { rank });
        };
        machine
            .fill_any(tensor, gradient, &mut self.out)
            .map_err(failed(rank))?;
        self.packets
            .extend(self.out.drain(..).map(|frame| Packet::Up(rank, frame)));
        Ok(())
    }

    /// Delivers up to `most` frames, those that follow from them included. Returns how many.
    ///
    /// # Errors
    /// If a worker is refused or cannot read a frame.
    pub fn deliver(&mut self, most: usize) -> Result<usize, MemoryError> {
        let mut delivered = 0;
        while delivered < most {
            let Some(packet) = self.next_packet() else {
                break;
            };
            delivered += 1;
            match packet {
                Packet::Up(rank, frame) => {
                    let packets = &mut self.packets;
                    self.network.frame(rank, frame, &mut |rank, delivery| {
                        packets.push_back(Packet::Down(rank, delivery));
                    });
                }
                Packet::Down(rank, delivery) => {
                    // A lost worker's mail is dropped.
                    let Some(machine) = self.workers[rank.index()].as_mut() else {
                        continue;
                    };
                    accept(machine, delivery, &mut self.out)
                        .map_err(|source| MemoryError::Worker { rank, source })?;
                    self.packets
                        .extend(self.out.drain(..).map(|frame| Packet::Up(rank, frame)));
                }
            }
        }
        Ok(delivered)
    }

    /// A worker vanishes, and with it what it sent that has not arrived. Open rounds close with the others.
    pub fn lose(&mut self, rank: Rank) {
        self.remove(rank, false);
    }

    /// A worker leaves in order, between steps.
    pub fn leave(&mut self, rank: Rank) {
        self.remove(rank, true);
    }

    /// Delivers everything, treats missing gradients as zeros, and commits on all workers.
    ///
    /// # Errors
    /// As [`MemoryCluster::deliver`].
    pub fn finish(&mut self) -> Result<Vec<Option<StepOutcome>>, MemoryError> {
        for (rank, machine) in (0..).map(Rank).zip(&mut self.workers) {
            if let Some(machine) = machine {
                machine.flush(&mut self.out).map_err(failed(rank))?;
                self.packets
                    .extend(self.out.drain(..).map(|frame| Packet::Up(rank, frame)));
            }
        }
        self.deliver(usize::MAX)?;
        for (rank, machine) in (0..).map(Rank).zip(&self.workers) {
            if let Some(machine) = machine.as_ref().filter(|machine| !machine.is_complete()) {
                return Err(MemoryError::Stalled {
                    rank,
                    step: machine.step(),
                });
            }
        }
        Ok(self
            .workers
            .iter_mut()
            .map(|machine| machine.as_mut().map(StepMachine::commit))
            .collect())
    }

    fn remove(&mut self, rank: Rank, in_order: bool) {
        if self
            .workers
            .get_mut(rank.index())
            .and_then(Option::take)
            .is_none()
        {
            return;
        }
        self.packets
            .retain(|packet| !matches!(packet, Packet::Up(from, _) if *from == rank));
        let packets = &mut self.packets;
        self.network.remove(rank, in_order, &mut |rank, delivery| {
            packets.push_back(Packet::Down(rank, delivery))
        });
    }

    fn next_packet(&mut self) -> Option<Packet> {
        if let (Some(state), false) = (&mut self.random, self.packets.is_empty()) {
            // Of one round and worker at most one packet is on its way, so that any order keeps every stream's order.
            let at = split_mix(state) % self.packets.len() as u64;
            return self.packets.swap_remove_back(at as usize);
        }
        self.packets.pop_front()
    }
}

/// A job that has just started: what clusters and reducers are made of.
struct Job {
    plan: Arc<Plan>,
    machines: Vec<StepMachine>,
    network: Network,
}

impl Job {
    fn start(spec: PlanSpec, workers: u16, options: &MemoryOptions) -> Result<Self, MemoryError> {
        if workers == 0 {
            return Err(MemoryError::NoWorkers);
        }
        let plan = Arc::new(Plan::build(spec)?);
        let machine = |_| {
            let backend = (options.backend)(&plan)?;
            Ok(StepMachine::with_backend(
                Arc::clone(&plan),
                backend,
                Epoch(0),
                options.start,
                options.update,
            ))
        };
        let machines: Result<Vec<StepMachine>, DeviceFault> = (0..workers).map(machine).collect();
        let mut machines = machines?;
        let mut mail = Vec::new();
        let network = Network::connect(
            &plan.spec,
            workers,
            options.min_workers,
            options.start,
            &mut |rank, delivery| {
                mail.push((rank, delivery));
            },
        );
        for (rank, delivery) in mail {
            accept(&mut machines[rank.index()], delivery, &mut Vec::new())
                .map_err(|source| MemoryError::Worker { rank, source })?;
        }
        Ok(Self {
            plan,
            machines,
            network,
        })
    }
}

/// A shard's message arrives at a worker.
fn accept(
    machine: &mut StepMachine,
    delivery: Delivery,
    out: &mut Vec<Outgoing>,
) -> Result<(), ReduceError> {
    match delivery {
        Delivery::Round {
            shard,
            header,
            body,
        } => Ok(machine.handle(shard, header, body, out)?),
        Delivery::Place(Place { epoch, .. }) | Delivery::Epoch(epoch) => {
            machine.set_epoch(epoch);
            Ok(())
        }
        Delivery::Refused {
            shard,
            code,
            detail,
        } => Err(ReduceError::Refused {
            shard: shard.0,
            code,
            detail,
        }),
    }
}

fn failed(rank: Rank) -> impl Fn(StepError) -> MemoryError {
    move |source| MemoryError::Worker {
        rank,
        source: source.into(),
    }
}

/// Steele, Lea, Flood 2014: enough for shuffling packets, and in no way shared with the host program.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
