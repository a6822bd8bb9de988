//! Fused operations with their own backward pass: RMSNorm, SwiGLU, causal attention with rotary positions,
//! cross-entropy, and the seed of a segmented backward pass.
//!
//! candle's fused forms have no backward on the CPU, and compositions of its primitives spend more time in
//! broadcasts than in matrix products. All operations are f32 on the CPU and independent of the number of threads.

use super::math::{dot, exp_from_top, for_rows, sigmoid_into, softmax};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Storage, Tensor, bail,
};
use std::sync::{Arc, Mutex};

/// Calls `f` with the elements of a contiguous f32 tensor on the CPU.
pub(crate) fn with_slice<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(f(contiguous(storage, layout)?)),
        _ => bail!("the trainer runs on the CPU"),
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else {
        bail!("the trainer computes in f32")
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("a fused operation needs a contiguous tensor"),
    }
}

fn output(data: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), shape.into()))
}

/// y = x Wᵀ: (rows, in) and (out, in) → (rows, out). candle's product of a transposed matrix would transpose the
/// gradient of W element by element; here it comes out as W lies.
pub(super) struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((rows, inputs), (outputs, _)) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let y = s1.matmul(s2, (1, rows, outputs, inputs), l1, &l2.transpose(0, 1)?)?;
        Ok((y, (rows, outputs).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.matmul(w)?), Some(grad.t()?.matmul(x)?)))
    }
}

/// y = w ∘ x / √(mean x² + ε) along the last dimension.
pub(super) struct RmsNorm {
    pub(super) eps: f32,
}

impl RmsNorm {
    fn inverse(&self, x: &[f32]) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(s1, l1)?, contiguous(s2, l2)?);
        let mut y = vec![0f32; x.len()];
        for_rows(&mut y, w.len(), |row, y| {
            let x = &x[row * w.len()..][..w.len()];
            let inverse = self.inverse(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = w * (x * inverse);
            }
        });
        output(y, l1.shape().clone())
    }

    /// With x̂ = x·i, i = 1/rms: dx = i·(w∘dy − x̂·mean(w∘dy∘x̂)), dw = Σ_rows dy∘x̂.
    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let width = w.elem_count();
        let (dx, dw) = with_slice(x, |x| {
            with_slice(w, |w| {
                with_slice(grad, |dy| {
                    let mut dx = vec![0f32; x.len()];
                    for_rows(&mut dx, width, |row, dx| {
                        let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
                        let inverse = self.inverse(x);
                        for ((d, w), g) in dx.iter_mut().zip(w).zip(dy) {
                            *d = w * g;
                        }
                        let along = dot(dx, x) * inverse * inverse / width as f32;
                        for (d, x) in dx.iter_mut().zip(x) {
                            *d = inverse * (*d - x * along);
                        }
                    });
                    let mut dw = vec![0f32; width];
                    for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
                        let inverse = self.inverse(x);
                        for ((d, x), g) in dw.iter_mut().zip(x).zip(dy) {
                            *d += g * (x * inverse);
                        }
                    }
                    (dx, dw)
                })
            })
        })???;
        let dx = Tensor::from_vec(dx, x.shape(), &Device::Cpu)?;
        Ok((
            Some(dx),
            Some(Tensor::from_vec(dw, w.shape(), &Device::Cpu)?),
        ))
    }
}

/// SiLU(gate) ∘ up, where each row holds gate ‖ up.
pub(super) struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = l.shape().dims2()?;
        let x = contiguous(s, l)?;
        let mut y = vec![0f32; rows * width / 2];
        for_rows(&mut y, width / 2, |row, y| {
            let (gate, up) = x[row * width..][..width].split_at(width / 2);
            sigmoid_into(y, gate);
            for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                *y = gate * *y * up;
            }
        });
        output(y, (rows, width / 2))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = x.dims2()?;
        let half = width / 2;
        let dx = with_slice(x, |x| {
            with_slice(grad, |dy| {
                let mut dx = vec![0f32; x.len()];
                for_rows(&mut dx, width, |row, dx| {
                    let (gate, up) = x[row * width..][..width].split_at(half);
                    let (d_gate, d_up) = dx.split_at_mut(half);
                    let dy = &dy[row * half..][..half];
                    sigmoid_into(d_gate, gate);
                    for i in 0..half {
                        let s = d_gate[i];
                        d_up[i] = dy[i] * gate[i] * s;
                        d_gate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                    }
                });
                dx
            })
        })??;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}

/// cos and sin of every position and pair of a head, computed once per model.
#[derive(Debug)]
pub(super) struct RotaryTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTable {
    /// Angles position·θ^(−2i/d) in f64, for positions `0..positions` and pairs `0..head_dim/2`.
    pub(super) fn new(positions: usize, head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let angles = (0..positions).flat_map(|position| {
            (0..half).map(move |i| position as f64 * theta.powf(-2.0 * i as f64 / head_dim as f64))
        });
        let (cos, sin) = angles
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .unzip();
        Self { half, cos, sin }
    }

    /// Rotates the pairs (i, i + d/2) of a head by the position's angle; `sign` −1 rotates back.
    fn rotate(&self, position: usize, sign: f32, input: &[f32], output: &mut [f32]) {
        let cos = &self.cos[position * self.half..][..self.half];
        let sin = &self.sin[position * self.half..][..self.half];
        let (a, b) = input.split_at(self.half);
        let (out_a, out_b) = output.split_at_mut(self.half);
        for i in 0..self.half {
            let s = sin[i] * sign;
            out_a[i] = a[i] * cos[i] - b[i] * s;
            out_b[i] = b[i] * cos[i] + a[i] * s;
        }
    }
}

/// Sizes of an attention call.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttentionShape {
    pub(super) batch: usize,
    pub(super) positions: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
}

impl AttentionShape {
    fn width(self) -> usize {
        self.heads * self.head_dim
    }
}

/// What the forward pass keeps for the backward one; each (batch·heads, positions, …).
struct AttentionSaved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    probabilities: Tensor,
}

/// Causal self-attention with rotary positions: (batch·positions, 3·hidden) → (batch·positions, hidden),
/// where a row of the input holds q ‖ k ‖ v of all heads.
pub(super) struct CausalAttention {
    shape: AttentionShape,
    table: Arc<RotaryTable>,
    saved: Mutex<Option<AttentionSaved>>,
}

impl CausalAttention {
    pub(super) fn new(shape: AttentionShape, table: Arc<RotaryTable>) -> Self {
        Self {
            shape,
            table,
            saved: Mutex::new(None),
        }
    }

    /// Takes part 0 (q), 1 (k) or 2 (v) out of rows of `stride` floats, as (batch·heads, positions, head_dim).
    fn split(&self, rows: &[f32], stride: usize, part: usize) -> Result<Tensor> {
        let AttentionShape {
            batch,
            positions,
            heads,
            head_dim,
        } = self.shape;
        let mut out = vec![0f32; batch * positions * heads * head_dim];
        for_rows(&mut out, head_dim, |index, out| {
            let (at, position) = (index / positions, index % positions);
            let (sample, head) = (at / heads, at % heads);
            let start = (sample * positions + position) * stride
                + part * self.shape.width()
                + head * head_dim;
            let input = &rows[start..][..head_dim];
            if part < 2 {
                self.table.rotate(position, 1.0, input, out);
            } else {
                out.copy_from_slice(input);
            }
        });
        Tensor::from_vec(out, (batch * heads, positions, head_dim), &Device::Cpu)
    }

    /// The inverse of [`Self::split`]: rows of the parts given (one or three), rotated back where they are q or k.
    fn merge(&self, parts: &[&[f32]]) -> Vec<f32> {
        let AttentionShape {
            batch,
            positions,
            heads,
            head_dim,
        } = self.shape;
        let width = self.shape.width();
        let mut out = vec![0f32; parts.len() * batch * positions * width];
        for_rows(&mut out, parts.len() * width, |row, out| {
            let (sample, position) = (row / positions, row % positions);
            for (part, values) in parts.iter().enumerate() {
                for head in 0..heads {
                    let input = &values
                        [((sample * heads + head) * positions + position) * head_dim..][..head_dim];
                    let output = &mut out[part * width + head * head_dim..][..head_dim];
                    if parts.len() == 3 && part < 2 {
                        self.table.rotate(position, -1.0, input, output);
                    } else {
                        output.copy_from_slice(input);
                    }
                }
            }
        });
        out
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    /// softmax of the scaled scores over the positions up to one's own; the rest 0.
    fn probabilities(&self, scores: &Tensor) -> Result<Tensor> {
        let positions = self.shape.positions;
        let mut scores_vec = take(scores)?;
        let scale = self.scale();
        for_rows(&mut scores_vec, positions, |row, scores| {
            let (seen, future) = scores.split_at_mut(row % positions + 1);
            seen.iter_mut().for_each(|x| *x *= scale);
            softmax(seen);
            future.fill(0.0);
        });
        Tensor::from_vec(scores_vec, scores.shape(), &Device::Cpu)
    }
}

fn take(tensor: &Tensor) -> Result<Vec<f32>> {
    with_slice(tensor, <[f32]>::to_vec)
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, stride) = l.shape().dims2()?;
        let x = contiguous(s, l)?;
        let (q, k, v) = (
            self.split(x, stride, 0)?,
            self.split(x, stride, 1)?,
            self.split(x, stride, 2)?,
        );
        let probabilities = self.probabilities(&q.matmul(&k.t()?)?)?;
        let y = probabilities.matmul(&v)?;
        let merged = with_slice(&y, |y| self.merge(&[y]))?;
        let saved = AttentionSaved {
            q,
            k,
            v,
            probabilities,
        };
        *self
            .saved
            .lock()
            .expect("no thread panics while it holds this lock") = Some(saved);
        output(merged, (rows, self.shape.width()))
    }

    /// dV = Pᵀ dY; dP = dY Vᵀ; dS = P∘(dP − rowsum(dP∘P))·scale; dQ = dS K; dK = dSᵀ Q.
    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let saved = self
            .saved
            .lock()
            .expect("no thread panics while it holds this lock")
            .take();
        let Some(saved) = saved else {
            bail!("attention's backward pass runs once per forward pass")
        };
        let positions = self.shape.positions;
        // Part 2 is the one that is not rotated.
        let dy = with_slice(grad, |g| self.split_output(g))??;
        let dv = saved.probabilities.t()?.matmul(&dy)?;
        let mut ds = take(&dy.matmul(&saved.v.t()?)?)?;
        let scale = self.scale();
        with_slice(&saved.probabilities, |p| {
            for_rows(&mut ds, positions, |row, ds| {
                let p = &p[row * positions..][..positions];
                let along = dot(ds, p);
                for (d, p) in ds.iter_mut().zip(p) {
                    *d = p * (*d - along) * scale;
                }
            });
        })?;
        let ds = Tensor::from_vec(ds, saved.probabilities.shape(), &Device::Cpu)?;
        let (dq, dk) = (ds.matmul(&saved.k)?, ds.t()?.matmul(&saved.q)?);
        let dx = with_slice(&dq, |dq| {
            with_slice(&dk, |dk| with_slice(&dv, |dv| self.merge(&[dq, dk, dv])))
        })???;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}

impl CausalAttention {
    /// The gradient of the output as (batch·heads, positions, head_dim).
    fn split_output(&self, rows: &[f32]) -> Result<Tensor> {
        let AttentionShape {
            batch,
            positions,
            heads,
            head_dim,
        } = self.shape;
        let mut out = vec![0f32; rows.len()];
        for_rows(&mut out, head_dim, |index, out| {
            let (at, position) = (index / positions, index % positions);
            let start = ((at / heads) * positions + position) * self.shape.width()
                + (at % heads) * head_dim;
            out.copy_from_slice(&rows[start..][..head_dim]);
        });
        Tensor::from_vec(out, (batch * heads, positions, head_dim), &Device::Cpu)
    }
}

/// Mean cross-entropy (nats) of rows of logits against the target classes.
pub(super) struct CrossEntropy {
    pub(super) targets: Arc<Vec<u32>>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, classes) = l.shape().dims2()?;
        let logits = contiguous(s, l)?;
        if rows != self.targets.len() || self.targets.iter().any(|&t| t as usize >= classes) {
            bail!(
                "{} targets for {rows} rows of {classes} classes, or a target out of range",
                self.targets.len()
            );
        }
        let mut losses = vec![0f32; rows];
        for_rows(&mut losses, 1, |row, loss| {
            let logits = &logits[row * classes..][..classes];
            let (sum, top) = exp_from_top(&mut logits.to_vec());
            loss[0] = sum.ln() + top - logits[self.targets[row] as usize];
        });
        // In f64: the mean of a validation pass is compared to the bit between runs and must not depend on batch order.
        let mean = losses.iter().map(|&x| f64::from(x)).sum::<f64>() / rows as f64;
        output(vec![mean as f32], ())
    }

    fn bwd(&self, logits: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, classes) = logits.dims2()?;
        let scale = grad.to_scalar::<f32>()? / rows as f32;
        let mut d = take(logits)?;
        for_rows(&mut d, classes, |row, d| {
            softmax(d);
            d[self.targets[row] as usize] -= 1.0;
            d.iter_mut().for_each(|x| *x *= scale);
        });
        Ok(Some(Tensor::from_vec(d, logits.shape(), &Device::Cpu)?))
    }
}

/// A scalar whose gradient with respect to its argument is `gradient`: continues a backward pass that was cut at
/// a layer's border, so that the layers above can be handed over while those below are still computed.
pub(super) struct Seed {
    pub(super) gradient: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _s: &CpuStorage, _l: &Layout) -> Result<(CpuStorage, Shape)> {
        output(vec![0.0], ())
    }

    fn bwd(&self, _arg: &Tensor, _res: &Tensor, _grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient.clone()))
    }
}
