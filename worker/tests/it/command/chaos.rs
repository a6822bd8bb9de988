//! A job that is killed, grown, shrunk and cut off while it trains: the machinery of `make chaos`, with a short schedule.

#[path = "../../../examples/chaos/faults.rs"]
#[allow(dead_code, reason = "a test has its own schedule")]
mod faults;
#[path = "../../../examples/chaos/job.rs"]
#[allow(dead_code, reason = "the table is made by the example alone")]
mod job;
#[path = "../../../examples/chaos/lab.rs"]
mod lab;
#[path = "../../../examples/chaos/process.rs"]
mod process;
#[path = "../../../examples/chaos/timeline.rs"]
#[allow(dead_code, reason = "the table is made by the example alone")]
mod timeline;

use faults::{Chaos, Fault};
use job::{End, Job, Settings};
use lab::Lab;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// After so long a run has not ended at all.
const LIMIT: Duration = Duration::from_secs(400);

fn settings(dir: &Path, name: &str, pace_ms: u64) -> Settings {
    let dir = dir.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    Settings {
        program: env!("CARGO_BIN_EXE_arc-worker").into(),
        workers: 3,
        shards: 2,
        steps: 500,
        seed: 3,
        pace_ms,
        log: "info".to_owned(),
        train: Vec::new(),
        dir,
    }
}

/// Runs the job with these faults; what it came to, and after how many of them not all took part again.
fn disturbed(settings: &Settings, lab: &Lab, faults: &[Fault]) -> (End, usize) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut job = Job::start(settings, lab, Instant::now() + LIMIT, stop).unwrap();
    let mut chaos = Chaos::new(settings.seed, 0, lab.can_cut());
    if !faults.is_empty() {
        assert!(job.await_all(Instant::now(), 20, LIMIT).unwrap());
    }
    for fault in faults {
        chaos.inflict(*fault, &mut job, lab).unwrap();
    }
    (job.finish().unwrap(), chaos.unhealed)
}

/// Kills of each role at any moment, two at once, a worker more, a worker less; where there are network namespaces also
/// packets that are lost and a worker that is cut off from one shard.
#[test]
fn a_job_survives_what_happens_to_its_processes() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::build(8, 10, false).unwrap();
    eprintln!("chaos: {}", lab.description());
    let mut faults = vec![
        Fault::Worker,
        Fault::Coordinator,
        Fault::Add,
        Fault::Shard,
        Fault::Remove,
        Fault::Two,
    ];
    if lab.can_cut() {
        faults.push(Fault::CutLink);
    }
    let (end, unhealed) = disturbed(&settings(dir.path(), "disturbed", 20), &lab, &faults);
    assert_eq!((end.complaints, unhealed), (vec![], 0));
    assert_eq!(end.digests.len(), 1, "all have the same parameters");
    assert!(end.finished >= 2, "{}", end.finished);
    let alone = Lab::loopback();
    let (quiet, _) = disturbed(&settings(dir.path(), "quiet", 0), &alone, &[]);
    let (last, loss) = end.validation.unwrap();
    let (same, expected) = quiet.validation.unwrap();
    assert_eq!((last, same), (499, 499));
    // Between seeds it varies by a few hundredths; training that had stood still would be far above.
    assert!(
        (loss - expected).abs() < 0.25,
        "{loss} beside {expected} undisturbed"
    );
}
