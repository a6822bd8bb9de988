//! The "robust shifted objective" of the ARC-Top-K paper: a problem on which every worker's largest rows are noise.
//!
//! `cargo run -p arc-topk-common --example shifted_objective`
//!
//! N = 10 workers, w ∈ R²⁰⁰⁰ in 200 blocks (rows) of 10; blocks 0–149 are noise blocks w_j, block 150 is the signal block
//! w_s, the rest is unused. Worker i has sign s_i = +1 (first five) or −1, shift ξ = 100·s_i and coupling γ = 5·s_i, and the loss
//!
//! f_i(w) = ½‖w_s − 1‖² + (1/150)·Σ_j ½‖w_j − (ξ + γ·w_s)‖².
//!
//! In the mean over the workers the shifts cancel: the optimum has w_j = 0 and 26·w_s = 1 − 500, so w_s = −499/26. The printed
//! distance is that of the whole of w to it, ‖w − w*‖ (unused blocks have their optimum at the start, 0).
//!
//! From w = 0, learning rate 0.001, 1000 steps, gradients with Gaussian noise of deviation 0.001 in every coordinate, density 0.05
//! (10 rows), sketch rank 2. Feedback ef21 from zeros acts on the momentum v ← 0.5 v + g. ef21m with η = 0.5 averages the same
//! gradients with half the weight, so it runs at twice the learning rate and should give the same line: two rules, one algorithm.

use arc_topk_common::compress::fast::Fast;
use arc_topk_common::compress::round::{Round, RoundCodecs};
use arc_topk_common::compress::{
    FeedbackParams, ProjectionKey, SketchShape, TensorState, ValueCodec, projection,
};
use arc_topk_common::config::algorithm::{
    Compressor, Feedback, ProjectionKind, RoundKind, ValueType,
};

const WORKERS: usize = 10;
const BLOCKS: usize = 200;
const WIDTH: usize = 10;
const NOISE_BLOCKS: usize = 150;
const SIGNAL: core::ops::Range<usize> = NOISE_BLOCKS * WIDTH..(NOISE_BLOCKS + 1) * WIDTH;
const SIGNAL_OPTIMUM: f64 = -499.0 / 26.0;
const GRADIENT_NOISE: f64 = 0.001;
const LEARNING_RATE: f64 = 0.001;
const MOMENTUM: f32 = 0.5;
const DENSITY: f32 = 0.05;
const RANK: usize = 2;
const STEPS: usize = 1000;
const PRINT_EVERY: usize = 200;

/// One line of the table.
#[derive(Clone, Copy, Debug)]
struct Method {
    name: &'static str,
    compressor: Compressor,
    feedback: Feedback,
}

const METHODS: [Method; 5] = [
    Method {
        name: "dense",
        compressor: Compressor::Dense,
        feedback: Feedback::None,
    },
    Method {
        name: "randk, ef21",
        compressor: Compressor::Randk,
        feedback: Feedback::Ef21,
    },
    Method {
        name: "local topk, ef21",
        compressor: Compressor::Topk,
        feedback: Feedback::Ef21,
    },
    Method {
        name: "arc, ef21",
        compressor: Compressor::Arc,
        feedback: Feedback::Ef21,
    },
    Method {
        name: "arc, ef21m",
        compressor: Compressor::Arc,
        feedback: Feedback::Ef21m,
    },
];

/// Gradient of f_i at w, with noise.
fn gradient(worker: usize, w: &[f64], step: u64) -> Vec<f32> {
    let sign = if worker < WORKERS / 2 { 1.0 } else { -1.0 };
    let (shift, coupling, share) = (100.0 * sign, 5.0 * sign, 1.0 / NOISE_BLOCKS as f64);
    let mut g = vec![0f64; BLOCKS * WIDTH];
    for c in 0..WIDTH {
        let signal = w[SIGNAL.start + c];
        g[SIGNAL.start + c] = signal - 1.0;
        for block in 0..NOISE_BLOCKS {
            let error = w[block * WIDTH + c] - (shift + coupling * signal);
            g[block * WIDTH + c] = share * error;
            g[SIGNAL.start + c] -= share * coupling * error;
        }
    }
    // The projection's Gaussian stream is a seeded source of normal noise; "rank" = all coordinates, "tensor" = worker.
    let shape = SketchShape {
        width: 1,
        rank: BLOCKS * WIDTH,
        kind: ProjectionKind::Gaussian,
    };
    let noise = projection(
        shape,
        ProjectionKey {
            seed: 1,
            tensor: worker as u32,
            step,
        },
    );
    g.iter()
        .zip(noise)
        .map(|(g, z)| (g + GRADIENT_NOISE * f64::from(z)) as f32)
        .collect()
}

/// ‖w − w*‖.
fn distance(w: &[f64]) -> f64 {
    let optimum = |i: usize| {
        if SIGNAL.contains(&i) {
            SIGNAL_OPTIMUM
        } else {
            0.0
        }
    };
    w.iter()
        .enumerate()
        .map(|(i, x)| (x - optimum(i)).powi(2))
        .sum::<f64>()
        .sqrt()
}

/// Distances to the optimum at steps 0, `every`, 2·`every`, … up to `steps`.
fn simulate(method: Method, steps: usize, every: usize) -> Vec<f64> {
    let mut w = vec![0f64; BLOCKS * WIDTH];
    let mut momenta = vec![vec![0f32; BLOCKS * WIDTH]; WORKERS];
    let mut states = vec![TensorState::new(method.feedback, BLOCKS, WIDTH); WORKERS];
    let normalised = method.feedback == Feedback::Ef21m;
    let lr = if normalised {
        LEARNING_RATE / f64::from(1.0 - MOMENTUM)
    } else {
        LEARNING_RATE
    };
    let mut distances = vec![distance(&w)];
    for step in 0..steps {
        let mut buffers: Vec<Vec<f32>> = (0..WORKERS)
            .map(|worker| gradient(worker, &w, step as u64))
            .collect();
        if !normalised {
            for (v, buffer) in momenta.iter_mut().zip(&mut buffers) {
                v.iter_mut()
                    .zip(buffer.iter())
                    .for_each(|(v, g)| *v = MOMENTUM * *v + g);
                buffer.copy_from_slice(v);
            }
        }
        round(method, step as u64).run(&mut states, &mut buffers);
        w.iter_mut()
            .zip(&buffers[0])
            .for_each(|(w, g)| *w -= lr * f64::from(*g));
        if (step + 1).is_multiple_of(every) {
            distances.push(distance(&w));
        }
    }
    distances
}

fn round(method: Method, step: u64) -> Round<'static> {
    let exact = ValueCodec {
        value_type: ValueType::F32,
        quant_block: 64,
    };
    let dense = method.compressor == Compressor::Dense;
    Round {
        kernels: &Fast,
        compressor: method.compressor,
        kind: if dense {
            RoundKind::Dense
        } else {
            RoundKind::Sparse { density: DENSITY }
        },
        energy: 1.0,
        params: FeedbackParams {
            eta: 1.0 - MOMENTUM,
            decay: 1.0,
        },
        shape: SketchShape {
            width: WIDTH,
            rank: RANK,
            kind: ProjectionKind::Rademacher,
        },
        key: ProjectionKey {
            seed: 42,
            tensor: 0,
            step,
        },
        codecs: RoundCodecs {
            up: exact,
            down: exact,
            sketch: exact,
            dense: exact,
        },
    }
}

#[allow(clippy::print_stdout, reason = "an example's output")]
fn main() {
    print!("{:<18}", "distance at step");
    (0..=STEPS)
        .step_by(PRINT_EVERY)
        .for_each(|step| print!("{step:>12}"));
    println!();
    for method in METHODS {
        print!("{:<18}", method.name);
        simulate(method, STEPS, PRINT_EVERY)
            .iter()
            .for_each(|d| print!("{d:>12.3e}"));
        println!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_200_steps_arc_follows_dense_and_leaves_local_topk_behind() {
        let [dense, _, topk, arc, arc_momentum] =
            METHODS.map(|method| simulate(method, 200, 200)[1]);
        for arc in [arc, arc_momentum] {
            assert!(arc <= 3.0 * dense, "arc {arc:e}, dense {dense:e}");
            assert!(10.0 * arc <= topk, "arc {arc:e}, local topk {topk:e}");
        }
    }
}
