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

/// Hashes that have come, by step.
#[derive(Debug, Default)]
pub(super) struct Digests(BTreeMap<Step, BTreeMap<Rank, Digest>>);

impl Digests {
    /// How many wait.
    pub(super) fn held(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }
}

/// Those that differ from the most, ascending. Of two that are equally frequent the one that the lowest rank has counts.
fn outliers(digests: &BTreeMap<Rank, Digest>) -> Vec<Rank> {
    let mut counts: BTreeMap<Digest, (usize, core::cmp::Reverse<Rank>)> = BTreeMap::new();
    for (rank, digest) in digests {
        let first = (0, core::cmp::Reverse(*rank));
        counts.entry(*digest).or_insert(first).0 += 1;
    }
    let Some((most, _)) = counts.iter().max_by_key(|(_, count)| **count) else {
        return Vec::new();
    };
    let differs = digests.iter().filter(|(_, digest)| *digest != most);
    differs.map(|(rank, _)| *rank).collect()
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
        let Some(job) = &mut self.job else {
            return;
        };
        let Some(rank) = job.members.rank(session) else {
            return;
        };
        // A digest follows its steps. (A shard that owns nothing of any bucket sees no steps.)
        if job.rounds.buckets_here() > 0 && step > job.rounds.step() {
            return;
        }
        let table = &mut job.digests.0;
        table.entry(step).or_default().insert(rank, digest);
        let wanted = job.members.iter().filter(|(_, m)| {
            m.session().is_some() && matches!(m.waited, Waited::From(from) if from < step)
        });
        let complete = wanted
            .map(|(rank, _)| rank)
            .all(|rank| table.get(&step).is_some_and(|of| of.contains_key(&rank)));
        if complete {
            let digests = table.remove(&step).unwrap_or_default();
            self.compare(now, step, &digests, out);
        } else if table.len() > STEPS
            && let Some((oldest, digests)) = table.pop_first()
        {
            self.compare(now, oldest, &digests, out);
        }
    }

    fn compare(
        &mut self,
        now: Duration,
        step: Step,
        digests: &BTreeMap<Rank, Digest>,
        out: &mut Vec<Action>,
    ) {
        let ranks = outliers(digests);
        let Some(job) = self.job.as_ref().filter(|_| !ranks.is_empty()) else {
            return;
        };
        out.push(Action::Observe(Observation::DigestsDiffer {
            step,
            ranks: ranks.clone(),
        }));
        let message = Control::DigestsDiffer {
            step,
            ranks: ranks.clone(),
        };
        out.extend(job.members.sessions().map(|(_, session)| Action::Control {
            session,
            message: message.clone(),
        }));
        if self.config.resync {
            for rank in ranks {
                let detail = format!(
                    "the parameters of rank {rank} differ from those of the most at step {step}: join again, with the others' state"
                );
                self.fault(now, rank, Fault::Differs(detail), out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(digests: &[(u16, u8)]) -> Vec<u16> {
        let digests = digests
            .iter()
            .map(|(rank, byte)| (Rank(*rank), [*byte; 32]));
        outliers(&digests.collect())
            .into_iter()
            .map(|rank| rank.0)
            .collect()
    }

    #[test]
    fn the_minority_differs() {
        assert_eq!(of(&[(0, 1), (1, 2), (2, 2)]), [0]);
        assert_eq!(of(&[(0, 1), (1, 2), (2, 3)]), [1, 2]);
        assert_eq!(of(&[(0, 9), (1, 1)]), [1]);
        assert!(of(&[(4, 7), (9, 7)]).is_empty());
        assert!(of(&[]).is_empty());
    }
}
