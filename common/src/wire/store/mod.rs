//! Messages and files of the snapshot store: a service beside training, on connections of its own ([`STORE_ALPN`]).
//!
//! A *snapshot* is what a job needs to go on from a step: named by that step and the run that made it
//! ([`SnapshotId`]). It has a *part* for each [`Owner`]: the replica, which is the same on all workers, and one for the
//! feedback state of every rank. A part is a blob, cut into nearly equal contiguous *pieces* ([`piece_range`]), one for
//! each shard. A [`Manifest`] names all parts with their hashes and commits the snapshot.
//!
//! | request (one bidirectional stream each) | then | answer | then |
//! |---|---|---|---|
//! | Put | the piece's bytes | Stored | |
//! | Get | | Piece | the piece's bytes |
//! | List | | Listing | |
//! | Commit | | Stored | |
//! | any | | Failed | |
//!
//! A message is preceded by its length (u32, at most [`MAX_STORE_MESSAGE_BYTES`]); then a tag byte, then the fields in
//! the order of their declaration, little endian. Lists are preceded by a u32 count. A server may answer a Put before it
//! has read the bytes, when it already knows the answer.
//!
//! Files hold the same fields behind a magic number and a version, and in front of a SHA-256 over all of that: see
//! [`PieceMeta::file_header`] and [`Manifest::file_bytes`].

mod bytes;
mod file;
#[cfg(test)]
mod tests;

pub use file::PART_HEADER_BYTES;

use crate::ids::{Rank, RunId, Step};
use core::fmt;
use core::ops::Range;

/// ALPN of the store's connections.
pub const STORE_ALPN: &[u8] = b"arc-topk-store/1";
/// Largest message, bytes: a full listing.
pub const MAX_STORE_MESSAGE_BYTES: usize = 8 << 20;
/// Largest piece, bytes.
pub const MAX_PIECE_BYTES: u64 = 4 << 30;
/// Most pieces of a part: as many as a job may have shards.
pub const MAX_PIECES: u16 = 256;
/// Most parts of a snapshot: the replica and one for each worker.
pub const MAX_PARTS: usize = super::MAX_WORLD + 1;
/// Most snapshots that a shard holds.
pub const MAX_LISTED_SNAPSHOTS: usize = 16 + MOST_FILLING_SNAPSHOTS;
/// Snapshots of a run that may be on their way to a shard at once: of the whole job, and replicas for workers that join, some
/// of whom come together.
pub const MOST_FILLING_SNAPSHOTS: usize = 3;
/// Most pieces that a shard holds.
pub const MAX_LISTED_PIECES: usize = 1 << 16;

/// SHA-256.
pub type Sha256Bytes = [u8; 32];

/// Names a snapshot. Snapshots are ordered by step, and by run where two runs made one of the same step.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SnapshotId {
    /// Next step: the first that the snapshot does not contain.
    pub step: Step,
    /// Run that made it.
    pub run: RunId,
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} of run {}", self.step, self.run)
    }
}

/// Whose state a part is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Owner {
    /// Parameters, optimizer and counters, the same on all workers; one of them puts it.
    Replica,
    /// Feedback state of this rank.
    Rank(Rank),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replica => f.write_str("replica"),
            Self::Rank(rank) => write!(f, "rank-{rank}"),
        }
    }
}

/// All about a piece but its bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PieceMeta {
    /// Snapshot.
    pub snapshot: SnapshotId,
    /// Whose part.
    pub owner: Owner,
    /// Position, below `pieces`.
    pub piece: u16,
    /// Pieces of the part, 1 to [`MAX_PIECES`].
    pub pieces: u16,
    /// Bytes of the piece, at most [`MAX_PIECE_BYTES`]; what [`piece_range`] says.
    pub piece_bytes: u64,
    /// Bytes of the part.
    pub total_bytes: u64,
    /// Hash of the part.
    pub total_sha256: Sha256Bytes,
    /// Hash of the piece.
    pub piece_sha256: Sha256Bytes,
}

/// A part as a manifest names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartInfo {
    /// Whose.
    pub owner: Owner,
    /// Pieces, 1 to [`MAX_PIECES`].
    pub pieces: u16,
    /// Bytes.
    pub total_bytes: u64,
    /// Hash.
    pub total_sha256: Sha256Bytes,
}

/// What makes a set of parts a snapshot from which a job can go on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Snapshot.
    pub snapshot: SnapshotId,
    /// Next update (skipped steps not counted).
    pub update: u64,
    /// Workers that the job had: the parts of some may not have come.
    pub members: u16,
    /// All parts, ascending by owner: the replica, then one for each rank that belongs to it.
    pub parts: Vec<PartInfo>,
}

impl Manifest {
    /// The part of `owner`.
    #[must_use]
    pub fn part(&self, owner: Owner) -> Option<&PartInfo> {
        let at = self.parts.binary_search_by_key(&owner, |part| part.owner);
        at.ok().map(|at| &self.parts[at])
    }

    /// Ranks whose parts belong to it, ascending.
    pub fn ranks(&self) -> impl Iterator<Item = Rank> {
        self.parts.iter().filter_map(|part| match part.owner {
            Owner::Replica => None,
            Owner::Rank(rank) => Some(rank),
        })
    }
}

/// A piece that a shard holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldPiece {
    /// The part it belongs to, as its own header says.
    pub part: PartInfo,
    /// Position, below the part's pieces.
    pub piece: u16,
}

/// What a shard holds of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldSnapshot {
    /// Snapshot.
    pub snapshot: SnapshotId,
    /// Its manifest, once committed.
    pub manifest: Option<Manifest>,
    /// Pieces, ascending by owner, number of pieces, position.
    pub pieces: Vec<HeldPiece>,
}

/// What a worker asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreRequest {
    /// Keep the piece whose bytes follow.
    Put(PieceMeta),
    /// Send a piece.
    Get {
        /// Snapshot.
        snapshot: SnapshotId,
        /// Whose part.
        owner: Owner,
        /// Position.
        piece: u16,
        /// Pieces of the part.
        pieces: u16,
    },
    /// Say what there is.
    List,
    /// All parts are stored: keep the snapshot.
    Commit(Manifest),
}

/// Why a request failed. The detail names cause and remedy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum StoreCode {
    /// It does not hold that.
    Missing = 1,
    /// It would exceed a limit of this shard.
    Limit = 2,
    /// The bytes do not have the announced hash.
    Damaged = 3,
    /// Something else is committed under this name.
    Conflict = 4,
    /// A newer snapshot took its place.
    Stale = 5,
    /// The shard's directory fails.
    Io = 6,
    /// The peer broke the protocol.
    Protocol = 7,
    /// Not now: try again.
    Busy = 8,
}

/// What a shard answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreResponse {
    /// Done, and on the disk if the shard has a directory.
    Stored,
    /// The piece whose bytes follow.
    Piece(PieceMeta),
    /// What there is, ascending by snapshot.
    Listing(Vec<HeldSnapshot>),
    /// Not done.
    Failed {
        /// Why.
        code: StoreCode,
        /// Cause and remedy, for people.
        detail: String,
    },
}

/// Bytes of a part that piece `piece` of `pieces` holds: nearly equal, contiguous, in order. Empty for a position that
/// does not exist.
#[must_use]
pub fn piece_range(total_bytes: u64, piece: u16, pieces: u16) -> Range<u64> {
    if piece >= pieces {
        return total_bytes..total_bytes;
    }
    let cut = |at: u16| {
        let cut = u128::from(total_bytes) * u128::from(at) / u128::from(pieces);
        u64::try_from(cut).unwrap_or(u64::MAX)
    };
    cut(piece)..cut(piece + 1)
}
