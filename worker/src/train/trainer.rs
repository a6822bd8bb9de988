//! One worker's share of training: gradients of its batch, the optimizer on the averaged result, validation.

use super::data::{BatchKey, Dataset};
use super::model::{
    ConvNet, Llama, LlamaConfig, Model, ModelError, ParameterSpec, read_parameter, write_parameter,
};
use super::{Schedule, TrainError, Validation};
use crate::reducer::ReduceError;
use crate::step::TensorResult;
use arc_topk_common::config::train::{OptimizerChoice, Task, TrainArgs};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_common::optim::{Optimizer, OptimizerConfig, OptimizerKind};
use arc_topk_common::plan::{Plan, TensorSpec};
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// The registered tensors of the model that the settings describe, for a plan.
///
/// # Errors
/// If its sizes do not fit each other.
pub fn parameters(args: &TrainArgs) -> Result<Vec<TensorSpec>, TrainError> {
    Ok(super::model::tensor_specs(&parameter_specs(args)?))
}

fn parameter_specs(args: &TrainArgs) -> Result<Vec<ParameterSpec>, TrainError> {
    match args.task {
        Task::Lm => {
            let config = LlamaConfig::from(args.model_shape());
            config.check().map_err(ModelError::Sizes)?;
            Ok(config.parameters())
        }
        Task::Fashion => Ok(ConvNet::parameters()),
    }
}

/// The optimizer that the settings describe.
#[must_use]
pub fn optimizer_config(args: &TrainArgs) -> OptimizerConfig {
    OptimizerConfig {
        kind: match args.optimizer {
            OptimizerChoice::Sgd => OptimizerKind::Sgd,
            OptimizerChoice::AdamW => OptimizerKind::AdamW,
            OptimizerChoice::CatchUpAdamW => OptimizerKind::CatchUpAdamW,
        },
        beta1: args.beta1,
        beta2: args.beta2,
        eps: args.epsilon,
        weight_decay: args.weight_decay,
        momentum: args.momentum,
        catch_up_cap: args.catch_up_cap,
    }
}

/// Lets mathematics run on `threads` threads; 0 takes one per core. Results do not depend on it.
///
/// candle and rayon read RAYON_NUM_THREADS, and candle has no other way to be told.
///
/// # Safety
/// No other thread may run: call it first thing in `main`.
#[allow(unsafe_code, reason = "it changes the environment")]
pub unsafe fn use_threads(threads: usize) {
    if threads > 0 {
        // SAFETY: the caller promises that nobody else can read the environment now.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
}

/// Takes a tensor's gradient, as [`Reducer::push`](crate::reducer::Reducer::push) does.
pub type Push<'a> = dyn FnMut(TensorId, &[f32]) -> Result<(), ReduceError> + 'a;

/// Calls its argument with every tensor's result, as
/// [`Reducer::for_each_result`](crate::reducer::Reducer::for_each_result) does.
pub type Results<'a> = dyn FnMut(&mut dyn FnMut(TensorResult<'_>)) + 'a;

/// Model, data and optimizer of one worker.
pub struct Trainer {
    args: TrainArgs,
    seed: u64,
    schedule: Schedule,
    model: Box<dyn Model>,
    data: Arc<Dataset>,
    optimizer: Optimizer,
    /// Sums of the micro-batches' gradients; empty without accumulation.
    sums: Vec<Vec<f32>>,
}

impl Trainer {
    /// Starts from the plan's seed.
    ///
    /// # Errors
    /// If the settings are out of range, or the plan was made for another model.
    pub fn new(args: &TrainArgs, plan: &Plan, data: Arc<Dataset>) -> Result<Self, TrainError> {
        args.validate()?;
        check_plan(args, plan)?;
        let seed = plan.spec.algorithm.seed;
        let shape = args.model_shape();
        let model: Box<dyn Model> = match args.task {
            Task::Lm => Box::new(Llama::new(shape.into(), shape.context, seed)?),
            Task::Fashion => Box::new(ConvNet::new(seed)?),
        };
        let tensors: Vec<_> = plan
            .tensors
            .iter()
            .map(|t| (t.rows, t.width, t.elements))
            .collect();
        let mut optimizer = Optimizer::new(optimizer_config(args), &tensors);
        for (index, spec) in model.specs().iter().enumerate() {
            // Gains and biases are not decayed, as is customary.
            if spec.shape.len() < 2 {
                optimizer.set_weight_decay(index, 0.0);
            }
        }
        let sums = if args.accumulation > 1 {
            model
                .specs()
                .iter()
                .map(|spec| vec![0.0; spec.elements()])
                .collect()
        } else {
            Vec::new()
        };
        let schedule = Schedule {
            peak: args.lr,
            min_ratio: args.lr_min_ratio,
            warmup: args.lr_warmup,
            steps: args.steps,
        };
        Ok(Self {
            args: args.clone(),
            seed,
            schedule,
            model,
            data,
            optimizer,
            sums,
        })
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &dyn Model {
        &*self.model
    }

    /// Learning rates.
    #[must_use]
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// The optimizer, for checkpoints.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// Elements of all parameters.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.model.specs().iter().map(ParameterSpec::elements).sum()
    }

    /// Mean loss of the step's micro-batches of `rank`; the gradient of every tensor goes to `push` as soon as it
    /// is there, in reverse registration order. Returns (loss, tokens or images).
    ///
    /// # Errors
    /// Of the model, or the first of `push`.
    pub fn gradients(
        &mut self,
        step: u64,
        rank: Rank,
        push: &mut Push<'_>,
    ) -> Result<(f32, u64), TrainError> {
        let last = self.args.accumulation.max(1) - 1;
        let (mut loss, mut examples, mut failed) = (0.0f64, 0u64, None);
        for micro_batch in 0..=last {
            let key = BatchKey {
                seed: self.seed,
                step,
                micro_batch: micro_batch as u64,
                rank: rank.0,
            };
            let batch =
                self.data
                    .training_batch(key, self.args.batch, self.args.model_shape().context);
            examples += batch.examples() as u64;
            let (sums, share) = (&mut self.sums, 1.0 / (last + 1) as f32);
            let mut sink = |index: usize, gradient: &[f32]| {
                let Some(sum) = sums.get_mut(index) else {
                    push_once(&mut failed, push, index, gradient);
                    return;
                };
                if micro_batch == 0 {
                    sum.fill(0.0);
                }
                sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g);
                if micro_batch == last {
                    sum.iter_mut().for_each(|sum| *sum *= share);
                    push_once(&mut failed, push, index, sum);
                }
            };
            loss += f64::from(self.model.forward_backward(&batch, &mut sink)?);
            if let Some(error) = failed.take() {
                return Err(error.into());
            }
        }
        Ok(((loss / (last + 1) as f64) as f32, examples))
    }

    /// Applies a step's results at the rate of `step`: clips their norm, then updates every parameter.
    /// `results` calls its argument with every tensor's result; it is asked twice.
    ///
    /// # Errors
    /// Of the model.
    pub fn apply(&mut self, step: u64, results: &mut Results<'_>) -> Result<(), TrainError> {
        self.optimizer.begin_step(self.schedule.rate(step));
        let mut scale = 1.0;
        if self.args.clip > 0.0 {
            let mut norm_squared = 0.0;
            let optimizer = &self.optimizer;
            results(&mut |r| {
                norm_squared += optimizer.norm_squared(r.tensor.index(), r.values, r.rows)
            });
            scale = (f64::from(self.args.clip) / norm_squared.sqrt()).min(1.0) as f32;
        }
        let (optimizer, vars) = (&mut self.optimizer, self.model.vars());
        let mut failed = None;
        results(&mut |r| {
            let index = r.tensor.index();
            let done = write_parameter(vars[index].as_tensor(), |values| {
                optimizer.update(index, values, r.values, r.rows, scale);
            });
            failed = failed.take().or(done.err());
        });
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Mean loss over the fixed validation batches.
    ///
    /// # Errors
    /// Of the model.
    pub fn validate(&self) -> Result<Validation, TrainError> {
        let context = self.args.model_shape().context;
        let (mut loss, mut examples, mut correct) = (0.0f64, 0usize, None);
        for batch in
            self.data
                .validation_batches(self.args.validate_batches, self.args.batch, context)
        {
            let evaluation = self.model.evaluate(&batch)?;
            loss += f64::from(evaluation.loss) * evaluation.examples as f64;
            examples += evaluation.examples;
            correct = evaluation.correct.map(|right| right + correct.unwrap_or(0));
        }
        let accuracy = correct.map(|right| right as f32 / examples as f32);
        Ok(Validation {
            loss: (loss / examples as f64) as f32,
            accuracy,
        })
    }

    /// SHA-256 of all parameters in registration order (little endian), hexadecimal.
    ///
    /// # Errors
    /// Of the model.
    pub fn digest(&self) -> Result<String, TrainError> {
        let bytes = self.digest_bytes()?;
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// As [`Trainer::digest`], as bytes.
    ///
    /// # Errors
    /// Of the model.
    pub fn digest_bytes(&self) -> Result<[u8; 32], TrainError> {
        let mut hash = Sha256::new();
        for var in self.model.vars() {
            read_parameter(var.as_tensor(), |values| {
                for value in values {
                    hash.update(value.to_le_bytes());
                }
            })?;
        }
        Ok(hash.finalize().into())
    }
}

fn push_once(
    failed: &mut Option<ReduceError>,
    push: &mut Push<'_>,
    index: usize,
    gradient: &[f32],
) {
    if failed.is_none() {
        *failed = push(TensorId(index as u32), gradient).err();
    }
}

fn check_plan(args: &TrainArgs, plan: &Plan) -> Result<(), TrainError> {
    let (ours, theirs) = (parameters(args)?, &plan.spec.tensors);
    if ours.len() != theirs.len() {
        let detail = format!(
            "the model has {} tensors, the plan {}",
            ours.len(),
            theirs.len()
        );
        return Err(TrainError::Plan { detail });
    }
    for (ours, theirs) in ours.iter().zip(theirs) {
        if (&ours.name, &ours.shape) != (&theirs.name, &theirs.shape) {
            let detail = format!(
                "{} {:?} is {} {:?} in the plan",
                ours.name, ours.shape, theirs.name, theirs.shape
            );
            return Err(TrainError::Plan { detail });
        }
    }
    Ok(())
}
