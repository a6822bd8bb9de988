//! The workers' way into a job: a place, and the replica of one that is in it.

use super::workers::Stage;
use super::{Happening, World};
use crate::check::{LifeId, Violation, broken};
use crate::trainer::{Model, Replica};
use arc_topk_common::compress::fast::Fast;
use arc_topk_common::ids::{RunId, Step};
use arc_topk_common::wire::{Control, Welcome};
use arc_topk_worker::member::{Member, MemberConfig};
use arc_topk_worker::step::{StepMachine, WorkerState};
use core::time::Duration;
use std::rc::Rc;
use std::sync::Arc;

/// Attempts of a donor to put a replica into a store.
const MOST_UPLOADS: u32 = 6;

/// A replica on its way to the stores.
pub(super) struct Upload {
    pub(super) step: Step,
    pub(super) run: RunId,
    pub(super) replica: Rc<Replica>,
    pub(super) missing: Vec<bool>,
    pub(super) attempts: u32,
}

impl World<'_> {
    pub(super) fn joiner_hears(
        &mut self,
        worker: usize,
        message: Control,
    ) -> Result<(), Violation> {
        match message {
            Control::Welcome(welcome) => self.placed(worker, &welcome),
            Control::Refused { code, detail } => {
                self.workers[worker].refused = true;
                let after = self
                    .randoms
                    .processes
                    .time(Duration::from_millis(300)..Duration::from_millis(2000));
                self.rejoin(worker, &format!("{code:?}: {detail}"), after);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Shard 0 has given it a place.
    pub(super) fn placed(&mut self, worker: usize, welcome: &Welcome) -> Result<(), Violation> {
        let case = self.case;
        let machine = StepMachine::new(
            Arc::clone(&case.plan),
            Arc::new(Fast),
            welcome.place.epoch,
            welcome.step,
            0,
        );
        let mut out = Vec::new();
        let member = Member::new(machine, MemberConfig::new(welcome), &mut out);
        let life = self.workers[worker].life;
        let process = &mut self.workers[worker];
        process.member = Some(member);
        process.up[0] = true;
        process.refused = false;
        self.outputs(worker, out)?;
        if welcome.snapshot {
            self.workers[worker].stage = Stage::Fetching {
                run: welcome.place.run,
                step: welcome.step,
            };
            let time = self
                .randoms
                .store
                .time(Duration::from_millis(20)..Duration::from_millis(800));
            self.schedule(time, Happening::Fetched { life, worker });
            return Ok(());
        }
        self.workers[worker].stage = Stage::Training;
        self.begin(life, worker)
    }

    pub(super) fn fetched(&mut self, life: LifeId, worker: usize) -> Result<(), Violation> {
        if !self.workers[worker].alive || self.workers[worker].life != life {
            return Ok(());
        }
        let Stage::Fetching { run, step } = self.workers[worker].stage else {
            return Ok(());
        };
        let here = |shard: &super::shards::ShardProcess| {
            let replica = shard.store.get(&(run, step));
            replica
                .filter(|_| shard.up && shard.frozen_until.is_none())
                .cloned()
        };
        let parts: Option<Vec<Rc<Replica>>> = self.shards.iter().map(here).collect();
        let fails =
            self.randoms.store.chance(self.case.fetch_fails_per_mille) && self.healed.is_none();
        let Some(replica) = parts.filter(|_| !fails).and_then(|mut parts| parts.pop()) else {
            self.coverage.count("fetches that failed");
            self.rejoin(
                worker,
                "its replica cannot be fetched",
                Duration::from_millis(200),
            );
            return Ok(());
        };
        self.coverage.count("replicas fetched");
        let process = &mut self.workers[worker];
        let member = process
            .member
            .as_mut()
            .expect("a fetching worker is a member");
        let mut state = member.export_state();
        merge(&mut state, &replica.shared);
        member
            .import_state(state)
            .or_else(|error| broken("P import", error.to_string()))?;
        process.model = Model::of_replica(&replica);
        process.stage = Stage::Training;
        self.checker.inherits(life, step, replica.chain);
        self.checker.same_way(life)?;
        self.begin(life, worker)
    }

    /// A worker that is between steps and was asked for its replica begins to upload it.
    pub(super) fn donate(&mut self, worker: usize) -> Result<(), Violation> {
        let process = &mut self.workers[worker];
        let Some(member) = process.member.as_mut().filter(|m| m.donation_due()) else {
            return Ok(());
        };
        let (step, run) = (member.machine().step(), member.place().run);
        let mut out = Vec::new();
        member.donation_taken(step, &mut out);
        let mut shared = member.export_state();
        shared.arrays.retain(|(name, _)| name.starts_with("global"));
        let life = process.life;
        let chain = self.checker.chain(life, step);
        let process = &mut self.workers[worker];
        process.upload = Some(Upload {
            step,
            run,
            replica: Rc::new(process.model.replica(shared, chain)),
            missing: vec![true; process.links.len()],
            attempts: 0,
        });
        self.coverage.count("donations");
        self.note(format_args!("{} donates step {step}", self.name(life)));
        for shard in 0..usize::from(self.case.shards) {
            let time = self
                .randoms
                .store
                .time(Duration::from_millis(5)..Duration::from_millis(600));
            self.schedule(
                time,
                Happening::Stored {
                    life,
                    worker,
                    shard,
                },
            );
        }
        self.outputs(worker, out)
    }

    pub(super) fn stored(
        &mut self,
        life: LifeId,
        worker: usize,
        shard: usize,
    ) -> Result<(), Violation> {
        let reachable = {
            let now = self.now;
            let link = self.link(worker, shard);
            link.up.blocked <= now && link.down.blocked <= now
        };
        let (up, frozen) = (
            self.shards[shard].up,
            self.shards[shard].frozen_until.is_some(),
        );
        let process = &mut self.workers[worker];
        if !process.alive || process.life != life {
            return Ok(());
        }
        let Some(upload) = &mut process.upload else {
            return Ok(());
        };
        let (run, step) = (upload.run, upload.step);
        if !up || frozen || !reachable {
            upload.attempts += 1;
            if upload.attempts <= MOST_UPLOADS * u32::from(self.case.shards) {
                self.schedule(
                    Duration::from_millis(500),
                    Happening::Stored {
                        life,
                        worker,
                        shard,
                    },
                );
            }
            return Ok(());
        }
        upload.missing[shard] = false;
        let replica = Rc::clone(&upload.replica);
        let done = !upload.missing.contains(&true);
        self.shards[shard].store.insert((run, step), replica);
        if done {
            let mut out = Vec::new();
            let process = &mut self.workers[worker];
            process.upload = None;
            if let Some(member) = &mut process.member {
                member.donated(step, &mut out);
            }
            self.outputs(worker, out)?;
        }
        Ok(())
    }
}

/// Puts the shared arrays of a replica into a state, with its step and update.
fn merge(state: &mut WorkerState, shared: &WorkerState) {
    state.step = shared.step;
    state.update = shared.update;
    for (name, values) in &mut state.arrays {
        let shared_name = name.replace("local", "global");
        if let Some((_, replica)) = shared
            .arrays
            .iter()
            .find(|(other, _)| *other == shared_name)
        {
            values.clone_from(replica);
        }
    }
}
