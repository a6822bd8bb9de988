//! Shard 0: workers that want a place. They gather until the world is complete, or, once the job runs, get the state of
//! another worker first.
//!
//! A running job takes a worker in without a pause: a member (the *donor*) puts a snapshot of the replica, which is the same
//! on all workers, into the store at the end of its step. The newcomer then gets the next rank and the snapshot's step; it
//! fetches the snapshot, replays the answers of the steps since, and says when rounds are to wait for it.

use super::event::{Action, Observation, SessionId, ShardConfig};
use super::hello::Refusal;
use super::leaving::MEMBER_TIMEOUT;
use super::members::Waited;
use super::{Job, Life, Shard};
use arc_topk_common::ids::{Epoch, Rank, RunId, Step};
use arc_topk_common::plan::PlanSpec;
use arc_topk_common::wire::{Control, Hello, Intent, JoinWhen, MAX_WORLD, RefusalCode, Welcome};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// How long a donor may take before another one is asked.
const DONOR_TIMEOUT: Duration = Duration::from_secs(600);
const NOTHING_RUNS: &str = "no job runs that this worker could join, and it has no state to start one from: start the job again from its newest snapshot or checkpoint";
const RUNS_ALREADY: &str = "the job runs already, and this worker cannot take its state from a snapshot: wait until the job ends";

/// A worker that wants a place.
#[derive(Clone, Debug)]
pub(super) struct Applicant {
    pub(super) session: SessionId,
    pub(super) host: String,
    pub(super) incarnation: [u8; 16],
    asked: Option<Rank>,
    start: Step,
    when: JoinWhen,
    /// Who was asked to help it.
    donor: Option<Donor>,
}

/// A member that was asked for a snapshot.
#[derive(Clone, Copy, Debug)]
struct Donor {
    rank: Rank,
    since: Duration,
    /// Over which connection: one that comes on another may not have heard.
    session: Option<SessionId>,
}

impl Shard {
    /// A worker wants to join.
    pub(super) fn apply(
        &mut self,
        now: Duration,
        session: SessionId,
        hello: &Hello,
        out: &mut Vec<Action>,
    ) -> Result<(), Refusal> {
        let Intent::Join {
            rank,
            start_step,
            when,
            ..
        } = hello.intent
        else {
            return Ok(());
        };
        let applicant = Applicant {
            session,
            host: hello.host.clone(),
            incarnation: hello.incarnation,
            asked: rank,
            start: start_step,
            when,
            donor: None,
        };
        self.check_plan(hello)?;
        self.gather(now, applicant, &hello.plan)?;
        let Some(job) = &self.job else {
            return Ok(());
        };
        let joined = (job.applicants.len() + job.members.connected_count()) as u16;
        out.push(Action::Observe(Observation::Joined {
            session,
            rank: None,
            host: hello.host.clone(),
            joined,
        }));
        self.start_or_wait(now, out);
        Ok(())
    }

    fn check_applicant(&self, now: Duration, applicant: &Applicant) -> Result<(), Refusal> {
        let gathers = self
            .job
            .as_ref()
            .is_none_or(|job| matches!(job.life, Life::Gathering));
        if gathers && applicant.when == JoinWhen::Running && !self.is_patient(now) {
            return Err(Refusal(RefusalCode::World, NOTHING_RUNS.to_owned()));
        }
        let Some(job) = &self.job else {
            return self.check_asked(applicant);
        };
        if job.applicants.len() >= MAX_WORLD {
            let detail = "too many workers wait to join: start fewer".to_owned();
            return Err(Refusal(RefusalCode::World, detail));
        }
        if !matches!(job.life, Life::Gathering) {
            return match applicant.when {
                JoinWhen::Start => Err(Refusal(RefusalCode::World, RUNS_ALREADY.to_owned())),
                JoinWhen::Any | JoinWhen::Running => Ok(()),
            };
        }
        self.check_asked(applicant)?;
        let taken = job
            .applicants
            .iter()
            .find(|other| other.asked.is_some() && other.asked == applicant.asked);
        if let (Some(other), Some(rank)) = (taken, applicant.asked) {
            return Err(Refusal(
                RefusalCode::Rank,
                format!(
                    "rank {rank} is taken by {}: give every worker a rank of its own, or none",
                    other.host
                ),
            ));
        }
        match job.applicants.first() {
            Some(first) if first.start != applicant.start => Err(Refusal(
                RefusalCode::Step,
                format!(
                    "the worker starts at step {}, the others at step {}: resume all workers from checkpoints of one step",
                    applicant.start, first.start
                ),
            )),
            _ => Ok(()),
        }
    }

    fn check_asked(&self, applicant: &Applicant) -> Result<(), Refusal> {
        match applicant.asked.filter(|rank| rank.0 >= self.config.world) {
            None => Ok(()),
            Some(rank) => Err(Refusal(
                RefusalCode::Rank,
                format!(
                    "rank {rank} is out of range: a world of {} has ranks 0 to {}",
                    self.config.world,
                    self.config.world.saturating_sub(1)
                ),
            )),
        }
    }

    /// Gives ranks when the world is complete, else says how many are there.
    pub(super) fn start_or_wait(&mut self, now: Duration, out: &mut Vec<Action>) {
        let (world, patient) = (self.config.world, self.is_patient(now));
        if !patient {
            self.refuse_those_that_have_nothing_to_join(out);
        }
        let Some(job) = &mut self.job else {
            return;
        };
        let gathering = matches!(job.life, Life::Gathering);
        if !gathering || job.applicants.len() < usize::from(world) || patient {
            let joined = job.applicants.len() + job.members.connected_count();
            let message = Control::Waiting {
                joined: joined as u16,
                world: if gathering {
                    world
                } else {
                    self.config.max_workers
                },
            };
            out.extend(job.applicants.iter().map(|applicant| Action::Control {
                session: applicant.session,
                message: message.clone(),
            }));
            return;
        }
        let mut applicants = core::mem::take(&mut job.applicants);
        // More than the world may have gathered. Ranks that were asked for are kept for those who did.
        applicants.sort_by_key(|applicant| applicant.asked.is_none());
        let most = usize::from(self.config.max_workers.max(world));
        job.applicants = applicants.split_off(applicants.len().min(most));
        let start = applicants.first().map_or(Step(0), |first| first.start);
        // Of nothing that a worker keeps to itself: all members know it.
        self.starts += 1;
        let run = u128::from(self.starts) << 64 | u128::from(self.config.incarnation);
        job.run = RunId(run.to_le_bytes());
        job.life = Life::Running;
        job.rounds.begin();
        let given = give_ranks(&applicants);
        let ranks: Vec<Rank> = given.keys().copied().collect();
        let next_rank = ranks.last().map_or(0, |rank| rank.0.saturating_add(1));
        job.members.learn(Epoch(1), next_rank.max(world), &ranks);
        let mut welcomes = Vec::with_capacity(given.len());
        for (rank, applicant) in given {
            let member = applicant.member(start, Waited::From(start), now);
            welcomes.push((applicant.session, rank));
            job.members.insert(rank, member);
        }
        for (session, rank) in welcomes {
            self.welcome(session, rank, out);
        }
        out.push(Action::Observe(Observation::Started {
            epoch: Epoch(1),
            world,
            step: start,
        }));
        self.refuse_the_inelastic(out);
    }

    /// Members of a job that was here may still be about to come.
    fn is_patient(&self, now: Duration) -> bool {
        self.born
            .is_some_and(|born| now < born + self.config.start_grace)
    }

    /// When a world that is complete begins, if it has to wait; and when it is known that no job runs.
    pub(super) fn start_deadline(&self) -> Option<Duration> {
        let job = self.job.as_ref()?;
        let complete = job.applicants.len() >= usize::from(self.config.world);
        let joins = |applicant: &Applicant| applicant.when == JoinWhen::Running;
        let decides = complete || job.applicants.iter().any(joins);
        let waits = matches!(job.life, Life::Gathering) && decides;
        self.born
            .filter(|_| waits)
            .map(|born| born + self.config.start_grace)
    }

    pub(super) fn start_after_grace(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.start_deadline().is_some_and(|due| due <= now) {
            self.start_or_wait(now, out);
        }
    }

    /// Asks donors for those that wait, while there is room.
    pub(super) fn attend_applicants(&mut self, now: Duration, out: &mut Vec<Action>) {
        let Some(job) = &mut self.job else {
            return;
        };
        if job.applicants.is_empty() || !job.is_running() {
            return;
        }
        let room = job.room(&self.config);
        let members = &job.members;
        let can_donate = |rank: Rank| {
            members.get(rank).is_some_and(|member| {
                member.session().is_some() && matches!(member.waited, Waited::From(_))
            })
        };
        let mut asked = BTreeSet::new();
        for applicant in job.applicants.iter_mut().take(room) {
            let late = |since: Duration| now.saturating_sub(since) >= DONOR_TIMEOUT;
            let before = applicant.donor;
            let stands = before.filter(|donor| can_donate(donor.rank) && !late(donor.since));
            // The next one after the donor that failed, from the first again after the last.
            let next = || {
                let able = || {
                    members
                        .iter()
                        .map(|(rank, _)| rank)
                        .filter(|r| can_donate(*r))
                };
                let after = able().find(|rank| before.is_some_and(|failed| *rank > failed.rank));
                let rank = after.or_else(|| able().next())?;
                Some(Donor {
                    rank,
                    since: now,
                    session: None,
                })
            };
            applicant.donor = stands.or_else(next);
            if let Some(donor) = &mut applicant.donor {
                let session = members.session(donor.rank);
                if donor.session != session {
                    donor.session = session;
                    asked.extend(session);
                }
            }
        }
        // Those beyond lost their room to members that came back.
        for applicant in job.applicants.iter_mut().skip(room) {
            applicant.donor = None;
        }
        out.extend(asked.into_iter().map(|session| Action::Control {
            session,
            message: Control::Donate,
        }));
    }

    /// A donor has put its snapshot into the store.
    pub(super) fn donated(
        &mut self,
        now: Duration,
        session: SessionId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        let config = self.config.clone();
        let Some((job, donor)) = self.member_of(session) else {
            return;
        };
        let helped =
            |applicant: &Applicant| applicant.donor.is_some_and(|asked| asked.rank == donor);
        // A coordinator that was restarted meanwhile, or those that waited are gone: nobody asks for it any more.
        if !job.is_running() || !job.applicants.iter().any(helped) {
            return;
        }
        let seen = job.rounds.buckets_here() > 0;
        if step > super::LAST_START_STEP || seen && step > job.rounds.step() {
            let detail = format!(
                "rank {donor} gives a snapshot of step {step}, but the job is at step {}: run the same release everywhere",
                job.rounds.step()
            );
            return self.violation(now, session, detail, out);
        }
        job.rounds.pin(now, step);
        // Members that came back meanwhile have taken their room.
        let mut room = job.room(&config);
        let mut served = Vec::new();
        for mut applicant in core::mem::take(&mut job.applicants) {
            if helped(&applicant) && room > 0 {
                room -= 1;
                served.push(applicant);
            } else {
                applicant.donor = applicant.donor.filter(|asked| asked.rank != donor);
                job.applicants.push(applicant);
            }
        }
        for applicant in served {
            self.admit(now, &applicant, step, out);
        }
    }

    /// The job has ended, and those that wait begin anew, as if they had come now. It had come to step `at`: whoever would
    /// start before that looks first whether there is a snapshot by now, and comes again.
    pub(super) fn start_anew(
        &mut self,
        now: Duration,
        applicants: Vec<Applicant>,
        spec: &PlanSpec,
        at: Step,
        out: &mut Vec<Action>,
    ) {
        for mut applicant in applicants {
            applicant.donor = None;
            let gathered = if applicant.start < at {
                let detail = format!(
                    "the job for which the worker waited has ended at step {at}, and it starts at step {}: look for the newest snapshot, and come again",
                    applicant.start
                );
                Err(Refusal(RefusalCode::Step, detail))
            } else {
                self.gather(now, applicant.clone(), spec)
            };
            if let Err(Refusal(code, detail)) = gathered {
                super::refuse(applicant.session, code, &detail, out);
            }
        }
        self.start_or_wait(now, out);
    }

    /// Takes in one that wants a place.
    fn gather(
        &mut self,
        now: Duration,
        applicant: Applicant,
        spec: &PlanSpec,
    ) -> Result<(), Refusal> {
        self.check_applicant(now, &applicant)?;
        if self.job.is_none() {
            self.job = Some(self.new_job(spec, applicant.start, Life::Gathering)?);
        }
        if let Some(job) = &mut self.job {
            job.applicants.push(applicant);
        }
        Ok(())
    }

    /// No member of a job has come in the time that they had: those that have lost their state cannot start one.
    fn refuse_those_that_have_nothing_to_join(&mut self, out: &mut Vec<Action>) {
        let gathering = |job: &&mut Job| matches!(job.life, Life::Gathering);
        let Some(job) = self.job.as_mut().filter(gathering) else {
            return;
        };
        let joins = |applicant: &mut Applicant| applicant.when == JoinWhen::Running;
        for applicant in job.applicants.extract_if(.., joins) {
            let code = RefusalCode::World;
            super::refuse(applicant.session, code, NOTHING_RUNS, out);
        }
        if job.applicants.is_empty() {
            self.forget_job(out);
        }
    }

    /// The job runs already: those that wait and cannot take their state from a snapshot are refused.
    pub(super) fn refuse_the_inelastic(&mut self, out: &mut Vec<Action>) {
        let Some(job) = &mut self.job else {
            return;
        };
        let inelastic = |applicant: &mut Applicant| applicant.when == JoinWhen::Start;
        for applicant in job.applicants.extract_if(.., inelastic) {
            super::refuse(applicant.session, RefusalCode::World, RUNS_ALREADY, out);
        }
    }

    fn admit(&mut self, now: Duration, applicant: &Applicant, step: Step, out: &mut Vec<Action>) {
        let incarnation = self.config.incarnation;
        let Some(job) = &mut self.job else {
            return;
        };
        let rank = Rank(job.members.next_rank);
        let session = applicant.session;
        let Some(next_rank) = rank.0.checked_add(1) else {
            let detail =
                "this run has given all 65535 ranks: start the job again from its last snapshot";
            return super::refuse(session, RefusalCode::World, detail, out);
        };
        let mut listed: Vec<Rank> = job.members.listed.iter().copied().collect();
        listed.push(rank);
        let epoch = Epoch(job.members.epoch.0.saturating_add(1));
        job.members.learn(epoch, next_rank, &listed);
        job.members
            .insert(rank, applicant.member(step, Waited::Joining, now));
        out.push(Action::Control {
            session,
            message: Control::Welcome(Welcome {
                shard_incarnation: incarnation,
                retell: false,
                place: job.members.place(job.run, rank),
                step,
                snapshot: true,
            }),
        });
        out.push(Action::Observe(Observation::JoinedLater { rank, step }));
        self.tell_members(&format!("rank {rank} ({}) joins", applicant.host), out);
    }

    /// Somebody is going to replay the rounds from `step` on.
    pub(super) fn donating(&mut self, now: Duration, session: SessionId, step: Step) {
        if let Some((job, _)) = self.member_of(session) {
            job.rounds.pin(now, step);
        }
    }

    /// A member has caught up, or can reach all shards again.
    pub(super) fn ready(
        &mut self,
        now: Duration,
        session: SessionId,
        step: Step,
        out: &mut Vec<Action>,
    ) {
        let Some((job, rank)) = self.member_of(session) else {
            return;
        };
        if let Some(member) = job.members.get_mut(rank) {
            let cut_off = member.waited == Waited::CutOff;
            member.waited = Waited::From(step);
            member.step = member.step.max(step.min(super::LAST_START_STEP));
            if cut_off {
                job.members.one_is_back(now);
            }
        }
        self.advance_all(now, out);
    }

    /// A member cannot reach another shard.
    pub(super) fn cut_off(&mut self, now: Duration, session: SessionId, out: &mut Vec<Action>) {
        let Some((job, rank)) = self.member_of(session) else {
            return;
        };
        if let Some(member) = job.members.get_mut(rank) {
            member.waited = Waited::CutOff;
        }
        self.advance_all(now, out);
    }
}

impl Job {
    /// Workers that may come in.
    fn room(&self, config: &ShardConfig) -> usize {
        let max = usize::from(config.max_workers.max(config.world));
        max.saturating_sub(self.members.connected_count())
    }

    pub(super) fn applicants_deadline(&self) -> Option<Duration> {
        let donors = self
            .applicants
            .iter()
            .filter_map(|applicant| Some(applicant.donor?.since + DONOR_TIMEOUT));
        // Members that are all away may come back; when they do not, those that wait start the job anew.
        let away = self.members.away().map(|(_, since)| since).max();
        let all_away = away
            .filter(|_| !self.applicants.is_empty() && self.members.connected_count() == 0)
            .map(|since| since + MEMBER_TIMEOUT);
        donors.chain(all_away).min()
    }
}

/// Ranks asked for are honoured; the others get the lowest free in order of arrival.
fn give_ranks(applicants: &[Applicant]) -> BTreeMap<Rank, &Applicant> {
    let mut given: BTreeMap<Rank, &Applicant> = applicants
        .iter()
        .filter_map(|applicant| applicant.asked.map(|rank| (rank, applicant)))
        .collect();
    for applicant in applicants.iter().filter(|a| a.asked.is_none()) {
        let free = (0..=u16::MAX)
            .map(Rank)
            .find(|rank| !given.contains_key(rank));
        given.insert(free.expect("a world has at most 65535 workers"), applicant);
    }
    given
}
