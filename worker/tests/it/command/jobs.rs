//! Whole jobs on this machine: the same bits however they run, comparison, resuming, other programs.

use super::{SMALL, Said, arc_worker, digest, local, said, summary};
use std::fs;
use std::path::Path;

fn done(command: &mut std::process::Command) -> Said {
    let said = Said::from(command.output().unwrap());
    assert_eq!(said.code, Some(0), "{}", said.error);
    said
}

#[test]
fn threads_and_slow_shards_cannot_be_seen_in_the_parameters() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &[&str]| {
        let runs = dir.path().join(name);
        done(local(&runs).args(["--steps", "12"]).args(more));
        assert_eq!(digest(&runs, 0), digest(&runs, 1), "{name}");
        assert_eq!(summary(&runs, 0)["steps"], 12);
        digest(&runs, 0)
    };
    let one = run("two-threads", &["--threads", "2"]);
    assert_eq!(one, run("four-threads", &["--threads", "4"]));
    let slow = ["--threads", "4", "--chaos-delay-ms", "20"];
    assert_eq!(one, run("slow-shards", &slow));
    assert_ne!(one, run("another-seed", &["--threads", "2", "--seed", "1"]));
}

#[test]
fn a_comparison_leaves_a_table_and_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path();
    let said = done(local(runs).args(["--steps", "8", "--validate-every", "4", "--compare"]));
    for word in ["dense", "arc", "1 Gbit/s", "100 Mbit/s", "report.html"] {
        assert!(said.out.contains(word), "{word}: {}", said.out);
    }
    let page = fs::read_to_string(runs.join("report.html")).unwrap();
    assert!(page.contains("<svg") && !page.contains("<script src") && !page.contains("<link"));
    let sent = |name: &str| summary(&runs.join(name), 0)["bytes_sent"].as_u64().unwrap();
    assert!(sent("arc") < sent("dense"));
    // The page can be made again from the records.
    let out = runs.join("again.html").display().to_string();
    let dirs = ["dense", "arc"].map(|name| runs.join(name).display().to_string());
    let report = said_of_report(&dirs, &out);
    assert!(report.out.contains("dense") && Path::new(&out).exists());
}

fn said_of_report(dirs: &[String; 2], out: &str) -> Said {
    let report = said(&["report", &dirs[0], &dirs[1], "--out", out]);
    assert_eq!(report.code, Some(0), "{}", report.error);
    report
}

#[test]
fn a_job_resumed_from_its_checkpoints_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let schedule = ["--steps", "10", "--lr-warmup", "2"];
    done(local(&whole).args(schedule));
    let checkpoints = dir.path().join("checkpoints");
    let part = |more: &[&str]| {
        let mut command = local(&parts);
        command
            .args(schedule)
            .args(["--checkpoint-every", "3", "--checkpoint-dir"]);
        done(command.arg(&checkpoints).args(more))
    };
    part(&[]);
    // As if the job had died after step 9: the last checkpoint is gone.
    for rank in 0..2 {
        let last = checkpoints.join(format!("rank-{rank}/step-00000010.safetensors"));
        fs::remove_file(last).unwrap();
    }
    let resumed = part(&["--resume"]);
    assert!(
        resumed.error.contains("resumed at step 9"),
        "{}",
        resumed.error
    );
    assert_eq!(digest(&parts, 0), digest(&whole, 0));
    assert_eq!(digest(&parts, 1), digest(&whole, 0));
    let lines = fs::read_to_string(parts.join("worker-0/steps.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 10);
}

#[test]
fn a_truncated_checkpoint_is_passed_over_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = dir.path().display().to_string();
    let train = |more: &[&str]| {
        let mut command = arc_worker();
        command.args(["train", "--steps", "6", "--checkpoint-every", "3"]);
        command
            .args(["--checkpoint-dir", &checkpoints])
            .args(SMALL)
            .args(more);
        Said::from(command.output().unwrap())
    };
    assert_eq!(train(&[]).code, Some(0));
    let file = |step: u64| {
        dir.path()
            .join(format!("rank-0/step-{step:08}.safetensors"))
    };
    let cut = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    cut(&file(6));
    let older = train(&["--resume"]);
    assert_eq!(older.code, Some(0), "{}", older.error);
    assert!(
        older.error.contains("is damaged") && older.error.contains("resumed at step 3"),
        "{}",
        older.error
    );
    cut(&file(6));
    cut(&file(3));
    let none = train(&["--resume"]);
    assert_eq!(none.code, Some(1));
    assert!(
        none.error.contains("step-00000006.safetensors is damaged")
            && none.error.contains("without --resume"),
        "{}",
        none.error
    );
    assert!(file(6).exists() && file(3).exists());
}

#[test]
fn another_program_finds_in_its_environment_how_to_join() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo \"$ARC_RANK of $ARC_WORKERS at $ARC_SHARD_ADDRESSES\"; test -f \"$ARC_CERTS/key.pem\" && echo \"$RANK warns\" >&2";
    let mut command = arc_worker();
    command
        .args([
            "local",
            "--workers",
            "2",
            "--shards",
            "2",
            "--admin",
            "off",
            "--run-dir",
        ])
        .arg(dir.path())
        .args(["--", "sh", "-c", script]);
    let said = done(&mut command);
    for rank in 0..2 {
        let told = format!("[{rank}] {rank} of 2 at 127.0.0.1:");
        assert!(said.error.contains(&told), "{}", said.error);
        let warned = format!("[{rank}] {rank} warns");
        assert!(said.error.contains(&warned), "{}", said.error);
    }
    let failing = ["local", "--admin", "off", "--run-dir"];
    let mut command = arc_worker();
    command
        .args(failing)
        .arg(dir.path())
        .args(["--", "sh", "-c", "echo oops >&2; exit 3"]);
    let said = Said::from(command.output().unwrap());
    assert_eq!(said.code, Some(1));
    assert!(
        said.error.contains("oops") && said.error.contains("logs"),
        "{}",
        said.error
    );
    // A program with a fault is not started over and over, however long it takes to load.
    let mut command = arc_worker();
    command.args(failing).arg(dir.path()).args([
        "--workers",
        "2",
        "--",
        "sh",
        "-c",
        "sleep 3; exit 3",
    ]);
    let said = Said::from(command.output().unwrap());
    assert!(!said.error.contains("is started again"), "{}", said.error);
    let mut command = arc_worker();
    command
        .args(failing)
        .arg(dir.path())
        .args(["--", "no-such-program"]);
    let said = Said::from(command.output().unwrap());
    assert!(
        said.error.contains("cannot start \"no-such-program\"") && said.error.contains("PATH"),
        "{}",
        said.error
    );
}
