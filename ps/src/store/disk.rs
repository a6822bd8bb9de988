//! The store's files.
//!
//! ```text
//! <dir>/lock                                         held while a shard uses the directory
//! <dir>/put-<n>.tmp                                  bytes that are coming
//! <dir>/step-<n>-<run>/<owner>-<piece>-of-<pieces>.part
//! <dir>/step-<n>-<run>/manifest
//! ```
//!
//! A file is written under a temporary name, synced and renamed, and its directory is synced: under its last name it is
//! there whole or not at all. Both kinds carry hashes of everything in them, so a file that a disk or a copy cut short or
//! changed is noticed. [`Disk::open`] reads all of them; what is not whole is reported and left alone until a newer
//! snapshot takes its place or the file is stored again.

use super::index::{PieceKey, Removals, piece_key};
use arc_topk_common::wire::{
    MAX_STORE_MESSAGE_BYTES, Manifest, PART_HEADER_BYTES, PieceMeta, SnapshotId,
};
use sha2::{Digest, Sha256};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const LOCK_FILE: &str = "lock";
const MANIFEST_FILE: &str = "manifest";
const PART_EXTENSION: &str = "part";
const TEMPORARY_EXTENSION: &str = "tmp";
const SNAPSHOT_PREFIX: &str = "step-";
/// Bytes read at once.
const BLOCK_BYTES: usize = 1 << 20;

/// Why a directory cannot be used, or a file in it not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}; check that --snapshot-dir is writable and has room", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Two shards must not share a directory.
    #[error("another process uses the snapshots in {}: give every shard a --snapshot-dir of its own", path.display())]
    InUse {
        /// Directory.
        path: PathBuf,
    },
    /// A file is not what it was.
    #[error("{} is damaged: {problem}; it is ignored, delete it or copy it again", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// What was found in a directory.
#[derive(Debug, Default)]
pub struct Found {
    /// Pieces that are whole.
    pub pieces: Vec<PieceMeta>,
    /// Manifests that are whole.
    pub manifests: Vec<Manifest>,
    /// Files that are not, and directories that cannot be read.
    pub damaged: Vec<DiskError>,
}

/// A directory of snapshots. One process at a time.
#[derive(Debug)]
pub struct Disk {
    dir: PathBuf,
    lock: File,
}

impl Disk {
    /// Takes the directory, which is made if it is not there, and makes sure that files can be written to it. Reads none
    /// of the snapshots: [`Disk::scan`] does.
    ///
    /// # Errors
    /// It cannot be made or written, or another process uses it.
    pub fn open(dir: &Path) -> Result<Self, DiskError> {
        fs::create_dir_all(dir).map_err(failed("create", dir))?;
        let path = dir.join(LOCK_FILE);
        let lock = File::create(&path).map_err(failed("create", &path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(DiskError::InUse {
                    path: dir.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
        }
        Ok(Self {
            dir: dir.to_owned(),
            lock,
        })
    }

    /// Lets another process use the directory. Nothing may be written afterwards.
    pub fn release(&self) {
        // The lock ends with the process at the latest.
        let _held_to_the_end = self.lock.unlock();
    }

    /// Reads and checks every file, and removes temporary ones. Never fails: what is not whole is reported.
    #[must_use]
    pub fn scan(&self) -> Found {
        let mut found = Found::default();
        for path in entries(&self.dir, &mut found) {
            if path.is_dir() && name(&path).starts_with(SNAPSHOT_PREFIX) {
                self.scan_snapshot(&path, &mut found);
            } else if path.extension().is_some_and(|e| e == TEMPORARY_EXTENSION) {
                remove_temporary(&path, &mut found);
            }
        }
        found
    }

    fn scan_snapshot(&self, dir: &Path, found: &mut Found) {
        for path in entries(dir, found) {
            let extension = path.extension().and_then(|e| e.to_str());
            if name(&path) == MANIFEST_FILE {
                match read_manifest(&path) {
                    Ok(manifest) if self.manifest_path(manifest.snapshot) == path => {
                        found.manifests.push(manifest);
                    }
                    Ok(_) => found.damaged.push(misplaced(&path)),
                    Err(error) => found.damaged.push(error),
                }
            } else if extension == Some(PART_EXTENSION) {
                match check_part(&path) {
                    Ok(meta) if self.part_path(meta.snapshot, piece_key(&meta)) == path => {
                        found.pieces.push(meta);
                    }
                    Ok(_) => found.damaged.push(misplaced(&path)),
                    Err(error) => found.damaged.push(error),
                }
            } else if extension == Some(TEMPORARY_EXTENSION) {
                remove_temporary(&path, found);
            }
        }
    }

    fn snapshot_dir(&self, snapshot: SnapshotId) -> PathBuf {
        let SnapshotId { step, run } = snapshot;
        self.dir
            .join(format!("{SNAPSHOT_PREFIX}{:08}-{run}", step.0))
    }

    fn manifest_path(&self, snapshot: SnapshotId) -> PathBuf {
        self.snapshot_dir(snapshot).join(MANIFEST_FILE)
    }

    /// File of a piece.
    #[must_use]
    pub fn part_path(&self, snapshot: SnapshotId, (owner, pieces, piece): PieceKey) -> PathBuf {
        self.snapshot_dir(snapshot)
            .join(format!("{owner}-{piece}-of-{pieces}.{PART_EXTENSION}"))
    }

    /// Begins a piece's file under the temporary name `number`.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn begin(&self, number: u64, meta: &PieceMeta) -> Result<PartWriter, DiskError> {
        let path = self.temporary_path(number);
        let file = File::create(&path).map_err(failed("create", &path))?;
        let mut writer = PartWriter {
            temporary: Temporary(Some(path)),
            file,
        };
        writer.write(&meta.file_header())?;
        Ok(writer)
    }

    fn temporary_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("put-{number}.{TEMPORARY_EXTENSION}"))
    }

    /// Gives a synced piece its name.
    ///
    /// # Errors
    /// If the directory cannot be made, written or synced. The piece is then not there, or will be found at the next
    /// start.
    pub fn publish(&self, part: SyncedPart, meta: &PieceMeta) -> Result<(), DiskError> {
        self.place(part.0, &self.part_path(meta.snapshot, piece_key(meta)))
    }

    /// Writes a manifest under the temporary name `number` and gives it its own.
    ///
    /// # Errors
    /// As [`Disk::publish`].
    pub fn commit(&self, number: u64, manifest: &Manifest) -> Result<(), DiskError> {
        let path = self.temporary_path(number);
        let temporary = Temporary(Some(path.clone()));
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(&manifest.file_bytes())?;
            file.sync_all()
        });
        written.map_err(failed("write", &path))?;
        self.place(temporary, &self.manifest_path(manifest.snapshot))
    }

    /// When a snapshot's manifest was written here.
    #[must_use]
    pub fn committed_at(&self, snapshot: SnapshotId) -> Option<SystemTime> {
        let manifest = fs::metadata(self.manifest_path(snapshot)).ok()?;
        manifest.modified().ok()
    }

    fn place(&self, mut temporary: Temporary, path: &Path) -> Result<(), DiskError> {
        let Some(from) = &temporary.0 else {
            return Ok(());
        };
        let dir = path.parent().unwrap_or(&self.dir);
        if !dir.is_dir() {
            fs::create_dir_all(dir).map_err(failed("create", dir))?;
            sync(&self.dir)?;
        }
        fs::rename(from, path).map_err(failed("rename", path))?;
        temporary.0 = None;
        // The rename itself must reach the disk, too.
        sync(dir)
    }

    /// Removes what the index dropped. Files that are gone already are no failure.
    ///
    /// # Errors
    /// The first file or directory that cannot be removed; the others are tried all the same.
    pub fn remove(&self, removals: &Removals) -> Result<(), DiskError> {
        let mut done = Ok(());
        for (snapshot, key) in &removals.pieces {
            let path = self.part_path(*snapshot, *key);
            done = done.and(gone(fs::remove_file(&path), &path));
        }
        for snapshot in &removals.snapshots {
            let dir = self.snapshot_dir(*snapshot);
            // Without its manifest it is no restart point any more, should this be cut short.
            let manifest = self.manifest_path(*snapshot);
            done = done.and(gone(fs::remove_file(&manifest), &manifest));
            done = done.and(gone(fs::remove_dir_all(&dir), &dir));
        }
        done
    }

    /// Opens a piece's file behind its header, which must be that of `meta`.
    ///
    /// # Errors
    /// If it cannot be read, or is not the one that was stored.
    pub fn read(&self, meta: &PieceMeta) -> Result<File, DiskError> {
        let path = self.part_path(meta.snapshot, piece_key(meta));
        let mut file = File::open(&path).map_err(failed("open", &path))?;
        let header = read_header(&path, &mut file)?;
        let length = file.metadata().map_err(failed("read", &path))?.len();
        if header != *meta || length != PART_HEADER_BYTES as u64 + meta.piece_bytes {
            return Err(damaged(&path, "it was changed while this shard ran"));
        }
        Ok(file)
    }
}

fn entries(dir: &Path, found: &mut Found) -> Vec<PathBuf> {
    let read = fs::read_dir(dir).and_then(|entries| {
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        paths.collect::<io::Result<Vec<_>>>()
    });
    match read {
        Ok(mut paths) => {
            paths.sort();
            paths
        }
        Err(source) => {
            found.damaged.push(failed("read", dir)(source));
            Vec::new()
        }
    }
}

fn name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}

fn remove_temporary(path: &Path, found: &mut Found) {
    if let Err(error) = gone(fs::remove_file(path), path) {
        found.damaged.push(error);
    }
}

fn gone(removed: io::Result<()>, path: &Path) -> Result<(), DiskError> {
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(failed("remove", path)(source))
        }
        _ => Ok(()),
    }
}

fn sync(dir: &Path) -> Result<(), DiskError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(failed("sync", dir))
}

fn damaged(path: &Path, problem: &str) -> DiskError {
    DiskError::Damaged {
        path: path.to_owned(),
        problem: problem.to_owned(),
    }
}

fn misplaced(path: &Path) -> DiskError {
    damaged(path, "its name or directory belongs to another piece")
}

fn read_manifest(path: &Path) -> Result<Manifest, DiskError> {
    let mut bytes = Vec::new();
    let limit = MAX_STORE_MESSAGE_BYTES as u64 + 1;
    let read = File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
    read.map_err(failed("read", path))?;
    Manifest::from_file_bytes(&bytes).map_err(|error| damaged(path, &error.to_string()))
}

fn read_header(path: &Path, file: &mut File) -> Result<PieceMeta, DiskError> {
    let mut header = [0; PART_HEADER_BYTES];
    match file.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(damaged(path, "it ends inside its header"));
        }
        read => read.map_err(failed("read", path))?,
    }
    PieceMeta::from_file_header(&header).map_err(|error| damaged(path, &error.to_string()))
}

/// Reads a whole piece.
fn check_part(path: &Path) -> Result<PieceMeta, DiskError> {
    let mut file = File::open(path).map_err(failed("open", path))?;
    let meta = read_header(path, &mut file)?;
    let length = file.metadata().map_err(failed("read", path))?.len();
    if length != PART_HEADER_BYTES as u64 + meta.piece_bytes {
        return Err(damaged(path, "it has not the length that its header says"));
    }
    let (mut hash, mut block) = (Sha256::new(), vec![0; BLOCK_BYTES]);
    loop {
        match file.read(&mut block).map_err(failed("read", path))? {
            0 => break,
            count => hash.update(&block[..count]),
        }
    }
    if hash.finalize().as_slice() != meta.piece_sha256 {
        return Err(damaged(
            path,
            "its bytes do not have the hash that its header says",
        ));
    }
    Ok(meta)
}

/// A temporary file, which goes when this does.
#[derive(Debug)]
struct Temporary(Option<PathBuf>);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // One that stays is removed at the next start.
            let _stays = fs::remove_file(path);
        }
    }
}

/// A piece's file while its bytes come. Dropped, it is removed.
#[derive(Debug)]
pub struct PartWriter {
    temporary: Temporary,
    file: File,
}

impl PartWriter {
    /// Appends bytes.
    ///
    /// # Errors
    /// If the disk does not take them.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        let written = self.file.write_all(bytes);
        written.map_err(|source| {
            let path = self.temporary.0.as_deref().unwrap_or(Path::new(""));
            failed("write", path)(source)
        })
    }

    /// Makes sure that all bytes are on the disk.
    ///
    /// # Errors
    /// If the disk does not take them.
    pub fn sync(self) -> Result<SyncedPart, DiskError> {
        let path = self.temporary.0.as_deref().unwrap_or(Path::new(""));
        self.file.sync_all().map_err(failed("sync", path))?;
        Ok(SyncedPart(self.temporary))
    }
}

/// A piece whose bytes are all on the disk, under a temporary name. Dropped, it is removed.
#[derive(Debug)]
pub struct SyncedPart(Temporary);
