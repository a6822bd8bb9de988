//! Settings, all read in this one place.
//!
//! - [`algorithm`] is what every peer of a job must agree on (it is part of the plan's hash).
//! - [`process`] is what a process is told about its job, its peers and its machine.
//! - [`elastic`] is what a job does when machines come, go or lag.
//! - [`train`] is what the built-in trainer is told.
//! - [`layers`] reads them: flag > environment (`ARC_…`) > TOML file (`--config FILE`) > default.

pub mod algorithm;
pub mod elastic;
pub mod layers;
pub mod process;
pub mod setting;
#[cfg(test)]
mod tests;
pub mod train;

pub use algorithm::AlgorithmConfig;
pub use elastic::{ElasticArgs, RestartPolicy};
pub use layers::{SettingsError, read_settings};
pub use process::{
    AdminAddress, CertArgs, CommonArgs, LocalArgs, PeerArgs, ShardArgs, SnapshotArgs,
};
pub use setting::{SettingError, check_density, require};
pub use train::{ModelPreset, OptimizerChoice, Task, TrainArgs};
