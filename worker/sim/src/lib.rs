//! The simulator: all shards and workers of a job in virtual time, with one seed that decides everything.
//!
//! The machines are those of production ([`Shard`](arc_topk_ps::shard::Shard),
//! [`Member`](arc_topk_worker::member::Member)); around them everything is a model: processes that are killed, started again,
//! stopped and left alone with a wrong clock; connections whose packets are late, held up or lost with the connection; a
//! trainer whose gradients are a hash; a store for replicas. After every event invariants are checked ([`check`]); at the
//! end all workers must have the same parameters.
//!
//! | module | room for |
//! |---|---|
//! | [`case`] | what a seed stands for |
//! | [`world`] | processes and events |
//! | [`wires`] | connections and clocks |
//! | [`trainer`] | the model, and the books of the feedback rule |
//! | [`check`], [`mod@reference`], `books`, `estimates` | invariants |
//! | [`sabotage`] | bugs on purpose |
//! | [`coverage`], [`trace`] | what was seen |

mod books;
pub mod case;
pub mod check;
pub mod coverage;
mod estimates;
pub mod random;
pub mod reference;
pub mod sabotage;
pub mod trace;
pub mod trainer;
pub mod wires;
pub mod world;

use case::Case;
use check::Violation;
use coverage::Coverage;
use sabotage::Sabotage;
use std::panic::{AssertUnwindSafe, catch_unwind};
use trace::{Level, Trace};
use world::World;

/// What came of one seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What was seen.
    pub coverage: Coverage,
    /// What was broken, if anything.
    pub violation: Option<Violation>,
    /// The last lines before.
    pub trace: Vec<String>,
}

/// Runs one seed.
#[must_use]
pub fn run(seed: u64, sabotage: Option<Sabotage>, level: Level) -> Outcome {
    run_case(&Case::new(seed), sabotage, level)
}

/// Runs one case.
#[must_use]
pub fn run_case(case: &Case, sabotage: Option<Sabotage>, level: Level) -> Outcome {
    let mut trace = Trace::new(level);
    let mut coverage = Coverage::default();
    // A panic of a machine is a finding like any other, and the trace leads to it.
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(case, sabotage, &mut trace);
        let result = world.run();
        coverage = world.coverage();
        result
    }));
    let violation = match result {
        Ok(result) => result.err(),
        Err(panic) => Some(Violation {
            invariant: "no panic",
            detail: panic_text(&*panic),
        }),
    };
    coverage.count("seeds");
    Outcome {
        seed: case.seed,
        coverage,
        violation,
        trace: trace.lines().map(str::to_owned).collect(),
    }
}

fn panic_text(panic: &(dyn core::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".to_owned())
}

/// Runs a seed, and if it fails once more to see how.
#[must_use]
pub fn run_and_explain(seed: u64, sabotage: Option<Sabotage>) -> Outcome {
    let outcome = run(seed, sabotage, Level::Off);
    if outcome.violation.is_none() {
        return outcome;
    }
    run(seed, sabotage, Level::Last)
}
