//! Golden vectors of an independent float64 oracle, for the reference and the fast kernels.
//!
//! Read from `tests/vectors/*.json.gz`, or from the directory that `ARC_VECTORS` names (the same files, `.json`
//! or `.json.gz`). Rows must agree exactly. A float must agree to 1e-5 of its own size or of the root mean square of its array
//! (of one tensor and field): sums that cancel cannot keep more digits in f32 than their terms have.
#![allow(clippy::unwrap_used, reason = "tests")]

use arc_topk_common::compress::fast::Fast;
use arc_topk_common::compress::reference::Reference;
use arc_topk_common::compress::round::{Round, RoundCodecs};
use arc_topk_common::compress::{
    FeedbackParams, Kernels, ProjectionKey, SketchShape, TensorState, ValueCodec, philox,
    projection, rows_to_keep,
};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{
    Compressor, Feedback, Init, ProjectionKind, RoundKind, ValueType,
};
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

/// `name` (a .json file) from the vectors' directory, compressed or not.
fn load<T: DeserializeOwned>(name: &str) -> T {
    let directory = std::env::var_os("ARC_VECTORS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors"),
        PathBuf::from,
    );
    let plain = directory.join(name);
    let text = if plain.exists() {
        fs::read_to_string(plain).unwrap()
    } else {
        let packed = directory.join(format!("{name}.gz"));
        let file = fs::File::open(&packed).unwrap_or_else(|e| panic!("{}: {e}", packed.display()));
        let mut text = String::new();
        flate2::read::GzDecoder::new(file)
            .read_to_string(&mut text)
            .unwrap();
        text
    };
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[derive(Deserialize)]
struct PhiloxVector {
    counter: [String; 4],
    key: [String; 2],
    output: [String; 4],
}

#[derive(Deserialize)]
struct ProjectionVector {
    seed: String,
    step: u64,
    tensor: u32,
    width: usize,
    rank: usize,
    signs: Vec<f32>,
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
    min_elements: u32,
}

#[derive(Deserialize)]
struct Tensor {
    shape: Vec<usize>,
    sparse: bool,
}

#[derive(Deserialize)]
struct TensorStep {
    dense: bool,
    k: Option<usize>,
    sketch_mean: Option<Vec<f64>>,
    score: Option<Vec<f64>>,
    selected: Option<Vec<u32>>,
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

fn assert_close(what: &str, actual: impl IntoIterator<Item = impl Into<f64>>, expected: &[f64]) {
    let actual: Vec<f64> = actual.into_iter().map(Into::into).collect();
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    let rms = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!(
            (a - e).abs() <= TOLERANCE * e.abs().max(rms),
            "{what}[{i}]: {a} instead of {e}"
        );
    }
}

/// Runs a file and compares every number in it.
fn check(name: &str, kernels: &dyn Kernels) {
    let rounds: Rounds = load(name);
    let config = &rounds.config;
    let algorithm = AlgorithmConfig {
        feedback: config.feedback,
        init: config.init,
        density: config.density,
        warmup_updates: 0,
        ..AlgorithmConfig::default()
    };
    let mut states: Vec<Vec<TensorState>> = rounds
        .tensors
        .iter()
        .map(|tensor| initial(tensor, config))
        .collect();
    for (step, (gradients, expected)) in rounds.gradients.iter().zip(&rounds.steps).enumerate() {
        for (id, (tensor, expected)) in rounds.tensors.iter().zip(expected).enumerate() {
            let what = format!("{name}, step {step}, tensor {id}");
            let mut buffers: Vec<Vec<f32>> =
                gradients.iter().map(|worker| worker[id].clone()).collect();
            let kind = if tensor.sparse {
                algorithm.round_kind(step as u64)
            } else {
                RoundKind::Dense
            };
            assert_eq!(
                kind == RoundKind::Dense,
                expected.dense,
                "{what}: kind of round"
            );
            let round = Round {
                kernels,
                compressor: Compressor::Arc,
                kind,
                energy: 1.0,
                params: FeedbackParams {
                    eta: config.eta,
                    decay: 1.0,
                },
                shape: SketchShape {
                    width: states[id][0].width,
                    rank: config.rank,
                    kind: ProjectionKind::Rademacher,
                },
                key: ProjectionKey {
                    seed: config.seed.parse().unwrap(),
                    tensor: id as u32,
                    step: step as u64,
                },
                codecs: RoundCodecs {
                    up: F32,
                    down: F32,
                    sketch: F32,
                    dense: F32,
                },
            };
            let trace = round.run(&mut states[id], &mut buffers);
            if let Some(selected) = &expected.selected {
                assert_eq!(&trace.selected, selected, "{what}: rows");
                assert_eq!(
                    expected.k,
                    Some(rows_to_keep(config.density, states[id][0].rows)),
                    "{what}: K"
                );
                assert_close(
                    &format!("{what}, sketch"),
                    trace.sketch_mean,
                    expected.sketch_mean.as_ref().unwrap(),
                );
                assert_close(
                    &format!("{what}, score"),
                    trace.scores,
                    expected.score.as_ref().unwrap(),
                );
                assert_close(
                    &format!("{what}, values"),
                    trace.mean,
                    expected.values_mean.as_ref().unwrap(),
                );
            }
            for buffer in buffers {
                assert_close(&format!("{what}, result"), buffer, &expected.result);
            }
        }
    }
    check_state(name, &rounds.state, &states);
}

fn initial(tensor: &Tensor, config: &Config) -> Vec<TensorState> {
    let elements: usize = tensor.shape.iter().product();
    let sparse = tensor.shape.len() > 1 && elements >= config.min_elements as usize;
    assert_eq!(sparse, tensor.sparse);
    let state = if sparse {
        TensorState::new(config.feedback, tensor.shape[0], elements / tensor.shape[0])
    } else {
        TensorState::for_dense_tensor(config.feedback, elements, false)
    };
    vec![state; config.workers]
}

/// `states[tensor][worker]`.
fn check_state(name: &str, expected: &State, states: &[Vec<TensorState>]) {
    for (id, workers) in states.iter().enumerate() {
        for (i, state) in workers.iter().enumerate() {
            let of = |field: &[Vec<Option<Vec<f64>>>]| {
                field.get(i).and_then(|worker| worker[id].clone())
            };
            let fields = [
                ("residual", &state.residual, of(&expected.residual)),
                ("local", &state.local, of(&expected.local)),
                ("momentum", &state.momentum, of(&expected.momentum)),
                (
                    "global",
                    &state.global,
                    expected.global.get(id).cloned().flatten(),
                ),
            ];
            for (field, actual, expected) in fields {
                // A tensor without state: the oracle writes null, or a residual of zeros.
                if let Some(expected) =
                    expected.filter(|e| !actual.is_empty() || e.iter().any(|x| *x != 0.0))
                {
                    assert_close(
                        &format!("{name}, {field}, tensor {id}, worker {i}"),
                        actual.clone(),
                        &expected,
                    );
                }
            }
        }
    }
}

#[test]
fn philox_known_answers() {
    let word = |s: &String| u32::from_str_radix(s, 16).unwrap();
    for vector in load::<Vec<PhiloxVector>>("philox.json") {
        let output = philox::philox4x32_10(
            vector.counter.each_ref().map(word),
            vector.key.each_ref().map(word),
        );
        assert_eq!(output, vector.output.each_ref().map(word));
    }
}

#[test]
fn projection_signs() {
    for vector in load::<Vec<ProjectionVector>>("projection.json") {
        let shape = SketchShape {
            width: vector.width,
            rank: vector.rank,
            kind: ProjectionKind::Rademacher,
        };
        let key = ProjectionKey {
            seed: vector.seed.parse().unwrap(),
            tensor: vector.tensor,
            step: vector.step,
        };
        assert_eq!(
            projection::projection(shape, key),
            vector.signs,
            "seed {}",
            vector.seed
        );
    }
}

#[test]
fn reference_rounds() {
    for name in load::<Vec<String>>("index.json") {
        check(&name, &Reference);
    }
}

#[test]
fn fast_rounds() {
    for name in load::<Vec<String>>("index.json") {
        check(&name, &Fast);
    }
}
