//! First messages: who comes, whether it fits, and what it is told.

use super::event::{Action, Observation, SessionId};
use super::joining::Applicant;
use super::leaving::Departure;
use super::members::{Link, Member, Members, Told, Waited};
use super::recovery::Recovery;
use super::rounds::Rounds;
use super::stragglers::Lateness;
use super::{Job, LAST_START_STEP, Life, STEP_WINDOW, Shard, refuse};
use arc_topk_common::ids::{Epoch, Rank, RunId, ShardId, Step};
use arc_topk_common::plan::{Plan, PlanDifference, PlanSpec};
use arc_topk_common::wire::{
    Control, Hello, Intent, PROTOCOL_VERSION, Place, RefusalCode, Welcome,
};
use core::time::Duration;
use std::sync::Arc;

#[derive(Debug)]
pub(super) struct Refusal(pub(super) RefusalCode, pub(super) String);

/// A member that introduces itself.
struct Newcomer<'a> {
    session: SessionId,
    hello: &'a Hello,
    place: &'a Place,
    step: Step,
    waited: bool,
}

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
        let refused = match self.check_identity(&hello) {
            Err(refusal) => Err(refusal),
            Ok(()) => match &hello.intent {
                Intent::Join { .. } => self.apply(now, session, &hello, out),
                Intent::Member {
                    place,
                    step,
                    waited,
                } => {
                    let newcomer = Newcomer {
                        session,
                        hello: &hello,
                        place,
                        step: *step,
                        waited: *waited,
                    };
                    self.member(now, &newcomer, out)
                }
            },
        };
        if let Err(refusal) = refused
            && let Err(Refusal(code, detail)) = self.put_off(now, session, hello, refusal)
        {
            refuse(session, code, &detail, out);
        }
    }

    /// What can be judged without a job.
    pub(super) fn check_identity(&self, hello: &Hello) -> Result<(), Refusal> {
        let config = &self.config;
        let refuse = |code, detail| Err(Refusal(code, detail));
        if hello.protocol != PROTOCOL_VERSION {
            let detail = format!(
                "the worker speaks protocol {} and this shard {PROTOCOL_VERSION}: install the same release of arc-topk on both",
                hello.protocol
            );
            return refuse(RefusalCode::Version, detail);
        }
        if hello.job != config.job {
            let detail = format!(
                "this shard serves job {:?}, the worker belongs to job {:?}: check --job on both, and the shards' addresses",
                config.job, hello.job
            );
            return refuse(RefusalCode::Job, detail);
        }
        if hello.shard != config.shard.0 {
            let detail = format!(
                "this is shard {}, but it stands at position {} of the worker's list: give every worker the shards' addresses in the order of their index",
                config.shard, hello.shard
            );
            return refuse(RefusalCode::Shard, detail);
        }
        if hello.plan.shards != config.shards {
            let detail = format!(
                "the worker was given {} shards, this shard was started as one of {}: give every worker all shards' addresses and every shard --shards",
                hello.plan.shards, config.shards
            );
            return refuse(RefusalCode::Plan, detail);
        }
        if config.quorum > 0 && hello.plan.algorithm.keeps_estimates() {
            let detail = "feedback ef21 and ef21m need every worker's part in every round: start the shards without --quorum, or use --feedback ef14".to_owned();
            return refuse(RefusalCode::Plan, detail);
        }
        self.check_intent(&hello.intent)
    }

    fn check_intent(&self, intent: &Intent) -> Result<(), Refusal> {
        let config = &self.config;
        let refuse = |code, detail| Err(Refusal(code, detail));
        let step = match intent {
            Intent::Join { .. } if config.shard != ShardId(0) => {
                let detail = format!(
                    "shard {} needs the place that shard 0 gave: connect to shard 0 first",
                    config.shard
                );
                return refuse(RefusalCode::Rank, detail);
            }
            Intent::Join {
                world: Some(world), ..
            } if *world != config.world => {
                let detail = format!(
                    "the worker expects {world} workers, this shard was started for {}: give the same --workers everywhere",
                    config.world
                );
                return refuse(RefusalCode::World, detail);
            }
            Intent::Join { start_step, .. } => *start_step,
            Intent::Member { place, .. } if !place.members.contains(&place.rank) => {
                let detail = format!(
                    "rank {} is not among the members that it names: run the same release everywhere",
                    place.rank
                );
                return refuse(RefusalCode::Rank, detail);
            }
            Intent::Member { place, .. } if place.epoch == Epoch(0) => {
                let detail = format!(
                    "rank {} names no membership that shard 0 ever gave: run the same release everywhere",
                    place.rank
                );
                return refuse(RefusalCode::Rank, detail);
            }
            Intent::Member { place, .. }
                if place.members.iter().any(|rank| rank.0 >= place.next_rank) =>
            {
                let detail = format!(
                    "a rank among the members is not below {}, the next one to be given: run the same release everywhere",
                    place.next_rank
                );
                return refuse(RefusalCode::Rank, detail);
            }
            Intent::Member { step, .. } => *step,
        };
        if step > LAST_START_STEP {
            let detail = format!(
                "the worker starts at step {step}, above the limit of {LAST_START_STEP}: its checkpoint is damaged; resume from another one"
            );
            return refuse(RefusalCode::Step, detail);
        }
        Ok(())
    }

    /// Whether the worker computes what the others do.
    pub(super) fn check_plan(&self, hello: &Hello) -> Result<(), Refusal> {
        let difference = self
            .job
            .as_ref()
            .and_then(|job| job.plan.spec.first_difference(&hello.plan));
        match difference {
            None => Ok(()),
            Some(PlanDifference { what, here, there }) => Err(Refusal(
                RefusalCode::Plan,
                format!(
                    "this worker's plan is not that of the job's others: {what} is {there} with this one, {here} with them; give all workers the same model and settings"
                ),
            )),
        }
    }

    pub(super) fn new_job(&self, spec: &PlanSpec, start: Step, life: Life) -> Result<Job, Refusal> {
        let refusal = |detail| Refusal(RefusalCode::Plan, detail);
        let elements = spec
            .tensors
            .iter()
            .map(|tensor| {
                tensor
                    .shape
                    .iter()
                    .fold(1u64, |product, n| product.saturating_mul(*n))
            })
            .fold(0u64, u64::saturating_add);
        if elements > self.limits.elements {
            return Err(refusal(format!(
                "the plan has {elements} elements, above this shard's limit of {}: use more shards or a smaller model",
                self.limits.elements
            )));
        }
        let plan = Plan::build(spec.clone())
            .map_err(|error| refusal(format!("the plan cannot be built: {error}")))?;
        let plan = Arc::new(plan);
        Ok(Job {
            rounds: Rounds::new(plan.clone(), self.config.shard, start),
            plan,
            run: RunId::default(),
            life,
            members: Members::default(),
            ends: false,
            applicants: Vec::new(),
            digests: Default::default(),
        })
    }

    /// A worker that has a place, for the first time here or again.
    fn member(
        &mut self,
        now: Duration,
        newcomer: &Newcomer<'_>,
        out: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        self.find_job(now, newcomer, out)?;
        self.check_plan(newcomer.hello)?;
        if let Some(job) = &mut self.job {
            // Also where it is refused: no rank is given twice.
            job.members.avoid_ranks_before(newcomer.place.next_rank);
        }
        self.check_place(newcomer)?;
        let Some(job) = &mut self.job else {
            return Ok(());
        };
        let Newcomer {
            session,
            hello,
            place,
            step,
            waited,
        } = *newcomer;
        if self.config.shard == ShardId(0) && job.is_running() {
            job.members.outgrow(place.epoch, place.next_rank);
        } else {
            job.members
                .learn(place.epoch, place.next_rank, &place.members);
        }
        let rank = place.rank;
        let back = job.members.get(rank).and_then(|member| match member.link {
            Link::Away { since, .. } => Some(now.saturating_sub(since)),
            Link::Connected(_) => None,
        });
        let known = job
            .members
            .get(rank)
            .is_some_and(|member| member.incarnation.is_some());
        job.first_comes(now);
        if job.members.get(rank).is_none() {
            let member = Member::new(hello, session, step, now);
            job.members.insert(rank, member);
        } else if let Some(old) = job.members.attach(rank, session) {
            out.push(Action::Close {
                session: old,
                code: RefusalCode::Superseded,
                detail: "the worker came on another connection".to_owned(),
            });
        }
        // One that is far behind first replays what it missed; the others need not wait for that. After a short loss, which
        // costs an answer or two, they do.
        let at = job.rounds.step();
        let from = if job.is_running() && step.0.saturating_add(1) < at.0 {
            Step(at.0.saturating_add(STEP_WINDOW))
        } else {
            step
        };
        if let Some(member) = job.members.get_mut(rank) {
            member.come_back(hello, step, waited.then_some(from));
        }
        self.welcome(session, rank, out);
        let joined = self.connected() as u16;
        out.push(Action::Observe(match back {
            Some(away) if known => Observation::Returned {
                rank,
                seconds: away.as_secs_f64(),
            },
            _ => Observation::Joined {
                session,
                rank: Some(rank),
                host: hello.host.clone(),
                joined,
            },
        }));
        self.tell_members(&format!("rank {rank} ({}) is connected", hello.host), out);
        self.end_recovery(now, out);
        Ok(())
    }

    pub(super) fn connected(&self) -> usize {
        self.job
            .as_ref()
            .map_or(0, |job| job.members.connected_count())
    }

    /// Makes, keeps or replaces the job so that it is the newcomer's, or refuses.
    fn find_job(
        &mut self,
        now: Duration,
        newcomer: &Newcomer<'_>,
        out: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let run = newcomer.place.run;
        match &mut self.job {
            Some(job) if job.run == run && !matches!(job.life, Life::Gathering) => Ok(()),
            // This process was restarted while the job went on, and others came first.
            Some(job) if matches!(job.life, Life::Gathering) => {
                let difference = job.plan.spec.first_difference(&newcomer.hello.plan);
                if difference.is_some() {
                    return self.check_plan(newcomer.hello);
                }
                job.run = run;
                job.life = Life::Recovering(Recovery::new(now));
                job.rounds = Rounds::new(job.plan.clone(), self.config.shard, Step(0));
                self.observe_recovery(newcomer.place, out);
                self.refuse_the_inelastic(out);
                Ok(())
            }
            Some(job) if self.config.shard == ShardId(0) || job.members.connected_count() > 0 => {
                Err(Refusal(
                    RefusalCode::Superseded,
                    "another start of the job is under way: join again".to_owned(),
                ))
            }
            _ => {
                // Nobody of an earlier start is connected, and shard 0 has begun another.
                let job = self.new_job(
                    &newcomer.hello.plan,
                    Step(0),
                    Life::Recovering(Recovery::new(now)),
                )?;
                self.forget_job(out);
                self.job = Some(Job { run, ..job });
                self.observe_recovery(newcomer.place, out);
                Ok(())
            }
        }
    }

    fn observe_recovery(&self, place: &Place, out: &mut Vec<Action>) {
        out.push(Action::Observe(Observation::Recovering {
            members: place.members.len() as u16,
        }));
    }

    /// Whether the rank is this worker's.
    fn check_place(&self, newcomer: &Newcomer<'_>) -> Result<(), Refusal> {
        let Some(job) = &self.job else {
            return Ok(());
        };
        let (rank, place) = (newcomer.place.rank, newcomer.place);
        let superseded = |detail: String| Err(Refusal(RefusalCode::Superseded, detail));
        let last = *job.rounds.window().end();
        if job.is_running() && job.rounds.buckets_here() > 0 && newcomer.step.0 > last {
            return superseded(format!(
                "rank {rank} is at step {}, but the job is at step {} and went another way while it was cut off: join again",
                newcomer.step,
                job.rounds.step()
            ));
        }
        let removed = || {
            superseded(format!(
                "rank {rank} was away too long and is no member any more (epoch {}): join again",
                job.members.epoch
            ))
        };
        let known = job.members.get(rank);
        let other = known.and_then(|member| member.incarnation);
        if other.is_some_and(|other| other != newcomer.hello.incarnation) {
            return superseded(format!("rank {rank} is another worker: join again"));
        }
        // Shard 0 knows all members once it runs; the others learn of new ones by their coming.
        let authority = self.config.shard == ShardId(0) && job.is_running();
        let outdated = place.epoch <= job.members.epoch && !job.members.listed.contains(&rank);
        if outdated || authority && known.is_none() {
            return removed();
        }
        Ok(())
    }

    pub(super) fn welcome(&self, session: SessionId, rank: Rank, out: &mut Vec<Action>) {
        let Some(job) = &self.job else {
            return;
        };
        let told = job.members.get(rank).map(|member| member.told);
        out.push(Action::Control {
            session,
            message: Control::Welcome(Welcome {
                shard_incarnation: self.config.incarnation,
                retell: told != Some(Told::All),
                place: job.members.place(job.run, rank),
                step: job.rounds.step(),
                snapshot: false,
            }),
        });
    }

    /// Removes a peer, telling it why.
    pub(super) fn turn_out(
        &mut self,
        now: Duration,
        session: SessionId,
        code: RefusalCode,
        detail: String,
        out: &mut Vec<Action>,
    ) {
        refuse(session, code, &detail, out);
        self.depart(now, session, Departure::Lost(detail), out);
    }
}

impl Member {
    pub(super) fn new(hello: &Hello, session: SessionId, step: Step, now: Duration) -> Self {
        Self {
            host: hello.host.clone(),
            incarnation: Some(hello.incarnation),
            link: Link::Connected(session),
            waited: Waited::From(step),
            step,
            told: Told::Partly { got: 0, of: None },
            early: Vec::new(),
            since: now,
            report: None,
            waited_for_seconds: 0.0,
            lateness: Lateness::default(),
        }
    }

    /// It is connected (again), and has told nothing since unless it has told everything before.
    fn come_back(&mut self, hello: &Hello, step: Step, waited: Option<Step>) {
        self.host.clone_from(&hello.host);
        self.incarnation = Some(hello.incarnation);
        self.step = self.step.max(step);
        self.waited = waited.map_or(Waited::Joining, Waited::From);
        self.early.clear();
        if self.told != Told::All {
            self.told = Told::Partly { got: 0, of: None };
        }
    }
}

impl Applicant {
    /// As a member of `rank` that has nothing to tell.
    pub(super) fn member(&self, step: Step, waited: Waited, now: Duration) -> Member {
        Member {
            host: self.host.clone(),
            incarnation: Some(self.incarnation),
            link: Link::Connected(self.session),
            waited,
            step,
            told: Told::All,
            early: Vec::new(),
            since: now,
            report: None,
            waited_for_seconds: 0.0,
            lateness: Lateness::default(),
        }
    }
}
