//! Help, completions, predictions, and what is said of wrong usage before anything is started.

use super::{SMALL, arc_worker, said};
use std::fs;

#[test]
fn every_command_teaches_by_its_help() {
    let all = said(&["--help"]);
    assert_eq!(all.code, Some(0));
    for command in ["train", "local", "demo", "plan", "report", "completions"] {
        assert!(all.out.contains(command), "{command}");
        let help = said(&[command, "--help"]);
        assert_eq!(help.code, Some(0), "{command}");
        assert!(help.out.contains("Example"), "{command}: {}", help.out);
        assert!(!help.out.contains("chaos"), "{command}");
    }
    assert!(said(&["ps", "--help"]).out.contains("--min-workers"));
    assert!(said(&["ps", "certs", "--help"]).out.contains("--host"));
    let nothing = said(&[]);
    assert_eq!(nothing.code, Some(2));
    assert!(nothing.error.contains("Usage"), "{}", nothing.error);
}

#[test]
fn completions_know_the_flags() {
    for shell in ["bash", "zsh", "fish"] {
        let script = said(&["completions", shell]);
        assert_eq!(script.code, Some(0));
        assert!(script.out.contains("sketch-rank"), "{shell}");
    }
}

/// Arguments, exit status, what the error must say.
type Case<'a> = (&'a [&'a str], i32, &'a [&'a str]);

#[test]
fn bad_settings_are_explained() {
    let cases: [Case<'_>; 12] = [
        (&["local", "--density", "0"], 2, &["density", "above 0"]),
        (
            &["local", "--density", "1.5"],
            2,
            &["density is 1.5", "at most 1"],
        ),
        (&["train", "--density", "NaN"], 2, &["density is NaN"]),
        (&["local", "--density", "much"], 2, &["--density", "much"]),
        (
            &["local", "--workers", "0"],
            2,
            &["workers is 0", "1 to 4096"],
        ),
        (&["local", "--sketch-rank", "0"], 2, &["sketch_rank is 0"]),
        (&["train", "--resume"], 2, &["--checkpoint-dir"]),
        (&["train", "--lr=-1"], 2, &["lr", "positive"]),
        (
            &["train", "--shard-addresses", "ps0"],
            2,
            &["HOST:PORT", "7400"],
        ),
        (
            &["train", "--shard-addresses", "127.0.0.1:9"],
            2,
            &["arc-ps certs"],
        ),
        (&["plan", "--rate", "fast"], 2, &["fast", "100mbit"]),
        (
            &["local", "--compressor", "topk", "--energy", "0.9"],
            2,
            &["energy is 0.9", "set compressor arc"],
        ),
    ];
    for (args, code, words) in cases {
        let said = said(args);
        assert_eq!(said.code, Some(code), "{args:?}: {}", said.error);
        for word in words {
            assert!(said.error.contains(word), "{args:?}: {}", said.error);
        }
    }
}

#[test]
fn missing_data_is_named_before_anything_starts() {
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().join("runs").display().to_string();
    for args in [
        vec!["local", "--data", "/nowhere/text.txt", "--run-dir", &runs],
        vec!["train", "--data", "/nowhere/text.txt"],
        vec![
            "local",
            "--task",
            "fashion",
            "--data",
            "/nowhere",
            "--run-dir",
            &runs,
        ],
    ] {
        let said = said(&args);
        assert_eq!(said.code, Some(1), "{args:?}: {}", said.error);
        assert!(said.error.contains("no data at /nowhere"), "{}", said.error);
    }
    assert!(!dir.path().join("runs").exists());
}

#[test]
fn settings_come_from_flags_then_environment_then_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("job.toml");
    fs::write(&file, "density = 0.3\nsketch_rank = 2\n").unwrap();
    let plan = |flags: &[&str], variable: Option<&str>| {
        let mut command = arc_worker();
        command.args(["plan", "--json", "--config"]).arg(&file);
        command.args(flags);
        if let Some(value) = variable {
            command.env("ARC_DENSITY", value);
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let has = |text: String, density: &str| {
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        let rows = json["rates"][0]["predictions"].as_array().unwrap();
        let name = format!("arc {density},");
        let there = rows
            .iter()
            .any(|row| row["name"].as_str().unwrap().starts_with(&name));
        assert!(there, "{density}: {text}");
    };
    has(plan(&[], None), "0.3");
    has(plan(&[], Some("0.25")), "0.25");
    has(plan(&["--density", "0.15"], Some("0.25")), "0.15");
    fs::write(&file, "densty = 0.3\n").unwrap();
    let wrong = said(&["plan", "--config", &file.display().to_string()]);
    assert_eq!(wrong.code, Some(2));
    assert!(
        wrong.error.contains("densty") && wrong.error.contains("job.toml"),
        "{}",
        wrong.error
    );
}

#[test]
fn a_prediction_with_an_energy_is_said_to_be_an_upper_bound() {
    let plan = |more: &[&str]| said(&[&["plan", "--densities", "0.2"], more].concat());
    let (whole, by_energy) = (plan(&[]), plan(&["--energy", "0.9"]));
    assert_eq!(by_energy.code, Some(0), "{}", by_energy.error);
    assert!(by_energy.out.contains("arc at most 0.2, energy 0.9"));
    assert!(by_energy.out.contains("upper bounds"));
    assert!(!whole.out.contains("upper bounds"), "{}", whole.out);
}

#[test]
fn a_port_in_use_is_named_with_its_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let certs = dir.path().join("certs").display().to_string();
    assert_eq!(said(&["ps", "certs", "--out", &certs]).code, Some(0));
    let serve = |listen: &str, admin: &str| {
        let job = ["ps", "--certs", &certs, "--workers", "1"];
        said(&[&job[..], &["--listen", listen, "--admin", admin]].concat())
    };
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ps = serve(&address, "off");
    assert_eq!(ps.code, Some(1));
    assert!(
        ps.error.contains(&address) && ps.error.contains("--listen"),
        "{}",
        ps.error
    );
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ps = serve("127.0.0.1:0", &address);
    assert_eq!(ps.code, Some(1));
    assert!(
        ps.error.contains(&address) && ps.error.contains("--admin"),
        "{}",
        ps.error
    );
    // A worker's own page, too.
    let mut args = vec!["train", "--steps", "1", "--admin", &address];
    args.extend(SMALL);
    let train = said(&args);
    assert_eq!(train.code, Some(1));
    assert!(train.error.contains(&address), "{}", train.error);
}
