//! Seconds of one worker's gradient computation, validation and optimizer step, without communication.
//!
//! `cargo run -p arc-topk-worker --example step_time -- --batch 8 --context 128` (RAYON_NUM_THREADS=1 for one thread)

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::train::TrainArgs;
use arc_topk_common::ids::Rank;
use arc_topk_common::plan::{Plan, PlanSpec};
use arc_topk_worker::step::{RowsCame, TensorResult};
use arc_topk_worker::train::{Trainer, data::Dataset, parameters};
use clap::Parser;
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Cli::parse().train;
    let spec = PlanSpec {
        trainer: String::new(),
        algorithm: AlgorithmConfig::default(),
        shards: 1,
        tensors: parameters(&args)?,
    };
    let plan = Plan::build(spec)?;
    let data = Arc::new(Dataset::load(&args)?);
    let mut trainer = Trainer::new(&args, &plan, data)?;
    let mut gradients: Vec<Vec<f32>> = plan
        .tensors
        .iter()
        .map(|tensor| vec![0.0; tensor.elements])
        .collect();
    println!("{} parameters", trainer.elements());
    for step in 0..10 {
        let start = Instant::now();
        let (loss, _) = trainer.gradients(step, Rank(0), &mut |tensor, gradient| {
            gradients[tensor.index()].copy_from_slice(gradient);
            Ok(())
        })?;
        let backward = start.elapsed();
        trainer.apply(step, &mut |f| {
            for (tensor, values) in plan.tensors.iter().zip(&gradients) {
                f(TensorResult {
                    tensor: tensor.id,
                    values,
                    rows: RowsCame::All,
                    width: tensor.width,
                });
            }
        })?;
        println!(
            "loss {loss:.3}, forward and backward {backward:.1?}, optimizer {:.1?}",
            start.elapsed() - backward
        );
    }
    let start = Instant::now();
    let validation = trainer.validate()?;
    println!(
        "validation {:.3} in {:.1?}",
        validation.loss,
        start.elapsed()
    );
    Ok(())
}
