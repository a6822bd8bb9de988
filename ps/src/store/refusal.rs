//! Why a request is refused, for people and for the wire.

use super::index::PieceKey;
use arc_topk_common::wire::{MAX_LISTED_PIECES, Owner, SnapshotId, StoreCode};

/// Why a request is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// It would not fit.
    #[error(
        "{asked} bytes do not fit: this shard holds {held} bytes of snapshots, receives {incoming}, and may hold {limit}; raise --snapshot-limit-bytes, lower --snapshot-keep, or use more shards"
    )]
    Bytes {
        /// Bytes of the piece.
        asked: u64,
        /// Bytes held.
        held: u64,
        /// Bytes announced of pieces that are still coming.
        incoming: u64,
        /// Most that may be held.
        limit: u64,
    },
    /// More pieces than can be listed.
    #[error(
        "this shard holds {MAX_LISTED_PIECES} pieces already, the most that it can list; lower --snapshot-keep, or remove files of shards that no longer exist from its --snapshot-dir"
    )]
    Pieces,
    /// Superseded.
    #[error(
        "the snapshot of {asked} comes too late: this shard has gone on to {newer}; nothing is to be done, the newer one serves"
    )]
    Stale {
        /// What was asked for.
        asked: SnapshotId,
        /// What there is.
        newer: SnapshotId,
    },
    /// Committed with other bytes.
    #[error(
        "the snapshot of {0} is committed with other contents: two workers disagree about the same step; look for a mismatch of their replicas"
    )]
    Conflict(SnapshotId),
    /// It was dropped while its bytes came.
    #[error("the snapshot of {0} was dropped while its bytes came: a newer one took its place")]
    Dropped(SnapshotId),
    /// Not all parts were stored.
    #[error(
        "the snapshot of {snapshot} cannot be committed here: this shard holds no piece of its {owner} part; store the part again, then commit"
    )]
    Incomplete {
        /// Snapshot.
        snapshot: SnapshotId,
        /// Whose part.
        owner: Owner,
    },
    /// Not held.
    #[error(
        "this shard holds no piece {} of {} of the {} part of the snapshot of {snapshot}; ask for a listing", .key.2, .key.1, .key.0
    )]
    Missing {
        /// Snapshot.
        snapshot: SnapshotId,
        /// Piece.
        key: PieceKey,
    },
}

impl Refusal {
    /// The code that goes on the wire.
    #[must_use]
    pub fn code(&self) -> StoreCode {
        match self {
            Self::Bytes { .. } | Self::Pieces => StoreCode::Limit,
            Self::Stale { .. } | Self::Dropped(_) => StoreCode::Stale,
            Self::Conflict(_) => StoreCode::Conflict,
            Self::Missing { .. } | Self::Incomplete { .. } => StoreCode::Missing,
        }
    }
}
