//! The client, for async callers and for those that block.

use super::link::{Answer, Link};
use super::search::{self, SnapshotInfo, Survey};
use super::{StoreConfig, StoreError, fetch};
use arc_topk_common::wire::{
    HeldSnapshot, MAX_PIECE_BYTES, MAX_PIECES, Manifest, Owner, PartInfo, PieceMeta, SnapshotId,
    StoreRequest, StoreResponse, piece_range,
};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Handle, Runtime};
use tokio::task::JoinSet;

/// What closing waits for each shard to take its connection's end.
const CLOSE_PATIENCE: Duration = Duration::from_millis(200);

/// The store of all shards, for async callers. Clones share its connections, which are made when they are needed.
#[derive(Clone, Debug)]
pub struct AsyncStoreClient {
    links: Arc<[Arc<Link>]>,
    deadline: Duration,
}

impl AsyncStoreClient {
    /// Nothing is connected yet.
    ///
    /// # Errors
    /// [`StoreError::Shards`] if there are no addresses, or more than a job may have shards.
    pub fn new(config: StoreConfig) -> Result<Self, StoreError> {
        let count = config.shards.len();
        let shards = u16::try_from(count).unwrap_or(u16::MAX);
        if !(1..=MAX_PIECES).contains(&shards) {
            return Err(StoreError::Shards { count });
        }
        let deadline = config.deadline;
        let config = Arc::new(config);
        let links = (0..shards).map(|shard| Arc::new(Link::new(shard, &config)));
        Ok(Self {
            links: links.collect(),
            deadline,
        })
    }

    /// Cuts `blob` into one piece for each shard and stores them; returns when all shards have theirs, on the disk if
    /// they have a directory. What it returns belongs into the manifest. Storing the same again is no error.
    ///
    /// # Errors
    /// The first shard that refuses or cannot be reached until the deadline. Pieces that other shards took stay until a
    /// newer snapshot replaces them, and are no restart point.
    pub async fn upload_part(
        &self,
        snapshot: SnapshotId,
        owner: Owner,
        blob: Bytes,
    ) -> Result<PartInfo, StoreError> {
        let shards = self.links.len();
        let bytes = blob.len() as u64;
        if bytes > MAX_PIECE_BYTES.saturating_mul(shards as u64) {
            return Err(StoreError::TooLarge { bytes, shards });
        }
        let pieces = u16::try_from(shards).expect("checked when the client was made");
        let cut = move || cut(snapshot, owner, &blob, pieces);
        let cut = tokio::task::spawn_blocking(cut).await;
        let (part, cut) = cut.map_err(|e| StoreError::Runtime(e.to_string()))?;
        let mut puts = JoinSet::new();
        for (link, (meta, bytes)) in self.links.iter().cloned().zip(cut) {
            puts.spawn(async move {
                let answer = link.request(&StoreRequest::Put(meta), Some(&bytes)).await?;
                stored(&link, &answer)
            });
        }
        all(puts).await?;
        Ok(part)
    }

    /// Commits a snapshot on all shards. Its parts must have been stored before.
    ///
    /// # Errors
    /// The first shard that refuses or cannot be reached until the deadline. The snapshot may be committed on others, and
    /// then is a restart point: one shard that knows the manifest is enough. Committing again is no error.
    pub async fn commit(&self, manifest: Manifest) -> Result<(), StoreError> {
        let request = Arc::new(StoreRequest::Commit(manifest));
        let mut commits = JoinSet::new();
        for link in self.links.iter() {
            let (link, request) = (Arc::clone(link), Arc::clone(&request));
            commits.spawn(async move {
                let answer = link.request(&request, None).await?;
                stored(&link, &answer)
            });
        }
        all(commits).await
    }

    /// What the shards hold. Shards that do not answer until the deadline are named in the survey.
    ///
    /// # Errors
    /// If no shard answers.
    pub async fn survey(&self) -> Result<Survey, StoreError> {
        Ok(self.survey_and_errors().await?.0)
    }

    /// The survey, and the errors of the shards that are named in it as unreachable.
    pub(super) async fn survey_and_errors(&self) -> Result<(Survey, Vec<StoreError>), StoreError> {
        let mut lists = JoinSet::new();
        for link in self.links.iter() {
            let link = Arc::clone(link);
            lists.spawn(async move {
                let listing = list(&link).await;
                (link.shard, listing)
            });
        }
        let (mut listings, mut unreachable) = (Vec::new(), Vec::new());
        while let Some(done) = lists.join_next().await {
            match done.map_err(|e| StoreError::Runtime(e.to_string()))? {
                (shard, Ok(listing)) => listings.push((shard, listing)),
                (shard, Err(error)) => unreachable.push((shard, error)),
            }
        }
        listings.sort_by_key(|(shard, _)| *shard);
        unreachable.sort_by_key(|(shard, _)| *shard);
        let mut survey = search::survey(&listings);
        let told = unreachable.iter();
        survey.unreachable = told
            .map(|(shard, error)| (*shard, error.to_string()))
            .collect();
        let mut errors = unreachable.into_iter().map(|(_, error)| error);
        match errors.next() {
            Some(error) if listings.is_empty() => Err(error),
            first => Ok((survey, first.into_iter().chain(errors).collect())),
        }
    }

    /// The newest snapshot from which a job can go on. What was passed over goes to the log; [`Self::survey`] returns it.
    ///
    /// # Errors
    /// If no shard answers; if there is no such snapshot, but not all shards answered, so that nobody can know; or if there
    /// are committed ones and none is whole ([`StoreError::NoneWhole`]).
    pub async fn newest(&self) -> Result<Option<SnapshotInfo>, StoreError> {
        fetch::newest(self).await
    }

    /// A part of a snapshot, from whichever shards have its pieces.
    ///
    /// # Errors
    /// The snapshot has no part of `owner`, or a piece can be had from none of its holders until the deadline.
    pub async fn fetch_part(
        &self,
        info: &SnapshotInfo,
        owner: Owner,
    ) -> Result<Vec<u8>, StoreError> {
        fetch::part(self, info, owner).await
    }

    /// The replica part of a snapshot that need not be committed; waits for pieces that are still being stored.
    ///
    /// # Errors
    /// If it cannot be had until the deadline.
    pub async fn fetch_replica(&self, snapshot: SnapshotId) -> Result<Vec<u8>, StoreError> {
        fetch::replica(self, snapshot).await
    }

    /// Closes the connections; the next request makes new ones.
    pub async fn close(&self) {
        for link in self.links.iter() {
            link.close(CLOSE_PATIENCE).await;
        }
    }

    pub(super) fn link(&self, shard: u16) -> Option<&Arc<Link>> {
        self.links.get(usize::from(shard))
    }

    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }
}

async fn list(link: &Link) -> Result<Vec<HeldSnapshot>, StoreError> {
    match link.request(&StoreRequest::List, None).await? {
        Answer::Message(StoreResponse::Listing(listing)) => Ok(listing),
        other => Err(link.unexpected(&other)),
    }
}

fn stored(link: &Link, answer: &Answer) -> Result<(), StoreError> {
    match answer {
        Answer::Message(StoreResponse::Stored) => Ok(()),
        other => Err(link.unexpected(other)),
    }
}

/// Waits for all; the first error ends the others.
pub(super) async fn all(mut tasks: JoinSet<Result<(), StoreError>>) -> Result<(), StoreError> {
    while let Some(done) = tasks.join_next().await {
        done.map_err(|e| StoreError::Runtime(e.to_string()))??;
    }
    Ok(())
}

/// Pieces with their hashes. Reads the blob twice: once for the part's hash, once for the pieces'.
fn cut(
    snapshot: SnapshotId,
    owner: Owner,
    blob: &Bytes,
    pieces: u16,
) -> (PartInfo, Vec<(PieceMeta, Bytes)>) {
    let total_bytes = blob.len() as u64;
    let part = PartInfo {
        owner,
        pieces,
        total_bytes,
        total_sha256: Sha256::digest(blob).into(),
    };
    let piece = |piece: u16| {
        let range = piece_range(total_bytes, piece, pieces);
        // Both ends are within the blob, whose length is a usize.
        let bytes = blob.slice(range.start as usize..range.end as usize);
        let meta = PieceMeta {
            snapshot,
            owner,
            piece,
            pieces,
            piece_bytes: bytes.len() as u64,
            total_bytes,
            total_sha256: part.total_sha256,
            piece_sha256: Sha256::digest(&bytes).into(),
        };
        (meta, bytes)
    };
    let cut = (0..pieces).map(piece).collect();
    (part, cut)
}

/// The store of all shards, for callers that block. Must not be called inside a tokio runtime.
#[derive(Debug)]
pub struct StoreClient {
    client: AsyncStoreClient,
    handle: Handle,
    /// If it has one of its own.
    runtime: Option<Runtime>,
}

impl StoreClient {
    /// With a small runtime of its own. Nothing is connected yet.
    ///
    /// # Errors
    /// As [`AsyncStoreClient::new`]; the system gives no threads.
    pub fn new(config: StoreConfig) -> Result<Self, StoreError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("arc-store")
            .enable_all()
            .build()
            .map_err(|e| StoreError::Runtime(e.to_string()))?;
        Ok(Self {
            client: AsyncStoreClient::new(config)?,
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
        })
    }

    /// On a runtime of the caller's, which must have time and I/O.
    ///
    /// # Errors
    /// As [`AsyncStoreClient::new`].
    pub fn on(handle: Handle, config: StoreConfig) -> Result<Self, StoreError> {
        Ok(Self {
            client: AsyncStoreClient::new(config)?,
            handle,
            runtime: None,
        })
    }

    /// The same store, for tasks on [`Self::handle`].
    #[must_use]
    pub fn to_async(&self) -> AsyncStoreClient {
        self.client.clone()
    }

    /// The runtime on which requests run.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// [`AsyncStoreClient::upload_part`].
    ///
    /// # Errors
    /// As there.
    pub fn upload_part(
        &self,
        snapshot: SnapshotId,
        owner: Owner,
        blob: Bytes,
    ) -> Result<PartInfo, StoreError> {
        let upload = self.client.upload_part(snapshot, owner, blob);
        self.handle.block_on(upload)
    }

    /// [`AsyncStoreClient::commit`].
    ///
    /// # Errors
    /// As there.
    pub fn commit(&self, manifest: Manifest) -> Result<(), StoreError> {
        self.handle.block_on(self.client.commit(manifest))
    }

    /// [`AsyncStoreClient::survey`].
    ///
    /// # Errors
    /// As there.
    pub fn survey(&self) -> Result<Survey, StoreError> {
        self.handle.block_on(self.client.survey())
    }

    /// [`AsyncStoreClient::newest`].
    ///
    /// # Errors
    /// As there.
    pub fn newest(&self) -> Result<Option<SnapshotInfo>, StoreError> {
        self.handle.block_on(self.client.newest())
    }

    /// [`AsyncStoreClient::fetch_part`].
    ///
    /// # Errors
    /// As there.
    pub fn fetch_part(&self, info: &SnapshotInfo, owner: Owner) -> Result<Vec<u8>, StoreError> {
        self.handle.block_on(self.client.fetch_part(info, owner))
    }

    /// [`AsyncStoreClient::fetch_replica`].
    ///
    /// # Errors
    /// As there.
    pub fn fetch_replica(&self, snapshot: SnapshotId) -> Result<Vec<u8>, StoreError> {
        self.handle.block_on(self.client.fetch_replica(snapshot))
    }
}

impl Drop for StoreClient {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            let client = self.client.clone();
            let (closed, all_closed) = std::sync::mpsc::channel();
            // Not `block_on`: whoever drops this may do so inside a runtime of his own.
            runtime.spawn(async move {
                client.close().await;
                // Too late is no failure.
                let _late = closed.send(());
            });
            let _lost_shards_never_answer = all_closed.recv_timeout(2 * CLOSE_PATIENCE);
            runtime.shutdown_background();
        }
    }
}
