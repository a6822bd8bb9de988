//! Answers that workers hold from before this shard was restarted, taken over as they are; and the moment from which on it
//! is known where the job is.

use super::super::reply::Held;
use super::{Due, Fault, Key, Rounds};
use arc_topk_common::ids::{BucketId, Rank, Step};
use arc_topk_common::wire::{FrameHeader, RoundShape};
use core::time::Duration;
use std::collections::BTreeSet;

impl Rounds {
    /// Takes an answer that a worker holds. What follows from it, if it is news: answers that are due now.
    pub(in crate::shard) fn adopt(
        &mut self,
        now: Duration,
        header: FrameHeader,
        held: Held,
        (rank, at): (Rank, Step),
    ) -> Result<Vec<Due>, Fault> {
        self.check_bucket(header.bucket)?;
        let key = (header.step, header.bucket);
        let shape = RoundShape::new(&self.plan, header.bucket, self.shard, header.update);
        let mut due = Vec::new();
        let mut next = Some(held);
        while let Some(held) = next {
            let phase = shape.phase_of(held.kind);
            due.extend(self.adopt_one(now, header, held, (rank, at))?);
            // Frames of different streams come in any order: the one that follows may be here.
            next = self
                .told
                .contains(&(key, rank, phase))
                .then(|| self.held_early.remove(&(key, rank, phase + 1)))
                .flatten();
        }
        Ok(due)
    }

    fn adopt_one(
        &mut self,
        now: Duration,
        header: FrameHeader,
        held: Held,
        (rank, at): (Rank, Step),
    ) -> Result<Option<Due>, Fault> {
        let key = (header.step, header.bucket);
        let known = self.check_held(key, &held, rank)?;
        if self.settled && header.step.0 > *self.window().end() {
            return Err(Fault::Differs(format!(
                "rank {rank} holds an answer to step {}, but the job is at step {}: it went another way while that one was cut off; join again",
                header.step, self.step
            )));
        }
        if !known {
            self.check_update(header, rank).map_err(Fault::Differs)?;
            self.check_room(header.step)?;
        }
        if !known && !self.open.contains_key(&key) {
            if header.step < self.step {
                // Older than what is kept. Whether the sender's copy is that of the others shows in its last step.
                return if header.step.0.saturating_add(1) < at.0 {
                    Ok(None)
                } else {
                    Err(Fault::Gone(format!(
                        "rank {rank} has come to step {at}, and what it applied before can no longer be compared with the others': the job is at step {}; join again",
                        self.step
                    )))
                };
            }
            let round = self.new_round(now, header);
            self.open.insert(key, round);
            self.updates
                .entry(header.step)
                .or_insert((header.update, rank));
        }
        let shape = RoundShape::new(&self.plan, header.bucket, self.shard, header.update);
        let phase = shape.phase_of(held.kind);
        // An answer belongs to the one before it that its teller holds, which may be another one than that which is here.
        if !known && phase > 0 && !self.told.contains(&(key, rank, phase - 1)) {
            self.held_early.insert((key, rank, phase), held);
            return Ok(None);
        }
        if held.kind.goes_on() && !held.non_finite {
            self.told.insert((key, rank, phase));
        }
        let Some(round) = self.open.get_mut(&key).filter(|_| !known) else {
            return Ok(None);
        };
        let adopted = round
            .adopt(now, held)
            .map_err(|error| Fault::Protocol(error.to_string()))?;
        Ok(adopted.map(|answer| self.answered(now, key, answer)))
    }

    /// Whether an answer of this kind is here already.
    fn check_held(&self, key: Key, held: &Held, rank: Rank) -> Result<bool, Fault> {
        let (step, bucket) = key;
        let closed = self.closed.get(&key);
        let here = match (closed, self.open.get(&key)) {
            (Some(closed), _) => &closed.answers[..],
            (None, Some(round)) => round.answers(),
            (None, None) => &[],
        };
        let shape = |update| RoundShape::new(&self.plan, bucket, self.shard, update);
        let phase = match (closed, self.open.get(&key)) {
            (Some(closed), _) => shape(closed.update).phase_of(held.kind),
            (None, Some(round)) => round.phase_of(held.kind),
            (None, None) => return Ok(false),
        };
        match here.get(phase) {
            Some(answer) if held.agrees(answer) => Ok(true),
            // What closed without an answer of this phase was skipped before it came to that.
            None if closed.is_none() => Ok(false),
            _ => Err(Fault::Differs(format!(
                "rank {rank} holds another answer to step {step}, bucket {bucket} than the others: it was cut off while shard {} restarted, and the job went on without it; join again",
                self.shard
            ))),
        }
    }

    /// It is known where the job is.
    pub(in crate::shard) fn begin(&mut self) {
        self.settled = true;
        self.held_early.clear();
        self.told.clear();
    }

    /// The shard has been told everything: the job is at `step`. Whoever asked for an answer of an earlier one that
    /// nobody holds cannot go on.
    pub(in crate::shard) fn settle(&mut self, step: Step) -> BTreeSet<Rank> {
        self.begin();
        let later = self.open.split_off(&(step, BucketId(0)));
        let dropped = core::mem::replace(&mut self.open, later);
        self.step = self.step.max(step);
        // What members that are gone again did in steps to which nobody has come.
        let beyond = Step(self.window().end().saturating_add(1));
        self.open.split_off(&(beyond, BucketId(0)));
        self.updates.split_off(&beyond);
        let later = Step(step.0.saturating_add(1));
        for closed in self.closed.split_off(&(later, BucketId(0))).into_values() {
            self.retained_bytes -= closed.bytes();
        }
        self.move_on();
        dropped
            .into_values()
            .flat_map(|round| round.askers().into_keys())
            .collect()
    }
}
