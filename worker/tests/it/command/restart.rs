//! A whole job that dies, and goes on from its shards' snapshots as another one.

use super::{Job, SMALL, Said, arc_worker, digest};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

fn job_of(workers: u16, shards: u16, runs: &Path) -> Command {
    let mut command = arc_worker();
    command.args(["local", "--admin", "off", "--json", "--threads", "1"]);
    command.args(SMALL).args(["--snapshot-every", "20"]);
    command.arg(format!("--workers={workers}"));
    command.arg(format!("--shards={shards}"));
    command.arg("--run-dir").arg(runs);
    command
}

#[test]
fn a_dead_job_goes_on_with_other_workers_and_shards() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path();
    let mut command = job_of(3, 2, runs);
    let mut job = Job::start(command.args(["--steps", "400", "--chaos-delay-ms", "5"]));
    let mut lines = BufReader::new(job.0.stdout.take().unwrap()).lines();
    // More than one snapshot is whole by then.
    let seen = lines.find(|line| {
        let line = line.as_ref().unwrap();
        line.contains("\"event\":\"step\"") && line.contains("\"step\":90,")
    });
    assert!(seen.is_some(), "the job ended before step 90");
    let processes = [
        job.process(&[" train ", "--rank=0 "]),
        job.process(&[" train ", "--rank=1 "]),
        job.process(&[" train ", "--rank=2 "]),
        job.process(&[" ps ", "--shard=0 "]),
        job.process(&[" ps ", "--shard=1 "]),
    ];
    // First of all what would start them again.
    Job::signal(job.0.id(), "-KILL");
    for process in processes {
        // Those that see the end of their input first are gone already.
        let _gone = Command::new("kill")
            .args(["-KILL", &process.to_string()])
            .output();
    }
    drop(job);
    for (workers, shards, steps) in [(2, 3, 120), (4, 3, 150)] {
        let mut command = job_of(workers, shards, runs);
        command.args(["--resume", "--steps", &steps.to_string()]);
        let said = Said::from(command.output().unwrap());
        assert_eq!(said.code, Some(0), "{}", said.error);
        let (_, from) = said.out.split_once("resumed at step ").unwrap();
        let from: u64 = from.split(' ').next().unwrap().parse().unwrap();
        assert!(from >= 60, "it goes back to step {from}");
        for rank in 0..usize::from(workers) {
            assert_eq!(digest(runs, rank), digest(runs, 0), "{workers} workers");
            let lines = std::fs::read_to_string(runs.join(format!("worker-{rank}/steps.jsonl")));
            let last = lines.unwrap().lines().last().unwrap().to_owned();
            let last: serde_json::Value = serde_json::from_str(&last).unwrap();
            assert_eq!(last["step"], steps - 1);
        }
    }
}
