#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::config::algorithm::{Compressor, ValueType};
use proptest::prelude::*;

fn tensor(name: &str, shape: &[u64]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        density: None,
    }
}

fn spec(shards: u16, tensors: Vec<TensorSpec>) -> PlanSpec {
    PlanSpec {
        trainer: String::new(),
        algorithm: AlgorithmConfig {
            density: 0.2,
            sketch_rank: 4,
            ..AlgorithmConfig::default()
        },
        shards,
        tensors,
    }
}

fn small() -> PlanSpec {
    spec(
        2,
        vec![
            tensor("embed", &[256, 128]),
            tensor("norm", &[128]),
            tensor("head", &[64, 8, 2, 2]),
        ],
    )
}

fn problem(spec: PlanSpec) -> String {
    Plan::build(spec).unwrap_err().to_string()
}

#[test]
fn tensors_are_viewed_as_rows() {
    let plan = Plan::build(small()).unwrap();
    let seen: Vec<_> = plan
        .tensors
        .iter()
        .map(|t| (t.rows, t.width, t.sparse))
        .collect();
    assert_eq!(seen, [(256, 128, true), (128, 1, false), (64, 32, true)]);
    assert_eq!(plan.buckets.len(), 1);
    assert_eq!(
        plan.buckets[0].tensors,
        [TensorId(2), TensorId(1), TensorId(0)]
    );
}

#[test]
fn block_width_reblocks_with_padding() {
    let mut spec = small();
    spec.algorithm.block_width = 100;
    let plan = Plan::build(spec).unwrap();
    assert_eq!((plan.tensors[0].rows, plan.tensors[0].width), (328, 100));
    assert_eq!(
        plan.tensors[0].padded_elements() - plan.tensors[0].elements,
        32
    );
}

#[test]
fn small_and_scalar_tensors_are_dense() {
    let plan = Plan::build(spec(
        1,
        vec![
            tensor("a", &[31, 33]),
            tensor("b", &[32, 32]),
            tensor("c", &[]),
        ],
    ))
    .unwrap();
    assert_eq!(
        plan.tensors.iter().map(|t| t.sparse).collect::<Vec<_>>(),
        [false, true, false]
    );
    assert_eq!(plan.tensors[2].elements, 1);
}

#[test]
fn a_tensor_larger_than_a_bucket_has_one_of_its_own() {
    let mut spec = spec(
        1,
        vec![
            tensor("a", &[10]),
            tensor("big", &[512]),
            tensor("b", &[10]),
            tensor("c", &[10]),
        ],
    );
    spec.algorithm.bucket_bytes = 1024;
    let plan = Plan::build(spec).unwrap();
    let ids: Vec<Vec<u32>> = plan
        .buckets
        .iter()
        .map(|b| b.tensors.iter().map(|t| t.0).collect())
        .collect();
    assert_eq!(ids, [vec![3, 2], vec![1], vec![0]]);
    assert!(
        plan.tensors
            .iter()
            .all(|t| plan.buckets[t.bucket.index()].tensors.contains(&t.id))
    );
}

#[test]
fn large_tensors_are_spread_over_all_shards_without_raising_the_density() {
    let plan = Plan::build(spec(4, vec![tensor("embed", &[32000, 512])])).unwrap();
    let kept: usize = plan.buckets[0]
        .segments
        .iter()
        .flatten()
        .map(|s| crate::compress::select::rows_to_keep(0.2, s.rows()))
        .sum();
    assert_eq!(kept, 6400);
    assert!(
        plan.buckets[0]
            .segments
            .iter()
            .all(|s| s.len() == 1 && s[0].rows() == 8000)
    );
}

#[test]
fn tensors_too_small_to_cut_go_round_the_shards() {
    let mut spec = spec(
        3,
        (0..6)
            .map(|i| tensor(&format!("t{i}"), &[16, 64]))
            .collect(),
    );
    spec.algorithm.bucket_bytes = 4096;
    let plan = Plan::build(spec).unwrap();
    assert_eq!(plan.buckets.len(), 6);
    let owned = |shard: usize| {
        plan.buckets
            .iter()
            .filter(|b| !b.segments[shard].is_empty())
            .count()
    };
    assert_eq!([owned(0), owned(1), owned(2)], [2, 2, 2]);
}

#[test]
fn errors_teach() {
    let mut s = small();
    s.algorithm.density = 1.5;
    assert_eq!(
        problem(s),
        "density is 1.5, but must be above 0 and at most 1: it is the share of a tensor's rows that travel in each step; \
         1 sends all, 0.4 and 0.2 are good starts"
    );
    let mut s = small();
    (s.algorithm.compressor, s.algorithm.energy) = (Compressor::Randk, 0.9);
    assert_eq!(
        problem(s),
        "energy is 0.9, but must be 1 unless the compressor is arc: the others have no sketch whose energy could be told; \
         leave energy out, or set compressor arc"
    );
    let mut s = small();
    s.tensors[2].name = "embed".to_owned();
    assert!(problem(s).starts_with(
        "tensors 0 and 2 are both named \"embed\": every parameter needs a name of its own"
    ));
    let mut s = small();
    s.tensors[1].shape = vec![3, 0];
    assert_eq!(
        problem(s),
        "tensor 1 \"norm\": shape [3, 0] has no elements: leave the parameter out of the list"
    );
    let mut s = small();
    s.tensors[1].shape = vec![u64::MAX, 3];
    assert!(problem(s).contains("has more than 2^31 elements: split the parameter"));
    let mut s = small();
    s.tensors[1].density = Some(f32::NAN);
    assert!(problem(s).starts_with("tensor 1 \"norm\": density is NaN, but must be above 0"));
    assert!(problem(spec(1, vec![])).starts_with("the plan has no tensors"));
    assert!(
        problem(spec(0, vec![tensor("a", &[1])])).starts_with("shards is 0, but must be 1 to 256")
    );
    assert!(
        problem(spec(1, vec![tensor("a", &[1 << 14, 1 << 13])]))
            .contains("use more shards (now 1)")
    );
    let mut s = spec(
        1,
        (0..=MAX_BUCKETS)
            .map(|i| tensor(&i.to_string(), &[256]))
            .collect(),
    );
    s.algorithm.bucket_bytes = 1024;
    assert!(
        problem(s.clone()).starts_with("bucket_bytes is 1024, which makes more than 4096 buckets")
    );
    s.tensors.pop();
    assert_eq!(Plan::build(s).unwrap().buckets.len(), MAX_BUCKETS);
}

#[test]
fn every_range_is_checked_on_both_sides() {
    let check = |set: &dyn Fn(&mut AlgorithmConfig)| {
        let mut config = AlgorithmConfig::default();
        set(&mut config);
        config.validate().map_err(|e| e.name)
    };
    assert_eq!(check(&|c| c.density = 0.0), Err("density"));
    assert_eq!(check(&|c| c.density = f32::NAN), Err("density"));
    assert_eq!(check(&|c| c.density = 1.0), Ok(()));
    assert_eq!(check(&|c| c.energy = 0.0), Err("energy"));
    assert_eq!(check(&|c| c.energy = f32::NAN), Err("energy"));
    assert_eq!(check(&|c| c.energy = 1.01), Err("energy"));
    assert_eq!(check(&|c| c.energy = 0.01), Ok(()));
    for compressor in [Compressor::Dense, Compressor::Randk, Compressor::Topk] {
        let with =
            |energy| move |c: &mut AlgorithmConfig| (c.compressor, c.energy) = (compressor, energy);
        assert_eq!(check(&with(0.9)), Err("energy"), "{compressor:?}");
        assert_eq!(check(&with(1.0)), Ok(()), "{compressor:?}");
    }
    assert_eq!(
        check(&|c| *c = AlgorithmConfig {
            energy: 0.9,
            ..c.clone()
        }
        .dense()),
        Ok(())
    );
    assert_eq!(check(&|c| c.eta = 0.0), Err("eta"));
    assert_eq!(check(&|c| c.eta = 1.0), Ok(()));
    assert_eq!(check(&|c| c.feedback_decay = 1.01), Err("feedback_decay"));
    assert_eq!(check(&|c| c.sketch_rank = 0), Err("sketch_rank"));
    assert_eq!(check(&|c| c.sketch_rank = 64), Ok(()));
    assert_eq!(check(&|c| c.sketch_rank = 65), Err("sketch_rank"));
    assert_eq!(check(&|c| c.quant_block = 7), Err("quant_block"));
    assert_eq!(check(&|c| c.quant_block = 8), Ok(()));
    assert_eq!(check(&|c| c.quant_block = 4096), Ok(()));
    assert_eq!(check(&|c| c.quant_block = 4097), Err("quant_block"));
    assert_eq!(check(&|c| c.block_width = 7), Err("block_width"));
    assert_eq!(check(&|c| c.block_width = 8), Ok(()));
    assert_eq!(
        check(&|c| (c.block_width, c.sketch_rank) = (16, 16)),
        Err("block_width")
    );
    assert_eq!(check(&|c| c.bucket_bytes = 1023), Err("bucket_bytes"));
    assert_eq!(check(&|c| c.bucket_bytes = 1024), Ok(()));
    let randk_pooled = |c: &mut AlgorithmConfig| {
        c.compressor = Compressor::Randk;
        c.selection = crate::config::algorithm::SelectionPolicy::Pooled;
    };
    assert_eq!(check(&randk_pooled), Err("selection"));
}

#[test]
fn differences_name_the_first_mismatch() {
    let here = small();
    assert_eq!(here.first_difference(&here), None);
    let differs = |change: &dyn Fn(&mut PlanSpec)| {
        let mut there = here.clone();
        change(&mut there);
        assert_ne!(here.hash(), there.hash());
        here.first_difference(&there).unwrap().to_string()
    };
    assert_eq!(
        differs(&|s| s.algorithm.density = 0.4),
        "density: 0.2 here, 0.4 there"
    );
    assert_eq!(
        differs(&|s| s.algorithm.energy = 0.75),
        "energy: 1 here, 0.75 there"
    );
    assert_eq!(
        differs(&|s| s.algorithm.compressor = Compressor::Randk),
        "compressor: arc here, randk there"
    );
    assert_eq!(
        differs(&|s| s.algorithm.init = crate::config::algorithm::Init::Zeros),
        "init: first_gradient here, zeros there"
    );
    assert_eq!(differs(&|s| s.algorithm.seed = 9), "seed: 0 here, 9 there");
    assert_eq!(differs(&|s| s.shards = 3), "shards: 2 here, 3 there");
    assert_eq!(
        differs(&|s| s.tensors[1].name = "b".into()),
        "tensor 1: name: \"norm\" here, \"b\" there"
    );
    assert_eq!(
        differs(&|s| s.tensors[1].shape = vec![2]),
        "tensor 1 \"norm\": shape: [128] here, [2] there"
    );
    assert_eq!(
        differs(&|s| s.tensors[1].dtype = DType::Bf16),
        "tensor 1 \"norm\": dtype: f32 here, bf16 there"
    );
    assert_eq!(
        differs(&|s| s.tensors[1].density = Some(0.5)),
        "tensor 1 \"norm\": density: the job's here, 0.5 there"
    );
    assert_eq!(
        differs(&|s| drop(s.tensors.pop())),
        "number of tensors (the first that only one side has is \"head\"): 3 here, 2 there"
    );
}

#[test]
fn what_trainers_disagree_on_is_named() {
    let told = |trainer: &str| PlanSpec {
        trainer: trainer.to_owned(),
        ..small()
    };
    let difference = |a: &str, b: &str| {
        let difference = told(a).first_difference(&told(b));
        difference.map(|difference| difference.to_string())
    };
    assert_eq!(difference("lr=1\nclip=2\n", "lr=1\nclip=2\n"), None);
    assert_eq!(
        difference("lr=1\nclip=2\n", "lr=1\nclip=3\n").as_deref(),
        Some("clip: 2 here, 3 there")
    );
    assert_eq!(
        difference("lr=1\n", "").as_deref(),
        Some("lr: 1 here,  there")
    );
    assert_eq!(
        difference("", "lr=1").as_deref(),
        Some("lr:  here, 1 there")
    );
    assert_ne!(told("lr=1").hash(), told("lr=2").hash());
}

#[test]
fn the_hash_is_the_same_on_every_machine() {
    let mut spec = small();
    // Not the defaults, which may be tuned.
    spec.algorithm = AlgorithmConfig {
        density: 0.2,
        warmup_updates: 20,
        ramp_updates: 0,
        quant_block: 64,
        wire_sketch: ValueType::Int8,
        wire_warmup: ValueType::Int8,
        ..spec.algorithm
    };
    let hex: String = spec.hash().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        hex,
        "603ba28ba5edd243a77346268f62c8334158ccfccd1864821fb59860fa283cf6"
    );
}

fn any_spec() -> impl Strategy<Value = PlanSpec> {
    let shape = prop::collection::vec(1u64..300, 0..3);
    let density = prop::sample::select(vec![0.02f32, 0.05, 0.07, 0.2, 0.4, 1.0]);
    let compressor =
        prop::sample::select(vec![Compressor::Arc, Compressor::Dense, Compressor::Randk]);
    (
        prop::collection::vec(shape, 1..20),
        1u16..9,
        density,
        compressor,
        1024u32..200_000,
        0u32..2,
    )
        .prop_map(
            |(shapes, shards, density, compressor, bucket_bytes, blocks)| {
                let tensors = shapes
                    .iter()
                    .enumerate()
                    .map(|(i, s)| tensor(&i.to_string(), s))
                    .collect();
                let block_width = blocks * 48;
                let algorithm = AlgorithmConfig {
                    density,
                    compressor,
                    bucket_bytes,
                    block_width,
                    ..AlgorithmConfig::default()
                };
                PlanSpec {
                    trainer: String::new(),
                    algorithm,
                    shards,
                    tensors,
                }
            },
        )
}

proptest! {
    #[test]
    fn every_row_is_owned_once_and_in_order(spec in any_spec()) {
        let plan = Plan::build(spec.clone()).unwrap();
        prop_assert_eq!(&plan, &Plan::build(spec).unwrap());
        let mut next = vec![0u32; plan.tensors.len()];
        let mut order = Vec::new();
        for bucket in &plan.buckets {
            order.extend(bucket.tensors.iter().rev().copied());
            prop_assert_eq!(bucket.segments.len(), plan.shards());
            // Each shard's part is contiguous; the parts are dealt out in a rotated order.
            let mut all: Vec<&Segment> = bucket.segments.iter().flatten().collect();
            let place = |s: &Segment| (bucket.tensors.iter().position(|t| *t == s.tensor).unwrap(), s.row_start);
            for part in &bucket.segments {
                prop_assert!(part.is_sorted_by_key(place));
            }
            all.sort_by_key(|s| place(s));
            for segment in all {
                prop_assert_eq!(next[segment.tensor.index()], segment.row_start);
                prop_assert!(segment.row_end > segment.row_start);
                next[segment.tensor.index()] = segment.row_end;
            }
        }
        for tensor in &plan.tensors {
            prop_assert_eq!(next[tensor.id.index()] as usize, tensor.rows);
            prop_assert!(tensor.padded_elements() >= tensor.elements);
            prop_assert!(tensor.padded_elements() - tensor.elements < tensor.width.max(1));
        }
        let total_bytes = |b: &BucketPlan| b.tensors.iter().map(|t| plan.tensors[t.index()].elements * 4).sum::<usize>();
        for bucket in &plan.buckets {
            prop_assert!(bucket.tensors.len() == 1 || total_bytes(bucket) <= plan.spec.algorithm.bucket_bytes as usize);
        }
    }

    #[test]
    fn parts_are_level_up_to_what_cannot_be_cut(spec in any_spec()) {
        let plan = Plan::build(spec).unwrap();
        for bucket in &plan.buckets {
            let (worst, bound) = build::imbalance(&plan, bucket);
            prop_assert!(worst <= bound, "{worst} above {bound}");
        }
    }

    #[test]
    fn cutting_barely_raises_the_density(spec in any_spec()) {
        let plan = Plan::build(spec).unwrap();
        if plan.spec.algorithm.compressor == Compressor::Dense {
            return Ok(());
        }
        let density = plan.spec.algorithm.density;
        for tensor in plan.tensors.iter().filter(|t| t.sparse) {
            let segments = plan.buckets.iter().flat_map(|b| b.segments.iter().flatten()).filter(|s| s.tensor == tensor.id);
            let kept: usize = segments.map(|s| crate::compress::select::rows_to_keep(density, s.rows())).sum();
            let whole = crate::compress::select::rows_to_keep(density, tensor.rows);
            prop_assert!(kept as f64 <= whole as f64 * 1.25, "{kept} of {whole}");
        }
    }

    #[test]
    fn a_spec_differs_from_another_exactly_if_its_hash_does(a in any_spec(), b in any_spec()) {
        prop_assert_eq!(a.first_difference(&b).is_none(), a.hash() == b.hash());
    }
}
