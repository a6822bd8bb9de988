//! What goes wrong, and whether the job goes on all the same.

use super::{Happening, Place, SETTLE, STALL, World};
use crate::case::{Fault, When};
use crate::check::{Violation, broken};
use arc_topk_common::ids::Step;
use core::time::Duration;

/// How often the job is looked at.
const WATCH: Duration = Duration::from_millis(250);

impl World<'_> {
    pub(super) fn plan_faults(&mut self) {
        for (number, planned) in self.case.faults.iter().enumerate() {
            match planned.when {
                When::At(at) => self.schedule_at(at, Happening::Fault(number)),
                When::AfterAnswers(answers, _) => self.waiting.push_back((answers, number)),
            }
        }
        self.pending = self.case.faults.len();
    }

    /// A shard has sent an answer: some faults have waited for it.
    pub(super) fn answer_count_reached(&mut self) {
        let answers = self.answers;
        let case = self.case;
        let due: Vec<usize> = self
            .waiting
            .iter()
            .filter(|(at, _)| *at <= answers)
            .map(|(_, n)| *n)
            .collect();
        self.waiting.retain(|(at, _)| *at > answers);
        for number in due {
            let When::AfterAnswers(_, delay) = case.faults[number].when else {
                continue;
            };
            self.schedule(delay, Happening::Fault(number));
        }
    }

    /// Something has changed for the job: it may need time to get over it.
    pub(super) fn disturbed(&mut self) {
        self.disturbed_until = self.disturbed_until.max(self.now);
    }

    pub(super) fn progressed(&mut self, step: Step) {
        self.moved = self.now;
        self.frontier = self.frontier.max(step.0 + 1);
    }

    fn live_worker(&self, number: u64) -> Option<usize> {
        let alive: Vec<usize> = (0..self.workers.len())
            .filter(|at| self.workers[*at].alive)
            .collect();
        (!alive.is_empty()).then(|| alive[number as usize % alive.len()])
    }

    pub(super) fn strike(&mut self, number: usize) -> Result<(), Violation> {
        self.pending -= 1;
        let fault = self.case.faults[number].fault;
        self.note(format_args!("FAULT {fault:?}"));
        self.coverage.count(fault.label());
        self.disturbed();
        match fault {
            Fault::ShardCrash { shard, down } => {
                let shard = shard as usize % self.shards.len();
                if self.shards[shard].up {
                    self.note(format_args!("shard {shard} is killed"));
                    self.kill_shard(shard);
                    self.ends_after(down);
                    self.schedule(down, Happening::Start(shard));
                }
            }
            Fault::WorkerKill { worker } => self.strike_worker(worker, false)?,
            Fault::WorkerLeave { worker } => self.strike_worker(worker, true)?,
            Fault::WorkerJoin => self.new_worker(),
            Fault::Freeze {
                of_shard,
                process,
                time,
            } => {
                if let Some(place) = self.process(of_shard, process) {
                    self.freeze(place, time);
                }
            }
            Fault::ClockJump {
                of_shard,
                process,
                by,
            } => match self.process(of_shard, process) {
                Some(Place::Shard(shard)) => {
                    self.shards[shard].clock.jump(by);
                    self.shards[shard].rearm();
                    self.arm_shard(shard)?;
                }
                Some(Place::Worker(worker)) => {
                    self.workers[worker].clock.jump(by);
                    self.workers[worker].rearm();
                    self.arm_worker(worker);
                }
                None => {}
            },
            Fault::Partition {
                worker,
                shard,
                up,
                down,
                time,
            } => self.partition(worker, shard, (up, down), time),
            Fault::Clog {
                worker,
                shard,
                time,
            } => {
                if let Some(worker) = self.live_worker(worker) {
                    let until = self.now + time;
                    let shard = shard as usize % self.shards.len();
                    self.ends_after(time);
                    let link = self.link(worker, shard);
                    link.up.clogged = until;
                    link.down.clogged = until;
                }
            }
        }
        Ok(())
    }

    /// A fault that the others must get over while it lasts; when it ends there is something to get over again.
    fn lasts(&mut self, time: Duration) {
        let end = self.now + time;
        self.faults_until = self.faults_until.max(end);
        self.ends.push(end);
    }

    /// Nothing can be asked of the job before this has passed.
    fn ends_after(&mut self, time: Duration) {
        self.disturbed_until = self.disturbed_until.max(self.now + time);
    }

    fn strike_worker(&mut self, number: u64, in_order: bool) -> Result<(), Violation> {
        let Some(worker) = self.live_worker(number) else {
            return Ok(());
        };
        if in_order {
            self.workers[worker].leaving = true;
            return self.leaves_if_idle(worker);
        }
        self.note(format_args!("worker {worker} is killed"));
        self.kill_worker(worker);
        if self.randoms.faults.chance(600) {
            let after = self
                .randoms
                .faults
                .time(Duration::from_millis(100)..Duration::from_secs(6));
            self.schedule(after, Happening::NewWorker);
            self.coming += 1;
        }
        Ok(())
    }

    fn process(&self, of_shard: bool, number: u64) -> Option<Place> {
        if of_shard {
            let shard = number as usize % self.shards.len();
            return self.shards[shard].up.then_some(Place::Shard(shard));
        }
        self.live_worker(number).map(Place::Worker)
    }

    fn partition(&mut self, worker: u64, shard: Option<u64>, ways: (bool, bool), time: Duration) {
        let Some(worker) = self.live_worker(worker) else {
            return;
        };
        let until = self.now + time;
        self.lasts(time);
        if ways.0 != ways.1 {
            self.one_way_until = self.one_way_until.max(until);
        }
        let shards = match shard {
            Some(shard) => {
                let shard = shard as usize % self.shards.len();
                shard..shard + 1
            }
            None => 0..self.shards.len(),
        };
        self.note(format_args!(
            "worker {worker} is cut off from shards {shards:?}, ways {ways:?}, for {time:?}"
        ));
        for shard in shards {
            let link = self.link(worker, shard);
            if ways.0 {
                link.up.blocked = link.up.blocked.max(until);
            }
            if ways.1 {
                link.down.blocked = link.down.blocked.max(until);
            }
        }
    }

    fn freeze(&mut self, place: Place, time: Duration) {
        let until = self.now + time;
        let slot = match place {
            Place::Shard(shard) => &mut self.shards[shard].frozen_until,
            Place::Worker(worker) => &mut self.workers[worker].frozen_until,
        };
        if slot.is_some() {
            return;
        }
        *slot = Some(until);
        self.note(format_args!("{place:?} stands still for {time:?}"));
        match place {
            Place::Shard(_) => self.ends_after(time),
            Place::Worker(_) => self.lasts(time),
        }
        self.schedule_at(until, Happening::Thaw(place));
    }

    /// A process goes on with all that came meanwhile.
    pub(super) fn thaw(&mut self, place: Place) -> Result<(), Violation> {
        let (slot, inbox) = match place {
            Place::Shard(shard) => {
                let shard = &mut self.shards[shard];
                (&mut shard.frozen_until, &mut shard.inbox)
            }
            Place::Worker(worker) => {
                let worker = &mut self.workers[worker];
                (&mut worker.frozen_until, &mut worker.inbox)
            }
        };
        if slot.is_none_or(|until| until > self.now) {
            return Ok(());
        }
        *slot = None;
        let inbox = core::mem::take(inbox);
        self.note(format_args!(
            "{place:?} goes on with {} events",
            inbox.len()
        ));
        inbox
            .into_iter()
            .try_for_each(|happening| self.happen(happening))
    }

    /// Looks at the job as a whole.
    pub(super) fn watch(&mut self) -> Result<(), Violation> {
        self.schedule(WATCH, Happening::Watch);
        if self.pending == 0
            && self.healed.is_none()
            && self.now > self.disturbed_until.max(self.faults_until)
        {
            self.healed = Some(self.now);
            self.note(format_args!("no more faults"));
        }
        // Some wait for more answers than there will ever be.
        if self.now > self.moved.max(self.disturbed_until) + Duration::from_secs(30) {
            self.pending -= self.waiting.len();
            self.waiting.clear();
        }
        for worker in 0..self.workers.len() {
            if self.workers[worker].alive && self.workers[worker].leaving {
                self.leaves_if_idle(worker)?;
            }
        }
        self.check_stall()?;
        if self.is_over() {
            self.finished = true;
            return self.check_end();
        }
        if let Some(healed) = self.healed {
            self.refill();
            let steps = self.case.compute.end * 20 * self.case.steps as u32;
            if self.now > healed + SETTLE + steps {
                let training = self.workers.iter().filter(|worker| worker.is_training());
                let few = training.count() < usize::from(self.case.min_workers);
                return broken(
                    "I4 the job ends",
                    format!(
                        "not done {SETTLE:?} after the last fault{}: {}",
                        if few { ", with too few workers" } else { "" },
                        self.state()
                    ),
                );
            }
        }
        Ok(())
    }

    /// Everyone who can be in the job has done all steps.
    fn is_over(&self) -> bool {
        if self.coming > 0 {
            return false;
        }
        let alive = || self.workers.iter().filter(|worker| worker.alive);
        let training = alive().filter(|worker| worker.is_training()).count();
        // Those that have ended behind the others never donate.
        let late = self
            .healed
            .is_some_and(|healed| self.now > healed + SETTLE / 2);
        let full = training >= usize::from(self.case.max_workers) || late;
        let done = alive().all(|worker| {
            if worker.is_training() {
                worker.step().0 >= self.case.steps
                    && worker.frozen_until.is_none()
                    && !worker.leaving
            } else {
                full
            }
        });
        done && training > 0 && self.shards.iter().all(|shard| shard.up)
    }

    /// A job that ended for want of workers gets some.
    fn refill(&mut self) {
        let alive = self.workers.iter().filter(|worker| worker.alive).count();
        let training = self
            .workers
            .iter()
            .any(super::workers::WorkerProcess::is_training);
        if !training && alive < usize::from(self.case.world) {
            self.coverage.count("workers added at the end");
            self.new_worker();
        }
    }

    /// With enough workers that can reach all shards, something must happen.
    fn check_stall(&mut self) -> Result<(), Violation> {
        let healthy = |world: &Self, at: usize| {
            let worker = &world.workers[at];
            worker.is_training()
                && worker.frozen_until.is_none()
                && worker.links.iter().all(Option::is_some)
        };
        let count = (0..self.workers.len())
            .filter(|at| healthy(self, *at))
            .count();
        let busy = (0..self.workers.len())
            .any(|at| healthy(self, at) && self.workers[at].step().0 < self.case.steps);
        let shards = self
            .shards
            .iter()
            .all(|shard| shard.up && shard.frozen_until.is_none());
        if !shards || !busy || count < usize::from(self.case.min_workers.max(1)) {
            self.calm_since = self.now;
            return Ok(());
        }
        let slack = self.case.compute.end * 12
            + self.case.network.jitter * 20
            + Duration::from_millis(1500);
        let ended = self.ends.iter().filter(|end| **end <= self.now).max();
        let ended = ended.copied().unwrap_or_default();
        // What is cut off in one direction only is noticed by one end after the other.
        let one_way = Duration::from_secs(if self.one_way_until > self.now { 4 } else { 0 });
        let slack = slack + one_way;
        let since = self
            .calm_since
            .max(self.moved)
            .max(self.disturbed_until)
            .max(ended);
        if self.now > since + STALL + slack {
            let detail = format!(
                "no step was applied for {:?} although nothing is wrong: {}",
                self.now - self.moved,
                self.state()
            );
            return broken("I4 progress", detail);
        }
        Ok(())
    }

    /// Every worker's and shard's state in a line.
    fn state(&self) -> String {
        let workers = self
            .workers
            .iter()
            .enumerate()
            .filter(|(_, worker)| worker.alive);
        let workers = workers.map(|(at, worker)| {
            let links: Vec<bool> = worker.links.iter().map(Option::is_some).collect();
            format!(
                "worker {at} ({}) training={} step {} links {links:?}",
                self.name(worker.life),
                worker.is_training(),
                worker.step()
            )
        });
        let shards = self
            .shards
            .iter()
            .enumerate()
            .map(|(at, shard)| format!("shard {at} up={} {:?}", shard.up, shard.load()));
        workers.chain(shards).collect::<Vec<_>>().join("; ")
    }

    /// All workers have the same parameters.
    fn check_end(&mut self) -> Result<(), Violation> {
        let done = self.workers.iter().filter(|worker| worker.is_training());
        let lives: Vec<_> = done
            .map(|worker| (worker.life, worker.run(), worker.digest()))
            .collect();
        for (life, run, digest) in &lives {
            if !self.checker.is_live(*life) {
                continue;
            }
            for (other, other_run, other_digest) in &lives {
                if self.checker.is_live(*other) && run == other_run && digest != other_digest {
                    let detail = format!(
                        "{} and {} end with different parameters",
                        self.name(*life),
                        self.name(*other)
                    );
                    return broken("I1 equal parameters at the end", detail);
                }
            }
            self.checker.same_way(*life)?;
        }
        let runs: std::collections::BTreeSet<_> = lives.iter().map(|(_, run, _)| *run).collect();
        if runs.len() > 1 {
            let names: Vec<String> = lives.iter().map(|(life, ..)| self.name(*life)).collect();
            return broken(
                "P one start of the job",
                format!("{} are in different starts of it", names.join(", ")),
            );
        }
        Ok(())
    }
}
