//! One phase of a round: whose frames are here, their sum, and when it may close.
//!
//! A phase keeps a running sum over the ranks that precede every missing one; what came earlier than its
//! turn is parked as bytes. So the bytes of an answer depend on the contributions alone (I3), and memory on
//! density × bucket × workers, never on dense gradients (except in dense rounds).

use super::aggregate::Sum;
use super::event::SessionId;
use super::union::Union;
use arc_topk_common::ids::Rank;
use arc_topk_common::wire::{FrameKind, RoundShape};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// Bodies of one phase, folded in rank order.
#[derive(Debug)]
pub(super) enum Folded {
    Sum(Sum),
    Union(Union),
}

impl Folded {
    pub(super) fn add(&mut self, shape: &RoundShape, body: &[u8]) {
        match self {
            Self::Sum(sum) => sum.add(body),
            Self::Union(union) => union.add(shape, body),
        }
    }
}

/// One phase of a round.
#[derive(Debug)]
pub(super) struct Phase {
    pub(super) up: FrameKind,
    pub(super) folded: Folded,
    /// Came before their turn.
    pub(super) parked: BTreeMap<Rank, Bytes>,
    pub(super) arrived: BTreeMap<Rank, Arrival>,
    /// Want the answer and contribute nothing.
    pub(super) absent: BTreeMap<Rank, SessionId>,
    pub(super) non_finite: bool,
    /// Highest rank whose body is in the sum.
    pub(super) folded_to: Option<Rank>,
    /// Since when there is a quorum.
    pub(super) quorum_since: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival {
    pub(super) at: Duration,
    pub(super) session: SessionId,
}

/// When a phase may close.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ClosingRules {
    pub(crate) min_workers: u16,
    /// 0: all that are live.
    pub(crate) quorum: u16,
    pub(crate) straggler_timeout: Duration,
}

impl Phase {
    pub(super) fn new(up: FrameKind, folded: Folded) -> Self {
        Self {
            up,
            folded,
            parked: BTreeMap::new(),
            arrived: BTreeMap::new(),
            absent: BTreeMap::new(),
            non_finite: false,
            folded_to: None,
            quorum_since: None,
        }
    }

    /// Whether the answer is due.
    pub(super) fn is_full(
        &mut self,
        now: Duration,
        live: &BTreeSet<Rank>,
        rules: &ClosingRules,
    ) -> bool {
        if live.is_empty() {
            self.quorum_since = None;
            return false;
        }
        let came = |rank: &Rank| self.arrived.contains_key(rank) || self.absent.contains_key(rank);
        if live.iter().all(came) {
            // With nobody's contribution there is nothing to average, and all skip. One that only takes the answer is a
            // member that is there, and will not contribute to this phase any more, however long the others wait.
            let there = self.arrived.len() + self.absent.len();
            return there >= usize::from(rules.min_workers) || self.arrived.is_empty();
        }
        let quorum = usize::from(rules.quorum).min(live.len());
        let enough = quorum > 0 && self.arrived.len() >= quorum.max(usize::from(rules.min_workers));
        if !enough {
            self.quorum_since = None;
            return false;
        }
        let since = *self.quorum_since.get_or_insert(now);
        now.saturating_sub(since) >= rules.straggler_timeout
    }

    /// Folds every parked body that no live, still missing rank precedes.
    pub(super) fn fold_ready(&mut self, shape: &RoundShape, live: &BTreeSet<Rank>) {
        if live.is_empty() {
            // Nothing can close, so nobody's turn is over: whoever comes before it can is in the sum.
            return;
        }
        self.fold(shape, live);
    }

    /// Folds every parked body, in rank order.
    pub(super) fn fold_all(&mut self, shape: &RoundShape) {
        self.fold(shape, &BTreeSet::new());
    }

    fn fold(&mut self, shape: &RoundShape, live: &BTreeSet<Rank>) {
        let first_missing = live.iter().find(|rank| !self.arrived.contains_key(rank));
        while let Some(entry) = self.parked.first_entry() {
            if first_missing.is_some_and(|missing| missing < entry.key()) {
                break;
            }
            self.folded_to = Some(*entry.key());
            let body = entry.remove();
            if !self.non_finite {
                self.folded.add(shape, &body);
            }
        }
    }

    /// Who came last, and how long after the one before.
    pub(super) fn straggler(&self) -> Option<(Rank, Duration)> {
        let mut times: Vec<(Duration, Rank)> =
            self.arrived.iter().map(|(rank, a)| (a.at, *rank)).collect();
        times.sort_unstable();
        let [.., (before, _), (last, rank)] = times[..] else {
            return None;
        };
        Some((rank, last.saturating_sub(before)))
    }
}

impl Phase {
    pub(super) fn asked(&self) -> BTreeMap<Rank, SessionId> {
        let arrived = self.arrived.iter().map(|(rank, a)| (*rank, a.session));
        arrived
            .chain(self.absent.iter().map(|(rank, session)| (*rank, *session)))
            .collect()
    }
}
