//! Round frames: what a member sends, and the answers that follow.

use super::event::{Action, Observation, SessionId};
use super::members::{Told, Waited};
use super::reply::Answer;
use super::round::{Accepted, Frame};
use super::rounds::{Due, Fault, Key};
use super::{Job, Life, Limits, Shard};
use arc_topk_common::ids::Rank;
use arc_topk_common::wire::{FrameFlags, FrameHeader};
use bytes::Bytes;
use core::time::Duration;

impl Shard {
    pub(super) fn frame(
        &mut self,
        now: Duration,
        session: SessionId,
        header: FrameHeader,
        body: Bytes,
        out: &mut Vec<Action>,
    ) {
        if !self.knows(session) {
            // Removed while the frame was under way.
            return;
        }
        if header.flags.held {
            return self.held(now, session, header, body, out);
        }
        let limits = self.limits;
        let Some((job, rank)) = self.member_of(session) else {
            let detail =
                "a round frame came before the Welcome: say Hello and wait for it".to_owned();
            return self.violation(now, session, detail, out);
        };
        if job.is_telling(rank) {
            let parked = job.park_until_told(rank, header, body, &limits);
            return match parked {
                Ok(()) => {}
                Err(detail) => self.violation(now, session, detail, out),
            };
        }
        self.member_frame(now, rank, session, header, body, out);
    }

    /// Frames that overtook what their sender told, now that it has told everything.
    pub(super) fn take_parked(&mut self, now: Duration, rank: Rank, out: &mut Vec<Action>) {
        let Some(member) = self.job.as_mut().and_then(|job| job.members.get_mut(rank)) else {
            return;
        };
        let (frames, session) = (core::mem::take(&mut member.early), member.session());
        for (header, body) in frames {
            // The first frame may have cost it its place.
            let here = self.job.as_ref().and_then(|job| job.members.session(rank));
            if let Some(session) = session.filter(|session| here == Some(*session)) {
                self.member_frame(now, rank, session, header, body, out);
            }
        }
    }

    fn member_frame(
        &mut self,
        now: Duration,
        rank: Rank,
        session: SessionId,
        header: FrameHeader,
        body: Bytes,
        out: &mut Vec<Action>,
    ) {
        match self.accept_frame(now, rank, session, header, body) {
            Err(fault) => self.fault(now, rank, fault, out),
            Ok(Accepted::Late(answer)) => {
                self.answer_late(now, rank, session, header, &answer, out)
            }
            Ok(Accepted::Taken) => {
                if self.lacks_members() {
                    return self.too_few(now, "the others left", out);
                }
                self.advance(now, (header.step, header.bucket), out);
            }
        }
    }

    fn accept_frame(
        &mut self,
        now: Duration,
        rank: Rank,
        session: SessionId,
        header: FrameHeader,
        body: Bytes,
    ) -> Result<Accepted, Fault> {
        let Some(job) = &mut self.job else {
            return Ok(Accepted::Taken);
        };
        if header.body_bytes as usize != body.len() {
            return Err(Fault::Protocol(format!(
                "a frame's header says {} bytes, its body has {}",
                header.body_bytes,
                body.len()
            )));
        }
        let parked = job.rounds.parked_bytes(rank) + body.len();
        if parked > self.limits.parked_bytes_per_session {
            return Err(Fault::Protocol(format!(
                "{parked} bytes of rank {rank} would wait here for other workers, above the limit of {}: use more shards or smaller buckets",
                self.limits.parked_bytes_per_session
            )));
        }
        let frame = Frame {
            rank,
            session,
            kind: header.kind,
            non_finite: header.flags.non_finite,
            absent: header.flags.absent,
            body,
        };
        let steps = job.steps_for(rank);
        let mut live = job.members.live(now, header.step);
        if !job.is_running() {
            // Those that have not come yet keep their turn in the sums.
            live.extend(&job.members.listed);
        }
        let accepted = job.rounds.accept(now, header, frame, &live, steps)?;
        if let Some(member) = job.members.get_mut(rank) {
            member.step = member.step.max(header.step);
        }
        Ok(accepted)
    }

    /// The answer of a phase that closed before this frame came.
    fn answer_late(
        &mut self,
        now: Duration,
        rank: Rank,
        session: SessionId,
        header: FrameHeader,
        answer: &Answer,
        out: &mut Vec<Action>,
    ) {
        let Some(job) = &mut self.job else {
            return;
        };
        let key = (header.step, header.bucket);
        out.push(job.reply(rank, session, key, header.update, answer));
        // One that was counted only asks again for what it lost on the way.
        if !header.flags.absent && !answer.contributors.contains(&rank) {
            let late = now.saturating_sub(answer.at);
            if let Some(member) = job.members.get_mut(rank) {
                member.lateness.worst = member.lateness.worst.max(late);
            }
            out.push(Action::Observe(Observation::Late {
                rank,
                seconds: late.as_secs_f64(),
            }));
        }
    }

    /// Answers a round if that is due.
    fn advance(&mut self, now: Duration, key: Key, out: &mut Vec<Action>) {
        let rules = self.rules();
        let Some(job) = self.job.as_mut().filter(|job| job.is_running()) else {
            return;
        };
        let live = job.members.live(now, key.0);
        let due = job.rounds.due(now, key, &live, &rules);
        self.give(due.into_iter().collect(), out);
    }

    /// After a loss, or when time went by: answers all rounds that are due.
    pub(super) fn advance_all(&mut self, now: Duration, out: &mut Vec<Action>) {
        let keys = self
            .job
            .as_ref()
            .map_or_else(Vec::new, |job| job.rounds.open_keys());
        for key in keys {
            self.advance(now, key, out);
        }
    }

    /// Sends answers to those that asked, and books them.
    pub(super) fn give(&mut self, due: Vec<Due>, out: &mut Vec<Action>) {
        let quorum = self.config.quorum > 0;
        let Some(job) = &mut self.job else {
            return;
        };
        for Due {
            key,
            update,
            answer,
            closed,
        } in due
        {
            for (rank, session) in &answer.asked {
                // One that has come on another connection asks again there.
                if job.members.session(*rank) == Some(*session) {
                    out.push(job.reply(*rank, *session, key, update, &answer));
                }
            }
            if let Some((rank, lag)) = answer.straggler {
                let seconds = lag.as_secs_f64();
                if let Some(member) = job.members.get_mut(rank) {
                    member.waited_for_seconds += seconds;
                }
                out.push(Action::Observe(Observation::Waited { rank, seconds }));
            }
            if quorum {
                job.book_lateness(key, &answer, out);
            }
            if let Some(closed) = closed {
                out.push(Action::Observe(Observation::RoundClosed(Box::new(closed))));
            }
        }
    }
}

impl Job {
    /// Whether a member is still telling what it holds.
    fn is_telling(&self, rank: Rank) -> bool {
        let member = self.members.get(rank);
        member.is_some_and(|member| matches!(member.told, Told::Partly { .. }))
    }

    /// Held frames go on streams of their own, so that a frame of the open step may come before an answer that it builds on:
    /// values before the selection that they belong to.
    fn park_until_told(
        &mut self,
        rank: Rank,
        header: FrameHeader,
        body: Bytes,
        limits: &Limits,
    ) -> Result<(), String> {
        let most = self.rounds.open_limit();
        let Some(member) = self.members.get_mut(rank) else {
            return Ok(());
        };
        let parked: usize = member.early.iter().map(|(_, body)| body.len()).sum();
        if member.early.len() >= most || parked + body.len() > limits.parked_bytes_per_session {
            return Err(format!(
                "rank {rank} sends more than a step's frames before it has told the answers that it holds: run the same release everywhere"
            ));
        }
        member.early.push((header, body));
        Ok(())
    }

    /// Steps of which rounds are taken from this member. While the shard is being told it does not know where the job is,
    /// but a member sends frames of one step alone, or has just gone on to the next.
    fn steps_for(&self, rank: Rank) -> core::ops::RangeInclusive<u64> {
        match (&self.life, self.members.get(rank)) {
            (Life::Recovering(_), Some(member)) => member.step.0..=member.step.0.saturating_add(1),
            _ => self.rounds.window(),
        }
    }

    fn reply(
        &self,
        rank: Rank,
        session: SessionId,
        (step, bucket): Key,
        update: u64,
        answer: &Answer,
    ) -> Action {
        let lead = self.rounds.step().0.saturating_sub(step.0);
        let header = FrameHeader {
            kind: answer.kind,
            flags: FrameFlags {
                non_finite: answer.non_finite,
                counted: answer.contributors.contains(&rank),
                ..FrameFlags::default()
            },
            bucket,
            epoch: self.members.epoch,
            step,
            update,
            body_bytes: answer.body.len() as u32,
            roster_bytes: answer.roster_bytes,
            lead: u16::try_from(lead).unwrap_or(u16::MAX),
        };
        Action::Round {
            session,
            header,
            body: answer.body.clone(),
        }
    }

    /// Who of those that were waited for was in time.
    fn book_lateness(&mut self, (step, _): Key, answer: &Answer, out: &mut Vec<Action>) {
        if answer.non_finite {
            return;
        }
        let waited: Vec<Rank> = self
            .members
            .iter()
            .filter(|(_, m)| {
                m.session().is_some() && matches!(m.waited, Waited::From(from) if from <= step)
            })
            .map(|(rank, _)| rank)
            .collect();
        for rank in waited {
            // One that asks without contributing replays: it was late before.
            let in_time = answer.contributors.contains(&rank);
            if let Some(member) = self.members.get_mut(rank)
                && let Some(persistent) = member.lateness.closed(in_time)
            {
                out.push(Action::Observe(Observation::Straggling {
                    rank,
                    persistent,
                }));
            }
        }
    }
}
