//! The golden vectors of an independent f64 oracle, through the kernels. Only the shard's part (means and choice of rows) is the
//! common crate's. The files, and what "close" means, are those of `common/tests/vectors.rs`.

use crate::device::{Device, End, Spec, Wanted};
use crate::memory::values_of;
use arc_topk_common::compress::{
    FeedbackParams, ProjectionKey, TensorState, ValueCodec, rows_to_keep, score, select_top_k,
};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Feedback, Init, ProjectionKind, RoundKind, ValueType};
use arc_topk_kernels::{CommitFlags, Element, PieceSource};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fs;
use std::io::Read;
use std::path::PathBuf;

const TOLERANCE: f64 = 1e-5;
const F32: ValueCodec = ValueCodec {
    value_type: ValueType::F32,
    quant_block: 64,
};

fn load<T: DeserializeOwned>(name: &str) -> T {
    let directory = std::env::var_os("ARC_VECTORS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../common/tests/vectors"),
        PathBuf::from,
    );
    let plain = directory.join(name);
    let mut text = String::new();
    if plain.exists() {
        text = fs::read_to_string(plain).unwrap();
    } else {
        let packed = directory.join(format!("{name}.gz"));
        let file = fs::File::open(&packed).unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
        flate2::read::GzDecoder::new(file)
            .read_to_string(&mut text)
            .unwrap();
    }
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[derive(Deserialize)]
struct Rounds {
    config: Config,
    tensors: Vec<Tensor>,
    gradients: Vec<Vec<Vec<Vec<f32>>>>,
    steps: Vec<Vec<TensorStep>>,
    state: State,
}

#[derive(Deserialize)]
struct Config {
    feedback: Feedback,
    workers: usize,
    density: f32,
    rank: usize,
    seed: String,
    eta: f32,
    init: Init,
}

#[derive(Deserialize)]
struct Tensor {
    shape: Vec<usize>,
    sparse: bool,
}

#[derive(Deserialize)]
struct TensorStep {
    dense: bool,
    selected: Option<Vec<u32>>,
    sketch_mean: Option<Vec<f64>>,
    values_mean: Option<Vec<f64>>,
    result: Vec<f64>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct State {
    residual: Vec<Vec<Option<Vec<f64>>>>,
    local: Vec<Vec<Option<Vec<f64>>>>,
    momentum: Vec<Vec<Option<Vec<f64>>>>,
    global: Vec<Option<Vec<f64>>>,
}

fn assert_close(what: &str, actual: &[f32], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    let rms = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let near = (f64::from(*a) - e).abs() <= TOLERANCE * e.abs().max(rms);
        assert!(near, "{what}[{i}]: {a} instead of {e}");
    }
}

fn spec(tensor: &Tensor, feedback: Feedback) -> Spec {
    let elements: usize = tensor.shape.iter().product();
    let state = if tensor.sparse {
        TensorState::new(feedback, tensor.shape[0], elements / tensor.shape[0])
    } else {
        TensorState::for_dense_tensor(feedback, elements, false)
    };
    Spec {
        state,
        elements,
        element: Element::F32,
        cuts: Vec::new(),
        flat: !tensor.sparse,
        shift: 0,
    }
}

fn mean(contributions: &[Vec<u8>], values: usize) -> Vec<f32> {
    let mut sum = vec![0.0; values];
    for bytes in contributions {
        F32.decode_add(bytes, &mut sum);
    }
    sum.iter_mut()
        .for_each(|x| *x /= contributions.len() as f32);
    sum
}

/// What one array of every worker is.
fn encode(workers: &mut [Device], wanted: Wanted<'_>) -> Vec<Vec<u8>> {
    workers
        .iter_mut()
        .map(|worker| worker.encode(&[wanted], 0).0.remove(0))
        .collect()
}

/// All devices of a job: `devices[tensor][worker]`. A device holds one tensor, since the oracle's rounds are a tensor's.
struct Job {
    rounds: Rounds,
    devices: Vec<Vec<Device>>,
}

impl Job {
    fn new(rounds: Rounds) -> Self {
        let config = &rounds.config;
        let params = FeedbackParams {
            eta: config.eta,
            decay: 1.0,
        };
        let of = |tensor: &Tensor| {
            let spec = spec(tensor, config.feedback);
            (0..config.workers)
                .map(|i| Device::new(std::slice::from_ref(&spec), config.rank, params, i as u64))
                .collect()
        };
        let devices = rounds.tensors.iter().map(of).collect();
        Self { rounds, devices }
    }

    fn round(&mut self, name: &str, step: usize, id: usize, dense: bool) {
        let (tensor, expected) = (&self.rounds.tensors[id], &self.rounds.steps[step][id]);
        let what = format!("{name}, step {step}, tensor {id}");
        assert_eq!(dense, expected.dense, "{what}: kind of round");
        let workers = &mut self.devices[id];
        let (rank, rows) = (self.rounds.config.rank, workers[0].places[0].rows.len());
        let width = tensor.shape.iter().product::<usize>() / rows;
        // Each worker's device numbers its tensors from 0: the seed must not depend on it, so it is told the tensor's id.
        let key = ProjectionKey {
            seed: self.rounds.config.seed.parse().unwrap(),
            tensor: id as u32,
            step: step as u64,
        };
        for (worker, gradients) in workers.iter_mut().zip(&self.rounds.gradients[step]) {
            worker.set_id(id as u32);
            worker.set_gradient(0, &gradients[id]);
            let (finite, _) = worker.sketch(key, ProjectionKind::Rademacher, dense, false);
            assert_eq!(finite, [true], "{what}");
        }
        let whole = Wanted {
            segment: 0,
            source: PieceSource::Input,
            rows: None,
            values: rows * width,
            codec: F32,
            dense_round: dense,
        };
        let mut selected = Vec::new();
        let mut sent = if dense {
            encode(workers, whole)
        } else {
            let values = rows * rank;
            let sketches = encode(
                workers,
                Wanted {
                    source: PieceSource::Sketch,
                    values,
                    ..whole
                },
            );
            let sketch = mean(&sketches, values);
            assert_close(
                &format!("{what}, sketch"),
                &sketch,
                expected.sketch_mean.as_ref().unwrap(),
            );
            selected = select_top_k(
                &score(&sketch, rank),
                rows_to_keep(self.rounds.config.density, rows),
            );
            assert_eq!(Some(&selected), expected.selected.as_ref(), "{what}: rows");
            encode(
                workers,
                Wanted {
                    rows: Some(&selected),
                    values: selected.len() * width,
                    ..whole
                },
            )
        };
        let values = sent[0].len() / 4;
        let mean = mean(&sent, values);
        if let Some(expected) = &expected.values_mean {
            assert_close(&format!("{what}, values"), &mean, expected);
        }
        let mut bytes = Vec::new();
        F32.encode(&mean, &mut bytes);
        let flags = if dense {
            CommitFlags::ALL
        } else {
            CommitFlags::default()
        };
        for (worker, sent) in workers.iter_mut().zip(&mut sent) {
            let end = End {
                rows: &selected,
                sent,
                up: F32,
                mean: &bytes,
                down: F32,
                flags: flags.and(CommitFlags::COUNTED),
            };
            worker.commit(&[end]);
            let result: Vec<f32> = values_of(&worker.gradient(0));
            assert_close(&format!("{what}, result"), &result, &expected.result);
        }
    }

    fn check_state(&self, name: &str) {
        let expected = &self.rounds.state;
        for (id, workers) in self.devices.iter().enumerate() {
            let like = spec(&self.rounds.tensors[id], self.rounds.config.feedback).state;
            for (i, worker) in workers.iter().enumerate() {
                let state = worker.state(0, &like);
                let of = |field: &[Vec<Option<Vec<f64>>>]| {
                    field.get(i).and_then(|worker| worker[id].clone())
                };
                for (field, actual, expected) in [
                    ("residual", &state.residual, of(&expected.residual)),
                    ("local", &state.local, of(&expected.local)),
                    ("momentum", &state.momentum, of(&expected.momentum)),
                    (
                        "global",
                        &state.global,
                        expected.global.get(id).cloned().flatten(),
                    ),
                ] {
                    // A tensor without state: the oracle writes null, or a residual of zeros.
                    if let Some(expected) =
                        expected.filter(|e| !actual.is_empty() || e.iter().any(|x| *x != 0.0))
                    {
                        assert_close(
                            &format!("{name}, {field}, tensor {id}, worker {i}"),
                            actual,
                            &expected,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rounds_of_the_golden_vectors() {
    for name in load::<Vec<String>>("index.json") {
        let rounds: Rounds = load(&name);
        let algorithm = AlgorithmConfig {
            feedback: rounds.config.feedback,
            init: rounds.config.init,
            density: rounds.config.density,
            warmup_updates: 0,
            ..AlgorithmConfig::default()
        };
        let mut job = Job::new(rounds);
        for step in 0..job.rounds.steps.len() {
            for id in 0..job.rounds.tensors.len() {
                let sparse = job.rounds.tensors[id].sparse;
                let dense = !sparse || algorithm.round_kind(step as u64) == RoundKind::Dense;
                job.round(&name, step, id, dense);
            }
        }
        job.check_state(&name);
    }
}
