//! Who is in the job: hellos, ranks, departures.

use super::event::{Action, Observation, Report, SessionId};
use super::rounds::Rounds;
use super::{JOIN_GRACE, Job, LAST_START_STEP, Shard, refuse};
use arc_topk_common::ids::{Epoch, Rank, ShardId};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Control, Hello, PROTOCOL_VERSION, RefusalCode, Welcome};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// An admitted worker.
#[derive(Clone, Debug)]
pub(super) struct Session {
    pub(super) host: String,
    pub(super) incarnation: [u8; 16],
    pub(super) rank: Option<Rank>,
    pub(super) since: Duration,
    pub(super) report: Option<Report>,
    /// Seconds for which the others waited for it, all phases together.
    pub(super) waited_for_seconds: f64,
}

/// Members of one start of the job.
#[derive(Debug)]
pub(super) enum Members {
    /// Shard 0 until the world is complete: who came, in this order, and the rank asked for.
    Gathering(Vec<(SessionId, Option<Rank>)>),
    /// Ranks are given.
    Running {
        epoch: Epoch,
        joined: BTreeMap<Rank, SessionId>,
        /// Expected here, not yet come (never on shard 0).
        awaited: BTreeSet<Rank>,
        since: Duration,
    },
}

impl Members {
    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running { .. })
    }

    pub(super) fn epoch(&self) -> Epoch {
        match self {
            Self::Gathering(_) => Epoch(0),
            Self::Running { epoch, .. } => *epoch,
        }
    }

    pub(super) fn count(&self) -> usize {
        match self {
            Self::Gathering(order) => order.len(),
            Self::Running { joined, .. } => joined.len(),
        }
    }

    /// Ranks that a round waits for.
    pub(super) fn live(&self) -> BTreeSet<Rank> {
        match self {
            Self::Gathering(_) => BTreeSet::new(),
            Self::Running {
                joined, awaited, ..
            } => joined.keys().chain(awaited).copied().collect(),
        }
    }
}

/// How a worker goes.
#[derive(Clone, Debug)]
pub(super) enum Departure {
    /// In order.
    Left,
    /// Lost or removed, and why.
    Lost(String),
}

pub(super) struct Refusal(pub(super) RefusalCode, pub(super) String);

impl Shard {
    pub(super) fn hello(
        &mut self,
        now: Duration,
        session: SessionId,
        hello: Hello,
        out: &mut Vec<Action>,
    ) {
        if self.knows(session) {
            let detail =
                "a second Hello came on one connection: run the same release everywhere".to_owned();
            return self.violation(now, session, detail, out);
        }
        let rank = match self.admit(now, session, &hello) {
            Ok(rank) => rank,
            Err(refusal) => {
                if let Err(Refusal(code, detail)) = self.put_off(now, session, hello, refusal) {
                    refuse(session, code, &detail, out);
                }
                return;
            }
        };
        let host = hello.host;
        self.sessions.insert(
            session,
            Session {
                host: host.clone(),
                incarnation: hello.incarnation,
                rank,
                since: now,
                report: None,
                waited_for_seconds: 0.0,
            },
        );
        let joined = self.job.as_ref().map_or(0, |job| job.members.count()) as u16;
        out.push(Action::Observe(Observation::Joined {
            session,
            rank,
            host,
            joined,
        }));
        if self.config.shard == ShardId(0) {
            self.start_or_wait(now, out);
        } else if let Some(rank) = rank {
            self.welcome(session, rank, out);
        }
    }

    /// Checks a Hello and enters the worker into the job, which the first one makes. Its rank, if it has one by now.
    fn admit(
        &mut self,
        now: Duration,
        session: SessionId,
        hello: &Hello,
    ) -> Result<Option<Rank>, Refusal> {
        self.check_identity(hello)?;
        self.check_job(hello)?;
        let coordinator = self.config.shard == ShardId(0);
        if self.job.is_none() {
            self.job = Some(self.new_job(now, hello)?);
        }
        let job = self.job.as_mut().expect("made above");
        match (&mut job.members, hello.rank) {
            (Members::Gathering(order), asked) => {
                order.push((session, asked));
                Ok(None)
            }
            (
                Members::Running {
                    joined, awaited, ..
                },
                Some(rank),
            ) if !coordinator => {
                awaited.remove(&rank);
                joined.insert(rank, session);
                Ok(Some(rank))
            }
            (Members::Running { .. }, _) => unreachable_refusal(),
        }
    }

    pub(super) fn check_identity(&self, hello: &Hello) -> Result<(), Refusal> {
        let config = &self.config;
        if hello.protocol != PROTOCOL_VERSION {
            return Err(Refusal(
                RefusalCode::Version,
                format!(
                    "the worker speaks protocol {} and this shard {PROTOCOL_VERSION}: install the same release of arc-topk on both",
                    hello.protocol
                ),
            ));
        }
        if hello.job != config.job {
            return Err(Refusal(
                RefusalCode::Job,
                format!(
                    "this shard serves job {:?}, the worker belongs to job {:?}: check --job on both, and the shards' addresses",
                    config.job, hello.job
                ),
            ));
        }
        if hello.shard != config.shard.0 {
            return Err(Refusal(
                RefusalCode::Shard,
                format!(
                    "this is shard {}, but it stands at position {} of the worker's list: give every worker the shards' addresses in the order of their index",
                    config.shard, hello.shard
                ),
            ));
        }
        if let Some(world) = hello.world.filter(|world| *world != config.world) {
            return Err(Refusal(
                RefusalCode::World,
                format!(
                    "the worker expects {world} workers, this shard was started for {}: give the same --workers everywhere",
                    config.world
                ),
            ));
        }
        if let Some(rank) = hello.rank.filter(|rank| rank.0 >= config.world) {
            return Err(Refusal(
                RefusalCode::Rank,
                format!(
                    "rank {rank} is out of range: a world of {} has ranks 0 to {}",
                    config.world,
                    config.world.saturating_sub(1)
                ),
            ));
        }
        if hello.start_step > LAST_START_STEP {
            return Err(Refusal(
                RefusalCode::Step,
                format!(
                    "the worker starts at step {}, above the limit of {LAST_START_STEP}: its checkpoint is damaged; resume from another one",
                    hello.start_step
                ),
            ));
        }
        if hello.rank.is_none() && config.shard != ShardId(0) {
            return Err(Refusal(
                RefusalCode::Rank,
                format!(
                    "shard {} needs the rank that shard 0 gave: connect to shard 0 first",
                    config.shard
                ),
            ));
        }
        if hello.plan.shards != config.shards {
            return Err(Refusal(
                RefusalCode::Plan,
                format!(
                    "the worker was given {} shards, this shard was started as one of {}: give every worker all shards' addresses and every shard --shards",
                    hello.plan.shards, config.shards
                ),
            ));
        }
        Ok(())
    }

    /// Checks against the job as it stands, if there is one.
    pub(super) fn check_job(&self, hello: &Hello) -> Result<(), Refusal> {
        let Some(job) = &self.job else {
            return Ok(());
        };
        if let Some(difference) = job.plan.spec.first_difference(&hello.plan) {
            return Err(Refusal(
                RefusalCode::Plan,
                format!(
                    "the worker's plan differs from that of the workers that are here: {difference}; give all workers the same model and settings"
                ),
            ));
        }
        // Where a running job started is no news to a worker that comes too late for it.
        let too_late = match &job.members {
            Members::Gathering(_) => false,
            Members::Running { awaited, .. } => {
                !hello.rank.is_some_and(|rank| awaited.contains(&rank))
            }
        };
        if hello.start_step != job.start_step && !too_late {
            return Err(Refusal(
                RefusalCode::Step,
                format!(
                    "the worker starts at step {}, the others at step {}: resume all workers from checkpoints of one step",
                    hello.start_step, job.start_step
                ),
            ));
        }
        match &job.members {
            Members::Gathering(order) => {
                let taken = order
                    .iter()
                    .find(|(_, asked)| asked.is_some() && *asked == hello.rank);
                taken.map_or(Ok(()), |(session, _)| {
                    Err(self.rank_taken(hello.rank, *session))
                })
            }
            Members::Running {
                joined, awaited, ..
            } => {
                if let Some(session) = hello.rank.and_then(|rank| joined.get(&rank)) {
                    return Err(self.rank_taken(hello.rank, *session));
                }
                if hello.rank.is_some_and(|rank| awaited.contains(&rank)) {
                    return Ok(());
                }
                Err(Refusal(
                    RefusalCode::World,
                    format!(
                        "the job runs already with {} of {} workers at step {}, and a running job takes no further ones: wait until it ends, or stop its workers and start all again from a checkpoint (workers that died are forgotten after 3 s)",
                        joined.len(),
                        self.config.world,
                        job.rounds.step()
                    ),
                ))
            }
        }
    }

    fn rank_taken(&self, rank: Option<Rank>, holder: SessionId) -> Refusal {
        let host = self
            .sessions
            .get(&holder)
            .map_or("another worker", |s| s.host.as_str());
        let rank = rank.unwrap_or_default();
        Refusal(
            RefusalCode::Rank,
            format!(
                "rank {rank} is taken by {host}: give every worker a --rank of its own, or none to have one given (a worker that died is forgotten after 3 s)"
            ),
        )
    }

    fn new_job(&self, now: Duration, hello: &Hello) -> Result<Job, Refusal> {
        let refusal = |detail: String| Refusal(RefusalCode::Plan, detail);
        let elements = hello.plan.tensors.iter().fold(0u64, |sum, tensor| {
            let own = tensor
                .shape
                .iter()
                .fold(1u64, |product, d| product.saturating_mul(*d));
            sum.saturating_add(own)
        });
        if elements > self.limits.elements {
            return Err(refusal(format!(
                "the plan has {elements} elements, above this shard's limit of {}: use more shards or a smaller model",
                self.limits.elements
            )));
        }
        let plan = Plan::build(hello.plan.clone())
            .map_err(|error| refusal(format!("the plan cannot be built: {error}")))?;
        let plan = Arc::new(plan);
        let rounds = Rounds::new(plan.clone(), self.config.shard, hello.start_step);
        let members = if self.config.shard == ShardId(0) {
            Members::Gathering(Vec::new())
        } else {
            let awaited = (0..self.config.world).map(Rank).collect();
            Members::Running {
                epoch: Epoch(1),
                joined: BTreeMap::new(),
                awaited,
                since: now,
            }
        };
        Ok(Job {
            plan,
            start_step: hello.start_step,
            members,
            rounds,
        })
    }

    /// Shard 0: gives ranks when the world is complete, else says how many are there.
    fn start_or_wait(&mut self, now: Duration, out: &mut Vec<Action>) {
        let world = self.config.world;
        let Some(job) = &mut self.job else {
            return;
        };
        let Members::Gathering(order) = &job.members else {
            return;
        };
        if order.len() < usize::from(world) {
            let message = Control::Waiting {
                joined: order.len() as u16,
                world,
            };
            out.extend(order.iter().map(|(session, _)| Action::Control {
                session: *session,
                message: message.clone(),
            }));
            return;
        }
        let joined = give_ranks(order);
        job.members = Members::Running {
            epoch: Epoch(1),
            joined: joined.clone(),
            awaited: BTreeSet::new(),
            since: now,
        };
        let step = job.start_step;
        for (rank, session) in joined {
            if let Some(member) = self.sessions.get_mut(&session) {
                member.rank = Some(rank);
            }
            self.welcome(session, rank, out);
        }
        out.push(Action::Observe(Observation::Started {
            epoch: Epoch(1),
            world,
            step,
        }));
    }

    fn welcome(&self, session: SessionId, rank: Rank, out: &mut Vec<Action>) {
        let Some(job) = &self.job else {
            return;
        };
        let welcome = Welcome {
            epoch: job.members.epoch(),
            rank,
            world: self.config.world,
            start_step: job.start_step,
        };
        out.push(Action::Control {
            session,
            message: Control::Welcome(welcome),
        });
    }

    /// Takes a worker out; the others go on with those present.
    pub(super) fn depart(
        &mut self,
        now: Duration,
        session: SessionId,
        how: Departure,
        out: &mut Vec<Action>,
    ) {
        if self.successors.remove(&session).is_some() {
            return;
        }
        let Some(gone) = self.sessions.remove(&session) else {
            return;
        };
        let Some(job) = &mut self.job else {
            return;
        };
        match &mut job.members {
            Members::Gathering(order) => order.retain(|(other, _)| *other != session),
            Members::Running { joined, .. } => {
                if let Some(rank) = gone.rank {
                    joined.remove(&rank);
                }
            }
        }
        let remaining = job.members.count() as u16;
        out.push(Action::Observe(match &how {
            Departure::Left => Observation::Left {
                rank: gone.rank,
                remaining,
            },
            Departure::Lost(reason) => Observation::Lost {
                rank: gone.rank,
                reason: reason.clone(),
                remaining,
            },
        }));
        if remaining == 0 {
            job.rounds.abandon(now, out);
            return self.forget_job(out);
        }
        match gone.rank.filter(|_| job.members.is_running()) {
            None => self.start_or_wait(now, out),
            Some(rank) => self.after_loss(now, rank, &gone.host, &how, out),
        }
    }

    /// The epoch grows, the others are told, and open rounds close with those present.
    fn after_loss(
        &mut self,
        now: Duration,
        rank: Rank,
        host: &str,
        how: &Departure,
        out: &mut Vec<Action>,
    ) {
        let reason = match how {
            Departure::Left => format!("rank {rank} ({host}) left"),
            Departure::Lost(reason) => format!("rank {rank} ({host}) was lost: {reason}"),
        };
        let minimum = self.minimum();
        let Some(job) = &mut self.job else {
            return;
        };
        let live = job.members.live();
        // An orderly leave ends no job by itself: at the end of training all leave, one after the other. One that
        // leaves rounds behind is early.
        let early = job.keeps_estimates() && job.rounds.open().next().is_some();
        if live.len() < minimum && (matches!(how, Departure::Lost(_)) || early) {
            return self.too_few(now, &reason, out);
        }
        let Members::Running { epoch, joined, .. } = &mut job.members else {
            return;
        };
        epoch.0 = epoch.0.saturating_add(1);
        let message = Control::Membership {
            epoch: *epoch,
            members: live.iter().copied().collect(),
            reason,
        };
        out.extend(joined.values().map(|session| Action::Control {
            session: *session,
            message: message.clone(),
        }));
        self.advance_all(now, out);
    }

    /// Fewer live workers than this end the job. ef21's result is the mean of the estimates of *all* workers: one that goes
    /// takes its own along, and the mean of the others is another.
    pub(super) fn minimum(&self) -> usize {
        let all = self.job.as_ref().is_some_and(Job::keeps_estimates);
        usize::from(if all {
            self.config.world
        } else {
            self.config.min_workers
        })
    }

    /// Ends the job because fewer than the minimum are left.
    pub(super) fn too_few(&mut self, now: Duration, cause: &str, out: &mut Vec<Action>) {
        let left = self.job.as_ref().map_or(0, |job| job.members.live().len());
        let minimum = self.minimum();
        let detail = if self.job.as_ref().is_some_and(Job::keeps_estimates) {
            format!(
                "{left} of {minimum} workers are left ({cause}), and feedback ef21 and ef21m need all to the end, since each holds a part of the estimate: start all again from the last checkpoint, or use --feedback ef14, which bears losses"
            )
        } else {
            format!(
                "{left} of the at least {minimum} workers are left ({cause}): start the job again from its last checkpoint, or lower --min-workers"
            )
        };
        if let Some(job) = &mut self.job {
            job.rounds.abandon(now, out);
        }
        self.end_job(RefusalCode::TooFewWorkers, &detail, out);
    }

    /// Shards other than 0: ranks that shard 0 admitted may never come here.
    pub(super) fn drop_awaited_too_long(&mut self, now: Duration, out: &mut Vec<Action>) {
        let Some(Job {
            members: Members::Running { awaited, since, .. },
            ..
        }) = &mut self.job
        else {
            return;
        };
        if awaited.is_empty() || now.saturating_sub(*since) < JOIN_GRACE {
            return;
        }
        for rank in core::mem::take(awaited) {
            let reason = format!(
                "it did not connect to shard {} within {} s",
                self.config.shard,
                JOIN_GRACE.as_secs()
            );
            let remaining = self.job.as_ref().map_or(0, |job| job.members.count()) as u16;
            out.push(Action::Observe(Observation::Lost {
                rank: Some(rank),
                reason: reason.clone(),
                remaining,
            }));
            self.after_loss(now, rank, "never seen", &Departure::Lost(reason), out);
        }
    }
}

/// `check_job` refuses these before.
fn unreachable_refusal() -> Result<Option<Rank>, Refusal> {
    Err(Refusal(
        RefusalCode::World,
        "the job runs already: wait until it ends".to_owned(),
    ))
}

/// Ranks asked for are honoured; the others get the lowest free in order of arrival.
fn give_ranks(order: &[(SessionId, Option<Rank>)]) -> BTreeMap<Rank, SessionId> {
    let mut given: BTreeMap<Rank, SessionId> = order
        .iter()
        .filter_map(|(session, asked)| asked.map(|rank| (rank, *session)))
        .collect();
    for (session, _) in order.iter().filter(|(_, asked)| asked.is_none()) {
        let free = (0..=u16::MAX)
            .map(Rank)
            .find(|rank| !given.contains_key(rank));
        given.insert(free.expect("a world has at most 65535 workers"), *session);
    }
    given
}
