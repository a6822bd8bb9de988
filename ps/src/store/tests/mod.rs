//! The index against what must hold after any sequence of events; files after a crash at any byte.
#![allow(clippy::unwrap_used, reason = "tests")]

mod disk;
mod index;

use super::StoreOptions;
use super::index::part_of;
use arc_topk_common::ids::{Rank, RunId, Step};
use arc_topk_common::wire::{Manifest, Owner, PartInfo, PieceMeta, SnapshotId, piece_range};
use sha2::{Digest, Sha256};

fn id(run: u8, step: u64) -> SnapshotId {
    SnapshotId {
        step: Step(step),
        run: RunId([run; 16]),
    }
}

fn owner(number: u16) -> Owner {
    match number {
        0 => Owner::Replica,
        rank => Owner::Rank(Rank(rank - 1)),
    }
}

/// Piece `piece` of two of a blob, with its bytes.
fn piece(snapshot: SnapshotId, owner: Owner, blob: &[u8], piece: u16) -> (PieceMeta, Vec<u8>) {
    let total_bytes = blob.len() as u64;
    let range = piece_range(total_bytes, piece, 2);
    let bytes = blob[range.start as usize..range.end as usize].to_vec();
    let meta = PieceMeta {
        snapshot,
        owner,
        piece,
        pieces: 2,
        piece_bytes: bytes.len() as u64,
        total_bytes,
        total_sha256: Sha256::digest(blob).into(),
        piece_sha256: Sha256::digest(&bytes).into(),
    };
    (meta, bytes)
}

fn manifest(snapshot: SnapshotId, metas: &[PieceMeta]) -> Manifest {
    let mut parts: Vec<PartInfo> = metas.iter().map(part_of).collect();
    parts.sort_by_key(|part| part.owner);
    parts.dedup();
    Manifest {
        snapshot,
        update: snapshot.step.0,
        members: parts.len() as u16,
        parts,
    }
}

fn options(keep: usize, limit_bytes: u64) -> StoreOptions {
    StoreOptions {
        dir: None,
        keep,
        limit_bytes,
    }
}
