//! A shard that was started while the job goes on knows nothing, and is told by the workers.
//!
//! Every member says, in its Hello, who the members are and how far it is, and then tells the answers that it got from the
//! earlier incarnation for its open step and the last ones before. An answer that anybody holds is taken over as it is. Only
//! when all members have told everything, or [`RECOVERY_GRACE`] has passed, does the shard form answers of its own, and only
//! for the newest step at which any member is: a member is there because it has every answer of the steps before.
//!
//! So no two workers come to different results: either somebody holds the answer, and all get it, or nobody does. The
//! exception is a member that is cut off meanwhile and holds an answer that nobody else got; when it comes back it tells, is
//! found to differ, and must join again. See ARCHITECTURE, "When the guarantees end".

use super::event::{Action, Observation, SessionId};
use super::members::Told;
use super::reply::Held;
use super::rounds::Fault;
use super::{Job, Life, Shard};
use arc_topk_common::ids::{Rank, ShardId, Step};
use arc_topk_common::wire::{FrameHeader, RefusalCode};
use bytes::Bytes;
use core::time::Duration;

/// How long a restarted shard waits for members that do not come. With the pause until workers dial again it is below the
/// 5 s that a restart may cost.
pub const RECOVERY_GRACE: Duration = Duration::from_secs(3);
/// How long it waits for members that are connected and still tell: their answers may have a slow link before them. A peer
/// that trickles is removed by the shell long before.
const TELLING_TIMEOUT: Duration = Duration::from_secs(120);
/// Steps before its own of which a worker may tell answers.
const TOLD_STEPS: u64 = 4;

/// How far the telling is.
#[derive(Debug)]
pub(super) struct Recovery {
    since: Duration,
    adopted: u64,
}

impl Recovery {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            since: now,
            adopted: 0,
        }
    }
}

impl Job {
    pub(super) fn recovery_deadline(&self) -> Option<Duration> {
        match &self.life {
            // Without anybody there is nobody to go on with.
            Life::Recovering(recovery) if self.members.connected_count() > 0 => {
                let patience = if self.members.some_tell() {
                    TELLING_TIMEOUT
                } else {
                    RECOVERY_GRACE
                };
                Some(recovery.since + patience)
            }
            _ => None,
        }
    }

    /// A member is about to be connected: if it is the first, the others have their time from now on.
    pub(super) fn first_comes(&mut self, now: Duration) {
        if self.members.connected_count() == 0
            && let Life::Recovering(recovery) = &mut self.life
        {
            recovery.since = now;
        }
    }

    /// Most frames that a member can have to tell.
    fn most_told(&self) -> u32 {
        let answers = 2 * self.rounds.buckets_here() as u64 * (TOLD_STEPS + 1);
        u32::try_from(answers).unwrap_or(u32::MAX)
    }
}

impl Shard {
    /// A member says how many answers it is going to tell.
    pub(super) fn retelling(
        &mut self,
        now: Duration,
        session: SessionId,
        frames: u32,
        out: &mut Vec<Action>,
    ) {
        let Some((job, rank)) = self.member_of(session) else {
            return;
        };
        let most = job.most_told();
        if frames > most {
            let detail = format!(
                "rank {rank} announces {frames} answers, above the limit of {most}: run the same release everywhere"
            );
            return self.violation(now, session, detail, out);
        }
        if let Some(member) = job.members.get_mut(rank)
            && let Told::Partly { of, .. } = &mut member.told
        {
            *of = Some(frames);
        }
        self.told(now, rank, 0, out);
    }

    /// Counts a frame that was told.
    fn told(&mut self, now: Duration, rank: Rank, more: u32, out: &mut Vec<Action>) {
        let Some(member) = self.job.as_mut().and_then(|job| job.members.get_mut(rank)) else {
            return;
        };
        if let Told::Partly { got, of } = &mut member.told {
            *got = got.saturating_add(more);
            if of.is_some_and(|of| *got >= of) {
                member.told = Told::All;
                self.take_parked(now, rank, out);
                self.end_recovery(now, out);
            }
        }
    }

    /// An answer that a member holds.
    pub(super) fn held(
        &mut self,
        now: Duration,
        session: SessionId,
        header: FrameHeader,
        body: Bytes,
        out: &mut Vec<Action>,
    ) {
        let Some((job, rank)) = self.member_of(session) else {
            return;
        };
        if let Err(detail) = job.check_told(rank, &header, body.len()) {
            return self.violation(now, session, detail, out);
        }
        let held = Held {
            kind: header.kind,
            non_finite: header.flags.non_finite,
            body,
            roster_bytes: header.roster_bytes,
        };
        let at = job.members.get(rank).map_or(Step(0), |member| member.step);
        match job.rounds.adopt(now, header, held, (rank, at)) {
            Ok(due) => {
                if let (Life::Recovering(recovery), false) = (&mut job.life, due.is_empty()) {
                    recovery.adopted += due.len() as u64;
                }
                out.extend(due.iter().map(|due| {
                    Action::Observe(Observation::Adopted {
                        rank,
                        step: due.key.0,
                        bucket: due.key.1,
                    })
                }));
                self.give(due, out);
                self.told(now, rank, 1, out);
            }
            Err(fault) => self.fault(now, rank, fault, out),
        }
    }

    /// Removes a member for what it sent.
    pub(super) fn fault(&mut self, now: Duration, rank: Rank, fault: Fault, out: &mut Vec<Action>) {
        let session = self.job.as_ref().and_then(|job| job.members.session(rank));
        let Some(session) = session else {
            return;
        };
        match fault {
            Fault::Protocol(detail) => self.violation(now, session, detail, out),
            Fault::Gone(detail) | Fault::Differs(detail) => {
                self.turn_out(now, session, RefusalCode::Superseded, detail, out);
            }
        }
    }

    /// Goes on as soon as everything is told, or nobody is waited for any more.
    pub(super) fn end_recovery(&mut self, now: Duration, out: &mut Vec<Action>) {
        let coordinates = self.config.shard == ShardId(0);
        let Some(job) = &mut self.job else {
            return;
        };
        let due = job.recovery_deadline();
        let Life::Recovering(recovery) = &job.life else {
            return;
        };
        let patient = due.is_none_or(|due| now < due);
        if patient && !job.members.all_told() || job.members.connected_count() == 0 {
            return;
        }
        let came = job.members.iter().filter(|(_, m)| m.session().is_some());
        let step = came.map(|(_, member)| member.step).max().unwrap_or(Step(0));
        let told = job.members.iter().filter(|(_, m)| m.told == Told::All);
        out.push(Action::Observe(Observation::Recovered {
            step,
            told: told.count() as u16,
            members: job.members.listed.len() as u16,
            adopted: recovery.adopted,
            seconds: now.saturating_sub(recovery.since).as_secs_f64(),
        }));
        job.life = Life::Running;
        if coordinates {
            job.members.outnumber_forgotten_lists();
        }
        let mut behind = job.rounds.settle(step);
        behind.extend(job.uncomparable(step));
        job.expect_the_missing(now);
        job.rounds.members = job.members.count();
        for rank in behind {
            let detail = format!(
                "rank {rank} is at a step before {step} of which nobody else holds the answers any more: join again"
            );
            self.fault(now, rank, Fault::Gone(detail), out);
        }
        self.tell_members(
            "this shard was restarted and has been told where the job is",
            out,
        );
        self.advance_all(now, out);
    }
}

impl Job {
    /// Members so far behind that the answers which they applied last cannot be compared with those of the others. They
    /// may have been cut off when an earlier incarnation of this shard was restarted. (One that owns nothing has given no
    /// answers, and workers may train before they have met it.)
    fn uncomparable(&self, step: Step) -> impl Iterator<Item = Rank> {
        let owns_nothing = self.rounds.buckets_here() == 0;
        let low = Step(step.0.saturating_sub(1));
        self.members
            .iter()
            .filter(move |(_, m)| !owns_nothing && m.session().is_some() && m.step < low)
            .map(|(rank, _)| rank)
    }

    fn check_told(
        &mut self,
        rank: Rank,
        header: &FrameHeader,
        body_bytes: usize,
    ) -> Result<(), String> {
        let most = self.most_told();
        let same_release = "run the same release everywhere";
        let Some(member) = self.members.get_mut(rank) else {
            return Ok(());
        };
        if let Told::Partly { got, of } = member.told
            && got >= of.unwrap_or(most)
        {
            return Err(format!(
                "rank {rank} tells more answers than it announced: {same_release}"
            ));
        }
        if member.told == Told::All {
            return Err(format!(
                "rank {rank} tells an answer that it was not asked for: {same_release}"
            ));
        }
        if !header.kind.is_down() || header.body_bytes as usize != body_bytes {
            return Err(format!(
                "a {:?} frame of {body_bytes} bytes is no answer that could be told: {same_release}",
                header.kind
            ));
        }
        // It may have gone on by a step since its Hello.
        let (low, high) = (
            member.step.0.saturating_sub(TOLD_STEPS),
            member.step.0.saturating_add(1),
        );
        if !(low..=high).contains(&header.step.0) {
            return Err(format!(
                "rank {rank} is at step {} and tells an answer of step {}: {same_release}",
                member.step, header.step
            ));
        }
        Ok(())
    }

    /// Members that have not come may still do so: shard 0 removes them in time.
    fn expect_the_missing(&mut self, now: Duration) {
        let missing: Vec<Rank> = self
            .members
            .listed
            .iter()
            .copied()
            .filter(|rank| self.members.get(*rank).is_none())
            .collect();
        for rank in missing {
            self.members
                .insert(rank, super::members::Member::missing(now));
        }
    }
}
