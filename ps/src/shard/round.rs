//! One round: gathers frames of all live members, folds them in rank order, answers.
//!
//! A phase keeps a running sum over the ranks that precede every missing one; what came earlier than its
//! turn is parked as bytes. So the bytes of an answer depend on the contributions alone (I3), and memory on
//! density × bucket × workers, never on dense gradients (except in dense rounds).

use super::aggregate::Sum;
use super::answer::{self, Picked};
use super::event::Traffic;
use super::union::Union;
use arc_topk_common::config::algorithm::SelectionPolicy;
use arc_topk_common::ids::Rank;
use arc_topk_common::wire::{FrameKind, RoundShape, WireError};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// Bodies of one phase, folded in rank order.
#[derive(Debug)]
enum Folded {
    Sum(Sum),
    Union(Union),
}

impl Folded {
    fn add(&mut self, shape: &RoundShape, body: &[u8]) {
        match self {
            Self::Sum(sum) => sum.add(body),
            Self::Union(union) => union.add(shape, body),
        }
    }
}

/// One phase of a round.
#[derive(Debug)]
struct Phase {
    up: FrameKind,
    folded: Folded,
    /// Came before their turn.
    parked: BTreeMap<Rank, Bytes>,
    arrived: BTreeMap<Rank, Duration>,
    non_finite: bool,
}

impl Phase {
    fn new(up: FrameKind, folded: Folded) -> Self {
        Self {
            up,
            folded,
            parked: BTreeMap::new(),
            arrived: BTreeMap::new(),
            non_finite: false,
        }
    }

    /// Folds every parked body that no live, still missing rank precedes.
    fn fold_ready(&mut self, shape: &RoundShape, live: &BTreeSet<Rank>) {
        let first_missing = live.iter().find(|rank| !self.arrived.contains_key(rank));
        while let Some(entry) = self.parked.first_entry() {
            if first_missing.is_some_and(|missing| missing < entry.key()) {
                break;
            }
            let body = entry.remove();
            if !self.non_finite {
                self.folded.add(shape, &body);
            }
        }
    }

    /// Who came last, and how long after the one before.
    fn straggler(&self) -> Option<(Rank, Duration)> {
        let mut times: Vec<(Duration, Rank)> =
            self.arrived.iter().map(|(rank, at)| (*at, *rank)).collect();
        times.sort_unstable();
        let [.., (before, _), (last, rank)] = times[..] else {
            return None;
        };
        Some((rank, last.saturating_sub(before)))
    }
}

/// A frame of a member, its header checked against the job.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Frame {
    pub(crate) rank: Rank,
    pub(crate) kind: FrameKind,
    pub(crate) non_finite: bool,
    pub(crate) body: Bytes,
}

/// Answer of a full phase, the same for all.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Answer {
    pub(crate) kind: FrameKind,
    pub(crate) non_finite: bool,
    pub(crate) body: Bytes,
    /// No further frame of this round.
    pub(crate) last: bool,
    /// Whose contributions it holds.
    pub(crate) contributors: BTreeSet<Rank>,
    pub(crate) straggler: Option<(Rank, Duration)>,
}

/// An open round of one bucket.
#[derive(Debug)]
pub(crate) struct Round {
    shape: RoundShape,
    policy: SelectionPolicy,
    phase: Phase,
    /// Rows that the selection chose, per sparse segment; `Some` from the second phase of arc on.
    chosen: Option<Vec<Vec<u32>>>,
    pub(crate) update: u64,
    pub(crate) opened: Duration,
    pub(crate) received: Traffic,
    pub(crate) sent: Traffic,
    /// Workers that sent a first frame.
    pub(crate) started: u16,
    pub(crate) captured_energy: Option<f32>,
    pub(crate) density: Option<f32>,
}

/// What is wrong with a frame, for the peer that sent it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error(
        "a {got:?} frame came where the round gathers {expected:?}: worker and shard disagree about the phase \
         or the compressor; run the same release everywhere"
    )]
    Kind { got: FrameKind, expected: FrameKind },
    #[error(
        "rank {rank} sent its {kind:?} frame twice, but a contribution counts once; run the same release everywhere"
    )]
    Duplicate { rank: Rank, kind: FrameKind },
    #[error(
        "a frame flagged non-finite must have an empty body, but {got} bytes came; run the same release everywhere"
    )]
    NonFiniteBody { got: usize },
    #[error("{0}; run the same release with the same plan everywhere")]
    Body(#[from] WireError),
}

impl Round {
    /// A round in its first phase.
    ///
    /// # Panics
    /// If the shard owns nothing of the bucket: then there is no round.
    pub(crate) fn open(
        shape: RoundShape,
        policy: SelectionPolicy,
        update: u64,
        now: Duration,
    ) -> Self {
        let up = shape
            .phases()
            .first()
            .expect("a round is opened only for a bucket with segments here")
            .up;
        let kept = shape.keep();
        let folded = match up {
            FrameKind::Sketch => Folded::Sum(Sum::new(answer::sketch_pieces(&shape))),
            FrameKind::Values => {
                let mut pieces = answer::values_pieces(&shape, &kept, shape.codec_up);
                pieces.extend(answer::dense_pieces(&shape));
                Folded::Sum(Sum::new(pieces))
            }
            FrameKind::Sparse => Folded::Union(Union::new(&shape)),
            _ => Folded::Sum(Sum::new(answer::whole_pieces(&shape))),
        };
        Self {
            density: answer::density(&shape, kept),
            phase: Phase::new(up, folded),
            shape,
            policy,
            chosen: None,
            update,
            opened: now,
            received: Traffic::default(),
            sent: Traffic::default(),
            started: 0,
            captured_energy: None,
        }
    }

    /// Frame kind that it gathers now.
    pub(crate) fn gathers(&self) -> FrameKind {
        self.phase.up
    }

    /// Whether this rank's frame of the phase is here.
    pub(crate) fn has(&self, rank: Rank) -> bool {
        self.phase.arrived.contains_key(&rank)
    }

    /// Bytes of this rank that wait for their turn.
    pub(crate) fn parked_bytes(&self, rank: Rank) -> usize {
        self.phase.parked.get(&rank).map_or(0, Bytes::len)
    }

    /// Bytes of all ranks that wait for their turn.
    pub(crate) fn all_parked_bytes(&self) -> usize {
        self.phase.parked.values().map(Bytes::len).sum()
    }

    /// Dense f32 bytes that one worker would send for this bucket and shard.
    pub(crate) fn dense_equivalent_bytes(&self) -> u64 {
        4 * (self.shape.sparse_elements() + self.shape.dense_elements()) as u64
    }

    /// Checks a frame against the phase and takes it. Nothing changes on an error.
    pub(crate) fn accept(
        &mut self,
        now: Duration,
        frame: Frame,
        live: &BTreeSet<Rank>,
    ) -> Result<(), FrameError> {
        self.check(&frame)?;
        self.phase.arrived.insert(frame.rank, now);
        if self.chosen.is_none() {
            self.started += 1;
        }
        if frame.non_finite {
            self.phase.non_finite = true;
            self.phase.parked.clear();
        } else {
            self.received
                .add(self.traffic(self.phase.up, frame.body.len()), 1);
            if !self.phase.non_finite {
                self.phase.parked.insert(frame.rank, frame.body);
            }
        }
        self.phase.fold_ready(&self.shape, live);
        Ok(())
    }

    fn check(&self, frame: &Frame) -> Result<(), FrameError> {
        let Frame {
            rank,
            kind,
            non_finite,
            ref body,
        } = *frame;
        let expected = self.phase.up;
        if kind != expected {
            return Err(FrameError::Kind {
                got: kind,
                expected,
            });
        }
        if self.has(rank) {
            return Err(FrameError::Duplicate { rank, kind });
        }
        if non_finite {
            return if body.is_empty() {
                Ok(())
            } else {
                Err(FrameError::NonFiniteBody { got: body.len() })
            };
        }
        match &self.phase.folded {
            Folded::Sum(sum) if sum.body_bytes() == body.len() => Ok(()),
            Folded::Sum(sum) => Err(WireError::BodyLength {
                kind,
                expected: sum.body_bytes(),
                actual: body.len(),
            }
            .into()),
            Folded::Union(_) => Ok(Union::check(&self.shape, body)?),
        }
    }

    /// The answer, once every live member is in; the round then stands in its next phase.
    /// To be called again after a member was lost.
    pub(crate) fn advance(&mut self, live: &BTreeSet<Rank>) -> Option<Answer> {
        if live.is_empty() || !live.iter().all(|rank| self.has(*rank)) {
            return None;
        }
        self.phase.fold_ready(&self.shape, live);
        let next = Phase::new(FrameKind::Values, Folded::Sum(Sum::new(Vec::new())));
        let phase = core::mem::replace(&mut self.phase, next);
        let straggler = phase.straggler();
        let kind = answer_kind(phase.up);
        let body = if phase.non_finite {
            None
        } else {
            self.answer_body(phase.up, phase.folded)
        };
        let Some(body) = body else {
            return Some(Answer {
                kind,
                non_finite: true,
                body: Bytes::new(),
                last: true,
                contributors: BTreeSet::new(),
                straggler,
            });
        };
        self.sent
            .add(self.traffic(kind, body.len()), live.len() as u64);
        Some(Answer {
            kind,
            non_finite: false,
            body: body.into(),
            last: kind != FrameKind::Selection,
            contributors: phase.arrived.into_keys().collect(),
            straggler,
        })
    }

    /// Body of the answer, or `None` if a sum is not finite. A selection sets up the second phase.
    fn answer_body(&mut self, up: FrameKind, folded: Folded) -> Option<Vec<u8>> {
        let sum = match folded {
            Folded::Sum(sum) => sum,
            Folded::Union(union) => {
                let (body, density) = union.mean_body(&self.shape)?;
                self.density = density;
                return Some(body);
            }
        };
        let mean = sum.mean()?;
        if up == FrameKind::Sketch {
            return Some(self.selection_body(&mean));
        }
        let shape = &self.shape;
        let mut body = Vec::new();
        if up == FrameKind::Values {
            let kept = self
                .chosen
                .as_ref()
                .map_or_else(|| shape.keep(), |rows| rows.iter().map(Vec::len).collect());
            let mut pieces = answer::values_pieces(shape, &kept, shape.codec_down);
            if self.chosen.is_none() {
                pieces.extend(answer::dense_pieces(shape));
            }
            answer::encode_pieces(&pieces, &mean, &mut body);
        } else {
            answer::encode_pieces(&answer::whole_pieces(shape), &mean, &mut body);
        }
        Some(body)
    }

    /// Chooses rows by the averaged sketch, and stands ready for their values.
    fn selection_body(&mut self, mean: &[f32]) -> Vec<u8> {
        let shape = &self.shape;
        let sketch_values = mean.len() - shape.dense_elements();
        let Picked {
            rows,
            captured_energy,
        } = answer::select(shape, self.policy, &mean[..sketch_values]);
        let mut body = Vec::new();
        answer::encode_selections(shape, &rows, &mut body);
        answer::encode_pieces(
            &answer::dense_pieces(shape),
            &mean[sketch_values..],
            &mut body,
        );
        let kept: Vec<usize> = rows.iter().map(Vec::len).collect();
        let pieces = answer::values_pieces(shape, &kept, shape.codec_up);
        self.phase = Phase::new(FrameKind::Values, Folded::Sum(Sum::new(pieces)));
        self.captured_energy = captured_energy;
        self.density = answer::density(shape, kept);
        self.chosen = Some(rows);
        body
    }

    /// What `bytes` of a body of this kind hold.
    fn traffic(&self, kind: FrameKind, bytes: usize) -> Traffic {
        let second_phase =
            self.chosen.is_some() && matches!(kind, FrameKind::Values | FrameKind::Mean);
        let dense = if second_phase {
            0
        } else {
            answer::riding_bytes(&self.shape).min(bytes) as u64
        };
        let own = bytes as u64 - dense;
        match kind {
            FrameKind::Sketch => Traffic {
                sketch: own,
                dense,
                ..Traffic::default()
            },
            FrameKind::Selection => Traffic {
                selection: own,
                dense,
                ..Traffic::default()
            },
            FrameKind::Dense | FrameKind::DenseMean => Traffic {
                dense: bytes as u64,
                ..Traffic::default()
            },
            _ => Traffic {
                values: own,
                dense,
                ..Traffic::default()
            },
        }
    }
}

/// Kind of the answer to a phase.
fn answer_kind(up: FrameKind) -> FrameKind {
    match up {
        FrameKind::Sketch => FrameKind::Selection,
        FrameKind::Sparse => FrameKind::SparseMean,
        FrameKind::Values => FrameKind::Mean,
        _ => FrameKind::DenseMean,
    }
}
