//! What can go wrong with the store, by who has to act.

use arc_topk_common::wire::{MAX_PIECES, Owner, SnapshotId, StoreCode};
use arc_topk_transport::TransportError;

/// Why a part cannot be stored or had. Every text names cause and remedy.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum StoreError {
    /// No shards, or too many.
    #[error("{count} addresses of shards were given; a job has 1 to {MAX_PIECES}")]
    Shards {
        /// How many.
        count: usize,
    },
    /// The system gives no threads.
    #[error(
        "cannot start the store client's threads: {0}; look at the limits of this user (ulimit -u)"
    )]
    Runtime(String),
    /// The shard cannot be reached, or its connection is lost again and again.
    #[error("the snapshot store of shard {shard} at {address} cannot be reached: {source}")]
    Transport {
        /// Shard.
        shard: u16,
        /// Its address.
        address: String,
        /// The last failure.
        source: TransportError,
    },
    /// The shard has no store.
    #[error(
        "shard {shard} at {address} has no snapshot store: it is of an older release; run the same release everywhere"
    )]
    NoStore {
        /// Shard.
        shard: u16,
        /// Its address.
        address: String,
    },
    /// The shard keeps the connection and does not go on.
    #[error(
        "the snapshot store of shard {shard} at {address} stood still for {seconds} s; look at its log and its disk, and restart it"
    )]
    Stalled {
        /// Shard.
        shard: u16,
        /// Its address.
        address: String,
        /// How long.
        seconds: u64,
    },
    /// The shard refused.
    #[error("the snapshot store of shard {shard} at {address} refused: {detail}")]
    Refused {
        /// Shard.
        shard: u16,
        /// Its address.
        address: String,
        /// Why.
        code: StoreCode,
        /// Cause and remedy.
        detail: String,
    },
    /// The answer is to another question.
    #[error(
        "the snapshot store of shard {shard} at {address} answered with {answer}; run the same release everywhere"
    )]
    Answer {
        /// Shard.
        shard: u16,
        /// Its address.
        address: String,
        /// What came.
        answer: String,
    },
    /// The bytes are not those that were stored.
    #[error(
        "the {owner} part of the snapshot of {snapshot} is damaged: {detail}; go on from an older snapshot, or delete its files on that shard if others hold them"
    )]
    Damaged {
        /// Snapshot.
        snapshot: SnapshotId,
        /// Whose part.
        owner: Owner,
        /// What is wrong, and where.
        detail: String,
    },
    /// It is on no shard.
    #[error(
        "the {owner} part of the snapshot of {snapshot} cannot be had: {detail}; start every shard that held it, with its --snapshot-dir, or go on from another snapshot"
    )]
    Missing {
        /// Snapshot.
        snapshot: SnapshotId,
        /// Whose part.
        owner: Owner,
        /// What is missing.
        detail: String,
    },
    /// There are snapshots, but none from which a job could go on.
    #[error(
        "no snapshot in the shards' store is whole: of the newest, that of {snapshot}, {reason}; start the shards with the \
         --snapshot-dir that each had (files of a shard that is gone can be copied into another's), or with empty ones to begin anew"
    )]
    NoneWhole {
        /// The newest that was committed.
        snapshot: SnapshotId,
        /// What it lacks.
        reason: String,
    },
    /// A part is larger than the store takes.
    #[error(
        "a part of {bytes} bytes is too large for {shards} shards, each of which takes 4 GiB of it; use more shards"
    )]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// Shards.
        shards: usize,
    },
}

impl StoreError {
    /// Whether the same may succeed later without anybody's doing.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Transport { source, .. } => !matches!(
                source,
                TransportError::OwnCertificate { .. }
                    | TransportError::PeerCertificate { .. }
                    | TransportError::KeyMismatch { .. }
                    | TransportError::Setting { .. }
                    | TransportError::Bind { .. }
                    | TransportError::TooLong { .. }
                    | TransportError::Wire(_)
            ),
            Self::Stalled { .. } => true,
            Self::Refused { code, .. } => *code == StoreCode::Busy,
            _ => false,
        }
    }
}
