//! Getting parts back: pieces in parallel, each from whichever shard has it.

use super::StoreError;
use super::client::{AsyncStoreClient, all};
use super::link::{Answer, Backoff};
use super::search::{SnapshotInfo, WholePart};
use arc_topk_common::wire::{Owner, PartInfo, PieceMeta, SnapshotId, StoreRequest};
use sha2::{Digest, Sha256};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::task::JoinSet;

pub(super) async fn newest(client: &AsyncStoreClient) -> Result<Option<SnapshotInfo>, StoreError> {
    let (survey, errors) = client.survey_and_errors().await?;
    let newest = survey.newest().cloned();
    for passed in &survey.passed_over {
        if newest
            .as_ref()
            .is_none_or(|newest| passed.snapshot > newest.id())
        {
            tracing::warn!(snapshot = %passed.snapshot, reason = passed.reason, "a snapshot was passed over");
        }
    }
    match (newest, errors.into_iter().next()) {
        (None, Some(error)) => Err(error),
        // Whoever began at step 0 instead would drop them with the first snapshot of its own.
        (None, None) => match survey
            .passed_over
            .into_iter()
            .find(|passed| passed.committed)
        {
            Some(passed) => Err(StoreError::NoneWhole {
                snapshot: passed.snapshot,
                reason: passed.reason,
            }),
            None => Ok(None),
        },
        (newest, _) => Ok(newest),
    }
}

pub(super) async fn part(
    client: &AsyncStoreClient,
    info: &SnapshotInfo,
    owner: Owner,
) -> Result<Vec<u8>, StoreError> {
    let snapshot = info.id();
    let missing = |detail: &str| StoreError::Missing {
        snapshot,
        owner,
        detail: detail.to_owned(),
    };
    let part = info.manifest.part(owner);
    let part = part.ok_or_else(|| missing("its manifest has no such part"))?;
    let holders = info.holders.get(&owner).cloned().unwrap_or_default();
    if holders.len() != usize::from(part.pieces) {
        return Err(missing("nobody is known to hold its pieces"));
    }
    whole(client, snapshot, part, holders).await
}

pub(super) async fn replica(
    client: &AsyncStoreClient,
    snapshot: SnapshotId,
) -> Result<Vec<u8>, StoreError> {
    let mut backoff = Backoff::new(client.deadline());
    let mut last = StoreError::Missing {
        snapshot,
        owner: Owner::Replica,
        detail: "no shard that answered holds a piece of it, or not all pieces are stored"
            .to_owned(),
    };
    loop {
        let survey = client.survey().await?;
        let versions = survey.parts.get(&snapshot).cloned().unwrap_or_default();
        let replicas = versions
            .into_iter()
            .filter(|whole| whole.part.owner == Owner::Replica);
        for WholePart { part, holders } in replicas {
            match whole(client, snapshot, &part, holders).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => last = error,
            }
        }
        if !backoff.wait().await {
            return Err(last);
        }
    }
}

/// All pieces at once, put together and checked.
async fn whole(
    client: &AsyncStoreClient,
    snapshot: SnapshotId,
    part: &PartInfo,
    holders: Vec<Vec<u16>>,
) -> Result<Vec<u8>, StoreError> {
    let pieces: Arc<Mutex<Vec<Vec<u8>>>> = Arc::new(Mutex::new(vec![Vec::new(); holders.len()]));
    let mut gets = JoinSet::new();
    for (at, holders) in holders.into_iter().enumerate() {
        let (client, part, pieces) = (client.clone(), part.clone(), Arc::clone(&pieces));
        gets.spawn(async move {
            let piece = u16::try_from(at).expect("a part has at most 256 pieces");
            let bytes = one(&client, snapshot, &part, piece, &holders).await?;
            pieces.lock().unwrap_or_else(PoisonError::into_inner)[at] = bytes;
            Ok(())
        });
    }
    all(gets).await?;
    let pieces = std::mem::take(&mut *pieces.lock().unwrap_or_else(PoisonError::into_inner));
    let part = part.clone();
    let joined = tokio::task::spawn_blocking(move || join(snapshot, &part, pieces)).await;
    joined.map_err(|e| StoreError::Runtime(e.to_string()))?
}

fn join(
    snapshot: SnapshotId,
    part: &PartInfo,
    pieces: Vec<Vec<u8>>,
) -> Result<Vec<u8>, StoreError> {
    let mut whole = Vec::with_capacity(pieces.iter().map(Vec::len).sum());
    let mut hash = Sha256::new();
    // Each piece is freed as soon as it is copied, so that memory holds the part once.
    for piece in pieces {
        hash.update(&piece);
        whole.extend_from_slice(&piece);
    }
    if whole.len() as u64 != part.total_bytes || hash.finalize().as_slice() != part.total_sha256 {
        return Err(StoreError::Damaged {
            snapshot,
            owner: part.owner,
            detail: "its pieces are whole, but together do not have the part's hash".to_owned(),
        });
    }
    Ok(whole)
}

/// A piece, from the first holder that gives it. Holders are asked in turn, and again while one may yet answer.
async fn one(
    client: &AsyncStoreClient,
    snapshot: SnapshotId,
    part: &PartInfo,
    piece: u16,
    holders: &[u16],
) -> Result<Vec<u8>, StoreError> {
    let mut backoff = Backoff::new(client.deadline());
    loop {
        let mut errors = Vec::new();
        for link in holders.iter().filter_map(|shard| client.link(*shard)) {
            let request = StoreRequest::Get {
                snapshot,
                owner: part.owner,
                piece,
                pieces: part.pieces,
            };
            match link.attempt(&request, None).await {
                Ok(Answer::Piece(meta, bytes)) if belongs(&meta, snapshot, part, piece) => {
                    return Ok(bytes);
                }
                Ok(other) => errors.push(link.unexpected(&other)),
                Err(error) => errors.push(error),
            }
            tracing::debug!(shard = link.shard, %snapshot, owner = %part.owner, piece, error = ?errors.last(), "a piece was not had");
        }
        let may_pass = errors.iter().any(StoreError::may_pass);
        if !may_pass || !backoff.wait().await {
            return Err(told(snapshot, part, piece, errors));
        }
    }
}

fn belongs(meta: &PieceMeta, snapshot: SnapshotId, part: &PartInfo, piece: u16) -> bool {
    let same_part = meta.owner == part.owner
        && meta.pieces == part.pieces
        && meta.total_bytes == part.total_bytes
        && meta.total_sha256 == part.total_sha256;
    meta.snapshot == snapshot && meta.piece == piece && same_part
}

fn told(
    snapshot: SnapshotId,
    part: &PartInfo,
    piece: u16,
    mut errors: Vec<StoreError>,
) -> StoreError {
    if errors.len() == 1
        && let Some(error) = errors.pop()
    {
        return error;
    }
    let causes: Vec<String> = errors.iter().map(ToString::to_string).collect();
    StoreError::Missing {
        snapshot,
        owner: part.owner,
        detail: format!("piece {piece} of {}: {}", part.pieces, causes.join("; ")),
    }
}
