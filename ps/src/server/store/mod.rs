//! The snapshot store as the server's tasks share it: the index, and where the bytes are.
//!
//! The index is behind a lock that is held for moments. Files are written, renamed and removed on blocking threads;
//! renames, commits and removals one at a time ([`Store::publishing`]), so that what the index says of a snapshot cannot
//! change between being asked and being done, but for one thing: a newer Put may drop a snapshot that is being filled.
//! Its removal then waits for its turn, and finds what was renamed in the meantime.

mod serve;

pub(super) use serve::serve;

use crate::store::StoreOptions;
use crate::store::disk::{Disk, DiskError, PartWriter};
use crate::store::index::{Index, PieceKey, Removals, Ticket, piece_key};
use crate::store::refusal::Refusal;
use arc_topk_common::wire::{
    HeldSnapshot, Manifest, PieceMeta, SnapshotId, StoreCode, piece_range,
};
use bytes::Bytes;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

/// Bytes that are read, hashed and written at once.
const BLOCK_BYTES: usize = 1 << 20;

/// Bytes of a piece in memory.
type Blocks = Arc<[Bytes]>;

/// Why a request cannot be done.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreFault {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("the bytes that came are not those that were announced: {0}; send the piece again")]
    Announced(&'static str),
    #[error("the request cannot be read: {0}; run the same release everywhere")]
    Unreadable(String),
    #[error(
        "a piece of the snapshot of {0} was changed on the disk or cannot be read any more: it is not offered again; another shard may hold it"
    )]
    Changed(SnapshotId),
    #[error("the store's thread ended: {0}; look at the shard's log")]
    Thread(#[from] tokio::task::JoinError),
    /// The peer or its connection is gone: nobody is to be told.
    #[error("the peer is gone: {0}")]
    Gone(String),
}

impl StoreFault {
    fn code(&self) -> StoreCode {
        match self {
            Self::Refused(refusal) => refusal.code(),
            Self::Announced(_) => StoreCode::Damaged,
            Self::Disk(_) | Self::Thread(_) | Self::Changed(_) => StoreCode::Io,
            Self::Unreadable(_) | Self::Gone(_) => StoreCode::Protocol,
        }
    }
}

#[derive(Debug)]
struct Held {
    index: Index,
    /// Without a directory: the bytes of all pieces.
    memory: BTreeMap<(SnapshotId, PieceKey), Blocks>,
    /// When snapshots were committed here.
    committed: BTreeMap<SnapshotId, SystemTime>,
}

impl Held {
    fn age(&self, snapshot: SnapshotId) -> Option<u64> {
        let since = self.committed.get(&snapshot)?.elapsed();
        // A clock that was set back makes it new.
        Some(since.unwrap_or_default().as_secs())
    }

    fn forget(&mut self, removals: &Removals) {
        let gone = |(snapshot, key): &(SnapshotId, PieceKey)| {
            removals.snapshots.contains(snapshot) || removals.pieces.contains(&(*snapshot, *key))
        };
        if !removals.is_empty() {
            self.memory.retain(|at, _| !gone(at));
            self.committed
                .retain(|snapshot, _| !removals.snapshots.contains(snapshot));
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Store {
    options: StoreOptions,
    disk: Option<Disk>,
    held: Mutex<Held>,
    /// Held on blocking threads alone.
    publishing: Mutex<()>,
    /// Whether the directory has been read.
    ready: watch::Sender<bool>,
    next_file: AtomicU64,
    connections: AtomicUsize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks panics half way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Takes the directory; what is in it is read by [`Store::restore`].
    pub(super) fn open(options: StoreOptions) -> Result<Self, DiskError> {
        let disk = options.dir.as_deref().map(Disk::open).transpose()?;
        let (ready, _) = watch::channel(disk.is_none());
        Ok(Self {
            held: Mutex::new(Held {
                index: Index::new(&options),
                memory: BTreeMap::new(),
                committed: BTreeMap::new(),
            }),
            disk,
            options,
            publishing: Mutex::new(()),
            ready,
            next_file: AtomicU64::new(0),
            connections: AtomicUsize::new(0),
        })
    }

    /// Reads the directory, so that requests can be served. Takes as long as reading all snapshots does; blocks.
    pub(super) fn restore(&self) {
        if let Some(disk) = &self.disk {
            let found = disk.scan();
            for error in &found.damaged {
                tracing::warn!(%error, "the snapshot store ignores a file");
            }
            let (index, removals) = Index::restored(&self.options, found.pieces, found.manifests);
            if let Err(error) = disk.remove(&removals) {
                tracing::warn!(%error, "an old snapshot stays on the disk");
            }
            let listing = index.listing();
            for held in &listing {
                tracing::info!(
                    snapshot = %held.snapshot,
                    committed = held.manifest.is_some(),
                    pieces = held.pieces.len(),
                    "the snapshot store has a snapshot"
                );
            }
            let whole = listing.iter().filter(|held| held.manifest.is_some());
            let times =
                whole.filter_map(|held| Some((held.snapshot, disk.committed_at(held.snapshot)?)));
            let mut held = lock(&self.held);
            held.committed = times.collect();
            held.index = index;
        }
        self.ready.send_replace(true);
    }

    async fn ready(&self) {
        let mut ready = self.ready.subscribe();
        // The sender lives as long as this store.
        let _always = ready.wait_for(|ready| *ready).await;
    }

    /// Lets another process have the directory.
    pub(super) fn release(&self) {
        if let Some(disk) = &self.disk {
            disk.release();
        }
    }

    fn begin(self: &Arc<Self>, meta: &PieceMeta) -> Result<(Incoming, Removals), Refusal> {
        let mut held = lock(&self.held);
        let (ticket, removals) = held.index.begin(meta)?;
        held.forget(&removals);
        drop(held);
        let incoming = Incoming {
            store: Arc::clone(self),
            ticket,
        };
        Ok((incoming, removals))
    }

    /// Removes files of what the index dropped. Blocks.
    fn remove(&self, removals: &Removals) {
        let Some(disk) = &self.disk else {
            return;
        };
        if removals.is_empty() {
            return;
        }
        let _one_at_a_time = lock(&self.publishing);
        let mut removals = removals.clone();
        let held = lock(&self.held);
        // Begun again in the meantime: what is there now will be replaced or dropped with it.
        removals.snapshots.retain(|id| !held.index.has(*id));
        drop(held);
        if let Err(error) = disk.remove(&removals) {
            tracing::warn!(%error, "an old snapshot stays on the disk");
        }
    }

    /// Lists a piece whose bytes are all there. Blocks.
    fn publish(&self, incoming: &Incoming, sink: Sink) -> Result<(), StoreFault> {
        let stored = sink.stored()?;
        let _one_at_a_time = lock(&self.publishing);
        let meta = lock(&self.held)
            .index
            .check_finish(incoming.ticket)?
            .clone();
        let blocks = match (stored, &self.disk) {
            (Stored::File(part), Some(disk)) => {
                disk.publish(part, &meta)?;
                None
            }
            (Stored::File(_), None) => None,
            (Stored::Memory(blocks), _) => Some(blocks),
        };
        let mut held = lock(&self.held);
        held.index.finish(incoming.ticket)?;
        if let Some(blocks) = blocks {
            held.memory
                .insert((meta.snapshot, piece_key(&meta)), blocks);
        }
        Ok(())
    }

    /// Commits a snapshot. Blocks.
    fn commit(&self, manifest: Manifest) -> Result<(), StoreFault> {
        let one_at_a_time = lock(&self.publishing);
        if !lock(&self.held).index.check_commit(&manifest)? {
            return Ok(());
        }
        if let Some(disk) = &self.disk {
            disk.commit(self.next_file(), &manifest)?;
        }
        let id = manifest.snapshot;
        let mut held = lock(&self.held);
        let removals = held.index.commit(manifest)?;
        held.committed.insert(id, SystemTime::now());
        held.forget(&removals);
        drop(held);
        drop(one_at_a_time);
        tracing::info!(snapshot = %id, "a snapshot was committed");
        self.remove(&removals);
        Ok(())
    }

    fn next_file(&self) -> u64 {
        self.next_file.fetch_add(1, Ordering::Relaxed)
    }

    /// Opens a piece for reading. Blocks.
    fn open_piece(&self, snapshot: SnapshotId, key: PieceKey) -> Result<Opened, StoreFault> {
        let held = lock(&self.held);
        let meta = held.index.piece(snapshot, key)?.clone();
        let blocks = held.memory.get(&(snapshot, key)).cloned();
        drop(held);
        let source = match (&self.disk, blocks) {
            (Some(disk), _) => match disk.read(&meta) {
                Ok(file) => Source::File(file),
                Err(error) => {
                    self.forget_piece(&meta);
                    return Err(error.into());
                }
            },
            (None, Some(blocks)) => Source::Memory(blocks, 0),
            (None, None) => return Err(Refusal::Missing { snapshot, key }.into()),
        };
        Ok(Opened {
            source,
            left: meta.piece_bytes,
            hash: Sha256::new(),
            meta,
        })
    }

    /// It is damaged: it must not be offered again.
    fn forget_piece(&self, meta: &PieceMeta) {
        let mut held = lock(&self.held);
        // A piece stored in its place since then is another.
        if held.index.piece(meta.snapshot, piece_key(meta)) == Ok(meta) {
            held.index.forget_piece(meta.snapshot, piece_key(meta));
        }
    }

    fn listing(&self) -> Vec<HeldSnapshot> {
        lock(&self.held).index.listing()
    }

    /// Snapshots and bytes held, for metrics.
    pub(super) fn load(&self) -> (usize, u64) {
        let index = &lock(&self.held).index;
        (index.snapshots(), index.held_bytes())
    }

    /// For the status page.
    pub(super) fn status(&self) -> StoreStatus {
        let held = lock(&self.held);
        let snapshots = held.index.listing().into_iter().map(|snapshot| {
            let pieces = snapshot.pieces.iter();
            let bytes = pieces.map(|held| {
                let range = piece_range(held.part.total_bytes, held.piece, held.part.pieces);
                range.end - range.start
            });
            SnapshotStatus {
                step: snapshot.snapshot.step.0,
                run: snapshot.snapshot.run.to_string(),
                committed: snapshot.manifest.is_some(),
                age_seconds: held.age(snapshot.snapshot),
                update: snapshot.manifest.as_ref().map(|manifest| manifest.update),
                ranks: snapshot.manifest.as_ref().map(|m| m.ranks().count()),
                pieces: snapshot.pieces.len(),
                bytes: bytes.fold(0, u64::saturating_add),
            }
        });
        StoreStatus {
            ready: *self.ready.borrow(),
            directory: self.options.dir.clone(),
            keep: self.options.keep,
            limit_bytes: held.index.limit_bytes(),
            incoming_bytes: held.index.incoming_bytes(),
            bytes: held.index.held_bytes(),
            snapshots: snapshots.collect(),
        }
    }
}

/// What the store of a shard holds, for people and scripts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct StoreStatus {
    /// Whether the directory has been read.
    pub ready: bool,
    /// Where pieces are; `None`: in memory.
    pub directory: Option<PathBuf>,
    /// Committed snapshots that are kept.
    pub keep: usize,
    /// Most bytes that are held.
    pub limit_bytes: u64,
    /// Bytes announced of pieces that are coming.
    pub incoming_bytes: u64,
    /// Bytes held.
    pub bytes: u64,
    /// Snapshots, oldest first.
    pub snapshots: Vec<SnapshotStatus>,
}

/// What a shard holds of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct SnapshotStatus {
    /// Next step.
    pub step: u64,
    /// Run that made it, hexadecimal.
    pub run: String,
    /// Whether a job can go on from it, as far as this shard knows.
    pub committed: bool,
    /// Seconds since it was committed here, by this machine's clock.
    pub age_seconds: Option<u64>,
    /// Next update, once committed.
    pub update: Option<u64>,
    /// Workers whose state belongs to it, once committed.
    pub ranks: Option<usize>,
    /// Pieces here.
    pub pieces: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// A Put whose bytes are coming. Dropped before the end, it is forgotten.
#[derive(Debug)]
struct Incoming {
    store: Arc<Store>,
    ticket: Ticket,
}

impl Incoming {
    fn is_wanted(&self) -> bool {
        lock(&self.store.held).index.awaits(self.ticket)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        // Nothing of a snapshot that is forgotten here was ever on the disk.
        lock(&self.store.held).index.abandon(self.ticket);
    }
}

/// Takes the bytes of a Put, block by block, on blocking threads.
#[derive(Debug)]
struct Sink {
    place: Place,
    left: u64,
    hash: Sha256,
    expected: [u8; 32],
}

#[derive(Debug)]
enum Place {
    File(PartWriter),
    Memory(Vec<Bytes>),
}

/// Where the bytes of a Put are, all of them.
enum Stored {
    File(crate::store::disk::SyncedPart),
    Memory(Blocks),
}

impl Sink {
    fn new(store: &Store, meta: &PieceMeta) -> Result<Self, StoreFault> {
        let place = match &store.disk {
            Some(disk) => Place::File(disk.begin(store.next_file(), meta)?),
            None => Place::Memory(Vec::new()),
        };
        Ok(Self {
            place,
            left: meta.piece_bytes,
            hash: Sha256::new(),
            expected: meta.piece_sha256,
        })
    }

    fn write(&mut self, block: Bytes) -> Result<(), StoreFault> {
        let left = self.left.checked_sub(block.len() as u64);
        self.left = left.ok_or(StoreFault::Announced("more came"))?;
        self.hash.update(&block);
        match &mut self.place {
            Place::File(file) => file.write(&block)?,
            Place::Memory(blocks) => blocks.push(block),
        }
        Ok(())
    }

    fn stored(self) -> Result<Stored, StoreFault> {
        if self.left > 0 {
            return Err(StoreFault::Announced("fewer came"));
        }
        if self.hash.finalize().as_slice() != self.expected {
            return Err(StoreFault::Announced("their hash differs"));
        }
        Ok(match self.place {
            Place::File(file) => Stored::File(file.sync()?),
            Place::Memory(blocks) => Stored::Memory(blocks.into()),
        })
    }
}

/// A piece that is being read.
#[derive(Debug)]
struct Opened {
    meta: PieceMeta,
    source: Source,
    left: u64,
    hash: Sha256,
}

#[derive(Debug)]
enum Source {
    File(File),
    Memory(Blocks, usize),
}

impl Opened {
    /// The next bytes; `None` at the end. Blocks.
    fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        if self.left == 0 {
            return Ok(None);
        }
        let block = match &mut self.source {
            Source::File(file) => {
                let length = BLOCK_BYTES.min(usize::try_from(self.left).unwrap_or(usize::MAX));
                let mut block = vec![0; length];
                file.read_exact(&mut block)?;
                Bytes::from(block)
            }
            Source::Memory(blocks, at) => {
                *at += 1;
                blocks.get(*at - 1).cloned().unwrap_or_default()
            }
        };
        self.left = self.left.saturating_sub(block.len() as u64);
        self.hash.update(&block);
        Ok((!block.is_empty()).then_some(block))
    }

    /// Whether all bytes came and have their hash.
    fn came_whole(self) -> bool {
        self.left == 0 && self.hash.finalize().as_slice() == self.meta.piece_sha256
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreFault> + Send + 'static,
) -> Result<T, StoreFault> {
    spawn_blocking(work).await?
}
