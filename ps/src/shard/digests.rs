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

/// Hashes that have come.
#[derive(Debug, Default)]
pub(super) struct Digests {
    /// Of steps that are not complete.
    waiting: BTreeMap<Step, BTreeMap<Rank, Digest>>,
    /// What most had in the newest steps that were compared: a worker that caught up since has to have the same.
    compared: BTreeMap<Step, Digest>,
}

impl Digests {
    /// How many are held.
    pub(super) fn held(&self) -> usize {
        self.waiting.values().map(BTreeMap::len).sum::<usize>() + self.compared.len()
    }

    /// Takes one. If that completes a step for all that are `wanted`, or is late to one: the step, and who differs there.
    fn take(
        &mut self,
        step: Step,
        rank: Rank,
        digest: Digest,
        wanted: &[Rank],
    ) -> Option<(Step, Vec<Rank>)> {
        if let Some(most) = self.compared.get(&step) {
            return Some((step, Vec::from_iter((digest != *most).then_some(rank))));
        }
        let of_step = self.waiting.entry(step).or_default();
        of_step.insert(rank, digest);
        let (step, digests) = if wanted.iter().all(|rank| of_step.contains_key(rank)) {
            self.waiting.remove_entry(&step)?
        } else if self.waiting.len() > STEPS {
            self.waiting.pop_first()?
        } else {
            return None;
        };
        let most = most_frequent(&digests)?;
        self.compared.insert(step, most);
        if self.compared.len() > STEPS {
            self.compared.pop_first();
        }
        let differs = digests.into_iter().filter(|(_, digest)| *digest != most);
        Some((step, differs.map(|(rank, _)| rank).collect()))
    }
}

/// What most have. Of two that are equally frequent, what the lowest rank has.
fn most_frequent(digests: &BTreeMap<Rank, Digest>) -> Option<Digest> {
    let mut counts: BTreeMap<Digest, (usize, core::cmp::Reverse<Rank>)> = BTreeMap::new();
    for (rank, digest) in digests {
        let first = (0, core::cmp::Reverse(*rank));
        counts.entry(*digest).or_insert(first).0 += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count);
    most.map(|(digest, _)| digest)
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
        if let Some((step, ranks)) = job.digests.take(step, rank, digest, &wanted)
            && !ranks.is_empty()
        {
            job.members.broadcast(
                &Control::DigestsDiffer {
                    step,
                    ranks: ranks.clone(),
                },
                out,
            );
            out.push(Action::Observe(Observation::DigestsDiffer {
                step,
                ranks: ranks.clone(),
            }));
            self.resync(now, step, ranks, out);
        }
    }

    /// Lets workers that differ join again, if that is wanted.
    fn resync(&mut self, now: Duration, step: Step, ranks: Vec<Rank>, out: &mut Vec<Action>) {
        for rank in ranks {
            // Until it is back the job has one less, and must not end by that.
            if !self.config.resync || self.has_none_to_spare() {
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

    /// Those that differ once the last of all has come.
    fn of(digests: &[(u16, u8)]) -> Vec<u16> {
        let mut table = Digests::default();
        let wanted: Vec<Rank> = digests.iter().map(|(rank, _)| Rank(*rank)).collect();
        let taken = digests
            .iter()
            .filter_map(|(rank, byte)| table.take(Step(1), Rank(*rank), [*byte; 32], &wanted));
        let ranks = taken.last().map(|(_, ranks)| ranks);
        ranks.into_iter().flatten().map(|rank| rank.0).collect()
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
            table.take(Step(step), Rank(0), [1; 32], &[Rank(0), Rank(1)]);
            assert!(table.held() <= 2 * STEPS);
        }
        // The oldest were compared without the second one, which comes late to them.
        let late = |table: &mut Digests, step, byte| {
            table.take(Step(step), Rank(1), [byte; 32], &[Rank(0), Rank(1)])
        };
        assert_eq!(late(&mut table, 91, 1), Some((Step(91), vec![])));
        assert_eq!(late(&mut table, 91, 2), Some((Step(91), vec![Rank(1)])));
        // One that is forgotten is no news.
        assert!(late(&mut table, 3, 2).is_none_or(|(_, ranks)| ranks.is_empty()));
    }
}
