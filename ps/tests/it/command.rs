//! The binary: certificates, readiness, SIGTERM, completions, wrong usage.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn arc_ps() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_arc-ps"));
    // The tests' own environment has no say.
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ARC_")) {
        command.env_remove(name);
    }
    command
}

fn output(args: &[&str]) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = arc_ps().args(args).output().unwrap();
    (
        status.code(),
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    )
}

fn make(dir: &Path) -> String {
    let out = dir.join("certs").display().to_string();
    let (code, text, _) = output(&["certs", "--out", &out, "--host", "ps0.lan"]);
    assert_eq!(code, Some(0));
    assert!(
        text.contains("copy to every machine that runs a worker") && text.contains("ps0.lan"),
        "{text}"
    );
    out
}

#[test]
fn certificates_are_not_overwritten_without_force() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let out = make(dir.path());
    let key = dir.path().join("certs/shard/key.pem");
    assert_eq!(key.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let before = std::fs::read(&key).unwrap();
    let (code, _, error) = output(&["certs", "--out", &out]);
    assert_eq!(code, Some(1));
    assert!(error.contains("--force"), "{error}");
    assert_eq!(std::fs::read(&key).unwrap(), before);
    assert_eq!(output(&["certs", "--out", &out, "--force"]).0, Some(0));
    assert_ne!(std::fs::read(&key).unwrap(), before);
}

#[test]
fn it_says_when_it_is_ready_and_ends_with_zero_on_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let out = make(dir.path());
    let mut child = arc_ps()
        .args([
            "--certs",
            &out,
            "--workers",
            "2",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--ready-json",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(ready["ready"], true);
    assert!(
        ready["quic"].as_str().unwrap().starts_with("127.0.0.1:"),
        "{line}"
    );
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

/// What `/metrics` says of `name`.
fn metric(admin: &str, name: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(admin).unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {text}"))
        .trim()
        .to_owned()
}

#[test]
fn renewed_certificates_are_taken_on_sighup() {
    let dir = tempfile::tempdir().unwrap();
    let out = make(dir.path());
    let mut child = arc_ps()
        .args(["--certs", &out, "--workers", "2", "--listen", "127.0.0.1:0"])
        .args(["--admin", "127.0.0.1:0", "--ready-json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
    let admin = ready["admin"].as_str().unwrap();
    let end = "arc_certificate_expiry_timestamp_seconds";
    let taken = "arc_certificate_renewals_total{outcome=\"taken\"}";
    let before: u64 = metric(admin, end).parse().unwrap();
    let ca = std::fs::read(dir.path().join("certs/ca.pem")).unwrap();

    let (code, text, error) = output(&["certs", "--out", &out, "--renew", "--days", "30"]);
    assert_eq!(code, Some(0), "{error}");
    assert!(text.contains("Nothing needs a restart"), "{text}");
    assert_eq!(std::fs::read(dir.path().join("certs/ca.pem")).unwrap(), ca);
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-HUP", &pid]).status();
    assert!(sent.unwrap().success());
    for _ in 0..600 {
        if metric(admin, taken) != "0" {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(metric(admin, taken), "1");
    let after: u64 = metric(admin, end).parse().unwrap();
    assert!(after < before, "30 days end before 365: {after}, {before}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_renewal_needs_the_authoritys_key() {
    let dir = tempfile::tempdir().unwrap();
    let out = make(dir.path());
    std::fs::remove_file(dir.path().join("certs/ca-key.pem")).unwrap();
    let (code, _, error) = output(&["certs", "--out", &out, "--renew"]);
    assert_eq!(code, Some(1));
    assert!(error.contains("ca-key.pem"), "{error}");
    let (code, _, error) = output(&["certs", "--out", &out, "--renew", "--force"]);
    assert_eq!(code, Some(2), "{error}");
}

#[test]
fn it_ends_when_its_standard_input_does() {
    let dir = tempfile::tempdir().unwrap();
    let out = make(dir.path());
    let mut child = arc_ps()
        .args([
            "serve",
            "--certs",
            &out,
            "--workers",
            "1",
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "off",
            "--until-stdin-ends",
        ])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn wrong_usage_is_explained() {
    let cases: [(&[&str], i32, &str); 4] = [
        (
            &["--workers", "2"],
            2,
            "make certificates with `arc-ps certs --out DIR`",
        ),
        (
            &["--workers", "2", "--certs", "/nowhere"],
            1,
            "cannot read /nowhere/ca.pem",
        ),
        (
            &["--workers", "2", "--shard", "1"],
            2,
            "shards are counted from 0",
        ),
        (&["--log", "a=b=c", "--workers", "2"], 2, "is not a filter"),
    ];
    for (args, code, text) in cases {
        let (got, _, error) = output(args);
        assert_eq!(got, Some(code), "{args:?}: {error}");
        assert!(error.contains(text), "{args:?}: {error}");
    }
}

#[test]
fn help_and_completions_list_every_command() {
    let (code, help, _) = output(&["--help"]);
    assert_eq!(code, Some(0));
    assert!(
        help.contains("certs") && help.contains("completions") && help.contains("--min-workers"),
        "{help}"
    );
    assert!(output(&["certs", "--help"]).1.contains("--force"));
    let (code, script, _) = output(&["completions", "bash"]);
    assert_eq!(code, Some(0));
    assert!(script.contains("certs") && script.contains("--min-workers"));
}
