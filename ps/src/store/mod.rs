//! The snapshot store of one shard: pieces of snapshots, in files or in memory.
//!
//! | module | room for |
//! |---|---|
//! | [`index`] | what is held, what is kept, what is refused: pure |
//! | [`refusal`] | why a request is refused |
//! | [`disk`] | files: written by temporary file, fsync and rename; read after a crash at any byte |
//!
//! What a snapshot, a part, a piece and a manifest are, [`arc_topk_common::wire`] says. The service around it is in
//! [`crate::server`].
//!
//! # Invariants
//!
//! - A piece is listed only when all its bytes are stored and have their hash; with a directory, when they are on the disk.
//! - The newest `keep` committed snapshots stay whatever is put; beside them at most one that is being filled.
//! - Bytes held and being received stay within the limit, and pieces within what a listing can say.
//! - Nothing in the directory, and nothing that a peer sends, fails a start or panics.
//!
//! # Non-goals
//!
//! A shard does not know which pieces make a snapshot complete: that is the client's to see, over all shards. So files of
//! shards that no longer exist can be copied into any directory, and a job restarted with another number of shards.

pub mod disk;
pub mod index;
pub mod refusal;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

/// Snapshots that are kept unless told otherwise.
pub const DEFAULT_KEEP: usize = 2;
/// Limit of the bytes held unless told otherwise.
pub const DEFAULT_LIMIT_BYTES: u64 = 8 << 30;

/// Where snapshots go, and how many.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreOptions {
    /// Directory for their pieces, of this shard alone; without one they are held in memory and end with the process.
    pub dir: Option<PathBuf>,
    /// Committed snapshots that are kept, 1 to 16.
    pub keep: usize,
    /// Most bytes that are held.
    pub limit_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            dir: None,
            keep: DEFAULT_KEEP,
            limit_bytes: DEFAULT_LIMIT_BYTES,
        }
    }
}
