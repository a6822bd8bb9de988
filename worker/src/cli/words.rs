//! Settings as the command line of another process of this program.
//!
//! Flags, environment and file were read once, by the process that starts the others; these get every setting as a
//! flag, so that no layer can differ between them.

use serde::Serialize;
use std::ffi::OsString;

/// `--key=value` for every field of `settings` that is set, but for the `left_out` ones; `--key` for a switch that is on.
///
/// # Panics
/// If a field is neither a string, a number, a truth value nor nothing: settings are flat by design.
pub(super) fn flags<T: Serialize>(settings: &T, left_out: &[&str]) -> Vec<OsString> {
    // Through text, where a float is written in its shortest form: as a value, 0.003f32 would become 0.003000000026077032.
    let text = serde_json::to_string(settings).expect("settings are plain data");
    let fields: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).expect("settings are a struct of named fields");
    let kept = fields
        .into_iter()
        .filter(|(key, _)| !left_out.contains(&key.as_str()));
    kept.filter_map(|(key, value)| word(&key.replace('_', "-"), &value))
        .map(OsString::from)
        .collect()
}

fn word(flag: &str, value: &serde_json::Value) -> Option<String> {
    use serde_json::Value;
    match value {
        Value::Null | Value::Bool(false) => None,
        Value::Bool(true) => Some(format!("--{flag}")),
        Value::String(text) => Some(format!("--{flag}={text}")),
        Value::Number(number) => Some(format!("--{flag}={number}")),
        Value::Array(_) | Value::Object(_) => panic!("setting {flag} is not flat"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arc_topk_common::config::{AlgorithmConfig, TrainArgs};
    use clap::Parser;

    #[derive(Parser, Debug, PartialEq, Clone)]
    struct Both {
        #[command(flatten)]
        train: TrainArgs,
        #[command(flatten)]
        algorithm: AlgorithmConfig,
    }

    #[test]
    fn settings_survive_the_way_through_a_command_line() {
        let words = [
            "x",
            "--density",
            "0.37",
            "--lr",
            "0.0031",
            "--model",
            "60m",
            "--optimizer",
            "adamw",
            "--init",
            "zeros",
        ];
        let mut both = Both::parse_from(words);
        both.train.json = true;
        both.train.data = Some("a b/c.txt".into());
        let line = [OsString::from("x")].into_iter();
        let line = line
            .chain(flags(&both.train, &[]))
            .chain(flags(&both.algorithm, &[]));
        assert_eq!(Both::parse_from(line), both);
    }

    #[test]
    fn what_is_left_out_or_unset_is_no_word() {
        let both = Both::parse_from(["x"]);
        let words = flags(&both.train, &["lr"]);
        let named = |name: &str| {
            words
                .iter()
                .any(|word| word.to_string_lossy().starts_with(name))
        };
        assert!(named("--steps=") && !named("--lr=") && !named("--data") && !named("--json"));
    }
}
