//! Snapshots in the shards' store: uploads beside training, and what a run takes from there.
//!
//! Two kinds of upload run on threads of their own, at most one of each at a time:
//!
//! - a *donation* is the replica, for one worker that joins; nothing is committed;
//! - a *snapshot* is every worker's own feedback state and, by the leader, the replica. The leader looks into the store
//!   until the parts of all members are there, then commits. It does not wait for one that has been away for
//!   [`AWAY_PATIENCE`], nor for anybody when the next snapshot is due or this worker leaves the job.
//!
//! The training thread pays for a copy of the arrays and no more.

use super::checkpoint::Checkpoint;
use super::encoding::{decode, encode};
use super::{Observer, SnapshotError};
use crate::reducer::LiveRanks;
use crate::store::{SnapshotInfo, StoreClient, StoreError};
use arc_topk_common::ids::Rank;
use arc_topk_common::metrics::SnapshotEnd;
use arc_topk_common::wire::{Manifest, Owner, PartInfo, SnapshotId};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the leader waits for the other members' parts.
const PARTS_PATIENCE: Duration = Duration::from_secs(60);
/// How long it waits for one that is away: it may come back.
const AWAY_PATIENCE: Duration = Duration::from_secs(5);
/// Between a donation that failed and the next attempt.
const DONATION_PAUSE: Duration = Duration::from_secs(5);
/// Between two looks into the store.
const PARTS_INTERVAL: Duration = Duration::from_millis(500);

/// Where snapshots are kept: the shards' store, or a test's.
pub trait SnapshotStore: fmt::Debug + Send + Sync {
    /// Stores a part.
    ///
    /// # Errors
    /// Of the store.
    fn upload_part(
        &self,
        snapshot: SnapshotId,
        owner: Owner,
        blob: Bytes,
    ) -> Result<PartInfo, StoreError>;

    /// Parts of a snapshot that are whole, committed or not.
    ///
    /// # Errors
    /// Of the store.
    fn parts(&self, snapshot: SnapshotId) -> Result<Vec<PartInfo>, StoreError>;

    /// Makes a snapshot one from which a job can go on.
    ///
    /// # Errors
    /// Of the store.
    fn commit(&self, manifest: Manifest) -> Result<(), StoreError>;

    /// The newest snapshot from which a job can go on.
    ///
    /// # Errors
    /// Of the store.
    fn newest(&self) -> Result<Option<SnapshotInfo>, StoreError>;

    /// A part of a committed snapshot.
    ///
    /// # Errors
    /// Of the store.
    fn fetch_part(&self, info: &SnapshotInfo, owner: Owner) -> Result<Vec<u8>, StoreError>;

    /// The replica of a snapshot that need not be committed; waits for it.
    ///
    /// # Errors
    /// Of the store.
    fn fetch_replica(&self, snapshot: SnapshotId) -> Result<Vec<u8>, StoreError>;
}

impl SnapshotStore for StoreClient {
    fn upload_part(
        &self,
        snapshot: SnapshotId,
        owner: Owner,
        blob: Bytes,
    ) -> Result<PartInfo, StoreError> {
        Self::upload_part(self, snapshot, owner, blob)
    }

    fn parts(&self, snapshot: SnapshotId) -> Result<Vec<PartInfo>, StoreError> {
        Ok(self.survey()?.parts_of(snapshot).cloned().collect())
    }

    fn commit(&self, manifest: Manifest) -> Result<(), StoreError> {
        Self::commit(self, manifest)
    }

    fn newest(&self) -> Result<Option<SnapshotInfo>, StoreError> {
        Self::newest(self)
    }

    fn fetch_part(&self, info: &SnapshotInfo, owner: Owner) -> Result<Vec<u8>, StoreError> {
        Self::fetch_part(self, info, owner)
    }

    fn fetch_replica(&self, snapshot: SnapshotId) -> Result<Vec<u8>, StoreError> {
        Self::fetch_replica(self, snapshot)
    }
}

/// Takes a checkpoint from the store apart.
pub(super) fn open(what: String, bytes: &[u8]) -> Result<Checkpoint, SnapshotError> {
    decode(bytes).map_err(|detail| SnapshotError::Damaged { what, detail })
}

/// What a leader does for all.
pub(super) struct Lead {
    /// The part that is the same on all workers.
    pub(super) replica: Checkpoint,
    /// Ranks whose parts belong to the snapshot.
    pub(super) members: Vec<Rank>,
    /// Who is there, and may put its part into the store.
    pub(super) live: LiveRanks,
    /// Whether a snapshot without the parts of some members is better without any: the estimates of ef21 are of use only
    /// together.
    pub(super) all_or_none: bool,
}

/// What came of an upload.
#[derive(Debug)]
struct Uploaded {
    bytes: u64,
    seconds: f64,
    /// Members whose parts did not come in time.
    missing: Vec<Rank>,
    committed: bool,
}

#[derive(Debug)]
struct Upload {
    id: SnapshotId,
    thread: JoinHandle<Result<Uploaded, StoreError>>,
}

impl Upload {
    fn start(
        id: SnapshotId,
        work: impl FnOnce() -> Result<Uploaded, StoreError> + Send + 'static,
    ) -> Option<Self> {
        let thread = std::thread::Builder::new().name("arc-upload".into());
        let thread = thread.spawn(work).ok()?;
        Some(Self { id, thread })
    }

    /// Its result, if it is done or `wait` says to wait for it.
    fn take(
        slot: &mut Option<Self>,
        wait: bool,
    ) -> Option<(SnapshotId, Result<Uploaded, StoreError>)> {
        let upload = slot.take_if(|upload| wait || upload.thread.is_finished())?;
        // A panic is reported by the thread; the snapshot is as good as failed.
        let result = upload.thread.join();
        let panicked = |_| Err(StoreError::Runtime("the upload panicked".to_owned()));
        Some((upload.id, result.unwrap_or_else(panicked)))
    }
}

/// Uploads of one worker.
#[derive(Debug)]
pub(super) struct Uploads {
    store: Arc<dyn SnapshotStore>,
    donation: Option<Upload>,
    /// A donation failed, and is not tried again before then.
    donate_after: Option<Instant>,
    snapshot: Option<Upload>,
    /// Tells the snapshot's thread to wait for nobody any more.
    hurry: Arc<AtomicBool>,
    said_busy: bool,
}

impl Uploads {
    pub(super) fn new(store: Arc<dyn SnapshotStore>) -> Self {
        Self {
            store,
            donation: None,
            donate_after: None,
            snapshot: None,
            hurry: Arc::default(),
            said_busy: false,
        }
    }

    /// Whether a donation may be started now: none is on its way, and none has failed a moment ago.
    pub(super) fn may_donate(&self) -> bool {
        self.donation.is_none()
            && self
                .donate_after
                .is_none_or(|after| Instant::now() >= after)
    }

    /// Whether a snapshot may be started now. One that may not is counted and, once, reported.
    pub(super) fn is_free(&mut self, observer: &mut dyn Observer) -> bool {
        if self.snapshot.is_none() {
            return true;
        }
        self.hurry();
        observer.on_snapshot(SnapshotEnd::Skipped, 0, 0.0);
        if !std::mem::replace(&mut self.said_busy, true) {
            observer.on_message(
                "a snapshot is skipped, since the one before is still on its way to the shards; if that goes on, raise --snapshot-every",
            );
        }
        false
    }

    /// A snapshot that is under way takes the parts that are there.
    pub(super) fn hurry(&self) {
        self.hurry.store(true, Ordering::Relaxed);
    }

    /// Starts to put the replica into the store, for one that joins. Whether it could.
    pub(super) fn donate(&mut self, id: SnapshotId, replica: Checkpoint) -> bool {
        let store = Arc::clone(&self.store);
        self.donation = Upload::start(id, move || {
            let start = Instant::now();
            let part = put(&*store, id, Owner::Replica, &replica)?;
            Ok(Uploaded {
                bytes: part.total_bytes,
                seconds: start.elapsed().as_secs_f64(),
                missing: Vec::new(),
                committed: false,
            })
        });
        self.donate_after = None;
        self.donation.is_some()
    }

    /// Starts to put this worker's own part into the store and, for a leader, to complete the snapshot.
    pub(super) fn snapshot(
        &mut self,
        id: SnapshotId,
        rank: Rank,
        own: Checkpoint,
        lead: Option<Lead>,
    ) {
        let store = Arc::clone(&self.store);
        let hurry = Arc::new(AtomicBool::new(false));
        self.hurry = Arc::clone(&hurry);
        self.snapshot = Upload::start(id, move || {
            let start = Instant::now();
            let part = put(&*store, id, Owner::Rank(rank), &own)?;
            drop(own);
            let mut uploaded = Uploaded {
                bytes: part.total_bytes,
                seconds: 0.0,
                missing: Vec::new(),
                committed: lead.is_some(),
            };
            if let Some(Lead {
                replica,
                members,
                live,
                all_or_none,
            }) = lead
            {
                let update = replica.update;
                let whole = put(&*store, id, Owner::Replica, &replica)?;
                uploaded.bytes += whole.total_bytes;
                uploaded.seconds = start.elapsed().as_secs_f64();
                drop(replica);
                let looks = Looks {
                    members: &members,
                    live: &live,
                    hurry: &hurry,
                };
                let (mut parts, missing) = looks.await_parts(&*store, id, part)?;
                if all_or_none && !missing.is_empty() {
                    parts.clear();
                }
                parts.insert(0, whole);
                store.commit(Manifest {
                    snapshot: id,
                    update,
                    members: u16::try_from(members.len()).unwrap_or(u16::MAX),
                    parts,
                })?;
                uploaded.missing = missing;
            } else {
                uploaded.seconds = start.elapsed().as_secs_f64();
            }
            Ok(uploaded)
        });
    }

    /// Takes note of what is done; of everything, if `wait`. Returns the donation that has ended, if one has, and whether
    /// it is in the store.
    pub(super) fn note(
        &mut self,
        wait: bool,
        observer: &mut dyn Observer,
    ) -> Option<(SnapshotId, bool)> {
        let mut donated = None;
        if let Some((id, result)) = Upload::take(&mut self.donation, wait) {
            report(id, "the replica for a worker that joins", &result, observer);
            if result.is_err() {
                self.donate_after = Some(Instant::now() + DONATION_PAUSE);
            }
            donated = Some((id, result.is_ok()));
        }
        if let Some((id, result)) = Upload::take(&mut self.snapshot, wait) {
            report(id, "the snapshot", &result, observer);
            self.said_busy &= result.is_err();
        }
        donated
    }
}

fn put(
    store: &dyn SnapshotStore,
    id: SnapshotId,
    owner: Owner,
    part: &Checkpoint,
) -> Result<PartInfo, StoreError> {
    store.upload_part(id, owner, encode(part).into())
}

/// For whose parts a leader waits.
struct Looks<'a> {
    members: &'a [Rank],
    live: &'a LiveRanks,
    hurry: &'a AtomicBool,
}

impl Looks<'_> {
    /// The members' parts, `own` among them, once all have come that are waited for; and who is missing.
    fn await_parts(
        &self,
        store: &dyn SnapshotStore,
        id: SnapshotId,
        own: PartInfo,
    ) -> Result<(Vec<PartInfo>, Vec<Rank>), StoreError> {
        let deadline = Instant::now() + PARTS_PATIENCE;
        let mut away: BTreeMap<Rank, Instant> = BTreeMap::new();
        loop {
            // Before the look into the store: who leaves in order has stored its part before.
            let (live, hurry) = ((self.live)(), self.hurry.load(Ordering::Relaxed));
            let listed = store.parts(id)?;
            let part = |rank: &Rank| {
                let owner = Owner::Rank(*rank);
                if owner == own.owner {
                    return Some(own.clone());
                }
                listed.iter().find(|part| part.owner == owner).cloned()
            };
            let parts: Vec<PartInfo> = self.members.iter().filter_map(part).collect();
            let missing = self.members.iter().filter(|rank| part(rank).is_none());
            let missing: Vec<Rank> = missing.copied().collect();
            let now = Instant::now();
            away.retain(|rank, _| !live.contains(rank));
            let mut is_awaited = |rank: &Rank| {
                live.contains(rank)
                    || now.duration_since(*away.entry(*rank).or_insert(now)) < AWAY_PATIENCE
            };
            let awaited = missing.iter().filter(|rank| is_awaited(rank)).count();
            if awaited == 0 || hurry || now >= deadline {
                return Ok((parts, missing));
            }
            std::thread::sleep(PARTS_INTERVAL);
        }
    }
}

fn report(
    id: SnapshotId,
    what: &str,
    result: &Result<Uploaded, StoreError>,
    observer: &mut dyn Observer,
) {
    match result {
        Ok(done) => {
            observer.on_snapshot(SnapshotEnd::Stored, done.bytes, done.seconds);
            if done.committed && done.missing.is_empty() {
                observer.on_message(&format!("snapshot of step {} is complete", id.step));
            } else if done.committed {
                let missing: Vec<u16> = done.missing.iter().map(|rank| rank.0).collect();
                observer.on_message(&format!(
                    "snapshot of step {} is complete but for the feedback state of ranks {missing:?}, which did not come",
                    id.step
                ));
            }
        }
        Err(error) => {
            observer.on_snapshot(SnapshotEnd::Failed, 0, 0.0);
            observer.on_message(&format!(
                "{what} of step {} is not stored: {error}",
                id.step
            ));
        }
    }
}
