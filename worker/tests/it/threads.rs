//! Training gives the same parameters to the bit with 1, 2 and 4 threads.
//!
//! candle and rayon take their number of threads from the environment of the process, so every run is a process of its
//! own: this test starts itself again.

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::train::TrainArgs;
use arc_topk_common::plan::PlanSpec;
use arc_topk_worker::memory::{MemoryCluster, MemoryOptions};
use arc_topk_worker::train::{Quiet, TrainConfig, parameters, run};
use clap::Parser;
use std::process::Command;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    train: TrainArgs,
}

const CHILD: &str = "ARC_TEST_PRINT_DIGEST";

/// Large enough that matrix products and fused operations are split among threads.
fn digest() -> String {
    let line =
        "test --steps 4 --batch 4 --context 96 --layers 2 --lr-warmup 1 --validate-batches 1";
    let args = Cli::parse_from(line.split_whitespace()).train;
    let config = TrainConfig::new("threads", args);
    let algorithm = AlgorithmConfig {
        warmup_updates: 1,
        ..AlgorithmConfig::default()
    };
    let spec = PlanSpec {
        trainer: String::new(),
        algorithm,
        shards: 1,
        tensors: parameters(&config.args).unwrap(),
    };
    let mut reducers = MemoryCluster::reducers(spec, 1, &MemoryOptions::default()).unwrap();
    run(&config, &mut reducers[0], &mut Quiet).unwrap().digest
}

#[test]
fn parameters_do_not_depend_on_the_number_of_threads() {
    if std::env::var_os(CHILD).is_some() {
        println!("digest={}", digest());
        return;
    }
    let digests = ["1", "2", "4"].map(|threads| {
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "threads::parameters_do_not_depend_on_the_number_of_threads",
                "--nocapture",
            ])
            .env(CHILD, "1")
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout).into_owned();
        let found = text
            .lines()
            .find_map(|line| Some(line.split_once("digest=")?.1.to_owned()));
        found.unwrap_or_else(|| panic!("no digest in: {text}"))
    });
    assert_eq!(digests[0], digests[1], "2 threads");
    assert_eq!(digests[0], digests[2], "4 threads");
}
