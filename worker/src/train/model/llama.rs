//! A LLaMA-style decoder: embedding, blocks of (RMSNorm, causal attention with rotary positions, RMSNorm, SwiGLU),
//! RMSNorm, head. q, k and v are the rows of one matrix, and so are gate and up: one product each.

use super::init::{ParameterSpec, Start};
use super::ops::{
    AttentionShape, CausalAttention, CrossEntropy, Linear, RmsNorm, RotaryTable, Seed, SwiGlu,
};
use super::{Evaluation, Model, ModelError, hand_over};
use crate::train::data::Batch;
use arc_topk_common::config::train::ModelShape;
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Sizes of a decoder.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LlamaConfig {
    /// Tokens that can be told apart.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the SwiGLU.
    pub intermediate: usize,
    /// Blocks.
    pub layers: usize,
    /// Attention heads; must divide `hidden` into even parts.
    pub heads: usize,
    /// Whether the head shares the embedding's matrix.
    pub tied: bool,
}

impl From<ModelShape> for LlamaConfig {
    fn from(shape: ModelShape) -> Self {
        let ModelShape {
            hidden,
            intermediate,
            layers,
            heads,
            vocab,
            ..
        } = shape;
        Self {
            vocab,
            hidden,
            intermediate,
            layers,
            heads,
            tied: false,
        }
    }
}

impl LlamaConfig {
    /// Checks that the sizes fit each other.
    ///
    /// # Errors
    /// A text that names the size and what it must be.
    pub fn check(&self) -> std::result::Result<(), String> {
        let sizes = [
            self.vocab,
            self.hidden,
            self.intermediate,
            self.layers,
            self.heads,
        ];
        if sizes.contains(&0) {
            return Err(format!(
                "every size of the model must be at least 1, got {self:?}"
            ));
        }
        if !self.hidden.is_multiple_of(2 * self.heads) {
            return Err(format!(
                "hidden ({}) must be a multiple of twice the heads ({})",
                self.hidden, self.heads
            ));
        }
        Ok(())
    }

    /// Parameters in registration order (that of the forward pass).
    #[must_use]
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        // GPT-2's start: 0.02 at width 768, scaled like 1/√width, and output projections by 1/√(2·layers).
        let base = 0.02 * (768.0 / self.hidden as f32).sqrt();
        let output = base / (2.0 * self.layers as f32).sqrt();
        let (h, i) = (self.hidden, self.intermediate);
        let mut specs = vec![ParameterSpec::new(
            "embed.weight",
            &[self.vocab, h],
            Start::Normal(base),
        )];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize], start| {
                specs.push(ParameterSpec::new(
                    format!("layers.{layer}.{name}"),
                    shape,
                    start,
                ));
            };
            add("attention_norm.weight", &[h], Start::Ones);
            add("attention.qkv.weight", &[3 * h, h], Start::Normal(base));
            add("attention.output.weight", &[h, h], Start::Normal(output));
            add("mlp_norm.weight", &[h], Start::Ones);
            add("mlp.gate_up.weight", &[2 * i, h], Start::Normal(base));
            add("mlp.down.weight", &[h, i], Start::Normal(output));
        }
        specs.push(ParameterSpec::new("norm.weight", &[h], Start::Ones));
        if !self.tied {
            specs.push(ParameterSpec::new(
                "head.weight",
                &[self.vocab, h],
                Start::Normal(base),
            ));
        }
        specs
    }
}

const PER_LAYER: usize = 6;
const EPS: f32 = 1e-5;
const ROPE_THETA: f64 = 10_000.0;

/// A batch after the embedding.
struct Embedded {
    /// (windows·positions, hidden).
    x: Tensor,
    windows: usize,
    positions: usize,
    targets: Arc<Vec<u32>>,
}

/// A decoder with its parameters.
#[derive(Debug)]
pub struct Llama {
    config: LlamaConfig,
    specs: Vec<ParameterSpec>,
    vars: Vec<Var>,
    table: Arc<RotaryTable>,
    positions: usize,
}

impl Llama {
    /// A model for windows of up to `positions` tokens, started from `seed`.
    ///
    /// # Errors
    /// If the sizes do not fit each other.
    pub fn new(
        config: LlamaConfig,
        positions: usize,
        seed: u64,
    ) -> std::result::Result<Self, ModelError> {
        config.check().map_err(ModelError::Sizes)?;
        let specs = config.parameters();
        let vars: Result<Vec<Var>> = specs
            .iter()
            .enumerate()
            .map(|(i, spec)| spec.var(seed, i))
            .collect();
        let table = Arc::new(RotaryTable::new(
            positions,
            config.hidden / config.heads,
            ROPE_THETA,
        ));
        Ok(Self {
            config,
            specs,
            vars: vars?,
            table,
            positions,
        })
    }

    fn norm(x: &Tensor, w: &Var) -> Result<Tensor> {
        x.apply_op2(w.as_tensor(), RmsNorm { eps: EPS })
    }

    fn block(&self, layer: usize, x: &Tensor, batch: usize, positions: usize) -> Result<Tensor> {
        let w = &self.vars[1 + layer * PER_LAYER..][..PER_LAYER];
        let shape = AttentionShape {
            batch,
            positions,
            heads: self.config.heads,
            head_dim: self.config.hidden / self.config.heads,
        };
        let qkv = Self::norm(x, &w[0])?.apply_op2(w[1].as_tensor(), Linear)?;
        let attended = qkv.apply_op1(CausalAttention::new(shape, self.table.clone()))?;
        let x = (x + attended.apply_op2(w[2].as_tensor(), Linear)?)?;
        let gated = Self::norm(&x, &w[3])?
            .apply_op2(w[4].as_tensor(), Linear)?
            .apply_op1(SwiGlu)?;
        &x + gated.apply_op2(w[5].as_tensor(), Linear)?
    }

    fn head(&self) -> &Var {
        if self.config.tied {
            &self.vars[0]
        } else {
            &self.vars[self.vars.len() - 1]
        }
    }

    fn loss(&self, x: &Tensor, targets: &Arc<Vec<u32>>) -> Result<Tensor> {
        let norm = &self.vars[1 + self.config.layers * PER_LAYER];
        let logits = Self::norm(x, norm)?.apply_op2(self.head().as_tensor(), Linear)?;
        logits.apply_op1(CrossEntropy {
            targets: targets.clone(),
        })
    }

    fn embed(&self, batch: &Batch) -> std::result::Result<Embedded, ModelError> {
        let Batch::Tokens {
            inputs,
            targets,
            windows,
        } = batch
        else {
            return Err(ModelError::WrongBatch);
        };
        let positions = inputs.len() / windows;
        if positions > self.positions {
            return Err(ModelError::Sizes(format!(
                "a window has {positions} tokens, the model was made for {}",
                self.positions
            )));
        }
        let tokens = Tensor::from_slice(inputs, inputs.len(), &Device::Cpu)?;
        Ok(Embedded {
            x: self.vars[0].index_select(&tokens, 0)?,
            windows: *windows,
            positions,
            targets: Arc::new(targets.clone()),
        })
    }
}

impl Model for Llama {
    fn specs(&self) -> &[ParameterSpec] {
        &self.specs
    }

    fn vars(&self) -> &[Var] {
        &self.vars
    }

    /// The graph is cut at every block's border: the backward pass of a block starts as soon as the one above is
    /// done with, and its gradients leave while those below are still computed.
    fn forward_backward(
        &self,
        batch: &Batch,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> std::result::Result<f32, ModelError> {
        let Embedded {
            x: embedded,
            windows,
            positions,
            targets,
        } = self.embed(batch)?;
        let mut borders = vec![(Var::from_tensor(&embedded.detach())?, embedded)];
        for layer in 0..self.config.layers {
            let input = borders[layer].0.as_tensor();
            let output = self.block(layer, input, windows, positions)?;
            borders.push((Var::from_tensor(&output.detach())?, output));
        }
        let (top, _) = &borders[self.config.layers];
        let loss = self.loss(top.as_tensor(), &targets)?;
        let mut grads = loss.backward()?;
        let norm = 1 + self.config.layers * PER_LAYER;
        let mut tied_head = None;
        if self.config.tied {
            tied_head = grads.remove(self.vars[0].as_tensor());
        } else {
            hand_over(&self.vars, norm + 1, &mut grads, sink)?;
        }
        hand_over(&self.vars, norm, &mut grads, sink)?;
        for layer in (0..self.config.layers).rev() {
            grads = self.continue_backward(&mut borders, &mut grads)?;
            for parameter in (0..PER_LAYER).rev() {
                hand_over(
                    &self.vars,
                    1 + layer * PER_LAYER + parameter,
                    &mut grads,
                    sink,
                )?;
            }
        }
        let mut grads = self.continue_backward(&mut borders, &mut grads)?;
        if let Some(head) = tied_head {
            let embedding = self.vars[0].as_tensor();
            let sum = match grads.remove(embedding) {
                Some(gradient) => (head + gradient)?,
                None => head,
            };
            grads.insert(embedding, sum);
        }
        hand_over(&self.vars, 0, &mut grads, sink)?;
        Ok(loss.to_scalar::<f32>()?)
    }

    fn evaluate(&self, batch: &Batch) -> std::result::Result<Evaluation, ModelError> {
        let Embedded {
            mut x,
            windows,
            positions,
            targets,
        } = self.embed(batch)?;
        for layer in 0..self.config.layers {
            // Detached: nothing of the graph is kept.
            x = self.block(layer, &x, windows, positions)?.detach();
        }
        Ok(Evaluation {
            loss: self.loss(&x, &targets)?.to_scalar()?,
            correct: None,
            examples: targets.len(),
        })
    }
}

impl Llama {
    /// Carries the gradient of the topmost remaining border into the graph below it.
    fn continue_backward(
        &self,
        borders: &mut Vec<(Var, Tensor)>,
        grads: &mut GradStore,
    ) -> Result<GradStore> {
        let (border, output) = borders
            .pop()
            .expect("one border per block, and one above the embedding");
        let gradient = match grads.remove(border.as_tensor()) {
            Some(gradient) => gradient,
            None => output.zeros_like()?,
        };
        output.apply_op1(Seed { gradient })?.backward()
    }
}
