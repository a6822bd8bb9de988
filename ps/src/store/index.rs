//! What is held, what is kept and what is refused. No I/O, no clock: every call says what to remove.
//!
//! A run trains forward, so within a run a later step supersedes an earlier one. Between runs the step says nothing: a
//! job that restarts from an old snapshot comes to steps for which an abandoned course of training still has snapshots.
//! Therefore a commit drops what other runs hold of the same and later steps.
//!
//! | event | held | then |
//! |---|---|---|
//! | Put of X | X is there | accepted, unless X is committed and its manifest names other bytes |
//! | Put of X | uncommitted ones of other runs | they are dropped |
//! | Put of X | [`MOST_FILLING_SNAPSHOTS`] other uncommitted ones of the same run, all later | refused, stale |
//! | Put of X | as many, some earlier | the earliest is dropped |
//! | Commit of X | X is committed otherwise | refused, conflict |
//! | Commit of X | the same run has committed a later step | refused, stale |
//! | Commit of X | a part that it names has no piece here | refused, missing: every shard was to get one |
//! | Commit of X | | X's pieces that the manifest does not name are dropped; other runs' snapshots of X's step and later, and their uncommitted ones; committed ones beyond the newest `keep` |

use super::StoreOptions;
use super::refusal::Refusal;
use arc_topk_common::wire::{
    HeldPiece, HeldSnapshot, MAX_LISTED_PIECES, MAX_LISTED_SNAPSHOTS, MOST_FILLING_SNAPSHOTS,
    Manifest, Owner, PartInfo, PieceMeta, SnapshotId,
};
use std::collections::{BTreeMap, BTreeSet};

/// A piece among those of its snapshot: owner, number of pieces, position.
pub type PieceKey = (Owner, u16, u16);

/// The piece's place in its snapshot.
#[must_use]
pub fn piece_key(meta: &PieceMeta) -> PieceKey {
    (meta.owner, meta.pieces, meta.piece)
}

/// A Put that was accepted and whose bytes are coming.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket {
    /// Counted from 0.
    pub number: u64,
    /// Snapshot to which it adds.
    pub snapshot: SnapshotId,
}

/// What has to be removed after a change.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Removals {
    /// Snapshots with all that belongs to them.
    pub snapshots: Vec<SnapshotId>,
    /// Single pieces of snapshots that stay.
    pub pieces: Vec<(SnapshotId, PieceKey)>,
}

impl Removals {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.snapshots.is_empty() && self.pieces.is_empty()
    }

    fn add(&mut self, other: Self) {
        self.snapshots.extend(other.snapshots);
        self.pieces.extend(other.pieces);
    }
}

#[derive(Clone, PartialEq, Debug, Default)]
struct Entry {
    manifest: Option<Manifest>,
    pieces: BTreeMap<PieceKey, PieceMeta>,
}

impl Entry {
    fn bytes(&self) -> u64 {
        sum(self.pieces.values().map(|meta| meta.piece_bytes))
    }
}

fn sum(bytes: impl Iterator<Item = u64>) -> u64 {
    bytes.fold(0, u64::saturating_add)
}

/// What a shard holds. See the module.
#[derive(Clone, PartialEq, Debug)]
pub struct Index {
    keep: usize,
    limit_bytes: u64,
    snapshots: BTreeMap<SnapshotId, Entry>,
    incoming: BTreeMap<Ticket, PieceMeta>,
    next_ticket: u64,
}

impl Index {
    /// Empty. `keep` is at least 1 and at most what a listing has room for.
    #[must_use]
    pub fn new(options: &StoreOptions) -> Self {
        Self {
            keep: options
                .keep
                .clamp(1, MAX_LISTED_SNAPSHOTS - MOST_FILLING_SNAPSHOTS),
            limit_bytes: options.limit_bytes,
            snapshots: BTreeMap::new(),
            incoming: BTreeMap::new(),
            next_ticket: 0,
        }
    }

    /// With what was found at the start, of which it keeps what it would have kept; says what else to remove.
    #[must_use]
    pub fn restored(
        options: &StoreOptions,
        pieces: Vec<PieceMeta>,
        manifests: Vec<Manifest>,
    ) -> (Self, Removals) {
        let mut index = Self::new(options);
        for manifest in manifests {
            let entry = index.snapshots.entry(manifest.snapshot).or_default();
            entry.manifest = Some(manifest);
        }
        for meta in pieces {
            let entry = index.snapshots.entry(meta.snapshot).or_default();
            entry.pieces.insert(piece_key(&meta), meta);
        }
        let mut removals = Removals::default();
        let committed: Vec<SnapshotId> = index.committed().collect();
        for snapshot in committed {
            removals.pieces.extend(index.drop_orphans(snapshot));
        }
        removals.add(index.prune());
        // Of those that were being filled, the newest still can be.
        let filling: Vec<SnapshotId> = index.uncommitted().collect();
        for snapshot in filling.iter().rev().skip(MOST_FILLING_SNAPSHOTS) {
            index.remove(*snapshot);
            removals.snapshots.push(*snapshot);
        }
        (index, removals)
    }

    /// Snapshots of which anything is held or coming.
    #[must_use]
    pub fn snapshots(&self) -> usize {
        self.snapshots.len()
    }

    /// Bytes held.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        sum(self.snapshots.values().map(Entry::bytes))
    }

    /// Bytes announced of pieces that are still coming.
    #[must_use]
    pub fn incoming_bytes(&self) -> u64 {
        sum(self.incoming.values().map(|meta| meta.piece_bytes))
    }

    /// Most bytes that may be held.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// Whether anything of the snapshot is held, or coming.
    #[must_use]
    pub fn has(&self, snapshot: SnapshotId) -> bool {
        self.snapshots.contains_key(&snapshot)
    }

    fn committed(&self) -> impl DoubleEndedIterator<Item = SnapshotId> {
        let entries = self.snapshots.iter();
        entries.filter_map(|(id, entry)| entry.manifest.as_ref().map(|_| *id))
    }

    fn uncommitted(&self) -> impl DoubleEndedIterator<Item = SnapshotId> {
        let entries = self.snapshots.iter();
        entries.filter_map(|(id, entry)| entry.manifest.is_none().then_some(*id))
    }

    /// A Put begins: its bytes may come, or it is refused before any does.
    ///
    /// # Errors
    /// The snapshot is superseded or committed with other contents; the piece would not fit.
    pub fn begin(&mut self, meta: &PieceMeta) -> Result<(Ticket, Removals), Refusal> {
        let id = meta.snapshot;
        let displaced = self.displaced(meta)?;
        let stays = |id: &SnapshotId| !displaced.contains(id);
        let held = self.snapshots.iter().filter(|(id, _)| stays(id));
        let held = sum(held.map(|(_, entry)| entry.bytes()));
        let incoming = self.incoming.iter().filter(|(at, _)| stays(&at.snapshot));
        let incoming = sum(incoming.map(|(_, meta)| meta.piece_bytes));
        let asked = meta.piece_bytes;
        if held.saturating_add(incoming).saturating_add(asked) > self.limit_bytes {
            return Err(Refusal::Bytes {
                asked,
                held,
                incoming,
                limit: self.limit_bytes,
            });
        }
        let pieces = self.snapshots.values().map(|entry| entry.pieces.len());
        if pieces.sum::<usize>() + self.incoming.len() >= MAX_LISTED_PIECES {
            return Err(Refusal::Pieces);
        }
        displaced.iter().for_each(|id| self.remove(*id));
        self.snapshots.entry(id).or_default();
        let ticket = Ticket {
            number: self.next_ticket,
            snapshot: id,
        };
        self.next_ticket += 1;
        self.incoming.insert(ticket, meta.clone());
        let removals = Removals {
            snapshots: displaced.into_iter().collect(),
            pieces: Vec::new(),
        };
        Ok((ticket, removals))
    }

    /// Uncommitted snapshots in whose place `meta`'s comes.
    fn displaced(&self, meta: &PieceMeta) -> Result<BTreeSet<SnapshotId>, Refusal> {
        let id = meta.snapshot;
        if let Some(manifest) = self.snapshots.get(&id).and_then(|e| e.manifest.as_ref()) {
            let named = manifest.part(meta.owner);
            return match named {
                Some(part) if *part == part_of(meta) => Ok(BTreeSet::new()),
                _ => Err(Refusal::Conflict(id)),
            };
        }
        let others = self.uncommitted().filter(|other| *other != id);
        let (own, abandoned): (Vec<SnapshotId>, Vec<SnapshotId>) =
            others.partition(|other| other.run == id.run);
        // A replica for one that joins, one for another that joins a moment later, and a snapshot of the whole job may be
        // on their way at once; none may push out another.
        let beyond = (own.len() + 1).saturating_sub(MOST_FILLING_SNAPSHOTS);
        if let Some(oldest) = own.first().filter(|oldest| beyond > 0 && id < **oldest) {
            return Err(Refusal::Stale {
                asked: id,
                newer: *oldest,
            });
        }
        let oldest = own.into_iter().take(beyond);
        Ok(abandoned.into_iter().chain(oldest).collect())
    }

    /// A snapshot that the same run committed later in its course.
    fn later_committed(&self, id: SnapshotId) -> Option<SnapshotId> {
        self.committed()
            .rfind(|other| other.run == id.run && *other > id)
    }

    /// All bytes of a Put are stored and have their hash: from now on the piece is listed.
    ///
    /// # Errors
    /// The snapshot was dropped or committed with other contents in the meantime; the bytes are to be removed.
    pub fn finish(&mut self, ticket: Ticket) -> Result<(), Refusal> {
        let checked = self.check_finish(ticket).cloned();
        self.incoming.remove(&ticket);
        let meta = checked?;
        let entry = self.snapshots.entry(ticket.snapshot).or_default();
        entry.pieces.insert(piece_key(&meta), meta);
        Ok(())
    }

    /// Whether [`Index::finish`] would be done, and with what.
    ///
    /// # Errors
    /// As there.
    pub fn check_finish(&self, ticket: Ticket) -> Result<&PieceMeta, Refusal> {
        let id = ticket.snapshot;
        let meta = self.incoming.get(&ticket).ok_or(Refusal::Dropped(id))?;
        let entry = self.snapshots.get(&id).ok_or(Refusal::Dropped(id))?;
        match &entry.manifest {
            Some(manifest) if manifest.part(meta.owner) != Some(&part_of(meta)) => {
                Err(Refusal::Conflict(id))
            }
            _ => Ok(meta),
        }
    }

    /// Whether a Put is still wanted.
    #[must_use]
    pub fn awaits(&self, ticket: Ticket) -> bool {
        self.incoming.contains_key(&ticket)
    }

    /// A Put ended without all its bytes. A snapshot of which nothing is left is forgotten, and to be removed.
    pub fn abandon(&mut self, ticket: Ticket) -> Removals {
        self.incoming.remove(&ticket);
        let id = ticket.snapshot;
        let mut removals = Removals::default();
        let coming = self.incoming.keys().any(|other| other.snapshot == id);
        let empty = |entry: &Entry| entry.manifest.is_none() && entry.pieces.is_empty();
        if !coming && self.snapshots.get(&id).is_some_and(empty) {
            self.snapshots.remove(&id);
            removals.snapshots.push(id);
        }
        removals
    }

    /// Whether a Commit may be done; `Ok(false)` if it was done before.
    ///
    /// # Errors
    /// As the module's table says.
    pub fn check_commit(&self, manifest: &Manifest) -> Result<bool, Refusal> {
        let id = manifest.snapshot;
        let entry = self.snapshots.get(&id);
        if let Some(before) = entry.and_then(|entry| entry.manifest.as_ref()) {
            return match before == manifest {
                true => Ok(false),
                false => Err(Refusal::Conflict(id)),
            };
        }
        if let Some(newer) = self.later_committed(id) {
            return Err(Refusal::Stale { asked: id, newer });
        }
        let held = |part: &PartInfo| {
            let mut pieces = entry.into_iter().flat_map(|entry| entry.pieces.values());
            pieces.any(|meta| part_of(meta) == *part)
        };
        match manifest.parts.iter().find(|part| !held(part)) {
            Some(part) => Err(Refusal::Incomplete {
                snapshot: id,
                owner: part.owner,
            }),
            None => Ok(true),
        }
    }

    /// The manifest is stored: the snapshot is committed. Says what it supersedes.
    ///
    /// # Errors
    /// As [`Index::check_commit`].
    pub fn commit(&mut self, manifest: Manifest) -> Result<Removals, Refusal> {
        if !self.check_commit(&manifest)? {
            return Ok(Removals::default());
        }
        let id = manifest.snapshot;
        self.snapshots.entry(id).or_default().manifest = Some(manifest);
        let mut removals = Removals {
            snapshots: Vec::new(),
            pieces: self.drop_orphans(id),
        };
        let abandoned = |other: SnapshotId, entry: &Entry| match entry.manifest {
            Some(_) => other.run != id.run && other.step >= id.step,
            // What one that joins is about to fetch stays until later ones come.
            None => other.run != id.run,
        };
        let superseded: Vec<SnapshotId> = self
            .snapshots
            .iter()
            .filter(|(other, entry)| **other != id && abandoned(**other, entry))
            .map(|(other, _)| *other)
            .collect();
        superseded.iter().for_each(|other| self.remove(*other));
        removals.snapshots = superseded;
        removals.add(self.prune());
        Ok(removals)
    }

    /// Drops committed snapshots beyond the newest `keep`.
    fn prune(&mut self) -> Removals {
        let beyond: Vec<SnapshotId> = self.committed().rev().skip(self.keep).collect();
        let mut removals = Removals::default();
        for id in beyond {
            self.remove(id);
            removals.snapshots.push(id);
        }
        removals
    }

    /// Pieces that a committed snapshot's manifest does not name.
    fn drop_orphans(&mut self, id: SnapshotId) -> Vec<(SnapshotId, PieceKey)> {
        let Some(entry) = self.snapshots.get_mut(&id) else {
            return Vec::new();
        };
        let Some(manifest) = &entry.manifest else {
            return Vec::new();
        };
        let named = |meta: &PieceMeta| manifest.part(meta.owner) == Some(&part_of(meta));
        let mut orphans = Vec::new();
        entry.pieces.retain(|key, meta| {
            let stays = named(meta);
            if !stays {
                orphans.push((id, *key));
            }
            stays
        });
        orphans
    }

    fn remove(&mut self, id: SnapshotId) {
        self.snapshots.remove(&id);
        self.incoming.retain(|ticket, _| ticket.snapshot != id);
    }

    /// All about a piece that is held.
    ///
    /// # Errors
    /// [`Refusal::Missing`].
    pub fn piece(&self, snapshot: SnapshotId, key: PieceKey) -> Result<&PieceMeta, Refusal> {
        let entry = self.snapshots.get(&snapshot);
        entry
            .and_then(|entry| entry.pieces.get(&key))
            .ok_or(Refusal::Missing { snapshot, key })
    }

    /// A piece turned out to be damaged: it is not listed any more.
    pub fn forget_piece(&mut self, snapshot: SnapshotId, key: PieceKey) {
        if let Some(entry) = self.snapshots.get_mut(&snapshot) {
            entry.pieces.remove(&key);
        }
    }

    /// What is held, ascending by snapshot; if that is more than a listing can say, without pieces of the oldest.
    #[must_use]
    pub fn listing(&self) -> Vec<HeldSnapshot> {
        let mut room = MAX_LISTED_PIECES;
        let mut listing: Vec<HeldSnapshot> = Vec::with_capacity(self.snapshots.len());
        for (id, entry) in self.snapshots.iter().rev().take(MAX_LISTED_SNAPSHOTS) {
            let pieces = entry.pieces.values().take(room).map(|meta| HeldPiece {
                part: part_of(meta),
                piece: meta.piece,
            });
            let pieces: Vec<HeldPiece> = pieces.collect();
            room -= pieces.len();
            listing.push(HeldSnapshot {
                snapshot: *id,
                manifest: entry.manifest.clone(),
                pieces,
            });
        }
        listing.reverse();
        listing
    }
}

/// The part to which a piece belongs, by its own account.
#[must_use]
pub fn part_of(meta: &PieceMeta) -> PartInfo {
    PartInfo {
        owner: meta.owner,
        pieces: meta.pieces,
        total_bytes: meta.total_bytes,
        total_sha256: meta.total_sha256,
    }
}
