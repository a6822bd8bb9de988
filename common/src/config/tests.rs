#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::config::algorithm::{Compressor, Feedback, MAX_SCHEDULE_UPDATES, ValueType};
use clap::{CommandFactory, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Parser, Debug)]
#[command(name = "arc-worker")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Train(Box<Train>),
    Local(Box<Local>),
    Ps(Box<Ps>),
}

#[derive(clap::Args, Debug)]
struct Train {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    certs: CertArgs,
    #[command(flatten)]
    peers: PeerArgs,
    #[command(flatten)]
    algorithm: AlgorithmConfig,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(clap::Args, Debug)]
struct Local {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    local: LocalArgs,
    #[command(flatten)]
    algorithm: AlgorithmConfig,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(clap::Args, Debug)]
struct Ps {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    certs: CertArgs,
    #[command(flatten)]
    shard: ShardArgs,
}

/// A settings file that goes away with the test.
struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("arc-topk-{}-{name}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // A file that is already gone is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn read(words: &str, file: Option<&File>) -> Result<Cli, SettingsError> {
    let mut argv: Vec<OsString> = words.split(' ').map(OsString::from).collect();
    if let Some(file) = file {
        argv.extend(["--config".into(), file.0.clone().into_os_string()]);
    }
    read_settings(argv)
}

fn local(words: &str, file: Option<&File>) -> Result<Local, SettingsError> {
    match read(words, file)?.command {
        Command::Local(local) => Ok(*local),
        other => panic!("{other:?}"),
    }
}

fn problem(words: &str, text: &str) -> String {
    let name: String = text.chars().filter(char::is_ascii_alphanumeric).collect();
    let file = File::new(&format!("problem-{name}"), text);
    let error = read(words, Some(&file)).unwrap_err().to_string();
    error.replace(&file.0.display().to_string(), "FILE")
}

#[test]
fn the_commands_are_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn defaults_are_valid() {
    let local = local("arc-worker local", None).unwrap();
    assert_eq!(local.algorithm, AlgorithmConfig::default());
    local.algorithm.validate().unwrap();
    local.train.validate().unwrap();
    local.local.validate().unwrap();
    local.common.validate().unwrap();
    assert_eq!(local.train.model_shape().hidden, 128);
}

#[test]
fn the_file_lies_between_flags_and_defaults() {
    let file = File::new(
        "layers",
        "density = 0.05\nwire_up = \"bf16\"\nsteps = 7\njson = true\nlisten = \"127.0.0.1:1\"\n[local]\nworkers = 3\nsteps = 9\n[train]\nrank = 1",
    );
    let read = local("arc-worker local --density 0.4", Some(&file)).unwrap();
    assert_eq!(read.algorithm.density, 0.4, "a flag wins over the file");
    assert_eq!(
        read.algorithm.wire_up,
        ValueType::Bf16,
        "the file wins over the default"
    );
    assert_eq!(read.train.steps, 9, "the command's table wins over the top");
    assert_eq!(read.local.workers, 3);
    assert!(read.train.json);
    assert_eq!(read.algorithm.compressor, Compressor::Arc);
}

#[test]
fn required_flags_may_stand_in_the_file() {
    let file = File::new(
        "required",
        "shard_addresses = [\"a:1\", \"b:2\"]\n[ps]\nworkers = 4",
    );
    let Command::Train(train) = read("arc-worker train", Some(&file)).unwrap().command else {
        panic!("train")
    };
    assert_eq!(train.peers.shard_addresses, ["a:1", "b:2"]);
    train.peers.validate().unwrap();
    assert!(
        train
            .certs
            .paths("worker")
            .unwrap_err()
            .to_string()
            .starts_with("ca is not set, but must be a file")
    );
    let Command::Ps(ps) = read("arc-worker ps --certs dir", Some(&file))
        .unwrap()
        .command
    else {
        panic!("ps")
    };
    assert_eq!(ps.shard.workers, 4);
    assert_eq!(
        ps.certs.paths("shard").unwrap()[1],
        PathBuf::from("dir/cert.pem")
    );
    ps.shard.validate().unwrap();
    ps.common.validate().unwrap();
}

#[test]
fn errors_name_key_file_and_near_matches() {
    assert_eq!(
        problem("arc-worker local", "densty = 0.1"),
        "FILE: unknown setting \"densty\"; did you mean density?"
    );
    assert_eq!(
        problem("arc-worker local", "[local]\nsketch-rank = 1"),
        "FILE: unknown setting \"local.sketch-rank\"; did you mean sketch_rank?"
    );
    assert_eq!(
        problem("arc-worker local", "zzzzzzzzzzzz = 1"),
        "FILE: unknown setting \"zzzzzzzzzzzz\"; no setting has a similar name: --help lists all of them"
    );
    assert_eq!(
        problem("arc-worker local", "json = 3"),
        "FILE: setting \"json\": is integer, but must be true or false"
    );
    assert!(
        problem("arc-worker local", "compressor = \"arx\"")
            .starts_with("FILE: setting \"compressor\": invalid value 'arx'")
    );
    assert!(problem("arc-worker local", "density = [").starts_with("FILE is not valid TOML:"));
    let missing = read("arc-worker local --config /nonexistent/x.toml", None)
        .unwrap_err()
        .to_string();
    assert!(
        missing.starts_with("cannot read the settings file /nonexistent/x.toml: "),
        "{missing}"
    );
    assert!(matches!(
        read("arc-worker local --nonsense", None),
        Err(SettingsError::Flags(_))
    ));
    assert!(matches!(
        read("arc-worker local --help", None),
        Err(SettingsError::Flags(_))
    ));
}

#[test]
fn every_flag_has_a_help_text_and_an_environment_name() {
    for command in Cli::command().get_subcommands() {
        for arg in command.get_arguments().filter(|arg| arg.get_id() != "help") {
            let id = arg.get_id().as_str();
            assert!(
                arg.get_help()
                    .is_some_and(|help| help.to_string().len() > 10),
                "{id} needs a help text"
            );
            let env = arg
                .get_env()
                .unwrap_or_else(|| panic!("{id} needs an environment name"));
            assert!(env.to_string_lossy().starts_with("ARC_"), "{id}");
        }
    }
}

#[test]
fn ranges_of_processes_are_checked() {
    let ps = |words: &str| match read(&format!("arc-worker ps {words}"), None)
        .unwrap()
        .command
    {
        Command::Ps(ps) => ps.shard.validate().map_err(|e| e.name),
        other => panic!("{other:?}"),
    };
    assert_eq!(ps("--workers 1"), Ok(()));
    assert_eq!(ps("--workers 0"), Err("workers"));
    assert_eq!(ps("--workers 4096"), Ok(()));
    assert_eq!(ps("--workers 4097"), Err("workers"));
    assert_eq!(ps("--workers 2 --shards 2 --shard 2"), Err("shard"));
    assert_eq!(ps("--workers 2 --shards 257"), Err("shards"));
    assert_eq!(ps("--workers 2 --min-workers 3"), Err("min_workers"));
    let peers = |words: &str| match read(&format!("arc-worker train {words}"), None)
        .unwrap()
        .command
    {
        Command::Train(train) => train.peers.validate().map_err(|e| e.name),
        other => panic!("{other:?}"),
    };
    assert_eq!(peers("--shard-addresses a:1,b:2"), Ok(()));
    assert_eq!(peers("--shard-addresses a:1,b"), Err("shard_addresses"));
    assert_eq!(
        peers("--shard-addresses a:1 --workers 2 --rank 2"),
        Err("rank")
    );
    assert_eq!(
        peers("--shard-addresses a:1 --connect-timeout-seconds 0"),
        Err("connect_timeout_seconds")
    );
}

#[test]
fn ranges_of_training_are_checked() {
    let train = |words: &str| {
        local(&format!("arc-worker local {words}"), None)
            .unwrap()
            .train
            .validate()
            .map_err(|e| e.name)
    };
    assert_eq!(train("--lr 0"), Err("lr"));
    assert_eq!(train("--lr NaN"), Err("lr"));
    assert_eq!(train("--steps 0"), Err("steps"));
    assert_eq!(train("--hidden 100 --heads 4"), Err("hidden"));
    assert_eq!(train("--vocab 255"), Err("vocab"));
    assert_eq!(train("--beta2 1"), Err("beta2"));
    assert_eq!(train("--catch-up-cap 0"), Err("catch_up_cap"));
    assert_eq!(train("--checkpoint-every 5"), Err("checkpoint_dir"));
    // From the shards' store.
    assert_eq!(
        train("--resume --snapshot-every 10 --digest-every 0"),
        Ok(())
    );
    assert_eq!(train("--resume --checkpoint-dir x"), Ok(()));
    for preset in ["tiny", "60m", "130m", "350m", "1b"] {
        assert_eq!(train(&format!("--model {preset}")), Ok(()));
    }
}

#[test]
fn elastic_settings_are_read_and_checked() {
    let file = File::new(
        "elastic",
        "quorum = 3\nstraggler_timeout_seconds = 0.5\n[local]\nmax_workers = 6\n[ps]\nresync = true",
    );
    let args = local("arc-worker local --restart never", Some(&file)).unwrap();
    args.local.validate().unwrap();
    assert_eq!(args.local.elastic.quorum, 3);
    assert_eq!(args.local.elastic.straggler_timeout_seconds, 0.5);
    assert_eq!(args.local.elastic.most_workers(4), 6);
    assert!(!args.local.elastic.resync);
    assert_eq!(args.local.restart, RestartPolicy::Never);
    let Command::Ps(shard) = read("arc-worker ps --workers 4", Some(&file))
        .unwrap()
        .command
    else {
        panic!("ps")
    };
    assert!(shard.shard.elastic.resync);
    shard.shard.validate().unwrap();
    let problem = |words: &str| {
        local(&format!("arc-worker local {words}"), None)
            .unwrap()
            .local
            .validate()
            .map_err(|e| e.name)
    };
    assert_eq!(problem("--quorum 5"), Err("quorum"));
    assert_eq!(problem("--quorum 5 --max-workers 5"), Ok(()));
    assert_eq!(problem("--max-workers 2"), Err("max_workers"));
}

#[test]
fn schedules_are_bounded() {
    let config = |warmup_updates, ramp_updates| AlgorithmConfig {
        warmup_updates,
        ramp_updates,
        ..AlgorithmConfig::default()
    };
    let most = MAX_SCHEDULE_UPDATES;
    config(most, most).validate().unwrap();
    let problem = |config: AlgorithmConfig| config.validate().unwrap_err().name;
    assert_eq!(problem(config(most + 1, 0)), "warmup_updates");
    assert_eq!(problem(config(0, u64::MAX)), "ramp_updates");
}

/// Bits of these powers, computed with 60 decimal digits and rounded to f32.
#[test]
fn the_ramp_has_the_same_bits_everywhere() {
    let ramp = |density: f32, updates: u64| {
        let config = AlgorithmConfig {
            warmup_updates: 1,
            ramp_updates: updates,
            ..AlgorithmConfig::default()
        };
        let at = |update| config.density_at(update, density).to_bits();
        (1..=updates).map(at).collect::<Vec<u32>>()
    };
    assert_eq!(ramp(0.001, 2), [0x3dcc_cccd, 0x3c23_d70b]);
    assert_eq!(
        ramp(0.2, 6),
        [
            0x3f4b_6abc,
            0x3f21_a273,
            0x3f00_6f35,
            0x3ecc_1b78,
            0x3ea2_2ee2,
            0x3e80_decc
        ]
    );
    let jump = AlgorithmConfig::default();
    assert_eq!(jump.density_at(19, 0.2), 1.0);
    assert_eq!(jump.density_at(20, 0.2), 0.2);
    let longest = AlgorithmConfig {
        warmup_updates: 0,
        ramp_updates: MAX_SCHEDULE_UPDATES,
        ..jump
    };
    assert_eq!(longest.density_at(0, f32::MIN_POSITIVE), 1.0);
    assert_eq!(longest.density_at(MAX_SCHEDULE_UPDATES - 1, 0.2), 0.2);
    assert_eq!(longest.density_at(u64::MAX, 0.2), 0.2);
}

#[test]
fn estimates_need_an_exact_mean() {
    for feedback in [Feedback::Ef21, Feedback::Ef21m] {
        let config = |wire_down, wire_dense| AlgorithmConfig {
            feedback,
            wire_up: ValueType::Int4,
            wire_down,
            wire_dense,
            wire_warmup: ValueType::F32,
            ..AlgorithmConfig::default()
        };
        config(ValueType::F32, ValueType::F32).validate().unwrap();
        let text = |config: AlgorithmConfig| config.validate().unwrap_err().to_string();
        assert_eq!(
            text(config(ValueType::Int4, ValueType::F32)),
            "wire_down is int4, but must be f32 with feedback ef21 or ef21m: what rounding the mean loses would stay in \
             their estimate for ever; wire_up may be any type, and feedback ef14 takes any"
        );
        assert!(text(config(ValueType::F32, ValueType::Bf16)).starts_with("wire_dense is bf16"));
        let warm = AlgorithmConfig {
            wire_warmup: ValueType::Int8,
            ..config(ValueType::F32, ValueType::F32)
        };
        assert!(text(warm).starts_with("wire_warmup is int8"));
        let dense = AlgorithmConfig {
            compressor: Compressor::Dense,
            ..config(ValueType::Int4, ValueType::Bf16)
        };
        dense.validate().unwrap();
    }
}

#[test]
fn the_admin_server_can_be_off() {
    assert_eq!("off".parse(), Ok(AdminAddress(None)));
    assert_eq!(
        "127.0.0.1:9400"
            .parse::<AdminAddress>()
            .unwrap()
            .to_string(),
        "127.0.0.1:9400"
    );
    assert!(
        "9400"
            .parse::<AdminAddress>()
            .unwrap_err()
            .contains("127.0.0.1:9400")
    );
}
