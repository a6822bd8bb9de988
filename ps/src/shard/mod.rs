//! The shard as a deterministic state machine without sockets, clock or randomness.
//!
//! [`Shard::handle`] takes what happened and appends what is to be done. The shell around it
//! ([`crate::server`]) moves bytes and decides nothing; tests and the in-memory cluster drive it directly.
//!
//! # Membership
//! `empty → gathering → running → empty`. Shard 0 gathers until the world is complete, then gives ranks: those asked
//! for, else the lowest free in order of arrival. The other shards admit the ranks that shard 0 gave at once, and wait in
//! their rounds for those that are still on their way. A member that leaves, is lost or breaks the
//! protocol is removed, the epoch grows, and open rounds close with those present; under ef21's rules, whose estimates
//! a lost worker takes along, the job ends instead. When nobody
//! is left the shard is ready for another start of the job.
//!
//! Shards notice at different moments that workers have died, so that shard 0 may begin the next start of the job while
//! another shard still has members of the last: there its workers wait until the dead ones are gone (`successors.rs`).
//!
//! # Rounds
//! Keyed by (step, bucket); see `round.rs`. Steps are accepted in a window of two: the
//! lowest with a bucket not yet closed, and the next.
//!
//! # Bounds
//! A member can have at most one frame in each round of the window, each of the exact length that the plan gives, so a session
//! parks at most 2 × (the shard's share of a step); [`Limits`] bounds that too. All tables are B-trees: no
//! iteration order depends on addresses or hashes.
//!
//! # Not here
//! Rejoining a running job, quorums and timeouts of stragglers.

pub mod aggregate;
mod answer;
mod event;
mod members;
mod round;
mod rounds;
mod status;
mod successors;
#[cfg(test)]
mod tests;
mod union;

pub use event::{
    Action, Event, Observation, Outcome, Report, RoundClosed, SessionId, ShardConfig, Traffic,
};
pub use status::{
    JournalLine, LossPoint, MemberStatus, OpenRound, PlanStatus, Stage, Status, Totals,
};

use arc_topk_common::ids::{Epoch, Step};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Control, RefusalCode, RoundShape};
use core::time::Duration;
use members::{Departure, Members, Session};
use rounds::Rounds;
use status::Board;
use std::collections::BTreeMap;
use std::sync::Arc;
use successors::Successor;

/// Steps beyond the current one that a frame may name.
pub const STEP_WINDOW: u64 = 1;
/// After the first worker, how long a shard other than 0 waits for the ranks that have not come yet. Workers dial all
/// shards at once, so this is several times the longest attempt that succeeds.
pub const JOIN_GRACE: Duration = Duration::from_secs(10);
/// Highest step at which a job may start: steps that follow never come near the end of their type.
pub const LAST_START_STEP: Step = Step(1 << 62);

/// Bounds beyond those that the plan implies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Bytes of one session's frames that may wait for their turn in the sums.
    pub parked_bytes_per_session: usize,
    /// Elements of a plan, all tensors together.
    pub elements: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            parked_bytes_per_session: 2 << 30,
            elements: 1 << 36,
        }
    }
}

/// One start of the job, from its first Hello until nobody is left.
#[derive(Debug)]
struct Job {
    plan: Arc<Plan>,
    start_step: Step,
    members: Members,
    rounds: Rounds,
}

impl Job {
    fn keeps_estimates(&self) -> bool {
        self.plan.spec.algorithm.keeps_estimates()
    }
}

/// How much the machine holds now.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Load {
    /// Workers.
    pub members: u16,
    /// Version of the membership.
    pub epoch: Epoch,
    /// Rounds that wait for someone.
    pub open_rounds: usize,
    /// Bytes of frames that wait for their turn.
    pub parked_bytes: usize,
    /// Newest step that a worker reported, and the mean of all workers' latest losses that are finite; NaN if none is.
    pub training: Option<(Step, f64)>,
}

/// The machine. See the module.
#[derive(Debug)]
pub struct Shard {
    config: ShardConfig,
    limits: Limits,
    job: Option<Job>,
    sessions: BTreeMap<SessionId, Session>,
    /// Never on shard 0.
    successors: BTreeMap<SessionId, Successor>,
    board: Board,
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
            sessions: BTreeMap::new(),
            successors: BTreeMap::new(),
            board: Board::default(),
        }
    }

    /// What it was told at its start.
    #[must_use]
    pub fn config(&self) -> &ShardConfig {
        &self.config
    }

    /// Whether the world is complete (shard 0), or workers have come (others).
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.job
            .as_ref()
            .is_some_and(|job| job.members.is_running())
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

    /// How much it holds now.
    #[must_use]
    pub fn load(&self) -> Load {
        let Some(job) = &self.job else {
            return Load::default();
        };
        let reports: Vec<Report> = self.sessions.values().filter_map(|s| s.report).collect();
        let step = reports.iter().map(|report| report.step).max();
        // One worker's overflow says nothing of the others' losses.
        let finite = reports.iter().map(|report| f64::from(report.loss));
        let finite: Vec<f64> = finite.filter(|loss| loss.is_finite()).collect();
        let loss = finite.iter().sum::<f64>() / finite.len() as f64;
        Load {
            members: job.members.count() as u16,
            epoch: job.members.epoch(),
            open_rounds: job.rounds.open().count(),
            parked_bytes: job
                .rounds
                .open()
                .map(|(.., round)| round.all_parked_bytes())
                .sum(),
            training: step.map(|step| (step, loss)),
        }
    }

    /// Takes one event and appends what follows from it. `now` counts from any fixed moment and never falls.
    /// Never panics, whatever a peer sends.
    pub fn handle(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        let first = out.len();
        match event {
            Event::Hello { session, hello } => self.hello(now, session, *hello, out),
            Event::Round {
                session,
                header,
                body,
            } => self.frame(now, session, header, body, out),
            Event::Report { session, report } => self.report(session, report, out),
            Event::Leave { session } => self.depart(now, session, Departure::Left, out),
            Event::Closed { session, reason } => {
                self.depart(now, session, Departure::Lost(reason), out)
            }
            Event::Violation { session, detail } => self.violation(now, session, detail, out),
            Event::Shutdown { reason } => {
                let detail = format!(
                    "shard {} shuts down: {reason}; start it again, then the job from its last checkpoint",
                    self.config.shard
                );
                self.end_job(RefusalCode::Shutdown, &detail, out);
                for session in core::mem::take(&mut self.successors).into_keys() {
                    refuse(session, RefusalCode::Shutdown, &detail, out);
                }
            }
            Event::Tick => {}
        }
        self.drop_awaited_too_long(now, out);
        self.attend_successors(now, out);
        let observed = out[first..].iter().filter_map(|action| match action {
            Action::Observe(observation) => Some(observation),
            _ => None,
        });
        self.board.record(now, observed);
    }

    fn report(&mut self, session: SessionId, report: Report, out: &mut Vec<Action>) {
        let (Some(member), Some(job)) = (self.sessions.get_mut(&session), &self.job) else {
            return;
        };
        // A report follows its step. (A shard that owns nothing of any bucket sees no steps.)
        if job.rounds.buckets_here() > 0 && report.step > job.rounds.step() {
            return;
        }
        member.report = Some(report);
        if let Some(rank) = member.rank {
            out.push(Action::Observe(Observation::Reported { rank, report }));
        }
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
        if !self.knows(session) {
            return;
        }
        refuse(session, RefusalCode::Protocol, &detail, out);
        self.depart(now, session, Departure::Lost(detail), out);
    }

    /// Whether the session said Hello and was not removed since.
    fn knows(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session) || self.successors.contains_key(&session)
    }

    /// Tells every session why, closes all, and forgets the job.
    fn end_job(&mut self, code: RefusalCode, detail: &str, out: &mut Vec<Action>) {
        for session in core::mem::take(&mut self.sessions).into_keys() {
            refuse(session, code, detail, out);
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

/// Largest body that a round of this shape takes from a worker.
fn largest_body(shape: &RoundShape) -> usize {
    shape
        .phases()
        .iter()
        .map(|phase| shape.body_limit(phase.up))
        .max()
        .unwrap_or(0)
}
