#![allow(clippy::unwrap_used, reason = "tests")]

use super::encoding::encode;
use super::snapshot::{Lead, Uploads};
use super::tests::{Log, local, small, sparse, spec};
use super::*;
use crate::memory::{MemoryCluster, MemoryOptions};
use crate::record::RunSummary;
use crate::reducer::{Reducer, StepStart, TrainReport};
use crate::step::{StepOutcome, TensorResult, WorkerState};
use crate::store::SnapshotInfo;
use arc_topk_common::config::algorithm::Feedback;
use arc_topk_common::ids::{Rank, RunId, TensorId};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Manifest, Owner, PartInfo};
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

const RUN: RunId = RunId([7; 16]);

/// The shards' store without shards.
#[derive(Debug, Default)]
struct Shelf {
    parts: Mutex<BTreeMap<(SnapshotId, Owner), Bytes>>,
    manifests: Mutex<BTreeMap<SnapshotId, Manifest>>,
}

impl SnapshotStore for Shelf {
    fn upload_part(
        &self,
        snapshot: SnapshotId,
        owner: Owner,
        blob: Bytes,
    ) -> Result<PartInfo, StoreError> {
        let info = part_info(owner, &blob);
        let before = self
            .parts
            .lock()
            .unwrap()
            .insert((snapshot, owner), blob.clone());
        assert!(
            before.is_none_or(|before| before == blob),
            "equal states, equal bytes"
        );
        Ok(info)
    }

    fn parts(&self, snapshot: SnapshotId) -> Result<Vec<PartInfo>, StoreError> {
        let parts = self.parts.lock().unwrap();
        let parts = parts.iter().filter(|((id, _), _)| *id == snapshot);
        Ok(parts
            .map(|((_, owner), blob)| part_info(*owner, blob))
            .collect())
    }

    fn commit(&self, manifest: Manifest) -> Result<(), StoreError> {
        let known = manifest.snapshot;
        self.manifests.lock().unwrap().insert(known, manifest);
        Ok(())
    }

    fn newest(&self) -> Result<Option<SnapshotInfo>, StoreError> {
        let manifests = self.manifests.lock().unwrap();
        Ok(manifests.values().next_back().map(|manifest| SnapshotInfo {
            manifest: manifest.clone(),
            holders: BTreeMap::new(),
        }))
    }

    fn fetch_part(&self, info: &SnapshotInfo, owner: Owner) -> Result<Vec<u8>, StoreError> {
        Ok(self.parts.lock().unwrap()[&(info.id(), owner)].to_vec())
    }

    fn fetch_replica(&self, snapshot: SnapshotId) -> Result<Vec<u8>, StoreError> {
        let parts = self.parts.lock().unwrap();
        let part = parts.get(&(snapshot, Owner::Replica));
        part.map(|blob| blob.to_vec()).ok_or(StoreError::Missing {
            snapshot,
            owner: Owner::Replica,
            detail: "it was never stored".to_owned(),
        })
    }
}

fn part_info(owner: Owner, blob: &[u8]) -> PartInfo {
    PartInfo {
        owner,
        pieces: 1,
        total_bytes: blob.len() as u64,
        total_sha256: Sha256::digest(blob).into(),
    }
}

/// A worker of an elastic job, as far as a trainer can tell.
struct Elastic<R> {
    inner: R,
    run: RunId,
    step: u64,
    /// Steps that have closed without it.
    behind: std::ops::Range<u64>,
    needs: Option<Step>,
    due: bool,
    donated: Vec<Step>,
    digests: Vec<(Step, [u8; 32])>,
}

impl<R: Reducer> Elastic<R> {
    fn new(inner: R) -> Self {
        Self {
            step: inner.start_step().0,
            inner,
            run: RUN,
            behind: 0..0,
            needs: None,
            due: false,
            donated: Vec::new(),
            digests: Vec::new(),
        }
    }
}

impl<R: Reducer> Reducer for Elastic<R> {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }
    fn world(&self) -> u16 {
        self.inner.world()
    }
    fn run(&self) -> Option<RunId> {
        Some(self.run)
    }
    fn plan(&self) -> &Plan {
        self.inner.plan()
    }
    fn start_step(&self) -> Step {
        self.inner.start_step()
    }
    fn begin(&mut self) -> Result<StepStart, ReduceError> {
        self.inner.begin()?;
        let behind = self.behind.contains(&self.step);
        self.step += 1;
        Ok(StepStart { behind })
    }
    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
        assert!(
            !self.behind.contains(&(self.step - 1)),
            "no gradients when behind"
        );
        self.inner.push(tensor, gradient)
    }
    fn finish(&mut self) -> Result<StepOutcome, ReduceError> {
        self.inner.finish()
    }
    fn for_each_result(&mut self, f: &mut dyn FnMut(TensorResult<'_>)) {
        self.inner.for_each_result(f);
    }
    fn export_state(&mut self) -> WorkerState {
        self.inner.export_state()
    }
    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError> {
        self.step = state.step.0;
        self.needs = None;
        self.inner.import_state(state)
    }
    fn needs_snapshot(&self) -> Option<(RunId, Step)> {
        self.needs.map(|step| (self.run, step))
    }
    fn donation_due(&self) -> bool {
        self.due && self.step == 3
    }
    fn donation_ended(&mut self, step: Step, stored: bool) {
        assert!(stored);
        self.donated.push(step);
    }
    fn digest(&mut self, step: Step, digest: [u8; 32]) {
        self.digests.push((step, digest));
    }
    fn report(&mut self, report: TrainReport) {
        self.inner.report(report);
    }
    fn leave(self: Box<Self>) {}
}

/// What a worker of a job came to: summary, state and what it said.
type Ended = (RunSummary, WorkerState, Log);

/// A job of `world` workers in threads, which keeps its snapshots on `shelf` and goes on from there if `line` says so.
fn job(line: &str, feedback: Feedback, world: u16, run: RunId, shelf: &Arc<Shelf>) -> Vec<Ended> {
    let mut config = small(line);
    config.store = Some(Arc::clone(shelf) as Arc<dyn SnapshotStore>);
    let point = resume_point(&config.args, None, config.store.as_deref(), &mut |_| ()).unwrap();
    let mut options = MemoryOptions::default();
    if let Some(point) = point {
        (options.start, options.update) = (Step(point.step), point.update);
        config.snapshot = point.snapshot;
    }
    let spec = spec(&config, sparse(feedback), 2);
    let reducers = MemoryCluster::reducers(spec, world, &options).unwrap();
    let threads: Vec<_> = reducers
        .into_iter()
        .map(|inner| {
            let config = config.clone();
            thread::spawn(move || {
                let mut reducer = Elastic::new(inner);
                reducer.run = run;
                let mut log = Log::default();
                let summary = super::run(&config, &mut reducer, &mut log).unwrap();
                let state = reducer.export_state();
                Box::new(reducer.inner).leave();
                (summary, state, log)
            })
        })
        .collect();
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect()
}

/// The mean over workers of an array of their feedback states.
fn mean(ended: &[Ended], kind: &str) -> Vec<f64> {
    let all: Vec<Vec<f64>> = ended
        .iter()
        .map(|(_, state, _)| {
            let arrays = state
                .arrays
                .iter()
                .filter(|(name, _)| name.starts_with(kind));
            arrays
                .flat_map(|(_, values)| values)
                .map(|v| f64::from(*v))
                .collect()
        })
        .collect();
    let at = |index: usize| all.iter().map(|values| values[index]).sum::<f64>();
    (0..all[0].len())
        .map(|index| at(index) / all.len() as f64)
        .collect()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0.0f64, |most, a| most.max(a.abs()));
    assert!(largest > 0.0, "nothing to compare");
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() <= 1e-5 * largest, "{a} {b}");
    }
}

fn all_equal(ended: &[Ended]) {
    assert!(
        ended
            .iter()
            .all(|(summary, ..)| summary.digest == ended[0].0.digest)
    );
}

#[test]
fn a_job_goes_on_with_as_many_workers_to_the_bit() {
    for feedback in [Feedback::Ef14, Feedback::Ef21] {
        let whole = job("--steps 8", feedback, 3, RUN, &Arc::default());
        let shelf = Arc::default();
        job("--steps 8 --snapshot-every 5", feedback, 3, RUN, &shelf);
        let resumed = job("--steps 8 --resume", feedback, 3, RunId([8; 16]), &shelf);
        for (whole, resumed) in whole.iter().zip(&resumed) {
            assert_eq!(whole.0.digest, resumed.0.digest);
            assert_eq!(whole.1, resumed.1);
            assert_eq!(resumed.0.steps, 3);
        }
    }
}

#[test]
fn residuals_are_conserved_with_another_number_of_workers() {
    let shelf = Arc::default();
    let old = job(
        "--steps 6 --snapshot-every 6",
        Feedback::Ef14,
        4,
        RUN,
        &shelf,
    );
    for world in [3, 6] {
        // No step more: the state is that of the restart.
        let new = job(
            "--steps 6 --resume",
            Feedback::Ef14,
            world,
            RunId([8; 16]),
            &shelf,
        );
        assert_eq!(new.len(), usize::from(world));
        close(&mean(&old, "residual"), &mean(&new, "residual"));
        assert_eq!(new[0].0.digest, old[0].0.digest);
        let later = job(
            "--steps 9 --resume",
            Feedback::Ef14,
            world,
            RunId([9; 16]),
            &shelf,
        );
        all_equal(&later);
        assert_eq!(later[0].0.steps, 3);
        assert_ne!(later[0].0.digest, old[0].0.digest);
    }
}

#[test]
fn estimates_become_the_mean_with_another_number_of_workers() {
    for feedback in [Feedback::Ef21, Feedback::Ef21m] {
        let shelf = Arc::default();
        let old = job("--steps 6 --snapshot-every 6", feedback, 4, RUN, &shelf);
        close(&mean(&old, "global"), &mean(&old, "local"));
        for world in [3, 6] {
            let new = job(
                "--steps 6 --resume",
                feedback,
                world,
                RunId([8; 16]),
                &shelf,
            );
            close(&mean(&old, "global"), &mean(&new, "global"));
            close(&mean(&new, "global"), &mean(&new, "local"));
            let later = job(
                "--steps 9 --resume",
                feedback,
                world,
                RunId([9; 16]),
                &shelf,
            );
            all_equal(&later);
            close(&mean(&later, "global"), &mean(&later, "local"));
        }
    }
}

#[test]
fn snapshots_of_another_run_are_not_mixed_with_this_ones() {
    let shelf: Arc<Shelf> = Arc::default();
    job(
        "--steps 3 --snapshot-every 3",
        Feedback::Ef14,
        2,
        RUN,
        &shelf,
    );
    let mut config = small("--steps 3 --snapshot-every 3");
    config.store = Some(shelf);
    let mut reducer = Elastic::new(local(&config));
    reducer.run = RunId([1; 16]);
    let error = run(&config, &mut reducer, &mut Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("step 3") && error.contains("--resume"),
        "{error}"
    );
    // The same run's are no others'.
    let mut reducer = Elastic::new(local(&config));
    run(&config, &mut reducer, &mut Quiet).unwrap();
}

#[test]
fn a_joiner_goes_on_from_what_was_donated() {
    let shelf: Arc<Shelf> = Arc::default();
    let mut config = small("--steps 6 --digest-every 2");
    config.store = Some(shelf.clone());
    let mut donor = Elastic::new(local(&config));
    donor.due = true;
    let whole = run(&config, &mut donor, &mut Quiet).unwrap();
    assert_eq!(donor.donated, [Step(3)]);
    let steps: Vec<u64> = donor.digests.iter().map(|(step, _)| step.0).collect();
    assert_eq!(steps, [2, 4, 6]);
    let last: String = donor.digests[2]
        .1
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(last, whole.digest);

    let mut joiner = Elastic::new(local(&config));
    joiner.needs = Some(Step(3));
    let mut log = Log::default();
    let joined = run(&config, &mut joiner, &mut log).unwrap();
    assert_eq!((joined.steps, joined.digest), (3, whole.digest));
    assert!(
        log.messages.iter().any(|text| text.starts_with("joined")),
        "{:?}",
        log.messages
    );

    let mut late = Elastic::new(local(&config));
    late.needs = Some(Step(5));
    assert!(
        run(&config, &mut late, &mut Quiet)
            .unwrap_err()
            .may_join_again()
    );
}

#[test]
fn a_worker_that_is_behind_takes_results_and_gives_no_gradients() {
    let mut config = small("--steps 6 --validate-every 2");
    let dir = tempfile::tempdir().unwrap();
    config.args.run_dir = Some(dir.path().to_owned());
    let mut reducer = Elastic::new(local(&config));
    reducer.behind = 1..4;
    let mut log = Log::default();
    let summary = run(&config, &mut reducer, &mut log).unwrap();
    let behind: Vec<bool> = log.records.iter().map(|record| record.behind).collect();
    assert_eq!(behind, [false, true, true, true, false, false]);
    assert!(
        log.records
            .iter()
            .all(|record| record.loss.is_nan() == record.behind)
    );
    let validated: Vec<u64> = log
        .records
        .iter()
        .filter(|record| record.validation_loss.is_some())
        .map(|record| record.step)
        .collect();
    assert_eq!(validated, [5]);
    assert_eq!((summary.steps, summary.behind_steps), (6, 3));
}

#[test]
fn a_part_that_does_not_fit_is_named() {
    let shelf: Arc<Shelf> = Arc::default();
    job(
        "--steps 3 --snapshot-every 3",
        Feedback::Ef14,
        1,
        RUN,
        &shelf,
    );
    let mut config = small("--steps 5 --resume --hidden 64");
    config.store = Some(shelf.clone());
    let point = resume_point(&config.args, None, config.store.as_deref(), &mut |_| ());
    config.snapshot = point.unwrap().unwrap().snapshot;
    let error = run(&config, &mut Elastic::new(local(&config)), &mut Quiet).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("embed.weight") && text.contains("does not fit"),
        "{text}"
    );
    let mut parts = shelf.parts.lock().unwrap();
    let replica = parts
        .iter_mut()
        .find(|((_, owner), _)| *owner == Owner::Replica);
    let (_, blob) = replica.unwrap();
    let mut bytes = blob.to_vec();
    let end = bytes.len() - 3;
    bytes[end] ^= 1;
    *blob = bytes.into();
    drop(parts);
    let text = run(&config, &mut Elastic::new(local(&config)), &mut Quiet)
        .unwrap_err()
        .to_string();
    assert!(text.contains("damaged"), "{text}");
}

#[test]
fn free_settings_are_no_reason_to_refuse_a_worker() {
    let agreed = |line: &str| agreed_settings(&small(line).args);
    assert_eq!(
        agreed("--steps 3"),
        agreed("--steps 3 --digest-every 7 --snapshot-every 9")
    );
}

/// What a leader of three makes of a snapshot to which rank 2 gives nothing: the owners of its parts. `live`: who is there
/// at each look; the last one hurries it.
fn without_rank_2(live: &[&[u16]], all_or_none: bool) -> (Vec<Owner>, Vec<String>) {
    let shelf = Arc::new(Shelf::default());
    let id = SnapshotId {
        step: Step(5),
        run: RUN,
    };
    let part = |rank: u8| Checkpoint {
        step: 5,
        feedback: vec![("residual/a".to_owned(), vec![f32::from(rank)])],
        ..Checkpoint::default()
    };
    let (looks, enough) = mpsc::channel();
    let ranks: Vec<Vec<Rank>> = live
        .iter()
        .map(|ranks| ranks.iter().copied().map(Rank).collect())
        .collect();
    let look = AtomicUsize::new(0);
    let lead = Lead {
        replica: part(9),
        members: vec![Rank(0), Rank(1), Rank(2)],
        live: Arc::new(move || {
            let at = look.fetch_add(1, Ordering::SeqCst);
            if at + 1 == ranks.len() {
                looks.send(()).unwrap();
            }
            ranks[at.min(ranks.len() - 1)].clone()
        }),
        all_or_none,
    };
    shelf
        .upload_part(id, Owner::Rank(Rank(1)), encode(&part(1)).into())
        .unwrap();
    let mut uploads = Uploads::new(Arc::clone(&shelf) as Arc<dyn SnapshotStore>);
    uploads.snapshot(id, Rank(0), part(0), Some(lead));
    enough.recv().unwrap();
    let mut heard = Log::default();
    assert!(!uploads.is_free(&mut heard), "it waits for rank 2");
    assert_eq!(uploads.note(true, &mut heard), None);
    let manifest = shelf.newest().unwrap().unwrap().manifest;
    assert_eq!(manifest.members, 3);
    let owners = manifest.parts.iter().map(|part| part.owner).collect();
    (owners, heard.messages)
}

#[test]
fn a_snapshot_waits_for_nobody_once_the_next_one_is_due() {
    let there: &[u16] = &[0, 1, 2];
    let (owners, heard) = without_rank_2(&[there, there, &[0, 1]], false);
    let expected = [Owner::Replica, Owner::Rank(Rank(0)), Owner::Rank(Rank(1))];
    assert_eq!(owners, expected);
    let told = |what: &str| heard.iter().any(|text| text.contains(what));
    assert!(
        told("ranks [2]") && told("raise --snapshot-every"),
        "{heard:?}"
    );
    // Estimates are of use only together.
    let (owners, _) = without_rank_2(&[there], true);
    assert_eq!(owners, [Owner::Replica]);
}
