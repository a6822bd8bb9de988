//! What a worker needs when shards come and go: frames to send again, answers to tell again, steps to catch up with.

use super::round::{Answer, Round};
use super::{Outgoing, StepMachine};
use arc_topk_common::ids::{Rank, ShardId, Step};
use arc_topk_common::wire::{FrameFlags, FrameHeader};

/// Committed steps whose answers are kept. Workers are at most one step apart when they commit, so that with two any
/// round that one of them still needs is held by all the others.
pub const RETAINED_STEPS: usize = 2;

/// Answers of a committed step, in the order of buckets.
pub(super) type Kept = Vec<(ShardId, Answer)>;

impl StepMachine {
    /// This worker's rank: from now on rosters decide whether it was counted, whatever the answers' flags say.
    pub fn set_rank(&mut self, rank: Rank) {
        self.rank = Some(rank);
    }

    /// Opens the step without gradients: this worker contributes nothing and only takes the results. Gradients that are
    /// pushed all the same are ignored. The first frames of all rounds are pushed onto `out`.
    pub fn begin_abstaining(&mut self, out: &mut Vec<Outgoing>) {
        self.begin();
        self.abstains = true;
        self.missing.fill(0);
        self.rounds.iter_mut().flatten().for_each(Round::abstain);
        for bucket in 0..self.plan.buckets.len() {
            self.open_bucket(self.plan.buckets[bucket].id, out);
        }
    }

    /// Whether the step that is open, or was open last, only takes results.
    #[must_use]
    pub fn is_abstaining(&self) -> bool {
        self.abstains
    }

    /// Frames of the open step that this shard has not answered, in the order of buckets: to be sent again on a new
    /// connection.
    #[must_use]
    pub fn outstanding(&self, shard: ShardId) -> Vec<Outgoing> {
        let frames = self.open().filter(|round| round.shard() == shard);
        frames
            .filter_map(Round::unanswered)
            .map(|frame| Outgoing {
                header: FrameHeader {
                    epoch: self.epoch,
                    ..frame.header
                },
                ..frame.clone()
            })
            .collect()
    }

    /// Answers of this shard in the last [`RETAINED_STEPS`] committed steps and the open one, flagged `held`: to be told
    /// to a later incarnation. Oldest step first, then by bucket, a Selection before its Mean.
    #[must_use]
    pub fn held(&self, shard: ShardId) -> Vec<Outgoing> {
        let committed = self.kept.iter().flatten();
        let committed = committed.filter(|(from, _)| *from == shard);
        let open = self.open().filter(|round| round.shard() == shard);
        committed
            .map(|(_, answer)| answer)
            .chain(open.flat_map(Round::answers))
            .map(|answer| Outgoing {
                shard,
                header: FrameHeader {
                    epoch: self.epoch,
                    flags: FrameFlags {
                        held: true,
                        non_finite: answer.header.flags.non_finite,
                        ..FrameFlags::default()
                    },
                    lead: 0,
                    ..answer.header
                },
                body: answer.body.clone(),
                last: true,
            })
            .collect()
    }

    /// The lowest step that any shard was still working on, if all of them were past this one: the job goes on without
    /// this worker's gradients. A shard that was not heard of yet is taken to be here; by a worker that the job does not
    /// wait for (`waited` is false) to be ahead.
    #[must_use]
    pub fn behind(&self, waited: bool) -> Option<Step> {
        // Whoever works on step n has every answer of step n − 1, from all shards: none works on a lower one.
        let shards = (0..self.plan.spec.shards).map(ShardId);
        let shards = shards.filter(|shard| self.holds_rounds(*shard));
        let heard: Vec<Option<Step>> = shards.map(|shard| self.job[shard.index()]).collect();
        let newest = heard.iter().flatten().max();
        let at_least = newest.map(|step| Step(step.0.saturating_sub(1)));
        let mut lowest = None;
        for heard in heard {
            let at = match heard.max(at_least) {
                Some(step) if step > self.step => step,
                _ if heard.is_none() && !waited => self.step,
                _ => return None,
            };
            lowest = Some(lowest.map_or(at, |lowest: Step| lowest.min(at)));
        }
        lowest
    }

    /// A shard was connected, and said which step it works on. A restarted one may be behind what it was.
    pub fn met(&mut self, shard: ShardId, step: Step, restarted: bool) {
        if let Some(job) = self.job.get_mut(shard.index()) {
            *job = if restarted {
                Some(step)
            } else {
                (*job).max(Some(step))
            };
        }
    }

    /// What an answer tells about where its shard is.
    pub(super) fn note_lead(&mut self, shard: ShardId, header: &FrameHeader) {
        // Nobody asks for steps to come.
        if header.step <= self.step
            && let Some(job) = self.job.get_mut(shard.index())
        {
            let at = Step(header.step.0.saturating_add(u64::from(header.lead)));
            *job = (*job).max(Some(at));
        }
    }

    /// The step ends: its answers are kept, the oldest go.
    pub(super) fn keep_answers(&mut self) {
        let of = |round: &Round| {
            let shard = round.shard();
            let answers = round.answers().iter().cloned();
            answers
                .map(move |answer| (shard, answer))
                .collect::<Vec<_>>()
        };
        let kept = self.rounds.iter().flatten().flat_map(of).collect();
        self.rounds.clear();
        self.kept.push_back(kept);
        if self.kept.len() > RETAINED_STEPS {
            self.kept.pop_front();
        }
    }

    fn holds_rounds(&self, shard: ShardId) -> bool {
        let mut buckets = self.plan.buckets.iter();
        buckets.any(|bucket| !bucket.segments[shard.index()].is_empty())
    }

    fn open(&self) -> impl Iterator<Item = &Round> {
        self.rounds.iter().flatten()
    }
}
