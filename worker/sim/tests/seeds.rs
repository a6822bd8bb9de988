//! Seeds as everyone runs them.
#![allow(clippy::unwrap_used, reason = "tests")]

use arc_topk_sim::coverage::Coverage;
use arc_topk_sim::sabotage::Sabotage;
use arc_topk_sim::trace::Level;
use arc_topk_sim::{Outcome, run, run_and_explain};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Seeds of a test run.
const SEEDS: u64 = 2000;
/// Most seeds that a bug on purpose may survive; the README says how many each of them does.
const MOST_FOR_A_BUG: u64 = 3000;

fn explain(outcome: &Outcome) -> String {
    let violation = outcome.violation.as_ref();
    let what = violation.map_or_else(String::new, |v| format!("{}: {}", v.invariant, v.detail));
    format!(
        "{}\nseed {} FAILED: {what}\nsee it again: cargo run -p arc-topk-sim -- --seed {} --trace",
        outcome.trace.join("\n"),
        outcome.seed,
        outcome.seed
    )
}

/// Runs seeds on all cores until one fails.
fn first_failure(seeds: u64, sabotage: Option<Sabotage>) -> (Coverage, Option<Outcome>) {
    let next = AtomicU64::new(0);
    let found = Mutex::new((Coverage::default(), None::<Outcome>));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(1)
                    .use_current_thread()
                    .build();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    let outcome = run_and_explain(seed, sabotage);
                    let mut found = found.lock().unwrap();
                    found.0 += &outcome.coverage;
                    if outcome.violation.is_some() {
                        next.store(seeds, Ordering::Relaxed);
                        let first = found.1.as_ref().is_none_or(|other| other.seed > seed);
                        if first {
                            found.1 = Some(outcome);
                        }
                    }
                }
                drop(pool);
            });
        }
    });
    found.into_inner().unwrap()
}

#[test]
fn no_seed_breaks_an_invariant() {
    let (coverage, failure) = first_failure(SEEDS, None);
    if let Some(outcome) = failure {
        panic!("{}", explain(&outcome));
    }
    // What is not seen is not tested.
    let seen = [
        "steps applied",
        "steps skipped",
        "steps begun behind",
        "answers adopted",
        "selections short of the density formed",
        "selections short of the density adopted",
        "late contributions",
        "superseded",
        "joins of a running job",
        "recoveries ended",
        "steps that made H anew",
        "members returned",
        "members removed",
        "idle timeouts",
        "shard crashes",
        "worker kills",
        "leaves",
        "freezes",
        "clock jumps",
        "partitions",
        "clogs",
    ];
    for what in seen {
        assert!(
            coverage.of(what) > 0,
            "no seed has seen {what}:\n{coverage}"
        );
    }
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    for seed in [3, 17, 40] {
        let runs = [(); 2].map(|()| run(seed, None, Level::Last));
        assert_eq!(runs[0].coverage, runs[1].coverage);
        assert_eq!(runs[0].trace, runs[1].trace);
    }
}

#[test]
fn every_bug_on_purpose_is_found() {
    let mut unfound = Vec::new();
    for sabotage in Sabotage::ALL.into_iter().filter(|bug| !bug.is_harmless()) {
        let (_, failure) = first_failure(MOST_FOR_A_BUG, Some(sabotage));
        match failure {
            Some(outcome) => {
                let violation = outcome.violation.unwrap();
                println!(
                    "{sabotage:?}: {} seeds: {}",
                    outcome.seed + 1,
                    violation.invariant
                );
            }
            None => unfound.push(sabotage),
        }
    }
    assert!(
        unfound.is_empty(),
        "not found in {MOST_FOR_A_BUG} seeds: {unfound:?}"
    );
}
