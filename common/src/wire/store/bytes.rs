//! Bytes of the store's messages.

use super::super::codec::{Reader, Writer};
use super::super::{MAX_DETAIL_BYTES, MAX_WORLD, WireError};
use super::{
    HeldPiece, HeldSnapshot, MAX_LISTED_PIECES, MAX_LISTED_SNAPSHOTS, MAX_PARTS, MAX_PIECE_BYTES,
    MAX_PIECES, MAX_STORE_MESSAGE_BYTES, Manifest, Owner, PartInfo, PieceMeta, RunId, SnapshotId,
    StoreCode, StoreRequest, StoreResponse, piece_range,
};
use crate::ids::{Rank, Step};

const PUT: u8 = 1;
const GET: u8 = 2;
const LIST: u8 = 3;
const COMMIT: u8 = 4;

const STORED: u8 = 1;
const PIECE: u8 = 2;
const LISTING: u8 = 3;
const FAILED: u8 = 4;

const REPLICA: u8 = 0;
const RANK: u8 = 1;

/// Bytes of an encoded owner, and of what is made of it.
const OWNER_BYTES: usize = 3;
const PART_BYTES: usize = OWNER_BYTES + 2 + 8 + 32;
const HELD_PIECE_BYTES: usize = PART_BYTES + 2;
const SNAPSHOT_BYTES: usize = 8 + 16;
/// Bytes of an encoded [`PieceMeta`].
pub(super) const META_BYTES: usize = SNAPSHOT_BYTES + OWNER_BYTES + 2 + 2 + 8 + 8 + 32 + 32;

impl StoreCode {
    /// All codes, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Missing,
        Self::Limit,
        Self::Damaged,
        Self::Conflict,
        Self::Stale,
        Self::Io,
        Self::Protocol,
        Self::Busy,
    ];
}

impl StoreRequest {
    /// The message's bytes, without the length in front.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + META_BYTES);
        let mut w = Writer(&mut out);
        match self {
            Self::Put(meta) => {
                w.u8(PUT);
                write_meta(&mut w, meta);
            }
            Self::Get {
                snapshot,
                owner,
                piece,
                pieces,
            } => {
                w.u8(GET);
                write_snapshot(&mut w, *snapshot);
                write_owner(&mut w, *owner);
                w.u16(*piece);
                w.u16(*pieces);
            }
            Self::List => w.u8(LIST),
            Self::Commit(manifest) => {
                w.u8(COMMIT);
                write_manifest(&mut w, manifest);
            }
        }
        out
    }

    /// Reads one message that fills `bytes`.
    ///
    /// # Errors
    /// A message above [`MAX_STORE_MESSAGE_BYTES`], cut short or followed by more bytes; an unknown tag; a list or size
    /// above its limit; a position that is not below the number of pieces, or sizes that [`piece_range`] does not give;
    /// owners that do not ascend or do not begin with the replica.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut r = reader(bytes)?;
        let message = match r.u8("store request tag")? {
            PUT => Self::Put(read_meta(&mut r)?),
            GET => {
                let snapshot = read_snapshot(&mut r)?;
                let owner = read_owner(&mut r)?;
                let (piece, pieces) = (r.u16("piece")?, r.u16("pieces")?);
                check_position(piece, pieces)?;
                Self::Get {
                    snapshot,
                    owner,
                    piece,
                    pieces,
                }
            }
            LIST => Self::List,
            COMMIT => Self::Commit(read_manifest(&mut r)?),
            value => return Err(unknown("store request tag", u64::from(value))),
        };
        r.finish("store request")?;
        Ok(message)
    }
}

impl StoreResponse {
    /// The message's bytes, without the length in front. Texts for people are cut to their limit.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + META_BYTES);
        let mut w = Writer(&mut out);
        match self {
            Self::Stored => w.u8(STORED),
            Self::Piece(meta) => {
                w.u8(PIECE);
                write_meta(&mut w, meta);
            }
            Self::Listing(snapshots) => {
                w.u8(LISTING);
                w.count(snapshots.len());
                snapshots.iter().for_each(|held| write_held(&mut w, held));
            }
            Self::Failed { code, detail } => {
                w.u8(FAILED);
                w.u16(*code as u16);
                w.text_cut(detail, MAX_DETAIL_BYTES);
            }
        }
        out
    }

    /// Reads one message that fills `bytes`.
    ///
    /// # Errors
    /// As [`StoreRequest::decode`]; also an unknown code, text that is not UTF-8, snapshots or pieces that do not ascend
    /// or are more than a shard holds, and a manifest of another snapshot than the one it stands in.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut r = reader(bytes)?;
        let message = match r.u8("store response tag")? {
            STORED => Self::Stored,
            PIECE => Self::Piece(read_meta(&mut r)?),
            LISTING => Self::Listing(read_listing(&mut r)?),
            FAILED => {
                let value = u64::from(r.u16("store code")?);
                let code = StoreCode::ALL
                    .into_iter()
                    .find(|code| *code as u64 == value)
                    .ok_or(unknown("store code", value))?;
                Self::Failed {
                    code,
                    detail: r.text("detail", MAX_DETAIL_BYTES)?,
                }
            }
            value => return Err(unknown("store response tag", u64::from(value))),
        };
        r.finish("store response")?;
        Ok(message)
    }
}

fn reader(bytes: &[u8]) -> Result<Reader<'_>, WireError> {
    if bytes.len() > MAX_STORE_MESSAGE_BYTES {
        return Err(too_long(
            "store message",
            bytes.len() as u64,
            MAX_STORE_MESSAGE_BYTES as u64,
        ));
    }
    Ok(Reader(bytes))
}

fn unknown(what: &'static str, value: u64) -> WireError {
    WireError::Unknown { what, value }
}

fn too_long(what: &'static str, value: u64, limit: u64) -> WireError {
    WireError::TooLong { what, value, limit }
}

fn invalid(what: &'static str, rule: &'static str) -> WireError {
    WireError::Invalid { what, rule }
}

fn write_snapshot(w: &mut Writer<'_>, snapshot: SnapshotId) {
    w.u64(snapshot.step.0);
    w.bytes(&snapshot.run.0);
}

fn read_snapshot(r: &mut Reader<'_>) -> Result<SnapshotId, WireError> {
    Ok(SnapshotId {
        step: Step(r.u64("snapshot step")?),
        run: RunId(r.array("run")?),
    })
}

fn write_owner(w: &mut Writer<'_>, owner: Owner) {
    let (tag, rank) = match owner {
        Owner::Replica => (REPLICA, 0),
        Owner::Rank(rank) => (RANK, rank.0),
    };
    w.u8(tag);
    w.u16(rank);
}

fn read_owner(r: &mut Reader<'_>) -> Result<Owner, WireError> {
    let (tag, rank) = (r.u8("owner")?, r.u16("owner's rank")?);
    match tag {
        REPLICA if rank == 0 => Ok(Owner::Replica),
        REPLICA => Err(invalid("owner's rank", "a replica's is zero")),
        RANK if usize::from(rank) < MAX_WORLD => Ok(Owner::Rank(Rank(rank))),
        RANK => Err(too_long(
            "owner's rank",
            u64::from(rank),
            MAX_WORLD as u64 - 1,
        )),
        value => Err(unknown("owner", u64::from(value))),
    }
}

fn check_pieces(pieces: u16) -> Result<(), WireError> {
    match pieces {
        0 => Err(invalid("pieces", "a part has at least one piece")),
        1..=MAX_PIECES => Ok(()),
        _ => Err(too_long("pieces", u64::from(pieces), u64::from(MAX_PIECES))),
    }
}

fn check_position(piece: u16, pieces: u16) -> Result<(), WireError> {
    check_pieces(pieces)?;
    if piece < pieces {
        Ok(())
    } else {
        Err(invalid("piece", "must be below the number of pieces"))
    }
}

/// Such that no piece is above its limit.
fn read_total(r: &mut Reader<'_>, pieces: u16) -> Result<u64, WireError> {
    let total_bytes = r.u64("total bytes")?;
    let limit = MAX_PIECE_BYTES * u64::from(pieces);
    if total_bytes > limit {
        return Err(too_long("total bytes", total_bytes, limit));
    }
    Ok(total_bytes)
}

pub(super) fn write_meta(w: &mut Writer<'_>, meta: &PieceMeta) {
    write_snapshot(w, meta.snapshot);
    write_owner(w, meta.owner);
    w.u16(meta.piece);
    w.u16(meta.pieces);
    w.u64(meta.piece_bytes);
    w.u64(meta.total_bytes);
    w.bytes(&meta.total_sha256);
    w.bytes(&meta.piece_sha256);
}

pub(super) fn read_meta(r: &mut Reader<'_>) -> Result<PieceMeta, WireError> {
    let snapshot = read_snapshot(r)?;
    let owner = read_owner(r)?;
    let (piece, pieces) = (r.u16("piece")?, r.u16("pieces")?);
    check_position(piece, pieces)?;
    let piece_bytes = r.u64("piece bytes")?;
    if piece_bytes > MAX_PIECE_BYTES {
        return Err(too_long("piece bytes", piece_bytes, MAX_PIECE_BYTES));
    }
    let total_bytes = read_total(r, pieces)?;
    let range = piece_range(total_bytes, piece, pieces);
    if range.end - range.start != piece_bytes {
        return Err(invalid(
            "piece bytes",
            "a part is cut into nearly equal pieces",
        ));
    }
    Ok(PieceMeta {
        snapshot,
        owner,
        piece,
        pieces,
        piece_bytes,
        total_bytes,
        total_sha256: r.array("hash of the part")?,
        piece_sha256: r.array("hash of the piece")?,
    })
}

fn write_part(w: &mut Writer<'_>, part: &PartInfo) {
    write_owner(w, part.owner);
    w.u16(part.pieces);
    w.u64(part.total_bytes);
    w.bytes(&part.total_sha256);
}

fn read_part(r: &mut Reader<'_>) -> Result<PartInfo, WireError> {
    let owner = read_owner(r)?;
    let pieces = r.u16("pieces")?;
    check_pieces(pieces)?;
    let total_bytes = read_total(r, pieces)?;
    Ok(PartInfo {
        owner,
        pieces,
        total_bytes,
        total_sha256: r.array("hash of the part")?,
    })
}

pub(super) fn write_manifest(w: &mut Writer<'_>, manifest: &Manifest) {
    write_snapshot(w, manifest.snapshot);
    w.u64(manifest.update);
    w.u16(manifest.members);
    w.count(manifest.parts.len());
    manifest.parts.iter().for_each(|part| write_part(w, part));
}

pub(super) fn read_manifest(r: &mut Reader<'_>) -> Result<Manifest, WireError> {
    let snapshot = read_snapshot(r)?;
    let update = r.u64("update")?;
    let members = r.u16("members")?;
    let count = r.count("parts", MAX_PARTS, PART_BYTES)?;
    let parts = (0..count)
        .map(|_| read_part(r))
        .collect::<Result<Vec<_>, _>>()?;
    if parts.first().map(|part| part.owner) != Some(Owner::Replica) {
        return Err(invalid("parts", "the first is the replica"));
    }
    if !parts.is_sorted_by(|a, b| a.owner < b.owner) {
        return Err(invalid("parts", "owners must ascend"));
    }
    if parts.len() > 1 + usize::from(members) {
        return Err(invalid("members", "no fewer than the ranks with parts"));
    }
    Ok(Manifest {
        snapshot,
        update,
        members,
        parts,
    })
}

fn write_held(w: &mut Writer<'_>, held: &HeldSnapshot) {
    write_snapshot(w, held.snapshot);
    w.option(held.manifest.as_ref(), write_manifest);
    w.count(held.pieces.len());
    for held in &held.pieces {
        write_part(w, &held.part);
        w.u16(held.piece);
    }
}

fn read_listing(r: &mut Reader<'_>) -> Result<Vec<HeldSnapshot>, WireError> {
    let count = r.count(
        "snapshots",
        MAX_LISTED_SNAPSHOTS,
        SNAPSHOT_BYTES + size_of::<u8>() + size_of::<u32>(),
    )?;
    let mut pieces_left = MAX_LISTED_PIECES;
    let mut snapshots = Vec::with_capacity(count);
    for _ in 0..count {
        let held = read_held(r, pieces_left)?;
        pieces_left -= held.pieces.len();
        snapshots.push(held);
    }
    if !snapshots.is_sorted_by(|a, b| a.snapshot < b.snapshot) {
        return Err(invalid("snapshots", "must ascend"));
    }
    Ok(snapshots)
}

fn read_held(r: &mut Reader<'_>, pieces_left: usize) -> Result<HeldSnapshot, WireError> {
    let snapshot = read_snapshot(r)?;
    let manifest = r.option("manifest option", read_manifest)?;
    if manifest
        .as_ref()
        .is_some_and(|manifest| manifest.snapshot != snapshot)
    {
        return Err(invalid("manifest", "must be of the snapshot it stands in"));
    }
    let count = r.count("held pieces", pieces_left, HELD_PIECE_BYTES)?;
    let pieces = (0..count)
        .map(|_| read_held_piece(r))
        .collect::<Result<Vec<_>, _>>()?;
    let key = |held: &HeldPiece| (held.part.owner, held.part.pieces, held.piece);
    if !pieces.is_sorted_by(|a, b| key(a) < key(b)) {
        return Err(invalid("held pieces", "must ascend"));
    }
    Ok(HeldSnapshot {
        snapshot,
        manifest,
        pieces,
    })
}

fn read_held_piece(r: &mut Reader<'_>) -> Result<HeldPiece, WireError> {
    let part = read_part(r)?;
    let piece = r.u16("piece")?;
    check_position(piece, part.pieces)?;
    Ok(HeldPiece { part, piece })
}
