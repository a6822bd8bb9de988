//! The invariants, checked from outside: by what went over the wire and what workers applied.
//!
//! - **I1** Live workers that applied the answer of (step, bucket, shard) applied the same bytes, roster included. *Live*: the
//!   process is there, and no shard has gone on without it after a restart of that shard. A worker that a restarted shard
//!   went on without is live again once it has come back there and told what it holds, without being refused.
//! - **I2** A contribution is in an answer at most once, and what its worker believes of that is what the answer's roster
//!   says; so under ef14 all gradients given = residual + what was counted.
//! - **I3** An answer is a function of the contributions in its roster, in rank order: it is computed again from what
//!   the shard was sent, by [`mod@crate::reference`], and compared byte by byte; or it is what a worker held.

mod formed;

use crate::reference::Contribution;
use arc_topk_common::ids::{BucketId, Rank, RunId, ShardId, Step};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{FrameHeader, FrameKind, RoundShape, decode_roster};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// Steps that are remembered behind the newest.
const REMEMBERED: u64 = 40;

/// A broken invariant.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Its name.
    pub invariant: &'static str,
    /// What was seen.
    pub detail: String,
}

/// Shorthand for a broken invariant.
pub fn broken<T>(invariant: &'static str, detail: impl Into<String>) -> Result<T, Violation> {
    let detail = detail.into();
    Err(Violation { invariant, detail })
}

/// A worker's life: from one attempt to join until it ends or must join again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LifeId(pub u64);

/// A phase's answer by its kind.
pub type AnswerKey = (Step, BucketId, FrameKey);

/// Kinds of frames, in an order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameKey(pub u8);

impl From<FrameKind> for FrameKey {
    fn from(kind: FrameKind) -> Self {
        Self(kind as u8)
    }
}

/// An answer: whether all skip, and body with roster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// All skip.
    pub non_finite: bool,
    /// Payload and roster.
    pub body: Bytes,
    /// The last bytes that are the roster.
    pub roster_bytes: usize,
}

impl Answer {
    /// The answer in a frame.
    #[must_use]
    pub fn of(header: &FrameHeader, body: &Bytes) -> Self {
        Self {
            non_finite: header.flags.non_finite,
            body: body.clone(),
            roster_bytes: usize::from(header.roster_bytes),
        }
    }

    fn payload(&self) -> &[u8] {
        &self.body[..self.body.len() - self.roster_bytes]
    }

    /// Who was counted.
    ///
    /// # Errors
    /// A roster that cannot be read.
    pub fn roster(&self) -> Result<BTreeSet<Rank>, Violation> {
        decode_roster(&self.body[self.body.len() - self.roster_bytes..]).or_else(|error| {
            broken(
                "wire",
                format!("an answer's roster cannot be read: {error}"),
            )
        })
    }

    fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.non_finite, self.roster_bytes, &self.body[..]).hash(&mut hasher);
        hasher.finish()
    }
}

/// What one process of a shard was sent and sent, for one start of the job.
#[derive(Debug, Default)]
struct Incarnation {
    contributions: BTreeMap<AnswerKey, BTreeMap<Rank, Vec<Contribution>>>,
    /// Ranks as their contributions came, again and again if they were sent again.
    arrivals: BTreeMap<AnswerKey, Vec<Rank>>,
    held: BTreeMap<AnswerKey, Vec<Answer>>,
    answers: BTreeMap<AnswerKey, Answer>,
    accepted: BTreeSet<LifeId>,
}

impl Incarnation {
    fn forget(&mut self, oldest: Step) {
        let from = (oldest, BucketId(0), FrameKey(0));
        if self
            .answers
            .first_key_value()
            .is_none_or(|(key, _)| *key >= from)
        {
            return;
        }
        self.answers = self.answers.split_off(&from);
        self.contributions = self.contributions.split_off(&from);
        self.held = self.held.split_off(&from);
        self.arrivals = self.arrivals.split_off(&from);
    }
}

/// One worker's life.
#[derive(Debug)]
struct Life {
    run: RunId,
    rank: Rank,
    alive: bool,
    /// Shards that went on without it after their restart.
    overtaken: BTreeSet<usize>,
    /// Hash of all answers up to a step.
    chain: BTreeMap<Step, u64>,
    applied: BTreeMap<(Step, BucketId, ShardId, FrameKey), Answer>,
}

/// See the module.
#[derive(Debug)]
pub struct Checker {
    /// Nothing goes wrong, so that everyone must be counted.
    strict: bool,
    plan: Arc<Plan>,
    shards: Vec<BTreeMap<RunId, Incarnation>>,
    lives: BTreeMap<LifeId, Life>,
}

/// How an answer came to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Sent before.
    Known,
    /// Formed from contributions.
    Formed,
    /// Held by a worker.
    Adopted,
}

impl Checker {
    /// Nothing has happened.
    #[must_use]
    pub fn new(plan: &Arc<Plan>, strict: bool) -> Self {
        let shards = plan.spec.shards;
        Self {
            strict,
            plan: Arc::clone(plan),
            shards: (0..shards).map(|_| BTreeMap::new()).collect(),
            lives: BTreeMap::new(),
        }
    }

    /// A shard's process was started again and knows nothing.
    pub fn shard_started(&mut self, shard: usize) {
        self.shards[shard].clear();
    }

    /// A worker has a place. `first`: the step with which it starts the job; one that joins later [inherits](Self::inherits).
    ///
    /// # Errors
    /// A rank that another worker had, or has.
    pub fn life_began(
        &mut self,
        life: LifeId,
        run: RunId,
        rank: Rank,
        first: Option<Step>,
    ) -> Result<(), Violation> {
        let same = |other: &&Life| (other.run, other.rank, other.alive) == (run, rank, true);
        if self.lives.values().any(|other| same(&other)) {
            let detail =
                format!("rank {rank} of run {run} is given to another while its worker lives");
            return broken("P a rank is given once", detail);
        }
        self.lives.insert(
            life,
            Life {
                run,
                rank,
                alive: true,
                overtaken: BTreeSet::new(),
                chain: first.into_iter().map(|first| (first, 0)).collect(),
                applied: BTreeMap::new(),
            },
        );
        Ok(())
    }

    /// Its process is gone, or it gave up its place.
    pub fn life_ended(&mut self, life: LifeId) {
        if let Some(life) = self.lives.get_mut(&life) {
            life.alive = false;
        }
    }

    /// A shard process has accepted a worker, which has told it all it holds.
    pub fn accepted(&mut self, shard: usize, life: LifeId) {
        let Some(member) = self.lives.get_mut(&life) else {
            return;
        };
        member.overtaken.remove(&shard);
        let incarnation = self.shards[shard].entry(member.run).or_default();
        incarnation.accepted.insert(life);
    }

    /// A life's rank, once it has one.
    #[must_use]
    pub fn rank(&self, life: LifeId) -> Option<Rank> {
        self.lives.get(&life).map(|life| life.rank)
    }

    /// A worker begins with a replica: hash of the answers that led to it.
    pub fn inherits(&mut self, life: LifeId, step: Step, chain: u64) {
        if let Some(life) = self.lives.get_mut(&life) {
            life.chain = BTreeMap::from([(step, chain)]);
        }
    }

    /// Whether a worker's copy counts.
    #[must_use]
    pub fn is_live(&self, life: LifeId) -> bool {
        self.lives
            .get(&life)
            .is_some_and(|life| life.alive && life.overtaken.is_empty())
    }

    /// Hash of the answers up to a step.
    #[must_use]
    pub fn chain(&self, life: LifeId, step: Step) -> u64 {
        let life = self.lives.get(&life);
        life.and_then(|life| life.chain.get(&step).copied())
            .unwrap_or_default()
    }

    /// A frame that is a contribution reaches a shard.
    pub fn contributed(&mut self, shard: usize, life: LifeId, header: &FrameHeader, body: &Bytes) {
        let Some(Life { rank, run, .. }) = self.lives.get(&life) else {
            return;
        };
        let rank = *rank;
        let incarnation = self.shards[shard].entry(*run).or_default();
        let key = (header.step, header.bucket, header.kind.into());
        let contribution = Contribution {
            non_finite: header.flags.non_finite,
            body: body.clone(),
        };
        incarnation.arrivals.entry(key).or_default().push(rank);
        let sent = incarnation.contributions.entry(key).or_default();
        let sent = sent.entry(rank).or_default();
        if !sent.contains(&contribution) {
            sent.push(contribution);
        }
    }

    /// A held answer reaches a shard.
    pub fn told(&mut self, shard: usize, life: LifeId, header: &FrameHeader, body: &Bytes) {
        let Some(Life { run, .. }) = self.lives.get(&life) else {
            return;
        };
        let key = (header.step, header.bucket, header.kind.into());
        let incarnation = self.shards[shard].entry(*run).or_default();
        let held = incarnation.held.entry(key).or_default();
        held.push(Answer::of(header, body));
    }

    /// A shard answers a worker.
    ///
    /// # Errors
    /// See the module.
    pub fn answered(
        &mut self,
        shard: usize,
        life: LifeId,
        header: &FrameHeader,
        body: &Bytes,
    ) -> Result<Origin, Violation> {
        let Some(Life { rank, run, .. }) = self.lives.get(&life) else {
            return broken("P", format!("shard {shard} answers one that has no place"));
        };
        let (rank, run) = (*rank, *run);
        self.shards[shard].entry(run).or_default();
        let key: AnswerKey = (header.step, header.bucket, header.kind.into());
        let answer = Answer::of(header, body);
        let roster = answer.roster()?;
        let what = || {
            format!(
                "shard {shard}, step {}, bucket {}, {:?}",
                header.step, header.bucket, header.kind
            )
        };
        if !answer.non_finite && header.flags.counted != roster.contains(&rank) {
            let detail = format!(
                "{}: rank {rank} is told counted={}, but the roster is {roster:?}",
                what(),
                header.flags.counted
            );
            return broken("I2 counted as the roster says", detail);
        }
        if let Some(known) = self.shards[shard][&run].answers.get(&key) {
            if *known == answer {
                return Ok(Origin::Known);
            }
            let detail = format!(
                "{}: two answers of one process, first {}, then {}",
                what(),
                describe(known),
                describe(&answer)
            );
            return broken("I1 one answer", detail);
        }
        let adopted = self.shards[shard][&run]
            .held
            .get(&key)
            .is_some_and(|held| held.contains(&answer));
        if !adopted {
            self.check_formed(&self.shards[shard][&run], shard, header, &answer, &roster)
                .or_else(|detail| broken("I3 recomputed", format!("{}: {detail}", what())))?;
            self.went_on(shard, run);
        }
        let incarnation = self.shards[shard].entry(run).or_default();
        incarnation.answers.insert(key, answer);
        incarnation.forget(Step(header.step.0.saturating_sub(REMEMBERED)));
        Ok(if adopted {
            Origin::Adopted
        } else {
            Origin::Formed
        })
    }

    /// The shard has formed an answer: whoever has not come to this process was left behind.
    fn went_on(&mut self, shard: usize, run: RunId) {
        let accepted = &self.shards[shard][&run].accepted;
        for (id, life) in &mut self.lives {
            if life.alive && life.run == run && !accepted.contains(id) {
                life.overtaken.insert(shard);
            }
        }
    }

    /// Whether this is a selection whose energy needs fewer rows than the density allows.
    #[must_use]
    pub fn is_short_selection(&self, shard: usize, header: &FrameHeader, body: &Bytes) -> bool {
        if header.kind != FrameKind::Selection || header.flags.non_finite {
            return false;
        }
        let shape = self.shape(shard, header);
        let payload = Answer::of(header, body);
        let selected = shape.decode_selection_body(payload.payload());
        shape.energy < 1.0
            && selected.is_ok_and(|selected| {
                let kept = selected.kept();
                let each = kept.iter().zip(&shape.sparse);
                each.map(|(kept, s)| kept * s.width).sum::<usize>() < shape.budget_elements()
            })
    }

    fn shape(&self, shard: usize, header: &FrameHeader) -> RoundShape {
        let shard = ShardId(shard as u16);
        RoundShape::new(&self.plan, header.bucket, shard, header.update)
    }

    /// A worker applied a step: all its answers.
    ///
    /// # Errors
    /// If a live worker went another way.
    pub fn committed(
        &mut self,
        life: LifeId,
        step: Step,
        answers: &BTreeMap<(BucketId, ShardId, FrameKey), Answer>,
    ) -> Result<(), Violation> {
        let Some(own) = self.lives.get_mut(&life) else {
            return Ok(());
        };
        let mut hasher = DefaultHasher::new();
        own.chain.get(&step).hash(&mut hasher);
        // Who skips, skips: some are told in the first phase of a round and others in the second.
        let skipped = answers.values().any(|answer| answer.non_finite);
        for ((bucket, shard, kind), answer) in answers {
            if !skipped {
                (bucket, shard, kind, answer.hash()).hash(&mut hasher);
            }
            own.applied
                .insert((step, *bucket, *shard, *kind), answer.clone());
        }
        own.chain.insert(Step(step.0 + 1), hasher.finish());
        let oldest = Step(step.0.saturating_sub(REMEMBERED));
        own.chain = own.chain.split_off(&oldest);
        let from = (oldest, BucketId(0), ShardId(0), FrameKey(0));
        own.applied = own.applied.split_off(&from);
        self.same_way(life)
    }

    /// Compares a worker with all others that are live.
    ///
    /// # Errors
    /// If one of them went another way.
    pub fn same_way(&self, life: LifeId) -> Result<(), Violation> {
        if !self.is_live(life) {
            return Ok(());
        }
        let own = &self.lives[&life];
        for (id, other) in &self.lives {
            if *id == life || other.run != own.run || !self.is_live(*id) {
                continue;
            }
            let common = own
                .chain
                .keys()
                .rev()
                .find(|step| other.chain.contains_key(step));
            let Some(common) = common else { continue };
            if own.chain[common] != other.chain[common] {
                let detail = format!(
                    "ranks {} and {} have the same step {common} but got there by different answers: {}",
                    own.rank,
                    other.rank,
                    first_difference(own, other)
                );
                return broken("I1 live workers agree", detail);
            }
        }
        Ok(())
    }
}

fn first_difference(a: &Life, b: &Life) -> String {
    let both = |step: &Step| a.chain.contains_key(step) && b.chain.contains_key(step);
    let nothing = Answer {
        non_finite: true,
        body: Bytes::new(),
        roster_bytes: 0,
    };
    let keys: BTreeSet<_> = a.applied.keys().chain(b.applied.keys()).collect();
    let differs = keys
        .into_iter()
        .filter(|key| both(&Step(key.0.0 + 1)) && both(&key.0))
        .find_map(|key| {
            let answer = a.applied.get(key).unwrap_or(&nothing);
            let other = b.applied.get(key).unwrap_or(&nothing);
            if answer == other {
                return None;
            }
            let (step, bucket, shard, kind) = key;
            Some(format!(
                "first at step {step}, bucket {bucket}, shard {shard}, kind {}: {} against {}",
                kind.0,
                describe(answer),
                describe(other)
            ))
        });
    differs
        .unwrap_or_else(|| "the answers themselves are forgotten, or not both are there".to_owned())
}

/// An answer in a few words.
fn describe(answer: &Answer) -> String {
    if answer.non_finite {
        return "skip".to_owned();
    }
    let roster = answer.roster().map_or_else(
        |_| "?".to_owned(),
        |roster| {
            let ranks: Vec<String> = roster.iter().map(ToString::to_string).collect();
            ranks.join(",")
        },
    );
    format!("{:08x} of {roster}", answer.hash() as u32)
}
