//! I3: an answer computed again from the contributions that its roster names, or spoiled by a bug on purpose.

use super::{Answer, AnswerKey, Checker, Incarnation, LifeId, describe};
use crate::reference::{self, Contribution};
use crate::sabotage::Sabotage;
use arc_topk_common::config::algorithm::SelectionPolicy;
use arc_topk_common::ids::Rank;
use arc_topk_common::wire::{Direction, FrameHeader, FrameKind, RoundShape};
use std::collections::{BTreeMap, BTreeSet};

impl Checker {
    /// Whether the answer is what its roster's contributions make.
    pub(super) fn check_formed(
        &self,
        incarnation: &Incarnation,
        shard: usize,
        header: &FrameHeader,
        answer: &Answer,
        roster: &BTreeSet<Rank>,
    ) -> Result<(), String> {
        let shape = self.shape(shard, header);
        let up = up_kind(header.kind, &shape);
        let none = BTreeMap::new();
        let sent = incarnation
            .contributions
            .get(&(header.step, header.bucket, up.into()))
            .unwrap_or(&none);
        let policy = self.plan.spec.algorithm.selection;
        if answer.non_finite {
            return check_skip(
                policy,
                &shape,
                up,
                sent,
                self.selections(incarnation, shard, header),
            );
        }
        let mut contributions = Vec::new();
        for rank in roster {
            let Some(last) = sent.get(rank).and_then(|sent| sent.last()) else {
                return Err(format!(
                    "the roster names rank {rank}, which sent this process nothing"
                ));
            };
            contributions.push(last.clone());
        }
        // Under faults a rank that nobody waited for may come when its turn in the sum is over.
        if let Some(rank) = sent
            .keys()
            .find(|rank| !roster.contains(rank) && self.strict)
        {
            return Err(format!(
                "rank {rank} contributed in time, but the roster is {roster:?}"
            ));
        }
        if header.kind == FrameKind::Restore {
            return if answer.payload().is_empty() {
                Ok(())
            } else {
                Err("H is to be made anew, and yet something came with it".to_owned())
            };
        }
        let matches = self
            .selections(incarnation, shard, header)
            .into_iter()
            .any(|chosen| {
                fits(&shape, up, chosen.as_deref(), &contributions)
                    && reference::answer(&shape, policy, up, chosen.as_deref(), &contributions)
                        .is_some_and(|payload| payload == answer.payload())
            });
        if matches {
            Ok(())
        } else {
            Err(format!(
                "the payload ({}) is not what the contributions of {roster:?} make",
                describe(answer)
            ))
        }
    }

    /// The payload that a bug on purpose makes; `None`: the right one.
    #[must_use]
    pub fn spoiled(
        &self,
        sabotage: Sabotage,
        shard: usize,
        life: LifeId,
        header: &FrameHeader,
        roster: &BTreeSet<Rank>,
        members: usize,
    ) -> Option<Vec<u8>> {
        let incarnation = self.shards[shard].get(&self.lives.get(&life)?.run)?;
        let shape = self.shape(shard, header);
        let up = up_kind(header.kind, &shape);
        let key: AnswerKey = (header.step, header.bucket, up.into());
        let sent = incarnation.contributions.get(&key)?;
        let arrivals = incarnation.arrivals.get(&key)?;
        let mut order: Vec<Rank> = roster.iter().copied().collect();
        let again = |rank: &&Rank| arrivals.iter().filter(|other| other == rank).count() > 1;
        match sabotage {
            Sabotage::AddTwice => order.push(*order.first()?),
            Sabotage::CountAgain => order.push(*roster.iter().find(again)?),
            Sabotage::ArrivalOrder => {
                order.sort_by_key(|rank| arrivals.iter().position(|other| other == rank))
            }
            _ => {}
        }
        let of = |rank: &Rank| sent.get(rank).and_then(|sent| sent.last().cloned());
        let mut contributions = order.iter().map(of).collect::<Option<Vec<_>>>()?;
        if sabotage == Sabotage::DivideByMembers {
            // Zero bytes are zeros in every codec, but no body of topk.
            let zeros = Contribution {
                non_finite: false,
                body: vec![0; contributions.first()?.body.len()].into(),
            };
            let missing = members.saturating_sub(contributions.len());
            contributions.extend(
                (0..missing)
                    .filter(|_| up != FrameKind::Sparse)
                    .map(|_| zeros.clone()),
            );
        }
        let policy = self.plan.spec.algorithm.selection;
        let chosen = self.selections(incarnation, shard, header).pop().flatten();
        fits(&shape, up, chosen.as_deref(), &contributions)
            .then(|| reference::answer(&shape, policy, up, chosen.as_deref(), &contributions))?
    }

    /// The rows that a Mean may be about: those of the Selection that this process sent or was told.
    fn selections(
        &self,
        incarnation: &Incarnation,
        shard: usize,
        header: &FrameHeader,
    ) -> Vec<Option<Vec<Vec<u32>>>> {
        let key = (header.step, header.bucket, FrameKind::Selection.into());
        let held = incarnation.held.get(&key).into_iter().flatten();
        let known: Vec<&Answer> = incarnation
            .answers
            .get(&key)
            .into_iter()
            .chain(held)
            .collect();
        if header.kind != FrameKind::Mean || known.is_empty() {
            return vec![None];
        }
        let shape = self.shape(shard, header);
        let rows = |answer: &Answer| {
            let selected = shape.decode_selection_body(answer.payload()).ok()?;
            Some(Some(selected.rows))
        };
        known.into_iter().filter_map(rows).collect()
    }
}

/// The frame that an answer answers.
fn up_kind(down: FrameKind, shape: &RoundShape) -> FrameKind {
    match down {
        FrameKind::EstimatesMean => FrameKind::Estimates,
        FrameKind::Restore => shape
            .phases()
            .last()
            .map_or(FrameKind::Values, |phase| phase.up),
        FrameKind::Selection => FrameKind::Sketch,
        FrameKind::Mean => FrameKind::Values,
        FrameKind::SparseMean => FrameKind::Sparse,
        _ => FrameKind::Dense,
    }
}

/// Whether all skip for a reason.
fn check_skip(
    policy: SelectionPolicy,
    shape: &RoundShape,
    up: FrameKind,
    sent: &BTreeMap<Rank, Vec<Contribution>>,
    selections: Vec<Option<Vec<Vec<u32>>>>,
) -> Result<(), String> {
    let contributions: Vec<Contribution> = sent
        .values()
        .filter_map(|sent| sent.last().cloned())
        .collect();
    let skips = selections.into_iter().any(|chosen| {
        contributions.iter().any(|c| c.non_finite)
            || !fits(shape, up, chosen.as_deref(), &contributions)
            || reference::answer(shape, policy, up, chosen.as_deref(), &contributions).is_none()
    });
    if skips {
        Ok(())
    } else {
        let ranks: Vec<_> = sent.keys().collect();
        Err(format!("all skip, but {ranks:?} contributed finite values"))
    }
}

/// Whether bodies have the lengths that the rows ask for.
fn fits(
    shape: &RoundShape,
    up: FrameKind,
    chosen: Option<&[Vec<u32>]>,
    contributions: &[Contribution],
) -> bool {
    let bytes = match up {
        FrameKind::Sketch => shape.sketch_layout().bytes,
        FrameKind::Dense | FrameKind::Estimates => shape.dense_layout().bytes,
        FrameKind::Values => {
            let kept =
                chosen.map_or_else(|| shape.keep(), |rows| rows.iter().map(Vec::len).collect());
            shape.values_layout(&kept, Direction::Up).bytes
        }
        _ => return true,
    };
    contributions
        .iter()
        .all(|c| c.non_finite || c.body.len() == bytes)
}
