//! Processes that are killed for real.

use super::{Job, Said, digest, local, local_of, summary};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};

/// Reads the job's JSON lines until `rank` has done `step`.
fn await_step(lines: &mut BufReader<ChildStdout>, rank: u64, step: u64) {
    let mut line = String::new();
    while lines.read_line(&mut line).unwrap() > 0 {
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == "step" && event["rank"] == rank && event["step"] == step {
            return;
        }
        line.clear();
    }
    panic!("the job ended before rank {rank} did step {step}");
}

/// Lets the job run to its end. Exit status and standard error.
fn end(mut job: Job, mut lines: BufReader<ChildStdout>) -> Said {
    let mut error = String::new();
    std::io::copy(&mut lines, &mut std::io::sink()).unwrap();
    job.0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut error)
        .unwrap();
    let code = job.0.wait().unwrap().code();
    Said {
        code,
        out: String::new(),
        error,
    }
}

fn checkpoints_of(dir: &Path, rank: u64) -> Vec<String> {
    let listing = std::fs::read_dir(dir.join(format!("rank-{rank}"))).unwrap();
    let mut names: Vec<String> = listing
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Three workers with checkpoints, long enough to be disturbed.
fn start(runs: &Path, checkpoints: &Path) -> (Job, BufReader<ChildStdout>) {
    go(runs, checkpoints, false)
}

fn go(runs: &Path, checkpoints: &Path, resume: bool) -> (Job, BufReader<ChildStdout>) {
    let mut command = local_of(3, runs);
    command.args(["--steps", "300", "--json", "--threads", "1"]);
    if resume {
        command.arg("--resume");
    }
    command.args(["--restart", "never"]);
    command.args([
        "--chaos-delay-ms",
        "3",
        "--checkpoint-every",
        "100",
        "--checkpoint-dir",
    ]);
    let mut job = Job::start(command.arg(checkpoints));
    let lines = BufReader::new(job.0.stdout.take().unwrap());
    (job, lines)
}

#[test]
fn the_others_finish_when_a_worker_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, checkpoints) = (dir.path().join("runs"), dir.path().join("checkpoints"));
    let (job, mut lines) = start(&runs, &checkpoints);
    await_step(&mut lines, 1, 110);
    Job::signal(job.process(&[" train ", "--rank=1 "]), "-KILL");
    let said = end(job, lines);
    assert_eq!(said.code, Some(1), "{}", said.error);
    assert!(
        said.error.contains("worker 1 ended with signal: 9")
            && said.error.contains("the other workers go on, 2 of 3"),
        "{}",
        said.error
    );
    for rank in [0, 2] {
        assert_eq!(summary(&runs, rank)["steps"], 300);
    }
    assert_eq!(digest(&runs, 0), digest(&runs, 2));
    assert!(!runs.join("worker-1/summary.json").exists());
    // What the lost one had written is whole, and nobody else's is missing.
    assert_eq!(
        checkpoints_of(&checkpoints, 1),
        ["step-00000100.safetensors"]
    );
    for rank in [0, 2] {
        let kept = ["step-00000200.safetensors", "step-00000300.safetensors"];
        assert_eq!(checkpoints_of(&checkpoints, rank), kept);
    }
}

#[test]
fn workers_stop_with_the_cause_when_a_shard_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, checkpoints) = (dir.path().join("runs"), dir.path().join("checkpoints"));
    let (job, mut lines) = start(&runs, &checkpoints);
    await_step(&mut lines, 0, 110);
    Job::signal(job.process(&[" ps ", "--shard=1 "]), "-KILL");
    let said = end(job, lines);
    assert_eq!(said.code, Some(1), "{}", said.error);
    assert!(said.error.contains("shard 1"), "{}", said.error);
    for rank in 0..3 {
        assert_eq!(
            checkpoints_of(&checkpoints, rank),
            ["step-00000100.safetensors"]
        );
    }
}

#[test]
fn a_worker_that_comes_back_with_a_checkpoint_of_its_own_alone_joins() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, checkpoints) = (dir.path().join("runs"), dir.path().join("checkpoints"));
    let mut command = local_of(3, &runs);
    command.args([
        "--steps",
        "700",
        "--json",
        "--threads",
        "1",
        "--restart",
        "never",
    ]);
    command.args([
        "--chaos-delay-ms",
        "4",
        "--checkpoint-every",
        "40",
        "--checkpoint-dir",
    ]);
    let mut job = Job::start(command.arg(&checkpoints));
    let mut lines = BufReader::new(job.0.stdout.take().unwrap());
    await_step(&mut lines, 1, 90);
    let lost = job.process(&[" train ", "--rank=1 "]);
    let words = std::fs::read(format!("/proc/{lost}/cmdline")).unwrap();
    Job::signal(lost, "-KILL");
    await_step(&mut lines, 0, 250);
    let kept = |rank| checkpoints_of(&checkpoints, rank);
    assert!(kept(1).iter().all(|step| !kept(0).contains(step)));
    // As whoever starts machines again would. Nobody reads what it says before it has ended: a pipe would fill.
    let words = String::from_utf8(words).unwrap();
    let mut words = words.split_terminator('\0');
    let log = dir.path().join("again.log");
    let mut again = Command::new(words.next().unwrap());
    again.args(words).arg("--resume");
    again.stdin(Stdio::piped()).stdout(Stdio::null());
    again.stderr(std::fs::File::create(&log).unwrap());
    let mut again = Job(again.spawn().unwrap());
    let said = end(job, lines);
    assert_eq!(said.code, Some(1), "one was lost: {}", said.error);
    let ended = again.0.wait().unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    assert!(ended.success(), "{log}");
    for rank in [0, 2] {
        assert_eq!(digest(&runs, rank), digest(&runs, 3));
    }
    let steps = summary(&runs, 3)["steps"].as_u64().unwrap();
    assert!((1..460).contains(&steps), "{steps}");
}

#[test]
fn a_signal_ends_the_job_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, checkpoints) = (dir.path().join("runs"), dir.path().join("checkpoints"));
    let (job, mut lines) = start(&runs, &checkpoints);
    await_step(&mut lines, 0, 110);
    let shard = job.process(&[" ps ", "--shard=0 "]);
    Job::signal(job.0.id(), "-TERM");
    let said = end(job, lines);
    assert_eq!(said.code, Some(130), "{}", said.error);
    assert!(!Path::new(&format!("/proc/{shard}")).exists());
    for rank in 0..3 {
        let kept = checkpoints_of(&checkpoints, rank as u64);
        assert_eq!(kept.len(), 2, "{kept:?}");
        assert!(summary(&runs, rank)["steps"].as_u64().unwrap() > 110);
    }
    // They may have stopped a step apart, and go on together all the same.
    let (job, lines) = go(&runs, &checkpoints, true);
    let said = end(job, lines);
    assert_eq!(said.code, Some(0), "{}", said.error);
    for rank in 0..3 {
        assert_eq!(summary(&runs, rank)["steps"], 300);
        assert_eq!(digest(&runs, rank), digest(&runs, 0));
    }
}

#[test]
fn processes_that_are_killed_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().join("runs");
    let mut command = local_of(3, &runs);
    command.args(["--steps", "600", "--json", "--threads", "1"]);
    command.args(["--chaos-delay-ms", "10", "--snapshot-every", "100"]);
    let mut job = Job::start(&mut command);
    let mut lines = BufReader::new(job.0.stdout.take().unwrap());
    await_step(&mut lines, 0, 60);
    Job::signal(job.process(&[" train ", "--rank=1 "]), "-KILL");
    // It joins as a newcomer, with a rank that was never given before.
    let mut line = String::new();
    loop {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "nobody joined");
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == "step" && event["rank"] == 3 && event["behind"] == false {
            break;
        }
    }
    Job::signal(job.process(&[" ps ", "--shard=1 "]), "-KILL");
    let said = end(job, lines);
    assert_eq!(said.code, Some(0), "{}", said.error);
    for name in ["worker 1", "shard 1"] {
        let again = format!("{name} is started again");
        assert!(said.error.contains(&again), "{again}:\n{}", said.error);
    }
    for rank in [0, 2, 3] {
        assert_eq!(digest(&runs, rank), digest(&runs, 0));
    }
    assert_eq!(summary(&runs, 0)["steps"], 600);
    let late = summary(&runs, 3)["steps"].as_u64().unwrap();
    assert!((1..540).contains(&late), "{late}");
}

/// As an upgrade does it: each is asked to end, and another takes its place.
#[test]
fn shards_are_replaced_one_after_the_other_and_nothing_differs() {
    let dir = tempfile::tempdir().unwrap();
    let (runs, undisturbed) = (dir.path().join("runs"), dir.path().join("undisturbed"));
    let steps = ["--steps", "240", "--json", "--threads", "1"];
    let expected = Said::from(local(&undisturbed).args(steps).output().unwrap());
    assert_eq!(expected.code, Some(0), "{}", expected.error);
    let mut command = local(&runs);
    let mut job = Job::start(command.args(steps).args(["--chaos-delay-ms", "10"]));
    let mut lines = BufReader::new(job.0.stdout.take().unwrap());
    for (shard, step) in [(0, 100), (1, 160)] {
        await_step(&mut lines, 0, step);
        let words = [" ps ", &format!("--shard={shard} ")];
        Job::signal(job.process(&words), "-TERM");
    }
    let said = end(job, lines);
    assert_eq!(said.code, Some(0), "{}", said.error);
    for shard in 0..2 {
        let again = format!("shard {shard} is started again");
        assert!(said.error.contains(&again), "{again}:\n{}", said.error);
    }
    for rank in 0..2 {
        assert_eq!(digest(&runs, rank), digest(&undisturbed, 0));
        assert_eq!(summary(&runs, rank)["steps"], 240);
    }
}
