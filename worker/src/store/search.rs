//! What the shards' listings say together. Pure.

use arc_topk_common::wire::{HeldSnapshot, Manifest, Owner, PartInfo, Sha256Bytes, SnapshotId};
use std::collections::BTreeMap;

/// A snapshot from which a job can go on, and where its pieces are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotInfo {
    /// What belongs to it.
    pub manifest: Manifest,
    /// For every owner, for every piece in order, the shards that hold it.
    pub holders: BTreeMap<Owner, Vec<Vec<u16>>>,
}

impl SnapshotInfo {
    /// Step and run.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.manifest.snapshot
    }
}

/// A part all of whose pieces are somewhere.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WholePart {
    /// What a manifest would say of it.
    pub part: PartInfo,
    /// For every piece in order, the shards that hold it.
    pub holders: Vec<Vec<u16>>,
}

/// A snapshot that cannot be used, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PassedOver {
    /// Snapshot.
    pub snapshot: SnapshotId,
    /// It was whole once.
    pub committed: bool,
    /// For people.
    pub reason: String,
}

/// What all shards that answered hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Survey {
    /// Snapshots from which a job can go on, newest first.
    pub complete: Vec<SnapshotInfo>,
    /// The others, newest first.
    pub passed_over: Vec<PassedOver>,
    /// Parts all of whose pieces are there, committed or not, ascending by owner. If several whole versions of a part are
    /// there, all of them.
    pub parts: BTreeMap<SnapshotId, Vec<WholePart>>,
    /// Shards that did not answer, and why.
    pub unreachable: Vec<(u16, String)>,
}

impl Survey {
    /// The snapshot to go on from, if there is one.
    #[must_use]
    pub fn newest(&self) -> Option<&SnapshotInfo> {
        self.complete.first()
    }

    /// The complete snapshot of this name.
    #[must_use]
    pub fn find(&self, snapshot: SnapshotId) -> Option<&SnapshotInfo> {
        self.complete.iter().find(|info| info.id() == snapshot)
    }

    /// Whole parts of a snapshot, ascending by owner: what its manifest will name.
    pub fn parts_of(&self, snapshot: SnapshotId) -> impl Iterator<Item = &PartInfo> {
        let parts = self.parts.get(&snapshot).into_iter().flatten();
        parts.map(|whole| &whole.part)
    }
}

/// Pieces of one version of a part.
type Version = (Owner, u16, u64, Sha256Bytes);

#[derive(Default)]
struct Merged {
    manifests: Vec<Manifest>,
    versions: BTreeMap<Version, Vec<Vec<u16>>>,
}

impl Merged {
    fn holders(&self, part: &PartInfo) -> Option<&Vec<Vec<u16>>> {
        self.versions.get(&version(part))
    }
}

fn version(part: &PartInfo) -> Version {
    (part.owner, part.pieces, part.total_bytes, part.total_sha256)
}

/// Puts the shards' listings together.
pub(super) fn survey(listings: &[(u16, Vec<HeldSnapshot>)]) -> Survey {
    let mut survey = Survey::default();
    for (id, merged) in merge(listings).into_iter().rev() {
        match usable(&merged) {
            Ok(info) => survey.complete.push(info),
            Err(reason) => survey.passed_over.push(PassedOver {
                snapshot: id,
                committed: !merged.manifests.is_empty(),
                reason,
            }),
        }
        let whole = merged
            .versions
            .into_iter()
            .filter(|(_, holders)| holders.iter().all(|holders| !holders.is_empty()));
        let parts = whole.map(|((owner, pieces, total_bytes, total_sha256), holders)| {
            let part = PartInfo {
                owner,
                pieces,
                total_bytes,
                total_sha256,
            };
            WholePart { part, holders }
        });
        survey.parts.insert(id, parts.collect());
    }
    survey
}

fn merge(listings: &[(u16, Vec<HeldSnapshot>)]) -> BTreeMap<SnapshotId, Merged> {
    let mut snapshots: BTreeMap<SnapshotId, Merged> = BTreeMap::new();
    for (shard, listing) in listings {
        for held in listing {
            let merged = snapshots.entry(held.snapshot).or_default();
            if let Some(manifest) = &held.manifest
                && !merged.manifests.contains(manifest)
            {
                merged.manifests.push(manifest.clone());
            }
            for piece in &held.pieces {
                let pieces = usize::from(piece.part.pieces);
                let places = merged
                    .versions
                    .entry(version(&piece.part))
                    .or_insert_with(|| vec![Vec::new(); pieces]);
                if let Some(holders) = places.get_mut(usize::from(piece.piece)) {
                    holders.push(*shard);
                }
            }
        }
    }
    snapshots
}

/// The first manifest all of whose pieces are there, or what the last one lacks.
fn usable(merged: &Merged) -> Result<SnapshotInfo, String> {
    let mut reason = "it was not committed: its parts were not all stored when its run ended, or are being stored now"
        .to_owned();
    for manifest in &merged.manifests {
        match holders(merged, manifest) {
            Ok(holders) => {
                return Ok(SnapshotInfo {
                    manifest: manifest.clone(),
                    holders,
                });
            }
            Err(lacks) => reason = lacks,
        }
    }
    Err(reason)
}

fn holders(merged: &Merged, manifest: &Manifest) -> Result<BTreeMap<Owner, Vec<Vec<u16>>>, String> {
    let mut all = BTreeMap::new();
    for part in &manifest.parts {
        let places = merged.holders(part);
        let missing = match places {
            None => Some(0),
            Some(places) => places.iter().position(Vec::is_empty),
        };
        if let Some(piece) = missing {
            let (owner, pieces) = (part.owner, part.pieces);
            return Err(format!(
                "piece {piece} of {pieces} of its {owner} part is on no shard that answered, or is damaged there"
            ));
        }
        all.insert(part.owner, places.cloned().unwrap_or_default());
    }
    Ok(all)
}
