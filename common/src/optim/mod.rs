//! Optimizers on rows: SGD with momentum, AdamW and catch-up AdamW.
//!
//! They see the tensors as the plan does, as rows of a width, because under sparse exchange rows come at different times. The
//! last row may be short: parameters and gradients hold `elements` values, without padding.
//!
//! # Catch-up AdamW
//! Under ef14 a row that comes after τ steps brings τ gradients at once. AdamW would square that sum; catch-up
//! AdamW does, for the row, what τ steps with the mean gradient ĝ = b/τ would have done to the moments, and takes a step that is τ steps long:
//!
//! m ← β₁^τ m + (1−β₁^τ) ĝ;  v ← β₂^τ v + (1−β₂^τ) ĝ²;  x ← x − (Σ of the last τ learning rates) · m̂/(√v̂+ε).
//!
//! τ is the number of steps since the row last came (or since the start), at most `catch_up_cap`; the cap holds for all three formulas.
//! Rows that did not come keep m and v, and x but for the decoupled weight decay, which goes on every step at that step's rate.
//!
//! *Bias correction.* m̂ = m/(1−β₁^T) and v̂ = v/(1−β₂^T), where T is **the row's own sum of τ**. The weights that the
//! formulas above give to past values of ĝ sum to exactly 1−β^T, so m̂ and v̂ are true averages; the global step count would be too large
//! wherever the cap has cut a τ. Without a cut T is the global step count, so that τ = 1 everywhere is AdamW, bit for bit (they share the code).
//!
//! Every other kind ignores which rows came: to it, an absent row is a gradient of zero.
//!
//! # Determinism
//! All updates are elementwise and [`Optimizer::norm_squared`] sums in a fixed order, so results are the same to the bit for any
//! number of threads and any vector width. Powers are repeated multiplications, not library calls.

mod in_place;
mod kernels;
mod state;
#[cfg(test)]
mod tests;

pub use in_place::{AdamStep, AdamTensor, Elements, InPlaceError, catch_up_adamw};
pub use state::OptimizerStateError;

use kernels::{AdamCoefficients, adam, momentum, scale as decay, sum_of_squares};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Elements of a piece of work.
const CHUNK: usize = 1 << 14;

/// Which rows of a tensor's result are fresh.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RowsCame<'a> {
    /// All (dense rounds, dense tensors, ef21).
    All,
    /// These, ascending.
    Rows(&'a [u32]),
}

/// The rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerKind {
    /// u ← μu + g; x ← x − lr·u.
    Sgd,
    /// Loshchilov and Hutter 2019.
    #[value(name = "adamw")]
    #[serde(rename = "adamw")]
    AdamW,
    /// AdamW that knows how long a row has been away.
    #[default]
    #[value(name = "catch-up-adamw")]
    #[serde(rename = "catch-up-adamw")]
    CatchUpAdamW,
}

/// Hyperparameters. The learning rate is given per step, to [`Optimizer::begin_step`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// The rule.
    pub kind: OptimizerKind,
    /// Decay β₁ of AdamW's first moment, in [0, 1).
    pub beta1: f32,
    /// Decay β₂ of AdamW's second moment, in [0, 1).
    pub beta2: f32,
    /// AdamW's ε, positive.
    pub eps: f32,
    /// Decoupled weight decay: every step x ← (1 − lr·decay)·x. Not negative.
    pub weight_decay: f32,
    /// Momentum μ of SGD, in [0, 1).
    pub momentum: f32,
    /// Largest τ of catch-up AdamW, at least 1. Smaller bears higher learning rates.
    pub catch_up_cap: u32,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::CatchUpAdamW,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            momentum: 0.9,
            catch_up_cap: 20,
        }
    }
}

/// An optimizer and its state for all tensors.
///
/// Per step: [`Optimizer::begin_step`]; [`Optimizer::norm_squared`] of every tensor, if clipping is wanted;
/// [`Optimizer::update`] of every tensor, once. A skipped step calls none of them.
#[derive(Clone, PartialEq, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    /// Steps begun.
    step: u32,
    /// Learning rates of the last steps, newest first, at most `catch_up_cap` of them.
    rates: VecDeque<f32>,
    tensors: Vec<Moments>,
}

/// State of one tensor. What the rule does not need is empty.
#[derive(Clone, PartialEq, Debug)]
struct Moments {
    rows: usize,
    width: usize,
    weight_decay: f32,
    /// AdamW's m, or SGD's u.
    first: Vec<f32>,
    /// AdamW's v.
    second: Vec<f32>,
    /// Catch-up: step at which each row last came; 0 is the start.
    came: Vec<u32>,
    /// Catch-up: T, each row's sum of τ.
    weight: Vec<u32>,
    elements: usize,
}

/// Rows that take the same step: consecutive, same τ and T.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    start: usize,
    end: usize,
    tau: u32,
    weight: u32,
}

impl Optimizer {
    /// Zero state for tensors given as (rows, width, elements); elements ≤ rows·width.
    ///
    /// # Panics
    /// If elements exceed rows·width.
    #[must_use]
    pub fn new(config: OptimizerConfig, tensors: &[(usize, usize, usize)]) -> Self {
        let tensors = tensors
            .iter()
            .map(|shape| Moments::new(&config, *shape))
            .collect();
        Self {
            config,
            step: 0,
            rates: VecDeque::new(),
            tensors,
        }
    }

    /// Another weight decay for one tensor (0 for biases and norms, as is customary).
    pub fn set_weight_decay(&mut self, tensor: usize, weight_decay: f32) {
        self.tensors[tensor].weight_decay = weight_decay;
    }

    /// Hyperparameters.
    #[must_use]
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Starts a step at this learning rate.
    pub fn begin_step(&mut self, lr: f32) {
        self.step += 1;
        self.rates.push_front(lr);
        self.rates
            .truncate(self.config.catch_up_cap.max(1) as usize);
    }

    /// ‖ĝ‖² of a tensor, for clipping: of b/τ under catch-up AdamW (rows that came), else of the gradient.
    /// Between [`Optimizer::begin_step`] and [`Optimizer::update`].
    #[must_use]
    pub fn norm_squared(&self, tensor: usize, grad: &[f32], rows: RowsCame<'_>) -> f64 {
        let moments = &self.tensors[tensor];
        let chunks: Vec<f64> = moments
            .chunks()
            .into_par_iter()
            .map(|chunk| {
                let squares = |run: Run| {
                    let scale = 1.0 / f64::from(run.tau);
                    sum_of_squares(&grad[moments.elements_of(run.start, run.end)]) * scale * scale
                };
                self.runs(moments, rows, chunk)
                    .into_iter()
                    .map(squares)
                    .sum()
            })
            .collect();
        chunks.iter().sum()
    }

    /// One step of a tensor: `param` and `grad` hold its elements, `scale` multiplies the gradient (the clip factor).
    ///
    /// # Panics
    /// Before the first [`Optimizer::begin_step`], or if lengths disagree or a row is out of range.
    pub fn update(
        &mut self,
        tensor: usize,
        param: &mut [f32],
        grad: &[f32],
        rows: RowsCame<'_>,
        scale: f32,
    ) {
        assert!(self.step > 0, "begin_step comes first");
        let moments = &self.tensors[tensor];
        assert_eq!(
            (param.len(), grad.len()),
            (moments.elements, moments.elements),
            "elements of tensor {tensor}"
        );
        if let RowsCame::Rows(rows) = rows {
            assert!(
                rows.last().is_none_or(|r| (*r as usize) < moments.rows),
                "row out of range in tensor {tensor}"
            );
        }
        let keep = 1.0 - self.rates[0] * moments.weight_decay;
        // Runs first: they read the counters that are written last.
        let runs: Vec<Vec<Run>> = moments
            .chunks()
            .into_iter()
            .map(|chunk| self.runs(moments, rows, chunk))
            .collect();
        let coefficients = Coefficients {
            config: &self.config,
            rates: self.rate_sums(),
            scale,
        };
        let moments = &mut self.tensors[tensor];
        let chunk = moments.rows_per_chunk() * moments.width;
        let width = moments.width;
        let empty = moments.second.is_empty();
        let seconds: Vec<&mut [f32]> = if empty {
            runs.iter().map(|_| <&mut [f32]>::default()).collect()
        } else {
            moments.second.chunks_mut(chunk).collect()
        };
        param
            .par_chunks_mut(chunk)
            .zip(grad.par_chunks(chunk))
            .zip(moments.first.par_chunks_mut(chunk).zip(seconds))
            .zip(&runs)
            .enumerate()
            .for_each(|(index, (((x, g), (first, second)), runs))| {
                if keep != 1.0 {
                    decay(x, keep);
                }
                for run in runs {
                    let first_row = index * (chunk / width);
                    let at = (run.start - first_row) * width
                        ..((run.end - first_row) * width).min(x.len());
                    let second = if empty {
                        &mut [][..]
                    } else {
                        &mut second[at.clone()]
                    };
                    coefficients.apply(
                        run,
                        &mut x[at.clone()],
                        &g[at.clone()],
                        &mut first[at],
                        second,
                    );
                }
            });
        self.count(tensor, &runs);
    }

    /// Moves the counters of the rows that came.
    fn count(&mut self, tensor: usize, runs: &[Vec<Run>]) {
        let moments = &mut self.tensors[tensor];
        if moments.came.is_empty() {
            return;
        }
        for run in runs.iter().flatten() {
            moments.came[run.start..run.end].fill(self.step);
            moments.weight[run.start..run.end].fill(run.weight);
        }
    }

    /// Sums of the newest 1, 2, … learning rates.
    fn rate_sums(&self) -> Vec<f32> {
        let sums = self.rates.iter().scan(0.0, |sum, lr| {
            *sum += f64::from(*lr);
            Some(*sum as f32)
        });
        sums.collect()
    }

    /// The rows of `chunk` that take a step, as runs.
    fn runs(&self, moments: &Moments, rows: RowsCame<'_>, chunk: (usize, usize)) -> Vec<Run> {
        if self.config.kind != OptimizerKind::CatchUpAdamW {
            return vec![Run {
                start: chunk.0,
                end: chunk.1,
                tau: 1,
                weight: self.step,
            }];
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut add = |row: usize| {
            let tau = (self.step - moments.came[row]).min(self.rates.len() as u32);
            let weight = moments.weight[row].saturating_add(tau);
            match runs.last_mut() {
                Some(run) if run.end == row && run.tau == tau && run.weight == weight => {
                    run.end += 1
                }
                _ => runs.push(Run {
                    start: row,
                    end: row + 1,
                    tau,
                    weight,
                }),
            }
        };
        match rows {
            RowsCame::All => (chunk.0..chunk.1).for_each(&mut add),
            RowsCame::Rows(rows) => {
                let at = |row: usize| rows.partition_point(|r| (*r as usize) < row);
                rows[at(chunk.0)..at(chunk.1)]
                    .iter()
                    .for_each(|row| add(*row as usize));
            }
        }
        runs
    }
}

impl Moments {
    fn new(config: &OptimizerConfig, (rows, width, elements): (usize, usize, usize)) -> Self {
        assert!(
            elements <= rows * width,
            "{elements} elements do not fit into {rows} rows of {width}"
        );
        let needed = |needed: bool, len: usize| if needed { len } else { 0 };
        let catch_up = needed(config.kind == OptimizerKind::CatchUpAdamW, rows);
        Self {
            rows,
            width,
            weight_decay: config.weight_decay,
            first: vec![0.0; elements],
            second: vec![0.0; needed(config.kind != OptimizerKind::Sgd, elements)],
            came: vec![0; catch_up],
            weight: vec![0; catch_up],
            elements,
        }
    }

    fn rows_per_chunk(&self) -> usize {
        (CHUNK / self.width.max(1)).max(1)
    }

    /// Pieces of work, as (first row, past the last row) of those that have elements. They depend on the shape alone.
    fn chunks(&self) -> Vec<(usize, usize)> {
        let (rows, step) = (
            self.elements.div_ceil(self.width.max(1)),
            self.rows_per_chunk(),
        );
        (0..rows)
            .step_by(step)
            .map(|start| (start, (start + step).min(rows)))
            .collect()
    }

    fn elements_of(&self, start: usize, end: usize) -> core::ops::Range<usize> {
        start * self.width..(end * self.width).min(self.elements)
    }
}

/// What turns a run into the numbers of its update.
struct Coefficients<'a> {
    config: &'a OptimizerConfig,
    /// Sums of the newest learning rates; `[τ − 1]` is that of τ of them.
    rates: Vec<f32>,
    scale: f32,
}

impl Coefficients<'_> {
    fn apply(&self, run: &Run, x: &mut [f32], g: &[f32], first: &mut [f32], second: &mut [f32]) {
        let lr = self.rates[run.tau as usize - 1];
        if self.config.kind == OptimizerKind::Sgd {
            return momentum(x, g, first, self.config.momentum, lr, self.scale);
        }
        let betas = (f64::from(self.config.beta1), f64::from(self.config.beta2));
        let coefficients = adam_coefficients(betas, self.config.eps, lr, self.scale, run);
        adam(x, g, first, second, coefficients);
    }
}

/// Numbers of a run's step: `lr` is the sum of its τ learning rates, `scale` multiplies the gradient.
fn adam_coefficients(
    (beta1, beta2): (f64, f64),
    eps: f32,
    lr: f32,
    scale: f32,
    run: &Run,
) -> AdamCoefficients {
    let (decay1, decay2) = (power(beta1, run.tau), power(beta2, run.tau));
    AdamCoefficients {
        grad: scale / run.tau as f32,
        keep1: decay1 as f32,
        take1: (1.0 - decay1) as f32,
        keep2: decay2 as f32,
        take2: (1.0 - decay2) as f32,
        correct1: (1.0 / (1.0 - power(beta1, run.weight))) as f32,
        correct2: (1.0 / (1.0 - power(beta2, run.weight))) as f32,
        lr,
        eps,
    }
}

/// base^exponent by squaring.
fn power(mut base: f64, mut exponent: u32) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}
