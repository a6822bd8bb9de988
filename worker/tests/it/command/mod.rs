//! The binary as people use it: help, bad input, and whole jobs of real processes.

mod chaos;
mod faults;
mod jobs;
mod restart;
mod usage;

use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// A model of a few thousand parameters on the built-in text: a step takes milliseconds.
const SMALL: [&str; 16] = [
    "--data",
    "builtin",
    "--hidden",
    "32",
    "--intermediate",
    "64",
    "--layers",
    "1",
    "--heads",
    "2",
    "--context",
    "32",
    "--batch",
    "2",
    "--warmup-updates",
    "2",
];

fn arc_worker() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arc-worker"));
    // The tests' own environment has no say.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ARC_")) {
        command.env_remove(name);
    }
    command
}

/// What a command came to.
struct Said {
    code: Option<i32>,
    out: String,
    error: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            error: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

fn said(args: &[&str]) -> Said {
    arc_worker().args(args).output().unwrap().into()
}

/// `arc-worker local` with a small model, two shards and two workers, records in `dir`.
fn local(dir: &Path) -> Command {
    local_of(2, dir)
}

/// As [`local`], with so many workers.
fn local_of(workers: u16, dir: &Path) -> Command {
    let mut command = arc_worker();
    command
        .args(["local", "--shards", "2", "--admin", "off"])
        .arg(format!("--workers={workers}"))
        .args(SMALL)
        .arg("--run-dir")
        .arg(dir);
    command
}

/// A job whose processes end with it, however a test ends.
struct Job(Child);

impl Job {
    fn start(command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Self(child.unwrap())
    }

    /// Sends `signal` to `pid`.
    fn signal(pid: u32, signal: &str) {
        let sent = Command::new("kill")
            .args([signal, &pid.to_string()])
            .status();
        assert!(sent.unwrap().success(), "{signal} to {pid}");
    }

    /// The process among this job's whose command line has all of `words`.
    fn process(&self, words: &[&str]) -> u32 {
        let own = self.0.id();
        let children = std::fs::read_to_string(format!("/proc/{own}/task/{own}/children"));
        // Children belong to the thread that started them.
        let mut all = children.unwrap_or_default();
        for task in std::fs::read_dir(format!("/proc/{own}/task")).unwrap() {
            all += &std::fs::read_to_string(task.unwrap().path().join("children")).unwrap();
        }
        let found = all.split_whitespace().find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            words.iter().all(|word| line.contains(word))
        });
        found.expect("the job has such a process").parse().unwrap()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Its processes see the end of their standard input.
        let _ended = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// `summary.json` of a worker.
fn summary(run: &Path, rank: usize) -> Value {
    let path = run.join(format!("worker-{rank}/summary.json"));
    let text = std::fs::read_to_string(&path);
    serde_json::from_str(&text.unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

fn digest(run: &Path, rank: usize) -> String {
    let digest = summary(run, rank)["digest"].as_str().unwrap().to_owned();
    assert_eq!(digest.len(), 64);
    digest
}
