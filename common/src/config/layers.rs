//! Flag > environment > TOML file > default.
//!
//! A TOML key is a flag's name with underscores. Keys at the top apply to every command that has them; keys in a
//! table named like a command (`[train]`, `[ps]`, …) apply to that command alone and win over those at the top, so
//! that one file can serve a whole job. clap reads the result: a value from the file is appended to the command
//! line as its flag, unless flag or environment already gave one.

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Command, Parser};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Tables that a file may hold; those of other programs are skipped.
pub const SECTIONS: [&str; 5] = ["ps", "certs", "train", "local", "plan"];

/// Settings that could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Flags or environment; also `--help` and `--version`. Print it with [`clap::Error::exit`].
    #[error(transparent)]
    Flags(#[from] clap::Error),
    /// The file cannot be read.
    #[error("cannot read the settings file {}: {source}; check the path given by --config or ARC_CONFIG", file.display())]
    Unreadable {
        /// File.
        file: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{} is not valid TOML: {source}", file.display())]
    Syntax {
        /// File.
        file: PathBuf,
        /// Cause, with line and column.
        source: Box<toml::de::Error>,
    },
    /// A key that no command has.
    #[error("{}: unknown setting {key:?}; {hint}", file.display())]
    UnknownKey {
        /// File.
        file: PathBuf,
        /// Key, with its table.
        key: String,
        /// Near matches, or where to look.
        hint: String,
    },
    /// A value of a wrong kind, or that the flag refuses.
    #[error("{}: setting {key:?}: {problem}", file.display())]
    Value {
        /// File.
        file: PathBuf,
        /// Key.
        key: String,
        /// What is wrong.
        problem: String,
    },
}

/// Reads the settings of `C` from `argv` (program name first), the environment and the file that `--config` names.
///
/// # Errors
/// [`SettingsError`]; flags' errors also stand for `--help` and `--version`.
pub fn read_settings<C: Parser>(
    argv: impl IntoIterator<Item = OsString>,
) -> Result<C, SettingsError> {
    let argv: Vec<OsString> = argv.into_iter().collect();
    let command = C::command();
    // What flags and environment say, whatever is still missing: only to find the file and what is already set.
    let first = command
        .clone()
        .ignore_errors(true)
        .try_get_matches_from(&argv);
    let Some((names, matches)) = first.as_ref().ok().map(deepest) else {
        return Ok(C::try_parse_from(argv)?);
    };
    let Some(file) = explicit(matches, "config").and_then(|_| matches.get_one::<PathBuf>("config"))
    else {
        return Ok(C::try_parse_from(argv)?);
    };
    let chosen = names
        .iter()
        .try_fold(&command, |c, name| c.find_subcommand(name))
        .unwrap_or(&command);
    let section = names.first().map_or(
        command.get_name().trim_start_matches("arc-"),
        String::as_str,
    );
    let extra = from_file(file, &command, chosen, section, matches)?;
    let mut whole = argv;
    whole.extend(
        extra
            .iter()
            .flat_map(|(_, words)| words.iter().map(OsString::from)),
    );
    let parsed = command
        .try_get_matches_from(&whole)
        .and_then(|mut m| C::from_arg_matches_mut(&mut m));
    parsed.map_err(|error| blame_file(error, file, &extra))
}

/// Names of the chosen subcommands, and the innermost one's matches.
fn deepest(matches: &ArgMatches) -> (Vec<String>, &ArgMatches) {
    let (mut names, mut innermost) = (Vec::new(), matches);
    while let Some((name, inner)) = innermost.subcommand() {
        names.push(name.to_owned());
        innermost = inner;
    }
    (names, innermost)
}

/// The source of an argument that flag or environment set.
fn explicit(matches: &ArgMatches, id: &str) -> Option<ValueSource> {
    matches.try_contains_id(id).ok()?;
    matches
        .value_source(id)
        .filter(|source| *source != ValueSource::DefaultValue)
}

type Words = Vec<(String, Vec<String>)>;

/// The file's settings for the chosen command as key and flag words.
fn from_file(
    file: &Path,
    root: &Command,
    chosen: &Command,
    section: &str,
    matches: &ArgMatches,
) -> Result<Words, SettingsError> {
    let text = std::fs::read_to_string(file).map_err(|source| SettingsError::Unreadable {
        file: file.to_owned(),
        source,
    })?;
    let table: Table = text.parse().map_err(|source| SettingsError::Syntax {
        file: file.to_owned(),
        source: Box::new(source),
    })?;
    let (own, everywhere) = (keys(chosen), all_keys(root));
    let mut settings = Table::new();
    for (key, value) in &table {
        match value {
            Value::Table(inner) if key == section => {
                if let Some(key) = inner.keys().find(|key| !own.contains(*key)) {
                    return Err(unknown(file, &format!("{section}.{key}"), key, &own));
                }
            }
            Value::Table(_) if SECTIONS.contains(&key.as_str()) => {}
            _ if !everywhere.contains(key) => return Err(unknown(file, key, key, &everywhere)),
            value => drop(settings.insert(key.clone(), value.clone())),
        }
    }
    if let Some(Value::Table(inner)) = table.get(section) {
        settings.extend(inner.clone());
    }
    let wanted = settings
        .iter()
        .filter(|(key, _)| own.contains(*key) && explicit(matches, key).is_none());
    wanted
        .map(|(key, value)| {
            Ok((
                key.clone(),
                words(chosen, key, value).map_err(|problem| value_error(file, key, problem))?,
            ))
        })
        .collect()
}

/// Keys that a command's flags have.
fn keys(command: &Command) -> BTreeSet<String> {
    let flags = command
        .get_arguments()
        .filter(|arg| arg.get_long().is_some());
    let ids = flags.map(|arg| arg.get_id().to_string());
    ids.filter(|id| !["help", "version", "config"].contains(&id.as_str()))
        .collect()
}

fn all_keys(command: &Command) -> BTreeSet<String> {
    let mut all = keys(command);
    command
        .get_subcommands()
        .for_each(|inner| all.extend(all_keys(inner)));
    all
}

/// A value as words of the command line: `--key=value`.
fn words(command: &Command, key: &str, value: &Value) -> Result<Vec<String>, String> {
    let arg = command.get_arguments().find(|arg| arg.get_id() == key);
    let Some((arg, long)) = arg.and_then(|arg| Some((arg, arg.get_long()?))) else {
        return Ok(Vec::new());
    };
    if !arg.get_action().takes_values() {
        return match value {
            Value::Boolean(true) => Ok(vec![format!("--{long}")]),
            Value::Boolean(false) => Ok(Vec::new()),
            other => Err(format!(
                "is {}, but must be true or false",
                other.type_str()
            )),
        };
    }
    let text = match value {
        Value::Array(items) => items
            .iter()
            .map(scalar)
            .collect::<Result<Vec<_>, _>>()?
            .join(","),
        other => scalar(other)?,
    };
    Ok(vec![format!("--{long}={text}")])
}

fn scalar(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Float(number) => Ok(number.to_string()),
        Value::Boolean(truth) => Ok(truth.to_string()),
        other => Err(format!(
            "is a {}, but must be a string, a number or a list of them",
            other.type_str()
        )),
    }
}

fn value_error(file: &Path, key: &str, problem: String) -> SettingsError {
    SettingsError::Value {
        file: file.to_owned(),
        key: key.to_owned(),
        problem,
    }
}

/// An error of a value that stands in the file names the file, not a flag that nobody typed.
fn blame_file(error: clap::Error, file: &Path, extra: &Words) -> SettingsError {
    let (ErrorKind::InvalidValue | ErrorKind::ValueValidation) = error.kind() else {
        return error.into();
    };
    let text = error.to_string();
    let culprit = extra.iter().find(|(_, words)| {
        words.iter().any(|word| {
            word.split_once('=')
                .is_some_and(|(flag, _)| text.contains(&format!("'{flag} ")))
        })
    });
    match culprit {
        Some((key, _)) => {
            let first = text
                .trim_start_matches("error: ")
                .split("\n\nFor more")
                .next()
                .unwrap_or_default();
            value_error(file, key, first.trim().to_owned())
        }
        None => error.into(),
    }
}

fn unknown(file: &Path, key: &str, bare: &str, known: &BTreeSet<String>) -> SettingsError {
    let bare = bare.replace('-', "_");
    let mut near: Vec<(usize, &str)> = known
        .iter()
        .map(|k| (edit_distance(&bare, k), k.as_str()))
        .collect();
    near.sort_unstable();
    let limit = (bare.len() / 3).max(2);
    let near: Vec<&str> = near
        .into_iter()
        .filter(|(d, _)| *d <= limit)
        .take(3)
        .map(|(_, k)| k)
        .collect();
    let hint = if near.is_empty() {
        "no setting has a similar name: --help lists all of them".to_owned()
    } else {
        format!("did you mean {}?", near.join(" or "))
    };
    SettingsError::UnknownKey {
        file: file.to_owned(),
        key: key.to_owned(),
        hint,
    }
}

/// Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let change = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
