//! Golden vectors through the whole machines: N workers and one shard, exact wires.
//!
//! The archive is that of `common/tests/vectors`; `ARC_VECTORS` names another directory of the same form.

use crate::support::{algorithm, array, results, spec, step, tensor};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_worker::backend::MakeBackend;
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use serde_json::Value;
use std::io::Read;
use std::path::PathBuf;

/// Every vector of the archive.
pub fn check_all(backend: &MakeBackend) {
    for name in from::<Vec<String>>(&load("index.json")) {
        check(&name, backend);
    }
}

fn load(name: &str) -> Value {
    let directory = std::env::var_os("ARC_VECTORS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../common/tests/vectors"),
        PathBuf::from,
    );
    let plain = directory.join(name);
    let text = if plain.exists() {
        std::fs::read_to_string(plain).unwrap()
    } else {
        let file = std::fs::File::open(directory.join(format!("{name}.gz"))).unwrap();
        let mut text = String::new();
        flate2::read::GzDecoder::new(file)
            .read_to_string(&mut text)
            .unwrap();
        text
    };
    serde_json::from_str(&text).unwrap()
}

fn from<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

/// To 1e-5 of a value or of the root mean square of its array.
fn assert_close(what: &str, actual: &[f32], expected: &Value) {
    let expected: Vec<f64> = from(expected);
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    let rms = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!(
            (f64::from(*a) - e).abs() <= 1e-5 * e.abs().max(rms),
            "{what}[{i}]: {a} instead of {e}"
        );
    }
}

fn start(rounds: &Value, backend: &MakeBackend) -> MemoryCluster {
    let config = &rounds["config"];
    let algorithm = AlgorithmConfig {
        init: from(&config["init"]),
        eta: from(&config["eta"]),
        sketch_rank: from(&config["rank"]),
        seed: config["seed"].as_str().unwrap().parse().unwrap(),
        dense_below_elements: from(&config["min_elements"]),
        ..algorithm(from(&config["feedback"]), from(&config["density"]))
    };
    let tensors = rounds["tensors"].as_array().unwrap();
    let tensors = tensors
        .iter()
        .map(|t| tensor(t["name"].as_str().unwrap(), &from::<Vec<u64>>(&t["shape"])));
    let options = MemoryOptions {
        backend: MakeBackend::clone(backend),
        ..MemoryOptions::default()
    };
    MemoryCluster::new(
        spec(algorithm, 1, tensors.collect()),
        from(&config["workers"]),
        &options,
    )
    .unwrap()
}

fn check(name: &str, backend: &MakeBackend) {
    let rounds = load(name);
    let mut cluster = start(&rounds, backend);
    let workers: u16 = from(&rounds["config"]["workers"]);
    for (number, expected) in rounds["steps"].as_array().unwrap().iter().enumerate() {
        let outcomes = step(&mut cluster, &from(&rounds["gradients"][number]));
        assert!(outcomes.iter().all(|outcome| !outcome.unwrap().skipped));
        for rank in 0..workers {
            for (got, expected) in results(&cluster, rank)
                .iter()
                .zip(expected.as_array().unwrap())
            {
                let what = format!(
                    "{name}, step {number}, tensor {}, worker {rank}",
                    got.tensor
                );
                assert_close(&what, &got.values, &expected["result"]);
                let selected: Option<Vec<u32>> = expected.get("selected").map(from);
                let feedback = rounds["config"]["feedback"].as_str().unwrap();
                // Under ef21 the whole estimate is the result.
                if !feedback.starts_with("ef21") {
                    assert_eq!(got.rows, selected, "{what}");
                }
            }
        }
    }
    check_state(name, &rounds, &cluster, workers);
}

fn check_state(name: &str, rounds: &Value, cluster: &MemoryCluster, workers: u16) {
    let mut compared = 0;
    for rank in 0..workers {
        for (id, tensor) in rounds["tensors"].as_array().unwrap().iter().enumerate() {
            for field in ["residual", "local", "momentum", "global"] {
                let saved = array(
                    cluster,
                    rank,
                    &format!("{field}/{}", tensor["name"].as_str().unwrap()),
                );
                let expected = match field {
                    "global" => &rounds["state"]["global"][id],
                    _ => &rounds["state"][field][usize::from(rank)][id],
                };
                if let (Some(saved), false) = (saved, expected.is_null()) {
                    assert_close(
                        &format!("{name}, {field}, tensor {id}, worker {rank}"),
                        &saved,
                        expected,
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 0 || rounds["config"]["feedback"] == "none");
}
