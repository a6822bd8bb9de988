//! The shard as a deterministic state machine without sockets, clock or randomness.
//!
//! [`Shard::handle`] takes what happened and appends what is to be done. The shell around it
//! ([`crate::server`]) moves bytes and decides nothing; tests, the in-memory cluster and the simulator drive it directly.
//!
//! # Life of a job
//!
//! | stage | event | next |
//! |---|---|---|
//! | empty | shard 0: a worker that joins | gathering |
//! | empty | a member of a running job (any shard) | recovering |
//! | gathering (shard 0) | the world is complete | running: ranks are given |
//! | gathering | a member of a running job: this process was restarted | recovering; who gathered waits to join |
//! | recovering | all listed members have come and told what they hold, or [`RECOVERY_GRACE`] has passed | running |
//! | running | the last member is gone | empty |
//!
//! A first start looks like a recovery to shards other than 0, with nothing to tell. Shard 0 alone gives ranks and keeps
//! the list of members; workers pass that on to the other shards. For whom its rounds wait every shard decides by itself:
//! `members.rs`. Joining a running job: `joining.rs`; losing and leaving: `leaving.rs`; being told: `recovery.rs`.
//!
//! # Rounds
//! Keyed by (step, bucket); see `round.rs` and `rounds/`. New rounds are taken in a window of two steps: the
//! lowest with a bucket not yet closed, and the next. Answers of the last [`RETAIN_STEPS`] are kept for workers that come
//! late; nothing else is kept between rounds.
//!
//! # Bounds
//! A member can have at most one frame in each round of the window, each of the exact length that the plan gives, so a session
//! parks at most 2 × (the shard's share of a step); [`Limits`] bounds that and what is retained. All tables are B-trees: no
//! iteration order depends on addresses or hashes.

pub mod aggregate;
mod answer;
pub mod any_bytes;
mod digests;
mod event;
mod frames;
mod hello;
mod joining;
mod leaving;
mod members;
mod phase;
mod recovery;
mod reply;
mod round;
mod rounds;
mod status;
mod stragglers;
mod successors;
#[cfg(test)]
mod tests;
mod union;

pub use event::{
    Action, Event, Observation, Outcome, Report, RoundClosed, SessionId, ShardConfig, Traffic,
};
pub use leaving::MEMBER_TIMEOUT;
pub use members::RETURN_GRACE;
pub use recovery::RECOVERY_GRACE;
pub use rounds::RETAIN_STEPS;
pub use status::{
    JournalLine, LossPoint, MemberStatus, OpenRound, PlanStatus, Stage, Standing, Status, Totals,
};

use arc_topk_common::ids::{Epoch, Rank, RunId, ShardId, Step};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Control, Direction, MAX_ROSTER_BYTES, RefusalCode, RoundShape};
use core::time::Duration;
use digests::Digests;
use joining::Applicant;
use members::Members;
use phase::ClosingRules;
use recovery::Recovery;
use rounds::Rounds;
use status::Board;
use std::collections::BTreeMap;
use std::sync::Arc;
use successors::Successor;

/// Steps beyond the current one that a frame may name.
pub const STEP_WINDOW: u64 = 1;
/// How long workers of the next start of the job wait at a shard other than 0 for those of the last to be gone.
pub const JOIN_GRACE: Duration = Duration::from_secs(10);
/// Highest step at which a job may start: steps that follow never come near the end of their type.
pub const LAST_START_STEP: Step = Step(1 << 62);

/// Bounds beyond those that the plan implies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes of one session's frames that may wait for their turn in the sums.
    pub parked_bytes_per_session: usize,
    /// Bytes of answers that are kept for workers that come late.
    pub retained_bytes: usize,
    /// Elements of a plan, all tensors together.
    pub elements: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            parked_bytes_per_session: 2 << 30,
            retained_bytes: 1 << 30,
            elements: 1 << 36,
        }
    }
}

/// Where a job is in its life.
#[derive(Debug)]
enum Life {
    Gathering,
    Recovering(Recovery),
    Running,
}

/// One start of the job, from its first Hello until nobody is left.
#[derive(Debug)]
struct Job {
    plan: Arc<Plan>,
    run: RunId,
    life: Life,
    members: Members,
    /// A member has left in order: training comes to its end.
    ends: bool,
    /// Shard 0: those that want a place.
    applicants: Vec<Applicant>,
    rounds: Rounds,
    digests: Digests,
}

impl Job {
    fn is_running(&self) -> bool {
        matches!(self.life, Life::Running)
    }
}

/// How much the machine holds now.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Load {
    /// Workers that are connected.
    pub members: u16,
    /// Members that are not connected.
    pub away: u16,
    /// Version of the membership.
    pub epoch: Epoch,
    /// Rounds that wait for someone.
    pub open_rounds: usize,
    /// Bytes of frames that wait for their turn.
    pub parked_bytes: usize,
    /// Closed rounds whose answers are kept.
    pub retained_rounds: usize,
    /// Bytes of those answers.
    pub retained_bytes: usize,
    /// Newest step that a worker reported, and the mean of all workers' latest losses that are finite; NaN if none is.
    pub training: Option<(Step, f64)>,
}

/// The machine. See the module.
#[derive(Debug)]
pub struct Shard {
    config: ShardConfig,
    limits: Limits,
    job: Option<Job>,
    /// Never on shard 0.
    successors: BTreeMap<SessionId, Successor>,
    board: Board,
    /// Of the first event.
    born: Option<Duration>,
    /// How often the job has started here.
    starts: u64,
    /// When time alone may change something.
    deadline: Option<Duration>,
}

impl Shard {
    /// An empty shard.
    #[must_use]
    pub fn new(config: ShardConfig) -> Self {
        Self::with_limits(config, Limits::default())
    }

    /// An empty shard with bounds of its own.
    #[must_use]
    pub fn with_limits(config: ShardConfig, limits: Limits) -> Self {
        Self {
            config,
            limits,
            job: None,
            successors: BTreeMap::new(),
            board: Board::default(),
            born: None,
            starts: 0,
            deadline: None,
        }
    }

    /// What it was told at its start.
    #[must_use]
    pub fn config(&self) -> &ShardConfig {
        &self.config
    }

    /// Whether rounds are formed.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.job.as_ref().is_some_and(Job::is_running)
    }

    /// Largest frame body that a member may send under the current plan, bytes; 0 without a job.
    /// The shell refuses longer ones before it reads them.
    #[must_use]
    pub fn body_limit(&self) -> usize {
        self.job.as_ref().map_or(0, |job| job.rounds.body_limit())
    }

    /// Rounds that a member may have open at once under the current plan; 0 without a job.
    #[must_use]
    pub fn open_rounds_limit(&self) -> usize {
        self.job.as_ref().map_or(0, |job| job.rounds.open_limit())
    }

    /// When a [`Event::Tick`] is needed at the latest, if nothing else happens before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// How much it holds now.
    #[must_use]
    pub fn load(&self) -> Load {
        let Some(job) = &self.job else {
            return Load::default();
        };
        let reports = job.members.iter().filter_map(|(_, member)| member.report);
        let reports: Vec<Report> = reports.collect();
        let step = reports.iter().map(|report| report.step).max();
        // One worker's overflow says nothing of the others' losses.
        let finite = reports.iter().map(|report| f64::from(report.loss));
        let finite: Vec<f64> = finite.filter(|loss| loss.is_finite()).collect();
        let loss = finite.iter().sum::<f64>() / finite.len() as f64;
        let (retained_rounds, retained_bytes) = job.rounds.retained();
        let connected =
            job.members.connected_count() + usize::from(!job.is_running()) * job.applicants.len();
        Load {
            members: connected as u16,
            away: job.members.away().count() as u16,
            epoch: job.members.epoch,
            open_rounds: job.rounds.open().count(),
            parked_bytes: job
                .rounds
                .open()
                .map(|(.., round)| round.all_parked_bytes())
                .sum(),
            retained_rounds,
            retained_bytes,
            training: step.map(|step| (step, loss)),
        }
    }

    /// Takes one event and appends what follows from it. `now` counts from any fixed moment and never falls.
    /// Never panics, whatever a peer sends.
    pub fn handle(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        let first = out.len();
        self.born.get_or_insert(now);
        // A frame concerns its own round; anything else may change for whom rounds wait.
        let all_rounds = !matches!(
            event,
            Event::Round { .. } | Event::Report { .. } | Event::Tick
        );
        match event {
            Event::Hello { session, hello } => self.hello(now, session, *hello, out),
            Event::Round {
                session,
                header,
                body,
            } => self.frame(now, session, header, body, out),
            Event::Control { session, message } => self.control(now, session, message, out),
            Event::Report { session, report } => self.report(session, report, out),
            Event::Leave { session } => self.leave(now, session, out),
            Event::Closed {
                session,
                reason,
                for_good,
            } => self.closed(now, session, reason, for_good, out),
            Event::Violation { session, detail } => self.violation(now, session, detail, out),
            Event::Shutdown { reason } => self.shut_down(&reason, out),
            Event::Tick => {}
        }
        self.pass_time(now, all_rounds, out);
        let observed = out[first..].iter().filter_map(|action| match action {
            Action::Observe(observation) => Some(observation),
            _ => None,
        });
        self.board.record(now, observed);
    }

    /// What follows from the time alone.
    fn pass_time(&mut self, now: Duration, all_rounds: bool, out: &mut Vec<Action>) {
        self.end_recovery(now, out);
        self.remove_lost(now, out);
        self.start_after_grace(now, out);
        self.attend_applicants(now, out);
        self.attend_successors(now, out);
        self.end_if_too_few(now, out);
        if all_rounds || self.deadline.is_some_and(|deadline| deadline <= now) {
            self.advance_all(now, out);
        }
        if let Some(job) = &mut self.job {
            job.rounds.members = job.members.count();
            job.rounds.prune(now, &self.limits);
        }
        self.deadline = self.compute_deadline(now);
    }

    fn compute_deadline(&self, now: Duration) -> Option<Duration> {
        let rules = self.rules();
        let job = self.job.as_ref();
        let of_job = job.into_iter().flat_map(|job| {
            [
                job.recovery_deadline(),
                job.members.next_grace_end(now),
                job.rounds.next_deadline(&rules),
                job.removal_deadline(self.config.shard),
                job.applicants_deadline(),
            ]
        });
        let others = [self.successors_deadline(), self.start_deadline()];
        of_job.chain(others).flatten().min()
    }

    fn rules(&self) -> ClosingRules {
        ClosingRules {
            min_workers: self.min_contributions(),
            quorum: self.config.quorum,
            straggler_timeout: self.config.straggler_timeout,
        }
    }

    /// Shard 0 alone heeds the minimum: it knows who is about to join, and no step ends without its rounds.
    fn min_contributions(&self) -> u16 {
        let joining = self.job.as_ref().is_some_and(|job| {
            let there = job.members.connected_count() + job.applicants.len();
            !job.applicants.is_empty() && there >= usize::from(self.config.min_workers)
        });
        if self.config.shard == ShardId(0) && !joining {
            self.config.min_workers.max(1)
        } else {
            1
        }
    }

    /// Whether there are too few members, those that are about to join included.
    fn lacks_members(&self) -> bool {
        self.config.shard == ShardId(0)
            && self.job.as_ref().is_some_and(|job| {
                let members = job.members.count() + job.applicants.len();
                // Who is there is not known before everyone has been heard.
                job.is_running() && members < usize::from(self.config.min_workers)
            })
    }

    /// Whether the job might end if one more member went: those that are away or about to join may not come.
    fn has_none_to_spare(&self) -> bool {
        self.job.as_ref().is_some_and(|job| {
            job.members.connected_count() <= usize::from(self.config.min_workers)
        })
    }

    fn control(
        &mut self,
        now: Duration,
        session: SessionId,
        message: Control,
        out: &mut Vec<Action>,
    ) {
        match message {
            Control::Retelling { frames } => self.retelling(now, session, frames, out),
            Control::Away => self.cut_off(now, session, out),
            Control::Ready { step } => self.ready(now, session, step, out),
            Control::Digest { step, digest } => self.digest(now, session, step, digest, out),
            Control::Donating { step } => self.donating(now, session, step),
            Control::Donated { step } => self.donated(now, session, step, out),
            Control::Membership {
                epoch,
                next_rank,
                members,
                away,
                ..
            } => {
                self.relayed(session, epoch, next_rank, &members, &away);
                self.end_recovery(now, out);
            }
            other => {
                let detail = format!(
                    "a worker does not send {}: run the same release everywhere",
                    other.name()
                );
                self.violation(now, session, detail, out);
            }
        }
    }

    fn report(&mut self, session: SessionId, report: Report, out: &mut Vec<Action>) {
        let Some((job, rank)) = self.member_of(session) else {
            return;
        };
        // A report follows its step. (A shard that owns nothing of any bucket sees no steps.)
        if job.rounds.buckets_here() > 0 && report.step > job.rounds.step() {
            return;
        }
        if let Some(member) = job.members.get_mut(rank) {
            member.report = Some(report);
        }
        out.push(Action::Observe(Observation::Reported { rank, report }));
    }

    /// Refuses a peer for what it did, and removes it. One that is gone already is left alone: what was under way when
    /// it was removed is no further offence.
    fn violation(
        &mut self,
        now: Duration,
        session: SessionId,
        detail: String,
        out: &mut Vec<Action>,
    ) {
        if self.knows(session) {
            self.turn_out(now, session, RefusalCode::Protocol, detail, out);
        }
    }

    /// The job and the rank of a member's session. `None` of any other one, as of a member that was removed meanwhile.
    fn member_of(&mut self, session: SessionId) -> Option<(&mut Job, Rank)> {
        let job = self.job.as_mut()?;
        let rank = job.members.rank(session)?;
        Some((job, rank))
    }

    /// Whether the session said Hello and was not removed since.
    fn knows(&self, session: SessionId) -> bool {
        self.successors.contains_key(&session)
            || self.job.as_ref().is_some_and(|job| {
                job.members.rank(session).is_some()
                    || job.applicants.iter().any(|a| a.session == session)
            })
    }

    /// Ends every session, with or without a job to come back to.
    fn end_sessions(&mut self, code: RefusalCode, detail: &str, out: &mut Vec<Action>) {
        let Some(job) = &self.job else {
            return;
        };
        let members = job.members.sessions().map(|(_, session)| session);
        let applicants = job.applicants.iter().map(|applicant| applicant.session);
        for session in members.chain(applicants) {
            refuse(session, code, detail, out);
        }
    }

    /// Workers keep what is needed to go on with the next incarnation of this shard.
    fn shut_down(&mut self, reason: &str, out: &mut Vec<Action>) {
        let detail = format!(
            "shard {} shuts down: {reason}; workers go on once it is back",
            self.config.shard
        );
        self.end_sessions(RefusalCode::Shutdown, &detail, out);
        for session in core::mem::take(&mut self.successors).into_keys() {
            refuse(session, RefusalCode::Shutdown, &detail, out);
        }
        self.forget_job(out);
    }

    fn forget_job(&mut self, out: &mut Vec<Action>) {
        if self.job.take().is_some() {
            out.push(Action::Observe(Observation::Emptied));
        }
    }
}

/// Sends a refusal and closes.
fn refuse(session: SessionId, code: RefusalCode, detail: &str, out: &mut Vec<Action>) {
    out.push(Action::Observe(Observation::Refused {
        session,
        code,
        detail: detail.to_owned(),
    }));
    out.push(Action::Control {
        session,
        message: Control::Refused {
            code,
            detail: detail.to_owned(),
        },
    });
    out.push(Action::Close {
        session,
        code,
        detail: detail.to_owned(),
    });
}

/// Largest body that a round of this shape takes from a worker: one of its own, or an answer that it tells.
fn largest_body(shape: &RoundShape) -> usize {
    let told = shape.largest_body(Direction::Down) + MAX_ROSTER_BYTES;
    told.max(shape.largest_body(Direction::Up))
}
