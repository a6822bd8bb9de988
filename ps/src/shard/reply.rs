//! Answers to phases: formed here, or told by workers that got them from an earlier incarnation of this shard.

use super::event::SessionId;
use arc_topk_common::ids::Rank;
use arc_topk_common::wire::{FrameKind, encode_roster};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// Answer of a full phase, the same for all.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Answer {
    pub(crate) kind: FrameKind,
    pub(crate) non_finite: bool,
    /// Payload and roster.
    pub(crate) body: Bytes,
    pub(crate) roster_bytes: u16,
    /// No further frame of this round.
    pub(crate) last: bool,
    /// Whose contributions it holds.
    pub(crate) contributors: BTreeSet<Rank>,
    pub(crate) straggler: Option<(Rank, Duration)>,
    /// Who asked for it, and where.
    pub(crate) asked: BTreeMap<Rank, SessionId>,
    /// When it was formed.
    pub(crate) at: Duration,
}

impl Answer {
    /// `payload` with the roster behind it, or, without one, that all skip the update.
    pub(crate) fn new(
        kind: FrameKind,
        payload: Option<Vec<u8>>,
        contributors: BTreeSet<Rank>,
        at: Duration,
    ) -> Self {
        let Some(mut payload) = payload else {
            return Self {
                kind,
                non_finite: true,
                body: Bytes::new(),
                roster_bytes: 0,
                last: true,
                contributors: BTreeSet::new(),
                straggler: None,
                asked: BTreeMap::new(),
                at,
            };
        };
        let roster = encode_roster(&contributors);
        payload.extend_from_slice(&roster);
        Self {
            kind,
            non_finite: false,
            body: payload.into(),
            roster_bytes: roster.len() as u16,
            last: !kind.goes_on(),
            contributors,
            straggler: None,
            asked: BTreeMap::new(),
            at,
        }
    }
}

/// An answer as a worker tells it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Held {
    pub(crate) kind: FrameKind,
    pub(crate) non_finite: bool,
    /// Payload and roster.
    pub(crate) body: Bytes,
    pub(crate) roster_bytes: u16,
}

impl Held {
    /// Whether it says the same as an answer that is here.
    pub(crate) fn agrees(&self, answer: &Answer) -> bool {
        (self.kind, self.non_finite, &self.body) == (answer.kind, answer.non_finite, &answer.body)
    }
}

/// Kind of the answer to a phase.
pub(crate) fn answer_kind(up: FrameKind) -> FrameKind {
    match up {
        FrameKind::Sketch => FrameKind::Selection,
        FrameKind::Sparse => FrameKind::SparseMean,
        FrameKind::Values => FrameKind::Mean,
        FrameKind::Estimates => FrameKind::EstimatesMean,
        _ => FrameKind::DenseMean,
    }
}
