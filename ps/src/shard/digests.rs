//! Hashes of the workers' parameters, compared by shard 0.

use super::event::{Action, Observation, SessionId};
use super::rounds::Fault;
use super::{Shard, members::Waited};
use arc_topk_common::ids::{Rank, Step};
use arc_topk_common::wire::Control;
use core::time::Duration;
use std::collections::BTreeMap;

/// Steps whose hashes may wait for those of slower workers.
const STEPS: usize = 8;

type Digest = [u8; 32];

/// Hashes of one step.
#[derive(Debug, Default)]
struct OfStep {
    digests: BTreeMap<Rank, Digest>,
    /// They were compared. What comes now is from workers that were away or joining, and has to be the same.
    compared: bool,
}

impl OfStep {
    /// What most have, and how many. Of two that are equally frequent, what the lowest rank has.
    fn most_frequent(&self) -> Option<(Digest, usize)> {
        let mut counts: BTreeMap<Digest, (usize, core::cmp::Reverse<Rank>)> = BTreeMap::new();
        for (rank, digest) in &self.digests {
            let first = (0, core::cmp::Reverse(*rank));
            counts.entry(*digest).or_insert(first).0 += 1;
        }
        let most = counts.into_iter().max_by_key(|(_, count)| *count)?;
        Some((most.0, most.1.0))
    }

    /// Those that differ from the most, ascending.
    fn outliers(&self) -> Vec<Rank> {
        let most = self.most_frequent().map(|(digest, _)| digest);
        let differs = self.digests.iter().filter(|(_, own)| Some(**own) != most);
        differs.map(|(rank, _)| *rank).collect()
    }
}

/// Hashes that have come, of some steps that are not complete and some that were compared.
#[derive(Debug, Default)]
pub(super) struct Digests(BTreeMap<Step, OfStep>);

/// Workers that differ.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Difference {
    step: Step,
    ranks: Vec<Rank>,
    /// How many have what most have.
    most: usize,
}

impl Digests {
    /// How many are held.
    pub(super) fn held(&self) -> usize {
        self.0.values().map(|of| of.digests.len()).sum()
    }

    /// The newest step before which they were compared.
    pub(super) fn compared(&self) -> Option<Step> {
        let mut compared = self.0.iter().rev().filter(|(_, of)| of.compared);
        compared.next().map(|(step, _)| *step)
    }

    /// Takes one; each rank has one for each step. Who differs, if that is news: once those of all that are `wanted` are
    /// there, or no more can be waited for, and when a late one changes it.
    fn take(
        &mut self,
        step: Step,
        rank: Rank,
        digest: Digest,
        wanted: &[Rank],
    ) -> Option<Difference> {
        let of = self.0.entry(step).or_default();
        let before = if of.compared {
            of.outliers()
        } else {
            Vec::new()
        };
        if of.digests.contains_key(&rank) {
            return None;
        }
        of.digests.insert(rank, digest);
        let complete = of.compared || wanted.iter().all(|rank| of.digests.contains_key(rank));
        let compared = if complete { Some(step) } else { self.overdue() }?;
        let of = self.0.get_mut(&compared)?;
        of.compared = true;
        let (ranks, most) = (of.outliers(), of.most_frequent()?.1);
        self.forget_oldest();
        (ranks != before).then_some(Difference {
            step: compared,
            ranks,
            most,
        })
    }

    /// The oldest step that waits, if too many do.
    fn overdue(&self) -> Option<Step> {
        let mut waiting = self.0.iter().filter(|(_, of)| !of.compared);
        let oldest = waiting.next().map(|(step, _)| *step);
        oldest.filter(|_| waiting.count() >= STEPS)
    }

    fn forget_oldest(&mut self) {
        let compared = self.0.iter().filter(|(_, of)| of.compared);
        let beyond: Vec<Step> = compared.map(|(step, _)| *step).rev().skip(STEPS).collect();
        for step in beyond {
            self.0.remove(&step);
        }
    }
}

impl Shard {
    pub(super) fn digest(
        &mut self,
        now: Duration,
        session: SessionId,
        step: Step,
        digest: Digest,
        out: &mut Vec<Action>,
    ) {
        let Some((job, rank)) = self.member_of(session) else {
            return;
        };
        // A digest follows its steps. (A shard that owns nothing of any bucket sees no steps.)
        if job.rounds.buckets_here() > 0 && step > job.rounds.step() {
            return;
        }
        let wanted = job.members.iter().filter(|(_, m)| {
            m.session().is_some() && matches!(m.waited, Waited::From(from) if from < step)
        });
        let wanted: Vec<Rank> = wanted.map(|(rank, _)| rank).collect();
        let Some(difference) = job.digests.take(step, rank, digest, &wanted) else {
            return;
        };
        let Difference { step, ranks, .. } = difference.clone();
        let message = Control::DigestsDiffer {
            step,
            ranks: ranks.clone(),
        };
        job.members.broadcast(&message, out);
        out.push(Action::Observe(Observation::DigestsDiffer { step, ranks }));
        if self.config.resync {
            self.resync(now, difference, out);
        }
    }

    /// Lets workers that differ join again. Who is right can be told only by what more than half of all have, or once all
    /// have said what they have.
    fn resync(&mut self, now: Duration, difference: Difference, out: &mut Vec<Action>) {
        let Difference { step, ranks, most } = difference;
        let members = self.job.as_ref().map_or(0, |job| job.members.count());
        if most * 2 <= members && most + ranks.len() < members {
            return;
        }
        for rank in ranks {
            // Until it is back the job has one less, and must not end by that.
            if self.has_none_to_spare() {
                return;
            }
            let detail = format!(
                "the parameters of rank {rank} differ from those of the most at step {step}: join again, with the others' state"
            );
            self.fault(now, rank, Fault::Differs(detail), out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Rank; 3] = [Rank(0), Rank(1), Rank(2)];

    fn take(table: &mut Digests, step: u64, rank: u16, byte: u8, wanted: &[Rank]) -> Vec<u16> {
        let difference = table.take(Step(step), Rank(rank), [byte; 32], wanted);
        let ranks = difference.map(|difference| difference.ranks);
        ranks.into_iter().flatten().map(|rank| rank.0).collect()
    }

    /// Those that differ once the last of all has come.
    fn of(digests: &[(u16, u8)]) -> Vec<u16> {
        let mut table = Digests::default();
        let wanted: Vec<Rank> = digests.iter().map(|(rank, _)| Rank(*rank)).collect();
        let taken = digests
            .iter()
            .map(|(rank, byte)| take(&mut table, 1, *rank, *byte, &wanted));
        taken.last().unwrap_or_default()
    }

    #[test]
    fn the_minority_differs() {
        assert_eq!(of(&[(0, 1), (1, 2), (2, 2)]), [0]);
        assert_eq!(of(&[(0, 1), (1, 2), (2, 3)]), [1, 2]);
        assert_eq!(of(&[(0, 9), (1, 1)]), [1]);
        assert!(of(&[(4, 7), (9, 7)]).is_empty());
        assert!(of(&[]).is_empty());
    }

    #[test]
    fn no_more_steps_are_held_than_wait_or_were_compared_lately() {
        let mut table = Digests::default();
        for step in 0..100 {
            take(&mut table, step, 0, 1, &ALL[..2]);
            assert!(table.held() <= 2 * STEPS);
        }
        // The oldest were compared without the second one, which comes late to them; once.
        assert!(take(&mut table, 90, 1, 1, &ALL[..2]).is_empty());
        assert_eq!(take(&mut table, 91, 1, 2, &ALL[..2]), [1]);
        assert!(take(&mut table, 91, 1, 3, &ALL[..2]).is_empty());
        // One of a step that is forgotten is no news.
        assert!(take(&mut table, 3, 1, 2, &ALL[..2]).is_empty());
        assert!(table.held() <= 2 * STEPS + 2);
    }

    #[test]
    fn those_that_come_late_may_be_the_most() {
        let mut table = Digests::default();
        assert!(take(&mut table, 5, 0, 9, &ALL[..1]).is_empty());
        assert_eq!(
            take(&mut table, 5, 1, 1, &ALL),
            [1],
            "one word against another"
        );
        let last = table.take(Step(5), Rank(2), [1; 32], &ALL);
        let expected = Difference {
            step: Step(5),
            ranks: vec![Rank(0)],
            most: 2,
        };
        assert_eq!(last, Some(expected));
    }
}
