//! The open rounds of a job: which frames are admitted, and what follows when a phase is full.

use super::event::{Action, Observation, Outcome, RoundClosed, SessionId};
use super::members::Members;
use super::round::{Answer, Frame, Round};
use super::{Job, STEP_WINDOW, Shard, largest_body};
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, Step};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{FrameFlags, FrameHeader, RoundShape};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Rounds by (step, bucket).
#[derive(Debug)]
pub(super) struct Rounds {
    plan: Arc<Plan>,
    shard: ShardId,
    /// Buckets of which this shard owns segments.
    here: BTreeSet<BucketId>,
    /// The lowest step with a bucket that is not closed.
    step: Step,
    open: BTreeMap<(Step, BucketId), Round>,
    /// Closed rounds of the window.
    closed: BTreeSet<(Step, BucketId)>,
    /// Update number of each step of the window and the one before, and who named it first.
    updates: BTreeMap<Step, (u64, Rank)>,
    body_limit: usize,
}

impl Rounds {
    pub(super) fn new(plan: Arc<Plan>, shard: ShardId, start: Step) -> Self {
        let (mut here, mut body_limit) = (BTreeSet::new(), 0);
        for bucket in &plan.buckets {
            if plan.segments(bucket.id, shard).is_empty() {
                continue;
            }
            here.insert(bucket.id);
            // The schedule only decides between dense and sparse; limits are those of all rows.
            for update in [0, u64::MAX] {
                body_limit = body_limit.max(largest_body(&RoundShape::new(
                    &plan, bucket.id, shard, update,
                )));
            }
        }
        Self {
            plan,
            shard,
            here,
            step: start,
            open: BTreeMap::new(),
            closed: BTreeSet::new(),
            updates: BTreeMap::new(),
            body_limit,
        }
    }

    pub(super) fn step(&self) -> Step {
        self.step
    }

    pub(super) fn update(&self) -> Option<u64> {
        self.updates
            .last_key_value()
            .map(|(_, (update, _))| *update)
    }

    pub(super) fn body_limit(&self) -> usize {
        self.body_limit
    }

    pub(super) fn open_limit(&self) -> usize {
        self.here.len() * (1 + STEP_WINDOW as usize)
    }

    pub(super) fn open(&self) -> impl Iterator<Item = (Step, BucketId, &Round)> {
        self.open
            .iter()
            .map(|((step, bucket), round)| (*step, *bucket, round))
    }

    pub(super) fn buckets_here(&self) -> usize {
        self.here.len()
    }

    fn parked_bytes(&self, rank: Rank) -> usize {
        self.open
            .values()
            .map(|round| round.parked_bytes(rank))
            .sum()
    }

    /// Checks a header against the job and takes the frame. Nothing changes on an error.
    fn accept(
        &mut self,
        now: Duration,
        header: FrameHeader,
        frame: Frame,
        live: &BTreeSet<Rank>,
    ) -> Result<(), String> {
        self.check_place(header)?;
        self.check_update(header, frame.rank)?;
        let key = (header.step, header.bucket);
        let rank = frame.rank;
        if let Some(round) = self.open.get_mut(&key) {
            round
                .accept(now, frame, live)
                .map_err(|error| error.to_string())?;
        } else {
            let shape = RoundShape::new(&self.plan, header.bucket, self.shard, header.update);
            let policy = self.plan.spec.algorithm.selection;
            let mut round = Round::open(shape, policy, header.update, now);
            round
                .accept(now, frame, live)
                .map_err(|error| error.to_string())?;
            self.open.insert(key, round);
        }
        self.updates
            .entry(header.step)
            .or_insert((header.update, rank));
        Ok(())
    }

    /// Bucket and step.
    fn check_place(&self, header: FrameHeader) -> Result<(), String> {
        let FrameHeader { step, bucket, .. } = header;
        if bucket.index() >= self.plan.buckets.len() {
            return Err(format!(
                "a frame names bucket {bucket}, but the plan has {}: run the same release with the same plan everywhere",
                self.plan.buckets.len()
            ));
        }
        if !self.here.contains(&bucket) {
            return Err(format!(
                "a frame names bucket {bucket}, of which shard {} owns nothing: give every worker the shards in the same order",
                self.shard
            ));
        }
        let (low, high) = (self.step.0, self.step.0.saturating_add(STEP_WINDOW));
        if !(low..=high).contains(&step.0) || self.closed.contains(&(step, bucket)) {
            let why = if step.0 > high {
                "is not open yet"
            } else {
                "is closed"
            };
            return Err(format!(
                "a frame came for step {step}, bucket {bucket}, which {why}: this shard is at step {low} and takes steps {low} to {high}; resume all workers from checkpoints of one step"
            ));
        }
        Ok(())
    }

    /// The update number is the same in all rounds of a step, and follows from the step before.
    fn check_update(&self, header: FrameHeader, rank: Rank) -> Result<(), String> {
        let FrameHeader { step, update, .. } = header;
        match self.updates.get(&step) {
            Some((known, first)) if *known != update => Err(format!(
                "rank {rank} is at update {update} in step {step}, but rank {first} is at update {known}: their schedules have come apart; resume all workers from one checkpoint"
            )),
            Some(_) => Ok(()),
            None => match self.updates.range(..step).next_back() {
                Some((before, (known, _)))
                    if update < *known || update - known > step.0 - before.0 =>
                {
                    Err(format!(
                        "rank {rank} is at update {update} in step {step}, but update {known} was in step {before}: an update number grows by at most one a step; resume all workers from one checkpoint"
                    ))
                }
                _ => Ok(()),
            },
        }
    }

    /// Answers that are due, each with the round if it closed by it.
    fn due(&mut self, live: &BTreeSet<Rank>) -> Vec<(Step, BucketId, Answer, u64, Option<Round>)> {
        let mut answers = Vec::new();
        let keys: Vec<_> = self.open.keys().copied().collect();
        for key in keys {
            answers.extend(self.due_of(key, live));
        }
        answers
    }

    fn due_of(
        &mut self,
        key: (Step, BucketId),
        live: &BTreeSet<Rank>,
    ) -> Option<(Step, BucketId, Answer, u64, Option<Round>)> {
        let round = self.open.get_mut(&key)?;
        let answer = round.advance(live)?;
        let update = round.update;
        let closed = if answer.last { self.close(key) } else { None };
        Some((key.0, key.1, answer, update, closed))
    }

    fn close(&mut self, key: (Step, BucketId)) -> Option<Round> {
        let round = self.open.remove(&key);
        self.closed.insert(key);
        while self
            .here
            .iter()
            .all(|bucket| self.closed.contains(&(self.step, *bucket)))
            && !self.here.is_empty()
        {
            let done = self.step;
            self.step.0 = self.step.0.saturating_add(1);
            self.closed = self.closed.split_off(&(self.step, BucketId(0)));
            // The step that was just completed stays, to check the next one's update against.
            self.updates = self.updates.split_off(&done);
        }
        round
    }

    /// Forgets all open rounds.
    pub(super) fn abandon(&mut self, now: Duration, out: &mut Vec<Action>) {
        for ((step, bucket), round) in core::mem::take(&mut self.open) {
            out.push(closed_observation(
                now,
                step,
                bucket,
                &round,
                Outcome::Abandoned,
                0,
            ));
        }
    }
}

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
        if let Err(detail) = self.accept_frame(now, session, header, body) {
            return self.violation(now, session, detail, out);
        }
        let minimum = self.minimum();
        let Some(job) = &mut self.job else {
            return;
        };
        let live = job.members.live();
        if live.len() < minimum {
            return self.too_few(now, "the others left", out);
        }
        if let Some(due) = job.rounds.due_of((header.step, header.bucket), &live) {
            self.answer(now, vec![due], out);
        }
    }

    fn accept_frame(
        &mut self,
        now: Duration,
        session: SessionId,
        header: FrameHeader,
        body: Bytes,
    ) -> Result<(), String> {
        let rank = self.sessions.get(&session).and_then(|s| s.rank);
        let (Some(rank), Some(job)) = (rank, &mut self.job) else {
            return Err(
                "a round frame came before the Welcome: say Hello and wait for it".to_owned(),
            );
        };
        if header.body_bytes as usize != body.len() {
            return Err(format!(
                "a frame's header says {} bytes, its body has {}",
                header.body_bytes,
                body.len()
            ));
        }
        let parked = job.rounds.parked_bytes(rank) + body.len();
        if parked > self.limits.parked_bytes_per_session {
            return Err(format!(
                "{parked} bytes of rank {rank} would wait here for other workers, above the limit of {}: use more shards or smaller buckets",
                self.limits.parked_bytes_per_session
            ));
        }
        let frame = Frame {
            rank,
            kind: header.kind,
            non_finite: header.flags.non_finite,
            body,
        };
        job.rounds.accept(now, header, frame, &job.members.live())
    }

    /// After a loss: closes the phases that waited for the lost one alone.
    pub(super) fn advance_all(&mut self, now: Duration, out: &mut Vec<Action>) {
        if let Some(job) = &mut self.job {
            let due = job.rounds.due(&job.members.live());
            self.answer(now, due, out);
        }
    }

    fn answer(
        &mut self,
        now: Duration,
        due: Vec<(Step, BucketId, Answer, u64, Option<Round>)>,
        out: &mut Vec<Action>,
    ) {
        let Some(Job {
            members: Members::Running { epoch, joined, .. },
            ..
        }) = &self.job
        else {
            return;
        };
        for (step, bucket, answer, update, closed) in due {
            send(*epoch, joined, step, bucket, update, &answer, out);
            if let Some((rank, lag)) = answer.straggler {
                let seconds = lag.as_secs_f64();
                if let Some(member) = joined
                    .get(&rank)
                    .and_then(|session| self.sessions.get_mut(session))
                {
                    member.waited_for_seconds += seconds;
                }
                out.push(Action::Observe(Observation::Waited { rank, seconds }));
            }
            if let Some(round) = closed {
                let contributors = answer.contributors.len() as u16;
                let outcome = match (answer.non_finite, contributors == self.config.world) {
                    (true, _) => Outcome::NonFinite,
                    (false, true) => Outcome::Complete,
                    (false, false) => Outcome::Partial,
                };
                out.push(closed_observation(
                    now,
                    step,
                    bucket,
                    &round,
                    outcome,
                    contributors,
                ));
            }
        }
    }
}

/// The same body to every member, each with its own `counted` flag.
fn send(
    epoch: Epoch,
    joined: &BTreeMap<Rank, SessionId>,
    step: Step,
    bucket: BucketId,
    update: u64,
    answer: &Answer,
    out: &mut Vec<Action>,
) {
    for (rank, session) in joined {
        let flags = FrameFlags {
            non_finite: answer.non_finite,
            counted: answer.contributors.contains(rank),
        };
        let header = FrameHeader {
            kind: answer.kind,
            flags,
            bucket,
            epoch,
            step,
            update,
            body_bytes: answer.body.len() as u32,
        };
        out.push(Action::Round {
            session: *session,
            header,
            body: answer.body.clone(),
        });
    }
}

fn closed_observation(
    now: Duration,
    step: Step,
    bucket: BucketId,
    round: &Round,
    outcome: Outcome,
    contributors: u16,
) -> Action {
    Action::Observe(Observation::RoundClosed(Box::new(RoundClosed {
        step,
        bucket,
        update: round.update,
        outcome,
        contributors,
        received: round.received,
        sent: round.sent,
        dense_equivalent_bytes: round.dense_equivalent_bytes() * u64::from(round.started),
        captured_energy: round.captured_energy,
        density: round.density,
        seconds: now.saturating_sub(round.opened).as_secs_f64(),
    })))
}
