//! Where a run begins: at step 0, at a checkpoint of this machine, at a snapshot of the shards, or in the middle of a job.

use super::checkpoint::{Arrays, Checkpoint, CheckpointError, CheckpointStore};
use super::feedback::{sources, taken_over};
use super::model::write_parameter;
use super::run::{Run, TrainConfig, optimizer_marker};
use super::snapshot::{SnapshotStore, open};
use super::{Observer, SnapshotError, TrainError};
use crate::reducer::Reducer;
use crate::step::WorkerState;
use crate::store::{SnapshotInfo, StoreError};
use arc_topk_common::config::train::TrainArgs;
use arc_topk_common::ids::Step;
use arc_topk_common::wire::{Owner, SnapshotId};

/// Where a worker resumes: what to ask for when joining.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResumePoint {
    /// Next step.
    pub step: u64,
    /// Next update (skipped steps not counted).
    pub update: u64,
    /// The rank whose checkpoints lie on this machine, if they are those of one rank alone. A worker that was told
    /// no rank must ask for this one.
    pub only_rank: Option<u16>,
    /// The snapshot to go on from, if there are no checkpoints on this machine: for [`TrainConfig::snapshot`].
    pub snapshot: Option<SnapshotInfo>,
}

/// Where a worker would resume; `None`: from the start. Without a `rank` it is that of the checkpoints that are
/// there, all of which are of the same step. Without checkpoints it is the newest snapshot of `store`.
///
/// # Errors
/// If there are checkpoints, but none can be used; if the store cannot be asked.
pub fn resume_point(
    args: &TrainArgs,
    rank: Option<u16>,
    store: Option<&dyn SnapshotStore>,
    message: &mut dyn FnMut(&str),
) -> Result<Option<ResumePoint>, TrainError> {
    if !args.resume {
        return Ok(None);
    }
    let local = match local_point(args, rank, message) {
        Ok(Some(point)) => return Ok(Some(point)),
        // Ranks come and go, and their directories stay: the shards may know better.
        unusable => unusable,
    };
    let newest = store.map_or(Ok(None), SnapshotStore::newest);
    let newest = newest.map_err(SnapshotError::Store)?;
    if newest.is_none() {
        return Ok(local?);
    }
    if let Err(error) = local {
        message(&format!("{error}. Going on from the shards' snapshots"));
    }
    Ok(newest.map(|info| ResumePoint {
        step: info.id().step.0,
        update: info.manifest.update,
        only_rank: None,
        snapshot: Some(info),
    }))
}

fn local_point(
    args: &TrainArgs,
    rank: Option<u16>,
    message: &mut dyn FnMut(&str),
) -> Result<Option<ResumePoint>, CheckpointError> {
    let Some(directory) = args.checkpoint_dir.as_deref() else {
        return Ok(None);
    };
    let ranks = CheckpointStore::ranks(directory)?;
    let only_rank = match ranks[..] {
        [only] => Some(only),
        _ => None,
    };
    let Some(rank) = rank.or(ranks.first().copied()) else {
        return Ok(None);
    };
    let latest = CheckpointStore::new(directory, rank).latest(message)?;
    Ok(latest.map(|checkpoint| ResumePoint {
        step: checkpoint.step,
        update: checkpoint.update,
        only_rank,
        snapshot: None,
    }))
}

/// Makes the error that says what does not fit.
type Mismatch<'a> = dyn Fn(String) -> TrainError + 'a;

impl Run<'_> {
    /// Takes the state from which this worker goes on, from wherever its settings and the job say.
    pub(super) fn take_state(
        &mut self,
        config: &TrainConfig,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        if let Some((run, step)) = reducer.needs_snapshot() {
            let store = config.store.as_deref().ok_or(SnapshotError::NoStore)?;
            return self.join(store, SnapshotId { step, run }, reducer, observer);
        }
        if !config.args.resume {
            if let Some(local) = &self.store {
                local.check_unused()?;
            }
            return self.check_unused(config, reducer);
        }
        // Only where there is no checkpoint that can be used.
        if let (Some(info), Some(store)) = (&config.snapshot, config.store.as_deref()) {
            return self.resume_from_snapshot(store, info, reducer, observer);
        }
        if !self.resume_from_checkpoint(reducer, observer)? {
            observer.on_message("no checkpoint or snapshot to resume from: starting at step 0");
        }
        Ok(())
    }

    /// Snapshots of another run than this one must not be taken for this one's later.
    fn check_unused(&self, config: &TrainConfig, reducer: &dyn Reducer) -> Result<(), TrainError> {
        let Some(store) = config.store.as_deref() else {
            return Ok(());
        };
        if config.args.snapshot_every == 0 {
            return Ok(());
        }
        let newest = match store.newest() {
            // This run's own first one, on its way to the shards.
            Err(StoreError::NoneWhole { snapshot, .. }) if Some(snapshot.run) == reducer.run() => {
                None
            }
            newest => newest.map_err(SnapshotError::Store)?,
        };
        match newest.map(|info| info.id()) {
            Some(newest) if Some(newest.run) != reducer.run() => {
                Err(SnapshotError::InUse { newest }.into())
            }
            _ => Ok(()),
        }
    }

    /// Goes on from the newest checkpoint of this machine. Whether there is one.
    fn resume_from_checkpoint(
        &mut self,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<bool, TrainError> {
        let Some(store) = self.store.clone() else {
            return Ok(false);
        };
        let Some(checkpoint) = store.latest(&mut |text| observer.on_message(text))? else {
            return Ok(false);
        };
        let path = store.path(checkpoint.step);
        let mismatch = |detail: String| {
            let path = path.clone();
            CheckpointError::Mismatch { path, detail }.into()
        };
        self.take_replica(&checkpoint, observer, &mismatch)?;
        let step = checkpoint.step;
        let arrays = checkpoint.feedback;
        self.take_feedback(step, checkpoint.update, arrays, reducer)?;
        store.abandon_after(step)?;
        observer.on_message(&format!("resumed at step {step} from {}", path.display()));
        Ok(true)
    }

    /// Goes on from a snapshot, with any number of workers.
    fn resume_from_snapshot(
        &mut self,
        store: &dyn SnapshotStore,
        info: &SnapshotInfo,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let fetch = |owner: Owner| {
            let bytes = store.fetch_part(info, owner);
            let bytes = bytes.map_err(SnapshotError::Store)?;
            open(
                format!("the {owner} part of the snapshot of {}", info.id()),
                &bytes,
            )
        };
        let replica = fetch(Owner::Replica)?;
        let mismatch = mismatch(info.id());
        self.take_replica(&replica, observer, &mismatch)?;
        let owners = info.manifest.parts.iter().map(|part| part.owner);
        let ranks: Vec<Owner> = owners.filter(|owner| *owner != Owner::Replica).collect();
        let (old, world) = (
            usize::from(info.manifest.members),
            usize::from(reducer.world()),
        );
        let own = sources(ranks.len(), reducer.rank().index(), world).into_iter();
        let own: Vec<Arrays> = own
            .map(|position| Ok(fetch(ranks[position])?.feedback))
            .collect::<Result<_, SnapshotError>>()?;
        let template = reducer.export_state().arrays;
        let arrays = taken_over(&template, &replica.feedback, &own, old, world);
        let arrays = arrays.map_err(&mismatch)?;
        self.take_feedback(replica.step, replica.update, arrays, reducer)?;
        let workers = if old == world || old == 0 {
            String::new()
        } else {
            format!(", which {old} workers made")
        };
        observer.on_message(&format!(
            "resumed at step {} from the shards' snapshot{workers}",
            replica.step
        ));
        Ok(())
    }

    /// Takes the replica that a donor stored for this worker.
    fn join(
        &mut self,
        store: &dyn SnapshotStore,
        id: SnapshotId,
        reducer: &mut dyn Reducer,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let bytes = store.fetch_replica(id);
        let bytes = bytes.map_err(|source| SnapshotError::Late { source })?;
        let replica = open(format!("the replica of {id}"), &bytes)?;
        let mismatch = mismatch(id);
        self.take_replica(&replica, observer, &mismatch)?;
        let template = reducer.export_state().arrays;
        let arrays = taken_over(&template, &replica.feedback, &[], 0, 1).map_err(&mismatch)?;
        self.take_feedback(replica.step, replica.update, arrays, reducer)?;
        if let Some(local) = &self.store {
            // A rank of the same number may have been here in a course that was abandoned.
            local.abandon_after(replica.step)?;
        }
        let (rank, members) = (reducer.rank(), reducer.members().len());
        observer.on_message(&format!(
            "joined the running job at step {} as rank {rank}, one of {members} workers",
            replica.step
        ));
        Ok(())
    }

    /// Parameters and optimizer.
    fn take_replica(
        &mut self,
        checkpoint: &Checkpoint,
        observer: &mut dyn Observer,
        mismatch: &Mismatch<'_>,
    ) -> Result<(), TrainError> {
        if checkpoint.config != self.config {
            observer.on_message(
                "the settings, or the number of shards, are not those that made the checkpoint: the run goes on from it, if not to the bit as it would have",
            );
        }
        let (specs, vars) = (self.trainer.model().specs(), self.trainer.model().vars());
        if checkpoint.model.len() != specs.len() {
            let (held, needed) = (checkpoint.model.len(), specs.len());
            let detail = format!("it holds {held} parameters, the model has {needed}");
            return Err(mismatch(detail));
        }
        for ((name, values), (spec, var)) in checkpoint.model.iter().zip(specs.iter().zip(vars)) {
            if *name != spec.name || values.len() != spec.elements() {
                let (held, needed) = (values.len(), spec.elements());
                let detail = format!("{name} has {held} elements, {} needs {needed}", spec.name);
                return Err(mismatch(detail));
            }
            write_parameter(var.as_tensor(), |parameter| {
                parameter.copy_from_slice(values)
            })?;
        }
        let kind = optimizer_marker(self.args);
        if !checkpoint.optimizer.iter().any(|(name, _)| *name == kind) {
            let detail = format!("its optimizer is not {:?}", self.args.optimizer);
            return Err(mismatch(detail));
        }
        let imported = self.trainer.optimizer_mut().import(&checkpoint.optimizer);
        imported.map_err(|error| mismatch(error.to_string()))
    }

    /// Feedback state and position.
    fn take_feedback(
        &mut self,
        step: u64,
        update: u64,
        arrays: Arrays,
        reducer: &mut dyn Reducer,
    ) -> Result<(), TrainError> {
        reducer.import_state(WorkerState {
            step: Step(step),
            update,
            arrays,
        })?;
        self.first_step = step;
        Ok(())
    }
}

fn mismatch(id: SnapshotId) -> impl Fn(String) -> TrainError {
    move |detail| {
        let what = format!("the snapshot of {id}");
        SnapshotError::Mismatch { what, detail }.into()
    }
}
