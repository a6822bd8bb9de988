//! Why a command failed, and with which exit status.

use crate::report::ReportError;
use crate::session::ConnectError;
use crate::train::TrainError;
use arc_topk_common::config::{SettingError, SettingsError};
use arc_topk_common::plan::PlanError;
use arc_topk_transport::TransportError;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit status of a run that a signal ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// Why a command failed. Every text names cause and remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error(
        "--log {filter:?} is not a filter: {problem}; write a level such as info, or info,arc_topk_worker=debug"
    )]
    Log { filter: String, problem: String },
    #[error("{argument:?} is not {what}: write {example}")]
    Argument {
        what: &'static str,
        argument: String,
        example: &'static str,
    },
    #[error("the settings give no plan: {0}")]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Record(#[from] crate::record::RecordError),
    #[error(
        "{} holds snapshots of an earlier run: pass --resume to go on from the newest, or another --run-dir, or remove it",
        dir.display()
    )]
    SnapshotsInUse { dir: PathBuf },
    #[error(transparent)]
    Store(Box<crate::store::StoreError>),
    #[error(
        "the job has ended while this worker was away, so there is nothing that it could join again; start all workers \
         again, with --resume if there are snapshots or checkpoints"
    )]
    NothingToJoin,
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Admin(#[from] arc_topk_ps::server::admin::AdminBindError),
    #[error("cannot {action} {}: {source}; check that the directory exists, is writable and has room", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot {action}: {source}")]
    System {
        action: &'static str,
        source: io::Error,
    },
    #[error("cannot start {program:?}: {source}; give its path, or see that it is on PATH")]
    Program {
        program: OsString,
        source: io::Error,
    },
    #[error("{who} did not get ready: {reason}\n{tail}")]
    NotReady {
        who: String,
        reason: String,
        tail: String,
    },
    /// Its parts were reported when they failed.
    #[error("{failed} of the job's processes failed; their logs are in {}", logs.display())]
    Job { failed: usize, logs: PathBuf },
    #[error("stopped by a signal")]
    Interrupted,
}

impl From<crate::store::StoreError> for CliError {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

impl CliError {
    /// 2 for what the caller should write differently, 130 for a signal, 1 for everything else.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Settings(SettingsError::Flags(error)) => {
                ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
            }
            Self::Settings(_)
            | Self::Setting(_)
            | Self::Log { .. }
            | Self::Argument { .. }
            | Self::Plan(_) => ExitCode::from(2),
            Self::Train(TrainError::Setting(_)) => ExitCode::from(2),
            Self::Interrupted => ExitCode::from(INTERRUPTED),
            _ => ExitCode::FAILURE,
        }
    }
}
