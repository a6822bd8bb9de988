//! Client of the snapshot store: puts parts of a snapshot on the shards and finds the newest from which a job can go on.
//!
//! ```text
//! donor     upload_part(snapshot, Replica, blob) ─┐
//! rank r    upload_part(snapshot, Rank(r), blob) ─┤ every part: one piece on each shard
//! donor     commit(manifest)  ────────────────────┘ once all parts are stored
//!
//! joiner    fetch_replica(snapshot)            no manifest needed
//! restart   survey() → newest complete → fetch_part(info, owner)
//! ```
//!
//! Pieces may lie on any shard, and a part may have another number of pieces than there are shards now: what counts is
//! that each is somewhere. Every piece and every part is checked by its SHA-256; a piece that is damaged on one shard is
//! taken from another that has it.
//!
//! A shard that does not answer is tried again, with pauses that double, until [`StoreConfig::deadline`] has passed since
//! its first failure. A transfer may take longer than that, as long as it moves.

mod client;
mod error;
mod fetch;
mod link;
mod search;
#[cfg(test)]
mod tests;

pub use client::{AsyncStoreClient, StoreClient};
pub use error::StoreError;
pub use search::{PassedOver, SnapshotInfo, Survey, WholePart};

use arc_topk_transport::{IdentitySource, TransportConfig};
use std::time::Duration;

/// How the shards' store is reached.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// `HOST:PORT` of every shard, in the same order on all workers. Certificates must name HOST.
    pub shards: Vec<String>,
    /// Certificate, key and CA of this worker.
    pub identity: IdentitySource,
    /// Tuning of QUIC.
    pub transport: TransportConfig,
    /// How long a shard that does not answer is tried again.
    pub deadline: Duration,
    /// How long a request may stand still before its connection is given up.
    pub patience: Duration,
}

impl StoreConfig {
    /// The store of `shards` with every other setting at its default.
    #[must_use]
    pub fn new(shards: &[String], identity: impl Into<IdentitySource>) -> Self {
        Self {
            shards: shards.to_vec(),
            identity: identity.into(),
            transport: TransportConfig::default(),
            deadline: Duration::from_secs(60),
            patience: Duration::from_secs(60),
        }
    }
}
