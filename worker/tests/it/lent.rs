//! Gradients that stay where they are: the same steps to the bit as with copies, and results in the gradients' own memory.
#![allow(
    unsafe_code,
    reason = "lending is a promise about memory, which the tests keep"
)]

use crate::support::{
    Gradients, algorithm, cluster, fingerprint, gradients, model, rules_and, spec, step,
};
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::config::algorithm::{Compressor, Feedback};
use arc_topk_common::ids::{Rank, TensorId};
use arc_topk_worker::backend::{Gradient, Lent};
use arc_topk_worker::memory::MemoryCluster;
use core::ptr::NonNull;

/// A step whose gradients are lent; they hold the results afterwards.
fn lent_step(cluster: &mut MemoryCluster, gradients: &mut Gradients) -> bool {
    cluster.begin();
    for (rank, own) in gradients.iter_mut().enumerate() {
        for (id, gradient) in own.iter_mut().enumerate() {
            // SAFETY: the gradients outlive the step, and nobody looks at them before `give_back`.
            let lent =
                unsafe { Lent::new(NonNull::new(gradient.as_mut_ptr()).unwrap(), gradient.len()) };
            let (rank, tensor) = (Rank(rank as u16), TensorId(id as u32));
            cluster.push(rank, tensor, Gradient::Lent(lent)).unwrap();
        }
    }
    cluster.finish().unwrap()[0].unwrap().skipped
}

fn give_back(cluster: &mut MemoryCluster, workers: u16) {
    for rank in 0..workers {
        cluster.worker_mut(Rank(rank)).unwrap().give_back();
    }
}

fn all_rules() -> Vec<AlgorithmConfig> {
    let mut rules = rules_and(&[Compressor::Randk, Compressor::Topk, Compressor::Dense]);
    // The last row of a tensor is filled up: there is no place for that in the gradient's own memory.
    rules.push(AlgorithmConfig {
        block_width: 9,
        ..algorithm(Feedback::Ef14, 0.3)
    });
    rules
}

#[test]
fn lent_gradients_give_the_same_steps_to_the_bit() {
    for rule in all_rules() {
        let spec = spec(rule.clone(), 2, model());
        let (mut copied, mut lending) = (cluster(&spec, 2), cluster(&spec, 2));
        for number in 0..4 {
            let mut given = gradients(&spec, 2, number);
            if number == 2 {
                // All skip this one.
                given[1][0][0] = f32::NAN;
            }
            let skipped = step(&mut copied, &given)[0].unwrap().skipped;
            assert_eq!(lent_step(&mut lending, &mut given), skipped);
            assert_eq!(skipped, number == 2);
            let expected = fingerprint(&copied, 2);
            assert_eq!(
                fingerprint(&lending, 2),
                expected,
                "{rule:?}, step {number}"
            );
            give_back(&mut lending, 2);
        }
    }
}

#[test]
fn results_lie_where_the_gradients_were() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let mut cluster = cluster(&spec, 2);
    let mut given = gradients(&spec, 2, 0);
    lent_step(&mut cluster, &mut given);
    let mut places = Vec::new();
    let machine = cluster.worker(Rank(0)).unwrap();
    machine.for_each_result(&mut |result| places.push(result.values.as_ptr()));
    let own: Vec<*const f32> = given[0].iter().map(|gradient| gradient.as_ptr()).collect();
    assert_eq!(places, own);

    give_back(&mut cluster, 2);
    let mut results = 0;
    let machine = cluster.worker(Rank(0)).unwrap();
    machine.for_each_result(&mut |_| results += 1);
    assert_eq!(results, 0, "there is nothing to read after giving back");
}

#[test]
fn a_step_without_gradients_needs_nothing_of_what_was_lent_before() {
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 1, model());
    let (mut copied, mut lending) = (cluster(&spec, 2), cluster(&spec, 2));
    let mut given = gradients(&spec, 2, 0);
    step(&mut copied, &given);
    lent_step(&mut lending, &mut given);
    give_back(&mut lending, 2);
    drop(given);
    for cluster in [&mut copied, &mut lending] {
        cluster.step(|_, _| None).unwrap();
    }
    assert_eq!(fingerprint(&lending, 2), fingerprint(&copied, 2));
}
