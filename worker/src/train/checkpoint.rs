//! Checkpoints: model, optimizer, feedback state and position of one rank, exact to the bit.
//!
//! `<directory>/rank-<r>/step-<s>.safetensors` is written to a temporary file, synced and renamed, so a crash leaves
//! the previous one whole; the newest two are kept. A SHA-256 over all names, values and counters stands in
//! the header and is checked before anything is used. The position in the data is the step number.

use super::encoding::{decode, encode};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Checkpoints that stay: the newest and, should it be damaged, the one before.
const KEPT: usize = 2;
/// Named f32 arrays in a fixed order.
pub type Arrays = Vec<(String, Vec<f32>)>;

/// Everything that a rank needs to go on to the bit.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Checkpoint {
    /// Next step.
    pub step: u64,
    /// Next update (skipped steps not counted).
    pub update: u64,
    /// Hash of the settings that made it.
    pub config: String,
    /// Parameters in registration order.
    pub model: Arrays,
    /// Optimizer state.
    pub optimizer: Arrays,
    /// Feedback state.
    pub feedback: Arrays,
}

/// Why a checkpoint cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("cannot {action} checkpoint {}: {source}; check that the directory is writable and has room", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Cut off, or changed since it was written.
    #[error("checkpoint {} is damaged: {detail}; delete it to go on from an older one, or start without --resume", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A new run would mix its checkpoints with those of an earlier one.
    #[error(
        "{} holds checkpoints of an earlier run, the newest of step {newest}: pass --resume to go on from it, or another --checkpoint-dir",
        directory.display()
    )]
    InUse {
        /// Directory of the rank.
        directory: PathBuf,
        /// Step of the newest.
        newest: u64,
    },
    /// Another rank has no checkpoint of the step.
    #[error(
        "{}: rank {rank} has no checkpoint of step {step}, only of {has:?}, and all ranks must go on from the same one; \
         if that rank was lost or is not wanted any more, move its directory away, number the others without a gap and resume with as many workers",
        directory.display()
    )]
    NotCommon {
        /// Directory of all ranks.
        directory: PathBuf,
        /// Step that was tried.
        step: u64,
        /// Rank that lacks it.
        rank: u16,
        /// Steps that it has.
        has: Vec<u64>,
    },
    /// It was made by another model, optimizer or feedback rule.
    #[error("checkpoint {} does not fit this run: {detail}; use the settings that made it, or another --checkpoint-dir", path.display())]
    Mismatch {
        /// File.
        path: PathBuf,
        /// First difference.
        detail: String,
    },
}

/// The checkpoints of one rank.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    directory: PathBuf,
    rank: u16,
}

impl CheckpointStore {
    /// Checkpoints of `rank` under `directory`. Nothing is touched yet.
    #[must_use]
    pub fn new(directory: &Path, rank: u16) -> Self {
        Self {
            directory: directory.to_owned(),
            rank,
        }
    }

    fn rank_directory(&self, rank: u16) -> PathBuf {
        self.directory.join(format!("rank-{rank}"))
    }

    /// File of this rank's checkpoint at `step`.
    #[must_use]
    pub fn path(&self, step: u64) -> PathBuf {
        self.rank_directory(self.rank)
            .join(format!("step-{step:08}.safetensors"))
    }

    /// Writes a checkpoint and removes those older than the one before it.
    ///
    /// # Errors
    /// If the file cannot be written; earlier checkpoints are then untouched.
    pub fn save(&self, checkpoint: &Checkpoint) -> Result<PathBuf, CheckpointError> {
        let directory = self.rank_directory(self.rank);
        fs::create_dir_all(&directory).map_err(|source| io_error("create", &directory, source))?;
        let path = self.path(checkpoint.step);
        let temporary = path.with_extension("new");
        let bytes = encode(checkpoint);
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.map_err(|source| io_error("write", &temporary, source))?;
        fs::rename(&temporary, &path).map_err(|source| io_error("rename", &path, source))?;
        // The rename itself must reach the disk, too.
        let synced = File::open(&directory).and_then(|directory| directory.sync_all());
        synced.map_err(|source| io_error("sync", &directory, source))?;
        for old in steps_in(&directory)?.iter().rev().skip(KEPT) {
            let old = self.path(*old);
            fs::remove_file(&old).map_err(|source| io_error("remove", &old, source))?;
        }
        Ok(path)
    }

    /// Makes sure that checkpoints can be written, before there is one to lose.
    ///
    /// # Errors
    /// If the directory cannot be made or a file in it cannot be written.
    pub fn prepare(&self) -> Result<(), CheckpointError> {
        let directory = self.rank_directory(self.rank);
        fs::create_dir_all(&directory).map_err(|source| io_error("create", &directory, source))?;
        let probe = directory.join("writable.new");
        File::create(&probe).map_err(|source| io_error("write", &probe, source))?;
        fs::remove_file(&probe).map_err(|source| io_error("remove", &probe, source))
    }

    /// Checks that a run which starts afresh finds no checkpoints of an earlier one.
    ///
    /// # Errors
    /// [`CheckpointError::InUse`] if it does.
    pub fn check_unused(&self) -> Result<(), CheckpointError> {
        let directory = self.rank_directory(self.rank);
        match steps_in(&directory)?.last() {
            Some(&newest) => Err(CheckpointError::InUse { directory, newest }),
            None => Ok(()),
        }
    }

    /// Removes this rank's checkpoints of steps after `step`, from which the run goes on: they belong to a course
    /// that is abandoned, and must neither be taken for this run's nor push its own out.
    ///
    /// # Errors
    /// If a file cannot be removed.
    pub fn abandon_after(&self, step: u64) -> Result<(), CheckpointError> {
        for later in steps_in(&self.rank_directory(self.rank))? {
            if later > step {
                let path = self.path(later);
                fs::remove_file(&path).map_err(|source| io_error("remove", &path, source))?;
            }
        }
        Ok(())
    }

    /// Reads and checks the checkpoint at `step`.
    ///
    /// # Errors
    /// If the file is missing, damaged, or of another version.
    pub fn load(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        load(&self.path(step))
    }

    /// The newest checkpoint that is whole, on this rank and on every other rank that keeps its own in the same
    /// directory: ranks must go on from the same step. What is passed over is told to `message`.
    ///
    /// # Errors
    /// If there are checkpoints, but none of them can be used; the error names the newest.
    pub fn latest(
        &self,
        message: &mut dyn FnMut(&str),
    ) -> Result<Option<Checkpoint>, CheckpointError> {
        let mut first = None;
        for &step in steps_in(&self.rank_directory(self.rank))?.iter().rev() {
            match self.load_with_peers(step) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => {
                    message(&format!("{error}. Trying the one before"));
                    first.get_or_insert(error);
                }
            }
        }
        first.map_or(Ok(None), Err)
    }

    fn load_with_peers(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        let checkpoint = self.load(step)?;
        let ranks = Self::ranks(&self.directory)?;
        for rank in ranks.into_iter().filter(|rank| *rank != self.rank) {
            let peer = Self::new(&self.directory, rank);
            let has = steps_in(&peer.rank_directory(rank))?;
            if !has.is_empty() && !has.contains(&step) {
                let directory = self.directory.clone();
                return Err(CheckpointError::NotCommon {
                    directory,
                    step,
                    rank,
                    has,
                });
            }
            if !has.is_empty() {
                peer.load(step)?;
            }
        }
        Ok(checkpoint)
    }

    /// Ranks that keep checkpoints under `directory`, ascending.
    ///
    /// # Errors
    /// If the directory cannot be listed; one that does not exist holds none.
    pub fn ranks(directory: &Path) -> Result<Vec<u16>, CheckpointError> {
        let mut ranks: Vec<u16> = names_in(directory)?
            .iter()
            .filter_map(|name| name.strip_prefix("rank-")?.parse().ok())
            .collect();
        ranks.sort_unstable();
        Ok(ranks)
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> CheckpointError {
    CheckpointError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Names in a directory; none if it does not exist.
fn names_in(directory: &Path) -> Result<Vec<String>, CheckpointError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(io_error("list", directory, source)),
    };
    let names: Result<Vec<_>, io::Error> = entries.map(|entry| Ok(entry?.file_name())).collect();
    let names = names.map_err(|source| io_error("list", directory, source))?;
    Ok(names
        .into_iter()
        .filter_map(|name| name.into_string().ok())
        .collect())
}

/// Steps of the finished checkpoints in a rank's directory, ascending.
fn steps_in(directory: &Path) -> Result<Vec<u64>, CheckpointError> {
    let mut steps: Vec<u64> = names_in(directory)?
        .iter()
        .filter_map(|name| {
            name.strip_prefix("step-")?
                .strip_suffix(".safetensors")?
                .parse()
                .ok()
        })
        .collect();
    steps.sort_unstable();
    Ok(steps)
}

fn load(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let bytes = fs::read(path).map_err(|source| io_error("read", path, source))?;
    decode(&bytes).map_err(|detail| CheckpointError::Damaged {
        path: path.to_owned(),
        detail,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::encoding::digest;
    use super::*;

    fn checkpoint(step: u64) -> Checkpoint {
        let arrays = |scale: f32| -> Arrays {
            let odd = f32::from_bits(0x7fc0_0001 + step as u32);
            vec![
                ("z".into(), vec![scale, -0.0, odd]),
                ("a".into(), vec![]),
                ("m".into(), vec![1e-42; 70]),
            ]
        };
        Checkpoint {
            step,
            update: step.saturating_sub(1),
            config: "c".into(),
            model: arrays(1.0),
            optimizer: arrays(2.0),
            feedback: arrays(3.0),
        }
    }

    /// Equality that tells NaNs and zeros apart.
    fn same(a: &Checkpoint, b: &Checkpoint) -> bool {
        (a.step, a.update, digest(a)) == (b.step, b.update, digest(b))
    }

    fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_checkpoint_comes_back_to_the_bit_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), 3);
        store.save(&checkpoint(7)).unwrap();
        let back = store.load(7).unwrap();
        assert!(same(&back, &checkpoint(7)));
        assert_eq!(
            back.feedback
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>(),
            ["z", "a", "m"]
        );
    }

    #[test]
    fn the_newest_two_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), 0);
        (1..=4).for_each(|step| drop(store.save(&checkpoint(step)).unwrap()));
        assert_eq!(steps_in(&dir.path().join("rank-0")).unwrap(), [3, 4]);
        assert_eq!(store.latest(&mut |_| ()).unwrap().unwrap().step, 4);
    }

    #[test]
    fn every_truncation_and_any_flipped_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), 0);
        let path = store.save(&checkpoint(1)).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(7) {
            fs::write(&path, &whole[..length]).unwrap();
            let text = store.load(1).unwrap_err().to_string();
            assert!(
                text.contains("step-00000001.safetensors is damaged"),
                "{length}: {text}"
            );
        }
        for at in (8..whole.len()).step_by(5) {
            let mut bytes = whole.clone();
            bytes[at] ^= 4;
            // Flips in the header's padding or key order may leave the same contents; none may change them unnoticed.
            if let Ok(back) = decode(&bytes) {
                assert!(same(&back, &checkpoint(1)), "flip at {at}");
            }
        }
    }

    #[test]
    fn a_damaged_checkpoint_falls_back_to_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), 0);
        store.save(&checkpoint(1)).unwrap();
        let newest = store.save(&checkpoint(2)).unwrap();
        damage(&newest, |bytes| bytes.truncate(bytes.len() - 9));
        let mut said = Vec::new();
        let found = store
            .latest(&mut |text| said.push(text.to_owned()))
            .unwrap()
            .unwrap();
        assert_eq!(found.step, 1);
        assert!(
            said[0].contains("step-00000002") && said[0].contains("damaged"),
            "{said:?}"
        );
        damage(&store.path(1), |bytes| bytes.clear());
        assert!(
            store
                .latest(&mut |_| ())
                .unwrap_err()
                .to_string()
                .contains("step-00000002")
        );
    }

    #[test]
    fn ranks_in_one_directory_agree_on_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let stores = [0, 1].map(|rank| CheckpointStore::new(dir.path(), rank));
        stores
            .iter()
            .for_each(|store| drop(store.save(&checkpoint(1)).unwrap()));
        // Rank 1 was killed before it wrote its second.
        stores[0].save(&checkpoint(2)).unwrap();
        for store in &stores {
            assert_eq!(store.latest(&mut |_| ()).unwrap().unwrap().step, 1);
        }
        // A half-written file does not count.
        fs::write(stores[1].path(2).with_extension("new"), b"half").unwrap();
        assert_eq!(stores[1].latest(&mut |_| ()).unwrap().unwrap().step, 1);
    }

    #[test]
    fn a_course_that_is_abandoned_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path(), 0);
        store.check_unused().unwrap();
        for step in [100, 142] {
            store.save(&checkpoint(step)).unwrap();
        }
        let error = store.check_unused().unwrap_err().to_string();
        assert!(
            error.contains("step 142") && error.contains("--resume"),
            "{error}"
        );
        store.abandon_after(100).unwrap();
        store.save(&checkpoint(120)).unwrap();
        assert_eq!(steps_in(&dir.path().join("rank-0")).unwrap(), [100, 120]);
    }

    #[test]
    fn nothing_there_is_a_fresh_start() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(&dir.path().join("none"), 0);
        assert_eq!(store.latest(&mut |_| ()).unwrap(), None);
    }
}
