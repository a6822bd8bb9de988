use super::*;
use crate::store::disk::{Disk, DiskError, Found};
use crate::store::index::{Index, Removals, piece_key};
use std::fs;
use std::path::{Path, PathBuf};

fn write(disk: &Disk, number: u64, meta: &PieceMeta, bytes: &[u8]) {
    let mut writer = disk.begin(number, meta).unwrap();
    bytes
        .chunks(7)
        .for_each(|chunk| writer.write(chunk).unwrap());
    disk.publish(writer.sync().unwrap(), meta).unwrap();
}

/// A snapshot of a replica and a rank, both pieces of each.
fn store(disk: &Disk, snapshot: SnapshotId) -> Manifest {
    let blobs = [(0, vec![snapshot.step.0 as u8; 37]), (1, vec![5; 20])];
    let pieces: Vec<_> = blobs
        .iter()
        .flat_map(|(number, blob)| (0..2).map(|at| piece(snapshot, owner(*number), blob, at)))
        .collect();
    for (at, (meta, bytes)) in pieces.iter().enumerate() {
        write(disk, at as u64, meta, bytes);
    }
    let metas: Vec<PieceMeta> = pieces.into_iter().map(|(meta, _)| meta).collect();
    let manifest = manifest(snapshot, &metas);
    disk.commit(9, &manifest).unwrap();
    manifest
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn scan(dir: &Path) -> Found {
    Disk::open(dir).unwrap().scan()
}

#[test]
fn what_was_stored_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(dir.path()).unwrap();
    let stored = [store(&disk, id(1, 10)), store(&disk, id(1, 20))];
    drop(disk);
    let found = scan(dir.path());
    assert!(found.damaged.is_empty(), "{:?}", found.damaged);
    assert_eq!(found.manifests, stored);
    assert_eq!(found.pieces.len(), 8);
    let (index, removals) = Index::restored(&options(1, 1000), found.pieces, found.manifests);
    assert_eq!(removals.snapshots, [id(1, 10)]);
    let disk = Disk::open(dir.path()).unwrap();
    disk.remove(&removals).unwrap();
    // Removed already is no failure.
    disk.remove(&removals).unwrap();
    assert_eq!(files(dir.path()).len(), 5 + 1);
    assert_eq!(index.held_bytes(), 57);
}

/// A crash leaves a temporary file, or a file that the disk cut short or changed: never does that hide the snapshot before
/// it, and never is it taken for whole.
#[test]
fn a_directory_is_readable_after_a_crash_at_any_byte() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(dir.path()).unwrap();
    let earlier = store(&disk, id(1, 10));
    let later = store(&disk, id(1, 20));
    drop(disk);
    let in_later = |path: &PathBuf| path.display().to_string().contains("step-00000020");
    let written: Vec<PathBuf> = files(dir.path()).into_iter().filter(in_later).collect();
    assert_eq!(written.len(), 5);
    for path in written {
        let whole = fs::read(&path).unwrap();
        let cuts = (0..whole.len()).map(|end| whole[..end].to_vec());
        let flips = (0..whole.len()).map(|at| {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            flipped
        });
        let longer = [whole.clone(), vec![0]].concat();
        for torn in cuts.chain(flips).chain([longer]) {
            fs::write(&path, &torn).unwrap();
            check(&scan(dir.path()), &earlier, &later, &path);
        }
        // As a temporary file, which is what a crash of this program leaves.
        fs::write(dir.path().join("put-7.tmp"), &whole[..whole.len() / 2]).unwrap();
        fs::remove_file(&path).unwrap();
        let found = scan(dir.path());
        assert!(found.damaged.is_empty());
        assert!(!dir.path().join("put-7.tmp").exists());
        fs::write(&path, whole).unwrap();
    }
}

fn check(found: &Found, earlier: &Manifest, later: &Manifest, torn: &Path) {
    assert_eq!(found.damaged.len(), 1, "{}", torn.display());
    assert!(
        found.damaged[0]
            .to_string()
            .contains(torn.to_str().unwrap())
    );
    let count = |of: &Manifest| {
        let pieces = found.pieces.iter();
        pieces.filter(|meta| meta.snapshot == of.snapshot).count()
    };
    assert!(found.manifests.contains(earlier) && count(earlier) == 4);
    let committed = found.manifests.contains(later);
    assert!(!committed || count(later) == 3, "{}", torn.display());
    assert!(committed || count(later) == 4, "{}", torn.display());
}

#[test]
fn files_under_another_name_are_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(dir.path()).unwrap();
    store(&disk, id(1, 10));
    drop(disk);
    let from = dir.path().join(format!("step-00000010-{}", RunId([1; 16])));
    let to = dir.path().join(format!("step-00000011-{}", RunId([1; 16])));
    fs::rename(from, to).unwrap();
    let found = scan(dir.path());
    assert_eq!(found.damaged.len(), 5);
    assert!(found.pieces.is_empty() && found.manifests.is_empty());
}

#[test]
fn other_files_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let readme = dir.path().join("README");
    fs::write(&readme, "mine").unwrap();
    fs::create_dir(dir.path().join("step-by-step")).unwrap();
    let found = scan(dir.path());
    assert!(found.damaged.is_empty() && readme.exists());
}

#[test]
fn a_piece_that_was_begun_and_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(dir.path()).unwrap();
    let (meta, bytes) = piece(id(1, 10), owner(0), &[1; 40], 0);
    let mut writer = disk.begin(0, &meta).unwrap();
    writer.write(&bytes).unwrap();
    drop(writer);
    drop(disk.begin(1, &meta).unwrap().sync().unwrap());
    assert_eq!(files(dir.path()), [dir.path().join("lock")]);
}

#[test]
fn one_process_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let first = Disk::open(dir.path()).unwrap();
    let second = Disk::open(dir.path()).unwrap_err();
    assert!(matches!(second, DiskError::InUse { .. }), "{second}");
    first.release();
    Disk::open(dir.path()).unwrap();
}

#[test]
fn a_file_that_changes_under_a_running_shard_is_noticed_at_its_header() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(dir.path()).unwrap();
    let (meta, bytes) = piece(id(1, 10), owner(0), &[1; 40], 0);
    write(&disk, 0, &meta, &bytes);
    disk.read(&meta).unwrap();
    let path = disk.part_path(meta.snapshot, piece_key(&meta));
    fs::write(&path, &fs::read(&path).unwrap()[..100]).unwrap();
    assert!(matches!(disk.read(&meta), Err(DiskError::Damaged { .. })));
    let removals = Removals {
        snapshots: Vec::new(),
        pieces: vec![(meta.snapshot, piece_key(&meta))],
    };
    disk.remove(&removals).unwrap();
    assert!(matches!(disk.read(&meta), Err(DiskError::Io { .. })));
}
