//! A small convolutional network for Fashion-MNIST: two 3×3 convolutions with max-pooling, two linear layers.
//!
//! Images are NHWC, and a convolution is a matrix product over unfolded patches: a filter is one row.

use super::init::{ParameterSpec, Start};
use super::math::for_rows;
use super::ops::{CrossEntropy, with_slice};
use super::{Evaluation, Model, ModelError, hand_over};
use crate::train::data::Batch;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, Var, bail};
use std::sync::{Arc, Mutex};

/// Side of an image in pixels.
pub(crate) const SIDE: usize = 28;
const CLASSES: usize = 10;
const CHANNELS: [usize; 3] = [1, 16, 32];
const HIDDEN: usize = 64;
/// Side of a convolution's window.
const WINDOW: usize = 3;

/// The network with its parameters.
#[derive(Debug)]
pub struct ConvNet {
    specs: Vec<ParameterSpec>,
    vars: Vec<Var>,
}

impl ConvNet {
    /// Its parameters in registration order (that of the forward pass).
    #[must_use]
    pub fn parameters() -> Vec<ParameterSpec> {
        // He's start: deviation √(2/inputs) keeps the variance through ReLU.
        let he = |inputs: usize| Start::Normal((2.0 / inputs as f32).sqrt());
        let flat = (SIDE / 4) * (SIDE / 4) * CHANNELS[2];
        let mut specs = Vec::new();
        for layer in 1..3 {
            let (inputs, outputs) = (CHANNELS[layer - 1], CHANNELS[layer]);
            let start = he(inputs * WINDOW * WINDOW);
            specs.push(ParameterSpec::new(
                format!("conv{layer}.weight"),
                &[outputs, WINDOW, WINDOW, inputs],
                start,
            ));
            specs.push(ParameterSpec::new(
                format!("conv{layer}.bias"),
                &[outputs],
                Start::Zeros,
            ));
        }
        specs.push(ParameterSpec::new(
            "linear1.weight",
            &[HIDDEN, flat],
            he(flat),
        ));
        specs.push(ParameterSpec::new("linear1.bias", &[HIDDEN], Start::Zeros));
        specs.push(ParameterSpec::new(
            "linear2.weight",
            &[CLASSES, HIDDEN],
            he(HIDDEN),
        ));
        specs.push(ParameterSpec::new("linear2.bias", &[CLASSES], Start::Zeros));
        specs
    }

    /// A network started from `seed`.
    ///
    /// # Errors
    /// If memory cannot be had.
    pub fn new(seed: u64) -> std::result::Result<Self, ModelError> {
        let specs = Self::parameters();
        let vars: Result<Vec<Var>> = specs
            .iter()
            .enumerate()
            .map(|(i, spec)| spec.var(seed, i))
            .collect();
        Ok(Self { specs, vars: vars? })
    }

    fn logits(&self, images: &[f32]) -> Result<Tensor> {
        let batch = images.len() / (SIDE * SIDE);
        let mut x = Tensor::from_slice(images, (batch, SIDE, SIDE, 1), &Device::Cpu)?;
        for layer in 0..2 {
            let (weight, bias) = (&self.vars[2 * layer], &self.vars[2 * layer + 1]);
            let (outputs, ..) = weight.dims4()?;
            let (_, height, width, _) = x.dims4()?;
            let weight = weight.reshape((outputs, ()))?;
            let y = x
                .apply_op1(Unfold)?
                .matmul(&weight.t()?)?
                .broadcast_add(bias)?
                .relu()?;
            x = y
                .reshape((batch, height, width, outputs))?
                .apply_op1(MaxPool::default())?;
        }
        let x = x.flatten_from(1)?;
        let x = x
            .matmul(&self.vars[4].t()?)?
            .broadcast_add(&self.vars[5])?
            .relu()?;
        x.matmul(&self.vars[6].t()?)?.broadcast_add(&self.vars[7])
    }
}

impl Model for ConvNet {
    fn specs(&self) -> &[ParameterSpec] {
        &self.specs
    }

    fn vars(&self) -> &[Var] {
        &self.vars
    }

    fn forward_backward(
        &self,
        batch: &Batch,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> std::result::Result<f32, ModelError> {
        let Batch::Images { pixels, labels } = batch else {
            return Err(ModelError::WrongBatch);
        };
        let loss = self.logits(pixels)?.apply_op1(CrossEntropy {
            targets: Arc::new(labels.clone()),
        })?;
        let mut grads = loss.backward()?;
        for parameter in (0..self.vars.len()).rev() {
            hand_over(&self.vars, parameter, &mut grads, sink)?;
        }
        Ok(loss.to_scalar()?)
    }

    fn evaluate(&self, batch: &Batch) -> std::result::Result<Evaluation, ModelError> {
        let Batch::Images { pixels, labels } = batch else {
            return Err(ModelError::WrongBatch);
        };
        let logits = self.logits(pixels)?;
        let guesses = logits.argmax(1)?.to_vec1::<u32>()?;
        let correct = guesses
            .iter()
            .zip(labels)
            .filter(|(guess, label)| guess == label)
            .count();
        let loss = logits
            .apply_op1(CrossEntropy {
                targets: Arc::new(labels.clone()),
            })?
            .to_scalar()?;
        Ok(Evaluation {
            loss,
            correct: Some(correct),
            examples: labels.len(),
        })
    }
}

fn input<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else {
        bail!("the trainer computes in f32")
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a fused operation needs a contiguous tensor")
    };
    Ok(&data[start..end])
}

/// (batch, h, w, c) → (batch·h·w, 9·c): the 3×3 neighbourhood of every pixel, zeros beyond the border.
struct Unfold;

/// Calls `f(offset in the patch row, offset in the image)` for every neighbour of a pixel that is inside.
fn neighbours(
    pixel: usize,
    (height, width, channels): (usize, usize, usize),
    mut f: impl FnMut(usize, usize),
) {
    let (image, y, x) = (
        pixel / (height * width),
        pixel / width % height,
        pixel % width,
    );
    for dy in 0..WINDOW {
        for dx in 0..WINDOW {
            // One is added and taken off again: usize has no −1.
            let (yy, xx) = (y + dy, x + dx);
            if (1..=height).contains(&yy) && (1..=width).contains(&xx) {
                f(
                    (dy * WINDOW + dx) * channels,
                    ((image * height + yy - 1) * width + xx - 1) * channels,
                );
            }
        }
    }
}

impl CustomOp1 for Unfold {
    fn name(&self) -> &'static str {
        "unfold"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, height, width, channels) = l.shape().dims4()?;
        let x = input(s, l)?;
        let patch = WINDOW * WINDOW * channels;
        let mut y = vec![0f32; batch * height * width * patch];
        for_rows(&mut y, patch, |pixel, out| {
            neighbours(pixel, (height, width, channels), |to, from| {
                out[to..to + channels].copy_from_slice(&x[from..from + channels]);
            });
        });
        Ok((CpuStorage::F32(y), (batch * height * width, patch).into()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (batch, height, width, channels) = x.dims4()?;
        let patch = WINDOW * WINDOW * channels;
        let image = height * width * channels;
        let mut dx = vec![0f32; batch * image];
        with_slice(grad, |grad| {
            // One image per row: no two rows write the same pixel.
            for_rows(&mut dx, image, |index, dx| {
                for pixel in 0..height * width {
                    let from = &grad[(index * height * width + pixel) * patch..][..patch];
                    neighbours(pixel, (height, width, channels), |at, to| {
                        let to = &mut dx[to..to + channels];
                        to.iter_mut().zip(&from[at..]).for_each(|(d, g)| *d += g);
                    });
                }
            });
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}

/// 2×2 max-pooling: (batch, h, w, c) → (batch, h/2, w/2, c). A tie goes to the first in reading order.
#[derive(Default)]
struct MaxPool {
    /// Where each maximum came from.
    winners: Mutex<Vec<u32>>,
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max-pool"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, height, width, channels) = l.shape().dims4()?;
        let x = input(s, l)?;
        let (out_height, out_width) = (height / 2, width / 2);
        let mut y = Vec::with_capacity(batch * out_height * out_width * channels);
        let mut winners = Vec::with_capacity(y.capacity());
        for row in 0..batch * out_height {
            let top = (row / out_height * height + row % out_height * 2) * width;
            for column in 0..out_width {
                for channel in 0..channels {
                    let corner = (top + 2 * column) * channels + channel;
                    let rest = [
                        corner + channels,
                        corner + width * channels,
                        corner + (width + 1) * channels,
                    ];
                    let best = rest
                        .into_iter()
                        .fold(corner, |best, at| if x[at] > x[best] { at } else { best });
                    y.push(x[best]);
                    winners.push(best as u32);
                }
            }
        }
        *self
            .winners
            .lock()
            .expect("no thread panics while it holds this lock") = winners;
        Ok((
            CpuStorage::F32(y),
            (batch, out_height, out_width, channels).into(),
        ))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let winners = self
            .winners
            .lock()
            .expect("no thread panics while it holds this lock");
        let mut dx = vec![0f32; x.elem_count()];
        with_slice(grad, |grad| {
            winners
                .iter()
                .zip(grad)
                .for_each(|(&at, g)| dx[at as usize] += g)
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}
