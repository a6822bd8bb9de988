//! A round of one tensor in one process: what the network does between N workers and one shard, without the network.
//!
//! For tests, examples and simulations; the bytes and the order of sums are those of the real system.

use super::{FeedbackParams, Kernels, ProjectionKey, SketchShape, TensorState, ValueCodec};
use super::{randk_rows, rows_to_keep, score, select_energy, select_top_k};
use crate::config::algorithm::{Compressor, RoundKind};

/// Codecs of the four kinds of values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoundCodecs {
    /// Values that workers push.
    pub up: ValueCodec,
    /// Their mean.
    pub down: ValueCodec,
    /// Sketches.
    pub sketch: ValueCodec,
    /// Dense rounds, both ways.
    pub dense: ValueCodec,
}

/// Everything about a round but the workers' data.
#[derive(Clone, Copy)]
pub struct Round<'a> {
    /// The loops to run.
    pub kernels: &'a dyn Kernels,
    /// How the tensor is thinned out.
    pub compressor: Compressor,
    /// Dense, or sparse at a density.
    pub kind: RoundKind,
    /// Share of the sketch's energy at which arc takes no more rows, in (0, 1]; 1 takes as many as the density allows.
    pub energy: f32,
    /// Parameters of the feedback rule.
    pub params: FeedbackParams,
    /// Width, rank and distribution.
    pub shape: SketchShape,
    /// Seed, tensor and step.
    pub key: ProjectionKey,
    /// Types on the wire.
    pub codecs: RoundCodecs,
}

/// What the shard saw and decided. Empty where the round has no such phase.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct RoundTrace {
    /// Some worker's input was not finite: nothing was changed but the buffers, which hold garbage.
    pub skipped: bool,
    /// Averaged sketch, m×r.
    pub sketch_mean: Vec<f32>,
    /// Scores of the rows.
    pub scores: Vec<f64>,
    /// Rows whose mean was returned, ascending.
    pub selected: Vec<u32>,
    /// What each worker sent, encoded.
    pub sent: Vec<Vec<u8>>,
    /// Mean of the selected rows as the workers decoded it.
    pub mean: Vec<f32>,
}

impl Round<'_> {
    /// Runs the round. `buffers` hold the gradients (m·n each) and afterwards the result, equal on all workers.
    ///
    /// # Panics
    /// If there is no worker, or states and buffers disagree in number or shape.
    pub fn run(&self, states: &mut [TensorState], buffers: &mut [Vec<f32>]) -> RoundTrace {
        assert!(
            !states.is_empty() && states.len() == buffers.len(),
            "one state and one buffer per worker"
        );
        let dense = self.kind == RoundKind::Dense;
        let rows = 0..states[0].rows;
        let mut finite = true;
        for (state, buffer) in states.iter_mut().zip(buffers.iter_mut()) {
            finite &= self
                .kernels
                .input(state, self.params, dense, buffer, rows.clone());
        }
        if !finite {
            for (state, buffer) in states.iter_mut().zip(buffers.iter()) {
                state.withdraw(buffer, rows.clone());
            }
            return RoundTrace {
                skipped: true,
                ..RoundTrace::default()
            };
        }
        match (self.kind, self.compressor) {
            (RoundKind::Dense, _) | (_, Compressor::Dense) => self.whole(states, buffers),
            (RoundKind::Sparse { density }, compressor) => {
                let keep = rows_to_keep(density, rows.len());
                match compressor {
                    Compressor::Topk => self.own_rows(states, buffers, keep),
                    Compressor::Randk => {
                        let selected = randk_rows(self.key, rows, keep);
                        self.shared_rows(
                            states,
                            buffers,
                            RoundTrace {
                                selected,
                                ..RoundTrace::default()
                            },
                        )
                    }
                    Compressor::Arc | Compressor::Dense => {
                        let trace = self.select(states, buffers, keep);
                        self.shared_rows(states, buffers, trace)
                    }
                }
            }
        }
    }

    fn whole(&self, states: &mut [TensorState], buffers: &mut [Vec<f32>]) -> RoundTrace {
        let (rows, width) = (states[0].rows, states[0].width);
        let selected: Vec<u32> = (0..rows as u32).collect();
        let codec = self.codecs.dense;
        let sent = self.gather(states, buffers, true, codec, |_| &selected);
        let mean = round_trip(codec, mean(codec, &sent, rows * width));
        for ((state, buffer), sent) in states.iter_mut().zip(buffers).zip(&sent) {
            self.kernels.commit(
                state,
                true,
                buffer,
                0..rows,
                &selected,
                Some(sent),
                codec,
                &mean,
            );
        }
        RoundTrace {
            selected,
            sent,
            mean,
            ..RoundTrace::default()
        }
    }

    /// Sketch, average, score, choose.
    fn select(&self, states: &[TensorState], buffers: &[Vec<f32>], keep: usize) -> RoundTrace {
        let rows = states[0].rows;
        let mut sketch = vec![0.0; rows * self.shape.rank];
        let sketches: Vec<Vec<u8>> = states
            .iter()
            .zip(buffers)
            .map(|(state, buffer)| {
                self.kernels
                    .sketch(state, self.shape, self.key, buffer, 0..rows, &mut sketch);
                let mut bytes = Vec::new();
                self.codecs.sketch.encode(&sketch, &mut bytes);
                bytes
            })
            .collect();
        let sketch_mean = mean(self.codecs.sketch, &sketches, rows * self.shape.rank);
        let scores = score(&sketch_mean, self.shape.rank);
        let selected = select_energy(&scores, keep, self.energy);
        RoundTrace {
            sketch_mean,
            scores,
            selected,
            ..RoundTrace::default()
        }
    }

    /// Values of the rows in `trace.selected`, the same on every worker.
    fn shared_rows(
        &self,
        states: &mut [TensorState],
        buffers: &mut [Vec<f32>],
        trace: RoundTrace,
    ) -> RoundTrace {
        let (rows, width, selected) = (states[0].rows, states[0].width, &trace.selected);
        let sent = self.gather(states, buffers, false, self.codecs.up, |_| selected);
        let mean = round_trip(
            self.codecs.down,
            mean(self.codecs.up, &sent, selected.len() * width),
        );
        for ((state, buffer), sent) in states.iter_mut().zip(buffers).zip(&sent) {
            self.kernels.commit(
                state,
                false,
                buffer,
                0..rows,
                selected,
                Some(sent),
                self.codecs.up,
                &mean,
            );
        }
        RoundTrace {
            sent,
            mean,
            ..trace
        }
    }

    /// Local top-k: each worker its own rows; the mean over the union counts absent rows as zeros.
    fn own_rows(
        &self,
        states: &mut [TensorState],
        buffers: &mut [Vec<f32>],
        keep: usize,
    ) -> RoundTrace {
        let (rows, width, workers) = (states[0].rows, states[0].width, states.len());
        let mut energy = vec![0.0; rows];
        let own: Vec<Vec<u32>> = (0..workers)
            .map(|i| {
                self.kernels
                    .energy(&states[i], &buffers[i], 0..rows, &mut energy);
                select_top_k(&energy, keep)
            })
            .collect();
        let sent = self.gather(states, buffers, false, self.codecs.up, |i| &own[i]);
        let mut selected: Vec<u32> = own.concat();
        selected.sort_unstable();
        selected.dedup();
        let mut sum = vec![0.0; selected.len() * width];
        for (own, bytes) in own.iter().zip(&sent) {
            let mut values = vec![0.0; own.len() * width];
            self.codecs.up.decode(bytes, &mut values);
            for (row, values) in own.iter().zip(values.chunks_exact(width)) {
                let at = selected.partition_point(|r| r < row) * width;
                sum[at..at + width]
                    .iter_mut()
                    .zip(values)
                    .for_each(|(sum, x)| *sum += x);
            }
        }
        sum.iter_mut().for_each(|x| *x *= 1.0 / workers as f32);
        let mean = round_trip(self.codecs.down, sum);
        for (i, (state, buffer)) in states.iter_mut().zip(buffers).enumerate() {
            let (own, sent) = (&own[i], Some(&sent[i][..]));
            self.kernels.commit_own_rows(
                state,
                buffer,
                0..rows,
                own,
                sent,
                self.codecs.up,
                &selected,
                &mean,
            );
        }
        RoundTrace {
            selected,
            sent,
            mean,
            ..RoundTrace::default()
        }
    }

    fn gather<'r>(
        &self,
        states: &[TensorState],
        buffers: &[Vec<f32>],
        dense: bool,
        codec: ValueCodec,
        rows: impl Fn(usize) -> &'r [u32],
    ) -> Vec<Vec<u8>> {
        let workers = states.iter().zip(buffers).enumerate();
        workers
            .map(|(i, (state, buffer))| {
                let mut bytes = Vec::new();
                self.kernels
                    .gather(state, dense, buffer, rows(i), codec, &mut bytes);
                bytes
            })
            .collect()
    }
}

/// Sum in rank order, times 1/N.
fn mean(codec: ValueCodec, contributions: &[Vec<u8>], values: usize) -> Vec<f32> {
    let mut sum = vec![0.0; values];
    for bytes in contributions {
        codec.decode_add(bytes, &mut sum);
    }
    let scale = 1.0 / contributions.len() as f32;
    sum.iter_mut().for_each(|x| *x *= scale);
    sum
}

/// What is left of values after the wire.
fn round_trip(codec: ValueCodec, mut values: Vec<f32>) -> Vec<f32> {
    let mut bytes = Vec::new();
    codec.encode(&values, &mut bytes);
    codec.decode(&bytes, &mut values);
    values
}
