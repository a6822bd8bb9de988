//! Members that go: in order, for good, or so that they may come back.
//!
//! A member whose connection is lost stays a member. Rounds wait for it for [`RETURN_GRACE`](super::RETURN_GRACE) and then go
//! on; whenever it comes back it replays what it missed, as long as the answers are kept. Shard 0 removes it from the list
//! after [`MEMBER_TIMEOUT`]; then it must join again.

use super::event::{Action, Observation, SessionId};
use super::{Job, Shard};
use arc_topk_common::ids::{Epoch, Rank, ShardId};
use arc_topk_common::wire::{Control, RefusalCode};
use core::time::Duration;

/// How long a member may be away before shard 0 removes it from the list.
pub const MEMBER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a job without any connected member is remembered.
const JOB_TIMEOUT: Duration = Duration::from_secs(600);

/// How a worker goes.
#[derive(Clone, Debug)]
pub(super) enum Departure {
    /// In order.
    Left,
    /// Lost or removed, and why.
    Lost(String),
}

impl Shard {
    pub(super) fn leave(&mut self, now: Duration, session: SessionId, out: &mut Vec<Action>) {
        self.depart(now, session, Departure::Left, out);
    }

    /// A connection is gone.
    pub(super) fn closed(
        &mut self,
        now: Duration,
        session: SessionId,
        reason: String,
        for_good: bool,
        out: &mut Vec<Action>,
    ) {
        match self.member_of(session) {
            Some((job, rank)) if !for_good => {
                job.members.detach(now, session, true);
                let text = format!("rank {rank} is away: {reason}");
                out.push(Action::Observe(Observation::Away { rank, reason }));
                self.tell_members(&text, out);
            }
            _ => self.depart(now, session, Departure::Lost(reason), out),
        }
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
        let Some(job) = &mut self.job else {
            return;
        };
        if let Some(at) = job.applicants.iter().position(|a| a.session == session) {
            job.applicants.remove(at);
            let remaining = job.applicants.len() as u16;
            out.push(Action::Observe(departed(None, &how, remaining)));
            if job.applicants.is_empty() && job.members.is_empty() {
                return self.forget_job(out);
            }
            return self.start_or_wait(now, out);
        }
        if let Some(rank) = job.members.rank(session) {
            self.remove_member(now, rank, &how, out);
        }
    }

    /// Takes a member out, connected or not.
    fn remove_member(&mut self, now: Duration, rank: Rank, how: &Departure, out: &mut Vec<Action>) {
        let Some(job) = &mut self.job else {
            return;
        };
        let Some(gone) = job.members.remove(rank) else {
            return;
        };
        let remaining = job.members.connected_count() as u16;
        out.push(Action::Observe(departed(Some(rank), how, remaining)));
        // Members that are away may come back, and nobody may begin anew what they go on with.
        job.ends |= matches!(how, Departure::Left);
        if job.members.is_empty() {
            return self.end_of_members(now, out);
        }
        let reason = match how {
            Departure::Left => format!("rank {rank} ({}) left", gone.host),
            Departure::Lost(reason) => format!("rank {rank} ({}) was lost: {reason}", gone.host),
        };
        if self.config.shard == ShardId(0) {
            job.members.epoch = Epoch(job.members.epoch.0.saturating_add(1));
        }
        // An orderly leave ends no job by itself: at the end of training all leave, one after the other.
        if matches!(how, Departure::Lost(_)) && self.lacks_members() {
            return self.too_few(now, &reason, out);
        }
        self.tell_members(&reason, out);
        self.end_recovery(now, out);
        self.advance_all(now, out);
    }

    /// The last connected member is gone. Those that wait to join start the job anew.
    fn end_of_members(&mut self, now: Duration, out: &mut Vec<Action>) {
        let Some(job) = &mut self.job else {
            return;
        };
        job.rounds.abandon(now, out);
        let applicants = core::mem::take(&mut job.applicants);
        let (spec, at) = (job.plan.spec.clone(), job.rounds.step());
        self.forget_job(out);
        self.start_anew(now, applicants, &spec, at, out);
    }

    /// Shard 0: members that have been away too long, and jobs of which nobody has come back.
    pub(super) fn remove_lost(&mut self, now: Duration, out: &mut Vec<Action>) {
        let Some(job) = &self.job else {
            return;
        };
        if job
            .removal_deadline(self.config.shard)
            .is_none_or(|due| now < due)
        {
            return;
        }
        if job.members.connected_count() == 0 {
            return self.end_of_members(now, out);
        }
        let lost: Vec<Rank> = job
            .members
            .away()
            .filter(|(_, since)| now.saturating_sub(*since) >= MEMBER_TIMEOUT)
            .map(|(rank, _)| rank)
            .collect();
        let reason = format!("it was away for {} s", MEMBER_TIMEOUT.as_secs());
        for rank in lost {
            self.remove_member(now, rank, &Departure::Lost(reason.clone()), out);
        }
    }

    /// Shard 0: tells all members who is there.
    pub(super) fn tell_members(&self, reason: &str, out: &mut Vec<Action>) {
        let Some(job) = &self.job else {
            return;
        };
        if self.config.shard != ShardId(0) || !job.is_running() {
            return;
        }
        let message = Control::Membership {
            epoch: job.members.epoch,
            next_rank: job.members.next_rank,
            members: job.members.listed.iter().copied().collect(),
            away: job.members.away().map(|(rank, _)| rank).collect(),
            reason: reason.to_owned(),
        };
        job.members.broadcast(&message, out);
    }

    /// A worker passes on what shard 0 said of the members.
    pub(super) fn relayed(
        &mut self,
        session: SessionId,
        epoch: Epoch,
        next_rank: u16,
        members: &[Rank],
        away: &[Rank],
    ) {
        let coordinates = self.config.shard == ShardId(0) && self.is_running();
        let Some((job, _)) = self.member_of(session).filter(|_| !coordinates) else {
            return;
        };
        job.members.learn(epoch, next_rank, members);
        if epoch >= job.members.epoch {
            job.members.gone = away.iter().copied().collect();
        }
    }

    /// Workers that leave in order end no job, but one that waits for an answer would wait for ever.
    pub(super) fn end_if_too_few(&mut self, now: Duration, out: &mut Vec<Action>) {
        let waits = |job: &Job| job.rounds.open().next().is_some();
        if self.lacks_members() && self.job.as_ref().is_some_and(waits) {
            self.too_few(now, "the others left", out);
        }
    }

    /// Ends the job because fewer than the minimum are left.
    pub(super) fn too_few(&mut self, now: Duration, cause: &str, out: &mut Vec<Action>) {
        let left = self.job.as_ref().map_or(0, |job| job.members.count());
        let minimum = self.config.min_workers;
        let detail = format!(
            "{left} of the at least {minimum} workers are left ({cause}): start the job again from its last checkpoint, or lower --min-workers"
        );
        if let Some(job) = &mut self.job {
            job.rounds.abandon(now, out);
        }
        self.end_sessions(RefusalCode::TooFewWorkers, &detail, out);
        self.forget_job(out);
    }
}

impl Job {
    /// When a member, or the job, has been gone too long.
    pub(super) fn removal_deadline(&self, shard: ShardId) -> Option<Duration> {
        let away = self.members.away().map(|(_, since)| since);
        if self.members.connected_count() > 0 {
            // The other shards are told by shard 0 who is no member any more.
            let due = away.min()? + MEMBER_TIMEOUT;
            return (shard == ShardId(0)).then_some(due);
        }
        let patience = if self.applicants.is_empty() && !self.ends {
            JOB_TIMEOUT
        } else {
            MEMBER_TIMEOUT
        };
        Some(away.max()? + patience)
    }
}

fn departed(rank: Option<Rank>, how: &Departure, remaining: u16) -> Observation {
    match how {
        Departure::Left => Observation::Left { rank, remaining },
        Departure::Lost(reason) => Observation::Lost {
            rank,
            reason: reason.clone(),
            remaining,
        },
    }
}
