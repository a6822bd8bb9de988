//! One round: gathers frames of all live members, folds them in rank order, answers.
//!
//! | phase | event | next |
//! |---|---|---|
//! | gathers | first frame of a rank | contributes, or (`absent`) only wants the answer |
//! | gathers | the same again on another session | the same; the answer goes there |
//! | gathers | every live rank has contributed or is absent; or a quorum has, and the others had their time | answered |
//! | gathers | an answer that a worker holds from before a restart | that answer |
//! | gathers, the last one, ef21 | due, but one whose h is a part of H is not counted | answered with Restore, gathers Estimates |
//! | answered | a frame of the phase | the same answer again (`late`), without being counted |

use super::aggregate::Sum;
use super::answer::{self, Picked};
use super::event::{SessionId, Traffic};
use super::phase::{Arrival, ClosingRules, Folded, Phase};
use super::reply::{Answer, Held, answer_kind, asked_phase};
use super::union::Union;
use arc_topk_common::config::algorithm::SelectionPolicy;
use arc_topk_common::ids::Rank;
use arc_topk_common::wire::{Direction, FrameKind, Layout, RoundShape, WireError, decode_roster};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// A frame of a member, its header checked against the job.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Frame {
    pub(crate) rank: Rank,
    pub(crate) session: SessionId,
    pub(crate) kind: FrameKind,
    pub(crate) non_finite: bool,
    pub(crate) absent: bool,
    pub(crate) body: Bytes,
}

/// What became of a frame.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Accepted {
    /// It is in.
    Taken,
    /// Its phase is answered already: this is the answer.
    Late(Answer),
}

/// An open round of one bucket.
#[derive(Debug)]
pub(crate) struct Round {
    shape: RoundShape,
    policy: SelectionPolicy,
    phase: Phase,
    /// Rows that the selection chose, per sparse segment; `Some` from the second phase of arc on.
    chosen: Option<Vec<Vec<u32>>>,
    /// Given so far.
    answers: Vec<Answer>,
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
        "a frame flagged non-finite or absent must have an empty body, but {got} bytes came; run the same release everywhere"
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
            answers: Vec::new(),
            update,
            opened: now,
            received: Traffic::default(),
            sent: Traffic::default(),
            started: 0,
            captured_energy: None,
        }
    }

    /// Which answer frames of this kind ask for, or are.
    pub(crate) fn phase_of(&self, kind: FrameKind) -> usize {
        self.shape.phase_of(kind)
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

    /// Answers given so far.
    pub(crate) fn answers(&self) -> &[Answer] {
        &self.answers
    }

    /// Answers given so far, taken out when the round has closed.
    pub(crate) fn into_answers(self) -> Vec<Answer> {
        self.answers
    }

    /// Who asked for the answer of the phase that is open.
    pub(crate) fn askers(&self) -> BTreeMap<Rank, SessionId> {
        self.phase.asked()
    }

    /// When the stragglers of this phase had their time, if it has its quorum.
    pub(crate) fn deadline(&self, rules: &ClosingRules) -> Option<Duration> {
        Some(self.phase.quorum_since? + rules.straggler_timeout)
    }

    /// Checks a frame against the phase and takes it. Nothing changes on an error.
    pub(crate) fn accept(
        &mut self,
        now: Duration,
        frame: Frame,
        live: &BTreeSet<Rank>,
    ) -> Result<Accepted, FrameError> {
        let asked = asked_phase(&self.shape, frame.kind);
        if let Some(answer) = asked.and_then(|phase| self.answers.get(phase)) {
            return Ok(Accepted::Late(answer.clone()));
        }
        self.check(&frame)?;
        let Frame { rank, session, .. } = frame;
        if let Some(arrival) = self.phase.arrived.get_mut(&rank) {
            // Sent again after its connection was lost: it is here already.
            arrival.session = session;
            return Ok(Accepted::Taken);
        }
        // Nobody waited for this one (it was away, say), and higher ranks are in the sum: its turn is over.
        let missed = self.phase.folded_to.is_some_and(|folded| rank < folded);
        if frame.absent || missed {
            self.phase.absent.insert(rank, session);
            self.phase.fold_ready(&self.shape, live);
            return Ok(Accepted::Taken);
        }
        self.phase.absent.remove(&rank);
        self.phase
            .arrived
            .insert(rank, Arrival { at: now, session });
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
                self.phase.parked.insert(rank, frame.body);
            }
        }
        self.phase.fold_ready(&self.shape, live);
        Ok(Accepted::Taken)
    }

    fn check(&self, frame: &Frame) -> Result<(), FrameError> {
        let Frame {
            rank,
            session,
            kind,
            non_finite,
            absent,
            ref body,
        } = *frame;
        let expected = self.phase.up;
        if kind != expected {
            return Err(FrameError::Kind {
                got: kind,
                expected,
            });
        }
        let before = self.phase.arrived.get(&rank).map(|arrival| arrival.session);
        if before.or(self.phase.absent.get(&rank).copied()) == Some(session) {
            return Err(FrameError::Duplicate { rank, kind });
        }
        if non_finite || absent {
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

    /// The answer, once it is due; the round then stands in its next phase. To be called again after a member was lost
    /// and when time went by. `before`: whose h make H (ef21); `None`: that is not known.
    pub(crate) fn advance(
        &mut self,
        now: Duration,
        live: &BTreeSet<Rank>,
        rules: &ClosingRules,
        before: Option<&BTreeSet<Rank>>,
    ) -> Option<Answer> {
        if !self.phase.is_full(now, live, rules) {
            return None;
        }
        self.phase.fold_all(&self.shape);
        let restores = self.restores(before);
        let next = if restores {
            self.estimates_phase()
        } else {
            Phase::new(FrameKind::Values, Folded::Sum(Sum::new(Vec::new())))
        };
        let mut phase = core::mem::replace(&mut self.phase, next);
        let kind = if restores {
            FrameKind::Restore
        } else {
            answer_kind(phase.up)
        };
        let folded = core::mem::replace(&mut phase.folded, Folded::Sum(Sum::new(Vec::new())));
        let body = if phase.non_finite || phase.arrived.is_empty() {
            None
        } else if restores {
            Some(Vec::new())
        } else {
            self.answer_body(phase.up, folded)
        };
        let asked = (phase.arrived.len() + phase.absent.len()) as u64;
        if let Some(body) = &body {
            self.sent.add(self.traffic(kind, body.len()), asked);
        }
        let contributors = phase.arrived.keys().copied().collect();
        let answer = Answer {
            straggler: phase.straggler(),
            asked: phase.asked(),
            ..Answer::new(kind, body, contributors, now)
        };
        self.answers.push(answer.clone());
        Some(answer)
    }

    /// ef21: whether the phase would change H by the mean of some only of those whose h it is the mean of.
    fn restores(&self, before: Option<&BTreeSet<Rank>>) -> bool {
        let up = self.phase.up;
        let is_here = |rank: &Rank| self.phase.arrived.contains_key(rank);
        self.shape.changes_estimates
            && up != FrameKind::Estimates
            && !answer_kind(up).goes_on()
            && !self.phase.non_finite
            && !self.phase.arrived.is_empty()
            && !before.is_some_and(|before| before.iter().all(is_here))
    }

    /// The phase that gathers what H is made of.
    fn estimates_phase(&self) -> Phase {
        let pieces = answer::whole_pieces(&self.shape);
        Phase::new(FrameKind::Estimates, Folded::Sum(Sum::new(pieces)))
    }

    /// Takes over an answer that a worker got from an earlier incarnation of this shard. `None`: one of the same phase
    /// is here already, or it follows one that is not here yet.
    ///
    /// # Errors
    /// If it cannot be an answer of this round.
    pub(crate) fn adopt(
        &mut self,
        now: Duration,
        held: Held,
    ) -> Result<Option<Answer>, FrameError> {
        let Held {
            kind,
            non_finite,
            ref body,
            roster_bytes,
        } = held;
        if self.shape.phase_of(kind) != self.answers.len() {
            return Ok(None);
        }
        let restores = kind == FrameKind::Restore && self.shape.changes_estimates;
        if answer_kind(self.phase.up) != kind && !restores {
            return Err(FrameError::Kind {
                got: kind,
                expected: answer_kind(self.phase.up),
            });
        }
        let (payload, roster) =
            body.split_at(body.len() - usize::from(roster_bytes).min(body.len()));
        let contributors = decode_roster(roster)?;
        let chosen = if non_finite {
            None
        } else {
            self.check_held(kind, payload)?
        };
        let asked = self.phase.asked();
        let next = match &chosen {
            Some(rows) => self.values_phase(rows),
            None if restores => self.estimates_phase(),
            None => Phase::new(FrameKind::Values, Folded::Sum(Sum::new(Vec::new()))),
        };
        self.phase = next;
        self.chosen = chosen.or(self.chosen.take());
        let answer = Answer {
            kind,
            non_finite,
            body: held.body,
            roster_bytes,
            last: non_finite || !kind.goes_on(),
            contributors,
            straggler: None,
            asked,
            at: now,
        };
        self.answers.push(answer.clone());
        Ok(Some(answer))
    }

    /// The rows, if it is a selection.
    fn check_held(
        &self,
        kind: FrameKind,
        payload: &[u8],
    ) -> Result<Option<Vec<Vec<u32>>>, FrameError> {
        let shape = &self.shape;
        match kind {
            FrameKind::Selection => return Ok(Some(shape.decode_selection_body(payload)?.rows)),
            FrameKind::SparseMean => {
                shape.decode_sparse_body(payload, Direction::Down)?;
            }
            FrameKind::Mean => {
                let kept = self
                    .chosen
                    .as_ref()
                    .map_or_else(|| shape.keep(), |rows| rows.iter().map(Vec::len).collect());
                shape
                    .values_layout(&kept, Direction::Down)
                    .check(kind, payload.len())?;
            }
            FrameKind::Restore => Layout::default().check(kind, payload.len())?,
            _ => shape.dense_layout().check(kind, payload.len())?,
        }
        Ok(None)
    }

    /// The phase that gathers the values of these rows.
    fn values_phase(&self, rows: &[Vec<u32>]) -> Phase {
        let kept: Vec<usize> = rows.iter().map(Vec::len).collect();
        let pieces = answer::values_pieces(&self.shape, &kept, self.shape.codec_up);
        Phase::new(FrameKind::Values, Folded::Sum(Sum::new(pieces)))
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
        self.density = answer::density(shape, rows.iter().map(Vec::len));
        self.phase = self.values_phase(&rows);
        self.captured_energy = captured_energy;
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
            FrameKind::Dense
            | FrameKind::DenseMean
            | FrameKind::Estimates
            | FrameKind::EstimatesMean => Traffic {
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
