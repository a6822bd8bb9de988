//! The rounds of a job: those that are open, and the answers of those that closed lately, for workers that come late.

mod adoption;

use super::event::{Action, Observation, Outcome, RoundClosed};
use super::phase::ClosingRules;
use super::reply::{Answer, Held, asked_phase};
use super::round::{Accepted, Frame, Round};
use super::{Limits, STEP_WINDOW, largest_body};
use arc_topk_common::ids::{BucketId, Rank, ShardId, Step};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{FrameHeader, RoundShape};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Closed steps whose answers are kept for workers that were away or slow.
pub const RETAIN_STEPS: u64 = 8;
/// How long answers are kept for a worker that joins, after the last sign of it.
const PIN_TIME: Duration = Duration::from_secs(600);

/// Steps of which there may be rounds while it is not known where the job is. Workers that are not too far apart name six.
const UNSETTLED_STEPS: usize = 16;

pub(super) type Key = (Step, BucketId);

/// Why a frame is not taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Fault {
    /// Its sender breaks the protocol.
    Protocol(String),
    /// Its sender is further behind than answers reach back.
    Gone(String),
    /// What its sender holds is not what the others got.
    Differs(String),
}

/// What is kept of a round.
#[derive(Debug)]
struct Closed {
    update: u64,
    answers: Vec<Answer>,
}

impl Closed {
    fn bytes(&self) -> usize {
        self.answers.iter().map(|answer| answer.body.len()).sum()
    }
}

/// An answer that is due: of this round, with its update number, and the round itself if it closed by it.
#[derive(Debug)]
pub(super) struct Due {
    pub(super) key: Key,
    pub(super) update: u64,
    pub(super) answer: Answer,
    pub(super) closed: Option<RoundClosed>,
}

/// Rounds by (step, bucket).
#[derive(Debug)]
pub(super) struct Rounds {
    plan: Arc<Plan>,
    shard: ShardId,
    /// Buckets of which this shard owns segments.
    here: BTreeSet<BucketId>,
    /// The lowest step with a bucket that is not closed.
    step: Step,
    open: BTreeMap<Key, Round>,
    closed: BTreeMap<Key, Closed>,
    retained_bytes: usize,
    /// Answers from this step on are wanted until then.
    pin: Option<(Step, Duration)>,
    /// Members, for telling complete rounds from partial ones.
    pub(super) members: usize,
    /// Answers that were told before those that they follow, by phase.
    held_early: BTreeMap<(Key, Rank, usize), Held>,
    /// Who told the answer of which phase, or holds the same: what it tells of the next phase belongs to that one.
    told: BTreeSet<(Key, Rank, usize)>,
    /// It is known where the job is.
    settled: bool,
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
            closed: BTreeMap::new(),
            retained_bytes: 0,
            pin: None,
            members: 0,
            held_early: BTreeMap::new(),
            told: BTreeSet::new(),
            settled: false,
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

    /// Answers that wait for those that they follow, and notes of who told what.
    pub(super) fn told(&self) -> (usize, usize) {
        (self.held_early.len(), self.told.len())
    }

    pub(super) fn parked_bytes(&self, rank: Rank) -> usize {
        self.open
            .values()
            .map(|round| round.parked_bytes(rank))
            .sum()
    }

    pub(super) fn retained(&self) -> (usize, usize) {
        (self.closed.len(), self.retained_bytes)
    }

    /// Checks a header against the job and takes the frame. Nothing changes on an error. `steps`: those that are taken.
    pub(super) fn accept(
        &mut self,
        now: Duration,
        header: FrameHeader,
        frame: Frame,
        live: &BTreeSet<Rank>,
        steps: core::ops::RangeInclusive<u64>,
    ) -> Result<Accepted, Fault> {
        let key = (header.step, header.bucket);
        if let Some(late) = self.late(now, header, &frame)? {
            return Ok(Accepted::Late(late));
        }
        self.check_open(header, steps)?;
        self.check_update(header, frame.rank)
            .map_err(Fault::Protocol)?;
        let rank = frame.rank;
        let protocol = |error: super::round::FrameError| Fault::Protocol(error.to_string());
        let accepted = if let Some(round) = self.open.get_mut(&key) {
            round.accept(now, frame, live).map_err(protocol)?
        } else {
            self.check_room(header.step)?;
            let mut round = self.new_round(now, header);
            let accepted = round.accept(now, frame, live).map_err(protocol)?;
            self.open.insert(key, round);
            accepted
        };
        self.updates
            .entry(header.step)
            .or_insert((header.update, rank));
        Ok(accepted)
    }

    fn new_round(&self, now: Duration, header: FrameHeader) -> Round {
        let shape = RoundShape::new(&self.plan, header.bucket, self.shard, header.update);
        Round::open(
            shape,
            self.plan.spec.algorithm.selection,
            header.update,
            now,
        )
    }

    /// The answer to a frame of a round that is closed.
    fn late(
        &mut self,
        now: Duration,
        header: FrameHeader,
        frame: &Frame,
    ) -> Result<Option<Answer>, Fault> {
        self.check_bucket(header.bucket)?;
        let (step, bucket) = (header.step, header.bucket);
        let Some(closed) = self.closed.get(&(step, bucket)) else {
            return Ok(None);
        };
        if closed.update != header.update {
            return Err(Fault::Differs(format!(
                "rank {} is at update {} in step {step}, but the others were at update {}: its copy went another way while it was cut off; join again",
                frame.rank, header.update, closed.update
            )));
        }
        // A round that was skipped in its first phase has no second answer: whoever asks for it has missed the skip.
        let shape = RoundShape::new(&self.plan, bucket, self.shard, closed.update);
        let phase = asked_phase(&shape, frame.kind);
        let skipped = closed.answers.last().filter(|answer| answer.non_finite);
        let answer = phase.and_then(|phase| closed.answers.get(phase).or(skipped));
        let answer = answer.cloned().ok_or_else(|| {
            Fault::Protocol(format!(
                "a {:?} frame came for step {step}, bucket {bucket}, which has no such phase: run the same release everywhere",
                frame.kind
            ))
        })?;
        if let Some((pinned, until)) = &mut self.pin
            && *pinned <= step
        {
            *until = now + PIN_TIME;
        }
        Ok(Some(answer))
    }

    /// While it is not known where the job is, members may name any steps, but not many.
    fn check_room(&self, step: Step) -> Result<(), Fault> {
        let mut steps: BTreeSet<Step> = self.open.keys().map(|key| key.0).collect();
        if self.settled || steps.contains(&step) {
            return Ok(());
        }
        steps.extend(self.closed.keys().map(|key| key.0));
        steps.extend(self.held_early.keys().map(|(key, ..)| key.0));
        if steps.len() < UNSETTLED_STEPS || steps.contains(&step) {
            return Ok(());
        }
        Err(Fault::Gone(format!(
            "step {step} is one too many of those that workers name while shard {} is told where the job is: they are too far apart; join again",
            self.shard
        )))
    }

    fn check_bucket(&self, bucket: BucketId) -> Result<(), Fault> {
        if bucket.index() >= self.plan.buckets.len() {
            return Err(Fault::Protocol(format!(
                "a frame names bucket {bucket}, but the plan has {}: run the same release with the same plan everywhere",
                self.plan.buckets.len()
            )));
        }
        if !self.here.contains(&bucket) {
            return Err(Fault::Protocol(format!(
                "a frame names bucket {bucket}, of which shard {} owns nothing: give every worker the shards in the same order",
                self.shard
            )));
        }
        Ok(())
    }

    fn check_open(
        &self,
        header: FrameHeader,
        steps: core::ops::RangeInclusive<u64>,
    ) -> Result<(), Fault> {
        let FrameHeader { step, bucket, .. } = header;
        let (low, high) = (*steps.start(), *steps.end());
        if step.0 > high {
            return Err(Fault::Protocol(format!(
                "a frame came for step {step}, bucket {bucket}, which is not open yet: this shard takes steps {low} to {high}; run the same release everywhere"
            )));
        }
        if step.0 < low {
            return Err(Fault::Gone(format!(
                "step {step} is closed and its answers are no longer kept: the job is at step {}; join again",
                self.step
            )));
        }
        Ok(())
    }

    /// The update number is the same in all rounds of a step, and never falls. It may grow by more than the steps do:
    /// workers can average an update by other means.
    fn check_update(&self, header: FrameHeader, rank: Rank) -> Result<(), String> {
        let FrameHeader { step, update, .. } = header;
        match self.updates.get(&step) {
            Some((known, first)) if *known != update => Err(format!(
                "rank {rank} is at update {update} in step {step}, but rank {first} is at update {known}: their schedules have come apart; resume all workers from one checkpoint"
            )),
            Some(_) => Ok(()),
            None => match self.updates.range(..step).next_back() {
                Some((before, (known, _))) if update < *known => Err(format!(
                    "rank {rank} is at update {update} in step {step}, but update {known} was in step {before}: an update number never falls; resume all workers from one checkpoint"
                )),
                _ => Ok(()),
            },
        }
    }

    /// Steps that frames may name while the shard knows where the job is.
    pub(super) fn window(&self) -> core::ops::RangeInclusive<u64> {
        self.step.0..=self.step.0.saturating_add(STEP_WINDOW)
    }

    pub(super) fn open_keys(&self) -> Vec<Key> {
        self.open.keys().copied().collect()
    }

    /// The answer of an open round, if it is due.
    pub(super) fn due(
        &mut self,
        now: Duration,
        key: Key,
        live: &BTreeSet<Rank>,
        rules: &ClosingRules,
    ) -> Option<Due> {
        let before = self.contributors_before(key);
        let round = self.open.get_mut(&key)?;
        let answer = round.advance(now, live, rules, before.as_ref())?;
        Some(self.answered(now, key, answer))
    }

    /// Whose h the bucket's H is the mean of: those whom its last update counted. `None`: that is not known any more.
    fn contributors_before(&self, (step, bucket): Key) -> Option<BTreeSet<Rank>> {
        let nobody = Some(BTreeSet::new());
        let update = match self.open.get(&(step, bucket)) {
            Some(round) if self.plan.spec.algorithm.keeps_estimates() => round.update,
            _ => return nobody,
        };
        let steps = (0..step.0)
            .rev()
            .map(|step| self.closed.get(&(Step(step), bucket)));
        let mut updates = steps.map_while(|closed| closed).peekable();
        if update == 0 || updates.peek().is_none() {
            // The job begins here, with H and all h alike.
            return nobody;
        }
        // Whatever a step was answered, it has changed nothing if some round of it made all skip: then the next one is
        // another attempt at the same update.
        let last = updates.find(|closed| closed.update < update)?;
        let answer = last.answers.last().filter(|answer| !answer.non_finite)?;
        Some(answer.contributors.clone())
    }

    fn answered(&mut self, now: Duration, key: Key, answer: Answer) -> Due {
        let update = self.open.get(&key).map_or(0, |round| round.update);
        let closed = answer.last.then(|| self.close(now, key, &answer)).flatten();
        Due {
            key,
            update,
            answer,
            closed,
        }
    }

    fn close(&mut self, now: Duration, key: Key, answer: &Answer) -> Option<RoundClosed> {
        let round = self.open.remove(&key)?;
        let outcome = match (answer.non_finite, answer.contributors.len()) {
            (true, _) => Outcome::NonFinite,
            (false, count) if count >= self.members => Outcome::Complete,
            _ => Outcome::Partial,
        };
        let contributors = answer.contributors.len() as u16;
        let closed = closed_round(now, key, &round, outcome, contributors);
        let kept = Closed {
            update: round.update,
            answers: round.into_answers(),
        };
        self.retained_bytes += kept.bytes();
        self.closed.insert(key, kept);
        self.move_on();
        Some(closed)
    }

    /// The lowest step with an open bucket.
    fn move_on(&mut self) {
        while !self.here.is_empty()
            && self
                .here
                .iter()
                .all(|bucket| self.closed.contains_key(&(self.step, *bucket)))
        {
            self.step.0 = self.step.0.saturating_add(1);
        }
        // The step that was just completed stays, to check the next one's update against.
        let last = Step(self.step.0.saturating_sub(1));
        self.updates = self.updates.split_off(&last);
    }

    /// Drops answers that nobody can want any more, and those of the oldest steps beyond `limits`.
    pub(super) fn prune(&mut self, now: Duration, limits: &Limits) {
        if self.pin.is_some_and(|(_, until)| until <= now) {
            self.pin = None;
        }
        let window = self.step.0.saturating_sub(RETAIN_STEPS);
        let low = self.pin.map_or(window, |(pinned, _)| window.min(pinned.0));
        while let Some(entry) = self.closed.first_entry() {
            let step = entry.key().0;
            let crowded = self.retained_bytes > limits.retained_bytes && step.0 + 1 < self.step.0;
            if step.0 >= low && !crowded {
                break;
            }
            self.retained_bytes -= entry.remove().bytes();
        }
        if self.settled {
            let open = self.step;
            self.held_early.retain(|(key, ..), _| key.0 >= open);
            self.told.retain(|(key, ..)| key.0 >= open);
        }
    }

    /// Keeps answers from `step` on for a worker that joins.
    pub(super) fn pin(&mut self, now: Duration, step: Step) {
        // Whoever joins next replays from a later step; the first one's answers are kept as long as it shows itself.
        let step = self.pin.map_or(step, |(pinned, _)| pinned.min(step));
        self.pin = Some((step, now + PIN_TIME));
    }

    /// When a round's stragglers have had their time.
    pub(super) fn next_deadline(&self, rules: &ClosingRules) -> Option<Duration> {
        self.open
            .values()
            .filter_map(|round| round.deadline(rules))
            .min()
    }

    /// Forgets all open rounds.
    pub(super) fn abandon(&mut self, now: Duration, out: &mut Vec<Action>) {
        for (key, round) in core::mem::take(&mut self.open) {
            let closed = closed_round(now, key, &round, Outcome::Abandoned, 0);
            out.push(Action::Observe(Observation::RoundClosed(Box::new(closed))));
        }
    }
}

fn closed_round(
    now: Duration,
    (step, bucket): Key,
    round: &Round,
    outcome: Outcome,
    contributors: u16,
) -> RoundClosed {
    RoundClosed {
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
    }
}
