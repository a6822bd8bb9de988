//! A model that trains on nothing: gradients are a hash of who asks, when, and of the parameters, so that replicas which
//! differ in one bit drift apart at once.

use crate::case::Case;
use crate::random::mix;
use arc_topk_common::ids::{Rank, Step, TensorId};
use arc_topk_common::optim::Optimizer;
use arc_topk_common::plan::Plan;
use arc_topk_worker::step::{TensorResult, WorkerState};
use std::hash::{DefaultHasher, Hasher};

/// Learning rate of every step.
const RATE: f32 = 0.01;

/// What a donor puts into the store: all that replicas have in common.
#[derive(Clone, Debug)]
pub struct Replica {
    /// Parameters by tensor.
    pub parameters: Vec<Vec<f32>>,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// The shared part of the feedback state, with step and update.
    pub shared: WorkerState,
    /// Hash of all answers that led here.
    pub chain: u64,
}

/// Calls what it is given with the result of every tensor.
pub type Results<'a> = dyn FnMut(&mut dyn FnMut(TensorResult<'_>)) + 'a;

/// Parameters and optimizer of one worker.
#[derive(Clone, Debug)]
pub struct Model {
    parameters: Vec<Vec<f32>>,
    optimizer: Optimizer,
}

impl Model {
    /// The model that every start of the job begins with.
    #[must_use]
    pub fn new(case: &Case) -> Self {
        let shapes: Vec<_> = case
            .plan
            .tensors
            .iter()
            .map(|t| (t.rows, t.width, t.elements))
            .collect();
        let parameters = case.plan.tensors.iter().map(|t| {
            (0..t.elements)
                .map(|at| ((mix(at as u64 + 1) % 17) as f32 - 8.0) / 8.0)
                .collect()
        });
        Self {
            parameters: parameters.collect(),
            optimizer: Optimizer::new(case.optimizer.clone(), &shapes),
        }
    }

    /// The model of a replica.
    #[must_use]
    pub fn of_replica(replica: &Replica) -> Self {
        Self {
            parameters: replica.parameters.clone(),
            optimizer: replica.optimizer.clone(),
        }
    }

    /// A copy for the store.
    #[must_use]
    pub fn replica(&self, shared: WorkerState, chain: u64) -> Replica {
        Replica {
            parameters: self.parameters.clone(),
            optimizer: self.optimizer.clone(),
            shared,
            chain,
        }
    }

    /// Hash of all parameters.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for value in self.parameters.iter().flatten() {
            hasher.write_u32(value.to_bits());
        }
        hasher.finish()
    }

    /// The gradient of a tensor; `digest` is that of the parameters.
    #[must_use]
    pub fn gradient(
        case: &Case,
        digest: u64,
        rank: Rank,
        step: Step,
        tensor: TensorId,
    ) -> Vec<f32> {
        let who = mix(case.seed ^ digest)
            ^ mix((u64::from(rank.0) << 48) ^ (step.0 << 16) ^ u64::from(tensor.0));
        let elements = case.plan.tensors[tensor.index()].elements;
        let value = |at: u64| {
            let bits = mix(who.wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            if case.exact {
                (bits % 9) as f32 - 4.0
            } else {
                (bits >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            }
        };
        (0..elements as u64).map(value).collect()
    }

    /// Whether this worker's gradient has a NaN in this step, and in which tensor.
    #[must_use]
    pub fn poisoned(case: &Case, rank: Rank, step: Step) -> Option<TensorId> {
        let bits = mix(case.seed ^ mix((u64::from(rank.0) << 40) ^ step.0 ^ 0x5a5a));
        let tensor = (bits >> 32) % case.plan.tensors.len() as u64;
        (bits % 1000 < case.nan_per_mille).then_some(TensorId(tensor as u32))
    }

    /// One update with the results of a step.
    pub fn apply(&mut self, results: &mut Results<'_>) {
        self.optimizer.begin_step(RATE);
        let Self {
            parameters,
            optimizer,
        } = self;
        results(&mut |result| {
            let at = result.tensor.index();
            optimizer.update(at, &mut parameters[at], result.values, result.rows, 1.0);
        });
    }
}

/// The books of ef14: what was given to a worker's machine, and what of it was counted by some shard. The difference must be the
/// residual.
#[derive(Clone, Debug)]
pub struct Books {
    /// Per tensor, padded.
    pub given: Vec<Vec<f64>>,
    /// Likewise.
    pub counted: Vec<Vec<f64>>,
}

impl Books {
    /// Empty books.
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let zeros: Vec<Vec<f64>> = plan
            .tensors
            .iter()
            .map(|t| vec![0.0; t.padded_elements()])
            .collect();
        Self {
            given: zeros.clone(),
            counted: zeros,
        }
    }
}
