//! One round: a bucket with a shard. See the module above for the table of states and events.

use super::error::StepError;
use super::exchange::Exchange;
use super::stats::ByteCounts;
use super::{Outgoing, StepContext};
use crate::backend::{Backend, Energies, Piece, PieceValues, SegmentCommit};
use arc_topk_common::ids::{BucketId, ShardId};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{
    Direction, FrameFlags, FrameHeader, FrameKind, HEADER_BYTES, Layout, Phase, RoundShape,
    SegmentShape, WireError, decode_roster,
};
use bytes::Bytes;
use core::ops::Range;

/// Where a round stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    /// Gradients of the bucket are missing.
    Filling,
    /// The frame of this phase is on its way, its answer is not there.
    Awaiting(usize),
    /// The last answer is there.
    Closed,
    /// Some worker's gradient, or a sum, was not finite.
    NonFinite,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Filling => "not open yet",
            Self::Awaiting(0) => "waiting for the answer to its first frame",
            Self::Awaiting(_) => "waiting for a later answer",
            Self::Closed | Self::NonFinite => "closed",
        }
    }
}

/// An answer as it came, roster included.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Answer {
    pub(super) header: FrameHeader,
    pub(super) body: Bytes,
}

/// One round.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) shape: RoundShape,
    phases: &'static [Phase],
    state: State,
    /// All gradients so far are finite.
    finite: bool,
    /// This worker contributes nothing more: it only takes the results.
    abstains: bool,
    /// ef21: H was made anew; what this round would have moved stays where it was.
    pub(super) restored: bool,
    /// Sparse segments, then dense ones.
    pub(super) exchanges: Vec<Exchange>,
    /// The frame up that waits for its answer.
    unanswered: Option<Outgoing>,
    /// By phase.
    answers: Vec<Answer>,
}

/// Bytes by kind, both directions.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Traffic {
    pub(super) sent: ByteCounts,
    pub(super) received: ByteCounts,
}

/// What [`Round::commit`] adds up.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Committed {
    /// Over the compressible tensors.
    pub(super) sparse: Energies,
    /// ‖A − C(A)‖² over all tensors.
    pub(super) residual: f64,
    /// Elements of compressible tensors that came.
    pub(super) elements_came: u64,
    /// Rounds.
    pub(super) rounds: u32,
    /// Those of them that hold all of what this worker sent.
    pub(super) counted: u32,
}

impl Round {
    /// The round of an update, or `None` if the shard owns nothing of the bucket.
    pub(super) fn new(plan: &Plan, bucket: BucketId, shard: ShardId, update: u64) -> Option<Self> {
        let shape = RoundShape::new(plan, bucket, shard, update);
        let phases = shape.phases();
        let exchange = |sparse| {
            move |segment: &SegmentShape| Exchange {
                shape: *segment,
                sparse,
                own: Vec::new(),
                union: None,
                sent: Bytes::new(),
                mean: Bytes::new(),
                counted: false,
            }
        };
        let exchanges = shape
            .sparse
            .iter()
            .map(exchange(true))
            .chain(shape.dense.iter().map(exchange(false)))
            .collect();
        (!phases.is_empty()).then_some(Self {
            shape,
            phases,
            state: State::Filling,
            finite: true,
            abstains: false,
            restored: false,
            exchanges,
            unanswered: None,
            answers: Vec::with_capacity(phases.len()),
        })
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// One of its gradients holds a NaN or an Inf.
    pub(super) fn mark_non_finite(&mut self) {
        self.finite = false;
    }

    /// No gradients come: the first frame will say so.
    pub(super) fn abstain(&mut self) {
        self.abstains = true;
    }

    /// The frame up that waits for its answer.
    pub(super) fn unanswered(&self) -> Option<&Outgoing> {
        self.unanswered.as_ref()
    }

    /// Answers so far, in the order of phases.
    pub(super) fn answers(&self) -> &[Answer] {
        &self.answers
    }

    pub(super) fn shard(&self) -> ShardId {
        self.shape.shard
    }

    /// Before the first frame: the rows that need no frame to be known.
    pub(super) fn prepare(&mut self, ctx: &StepContext<'_>) {
        self.take_shared_rows(ctx);
    }

    /// What the first frame holds; nothing if this worker abstains, or must look at A first (topk).
    pub(super) fn first_pieces(&self) -> Vec<Piece<'_>> {
        if self.abstains {
            return Vec::new();
        }
        let kind = self.phases[0].up;
        let exchanges = self.exchanges.iter();
        exchanges
            .filter_map(|exchange| exchange.first_piece(kind, &self.shape))
            .collect()
    }

    /// All gradients are there: sends the first frame, of which `encoded` is what [`Round::first_pieces`] asked for.
    pub(super) fn open(
        &mut self,
        encoded: Vec<u8>,
        backend: &mut dyn Backend,
        ctx: &StepContext<'_>,
        traffic: &mut Traffic,
    ) -> Outgoing {
        self.state = State::Awaiting(0);
        let kind = self.phases[0].up;
        if self.abstains || !self.finite {
            let flags = FrameFlags {
                absent: self.abstains,
                non_finite: !self.abstains,
                ..FrameFlags::default()
            };
            return self.outgoing(0, flags, Bytes::new(), ctx, traffic);
        }
        let body = if kind == FrameKind::Sparse {
            self.encode_own_rows(backend, &mut traffic.sent)
        } else {
            self.take_first(kind, encoded, &mut traffic.sent)
        };
        self.outgoing(0, FrameFlags::default(), body, ctx, traffic)
    }

    /// topk: each segment's rows and their values.
    fn encode_own_rows(&mut self, backend: &mut dyn Backend, sent: &mut ByteCounts) -> Bytes {
        let mut body = Vec::with_capacity(self.shape.dense_layout().bytes);
        let mut ranges = Vec::with_capacity(self.exchanges.len());
        for exchange in &mut self.exchanges {
            ranges.push(exchange.encode_own(&self.shape, backend, &mut body, sent));
        }
        let body = Bytes::from(body);
        for (exchange, range) in self.exchanges.iter_mut().zip(ranges) {
            exchange.sent = body.slice(range);
        }
        body
    }

    /// Any other first frame: what of it the commit will need.
    fn take_first(&mut self, kind: FrameKind, encoded: Vec<u8>, sent: &mut ByteCounts) -> Bytes {
        let layout = match kind {
            FrameKind::Sketch => self.shape.sketch_layout(),
            FrameKind::Values => self.shape.values_layout(&self.shape.keep(), Direction::Up),
            _ => self.shape.dense_layout(),
        };
        debug_assert_eq!(encoded.len(), layout.bytes);
        let body = Bytes::from(encoded);
        let compressed = bytes_of(&layout.sparse);
        match kind {
            FrameKind::Sketch => sent.sketch += compressed,
            FrameKind::Values => sent.values += compressed,
            _ => sent.dense += compressed,
        }
        sent.dense += bytes_of(&layout.dense);
        let (sparse, dense) = self.exchanges.split_at_mut(self.shape.sparse.len());
        let values = sparse.iter_mut().zip(&layout.sparse);
        // The commit needs no sketch.
        let values = values.filter(|_| kind != FrameKind::Sketch);
        for (exchange, range) in values.chain(dense.iter_mut().zip(&layout.dense)) {
            exchange.sent = body.slice(range.clone());
        }
        body
    }

    /// A frame of the shard. Returns the next frame up, if there is one.
    pub(super) fn handle(
        &mut self,
        header: &FrameHeader,
        body: Bytes,
        backend: &mut dyn Backend,
        ctx: &StepContext<'_>,
        traffic: &mut Traffic,
    ) -> Result<Option<Outgoing>, StepError> {
        let phase = self.shape.phase_of(header.kind);
        if let Some(known) = self.answers.get(phase) {
            return if (known.header.kind, known.header.flags.non_finite)
                == (header.kind, header.flags.non_finite)
                && known.body == body
            {
                // Told twice: once on a connection that was lost, once on the next.
                Ok(None)
            } else {
                Err(self.differs(header))
            };
        }
        if self.state != State::Awaiting(phase) || !self.answers_to(phase).contains(&header.kind) {
            return Err(self.unexpected(header));
        }
        if header.flags.held || header.flags.absent {
            return Err(self.unexpected(header));
        }
        if header.flags.non_finite {
            if !body.is_empty() {
                return Err(self.body_error(WireError::BodyLength {
                    kind: header.kind,
                    expected: 0,
                    actual: body.len(),
                }));
            }
            traffic.received.control += HEADER_BYTES as u64;
            self.state = State::NonFinite;
            self.answered(header, body);
            return Ok(None);
        }
        let (payload, counted) = self
            .split(header, &body, ctx)
            .map_err(|source| self.body_error(source))?;
        // A shard that averages what this worker did not send is out of its mind.
        if counted && (self.abstains || !self.finite) {
            return Err(self.unexpected(header));
        }
        self.take(header.kind, &payload, counted, &mut traffic.received)
            .map_err(|source| self.body_error(source))?;
        // The round closed before this worker's NaN came. It has no part in it, and leaves nothing behind.
        self.abstains |= !self.finite;
        self.answered(header, body);
        traffic.received.control += HEADER_BYTES as u64;
        if !header.kind.goes_on() {
            self.state = State::Closed;
            return Ok(None);
        }
        let next = phase + 1;
        self.state = State::Awaiting(next);
        if self.abstains {
            let flags = FrameFlags {
                absent: true,
                ..FrameFlags::default()
            };
            return Ok(Some(self.outgoing(next, flags, Bytes::new(), ctx, traffic)));
        }
        Ok(Some(if header.kind == FrameKind::Restore {
            self.send_estimates(backend, ctx, traffic)
        } else {
            self.send_values(backend, ctx, traffic)
        }))
    }

    /// Kinds that answer the frame of this phase.
    fn answers_to(&self, phase: usize) -> Vec<FrameKind> {
        let Some(of) = self.phases.get(phase) else {
            return vec![FrameKind::EstimatesMean];
        };
        let last = phase + 1 == self.phases.len();
        if last && self.shape.changes_estimates {
            vec![of.down, FrameKind::Restore]
        } else {
            vec![of.down]
        }
    }

    /// Kind of the frame that goes up in this phase.
    fn up(&self, phase: usize) -> FrameKind {
        self.phases
            .get(phase)
            .map_or(FrameKind::Estimates, |phase| phase.up)
    }

    fn answered(&mut self, header: &FrameHeader, body: Bytes) {
        self.unanswered = None;
        self.answers.push(Answer {
            header: *header,
            body,
        });
    }

    /// The body without its roster, and whether the answer holds what this worker sent. The roster decides where it is
    /// known whose it is: an answer that another worker told the shard may carry that one's flag.
    fn split(
        &self,
        header: &FrameHeader,
        body: &Bytes,
        ctx: &StepContext<'_>,
    ) -> Result<(Bytes, bool), WireError> {
        let roster = usize::from(header.roster_bytes);
        let Some(payload) = body.len().checked_sub(roster) else {
            return Err(WireError::Truncated {
                what: "roster",
                needed: roster,
                left: body.len(),
            });
        };
        let roster = decode_roster(&body[payload..])?;
        let counted = ctx
            .rank
            .map_or(header.flags.counted, |rank| roster.contains(&rank));
        Ok((body.slice(..payload), counted))
    }

    /// randk: the rows of the mean are known without any frame.
    fn take_shared_rows(&mut self, ctx: &StepContext<'_>) {
        if self.phases[0].up != FrameKind::Values {
            return;
        }
        for exchange in self.exchanges.iter_mut().filter(|exchange| exchange.sparse) {
            exchange.own = exchange.shared_rows(ctx);
        }
    }

    /// Reads an answer into the exchanges; nothing changes if it cannot be read.
    fn take(
        &mut self,
        kind: FrameKind,
        body: &Bytes,
        counted: bool,
        received: &mut ByteCounts,
    ) -> Result<(), WireError> {
        let sparse = self.shape.sparse.len();
        match kind {
            FrameKind::Selection => {
                let selected = self.shape.decode_selection_body(body)?;
                for (exchange, rows) in self.exchanges.iter_mut().zip(&selected.rows) {
                    exchange.own = exchange.shape.absolute(rows);
                }
                received.selection += bytes_of(&selected.layout.sparse);
                received.dense += bytes_of(&selected.layout.dense);
                assign(
                    &mut self.exchanges[sparse..],
                    &selected.layout.dense,
                    body,
                    counted,
                );
            }
            FrameKind::SparseMean => {
                let selected = self.shape.decode_sparse_body(body, Direction::Down)?;
                for (exchange, rows) in self.exchanges.iter_mut().zip(&selected.rows) {
                    exchange.union = Some(exchange.shape.absolute(rows));
                }
                self.assign_all(&selected.layout, body, counted);
                let (values, dense) = (
                    bytes_of(&selected.layout.sparse),
                    bytes_of(&selected.layout.dense),
                );
                received.values += values;
                received.dense += dense;
                received.selection += body.len() as u64 - values - dense;
            }
            FrameKind::Restore => Layout::default().check(kind, body.len())?,
            FrameKind::EstimatesMean => {
                self.take_estimates(body, counted, received)?;
            }
            FrameKind::Mean => {
                let kept: Vec<usize> = self.exchanges[..sparse]
                    .iter()
                    .map(|e| e.own.len())
                    .collect();
                let layout = self.shape.values_layout(&kept, Direction::Down);
                layout.check(kind, body.len())?;
                received.values += bytes_of(&layout.sparse);
                received.dense += bytes_of(&layout.dense);
                self.assign_all(&layout, body, counted);
            }
            _ => {
                let layout = self.shape.dense_layout();
                layout.check(kind, body.len())?;
                received.dense += body.len() as u64;
                self.assign_all(&layout, body, counted);
            }
        }
        Ok(())
    }

    /// Means of the sparse segments and, where the frame carries them, of the dense ones.
    pub(super) fn assign_all(&mut self, layout: &Layout, body: &Bytes, counted: bool) {
        let (sparse, dense) = self.exchanges.split_at_mut(self.shape.sparse.len());
        assign(sparse, &layout.sparse, body, counted);
        assign(dense, &layout.dense, body, counted);
    }

    /// The values of the rows that the shard chose.
    fn send_values(
        &mut self,
        backend: &mut dyn Backend,
        ctx: &StepContext<'_>,
        traffic: &mut Traffic,
    ) -> Outgoing {
        let sparse = self.shape.sparse.len();
        let kept: Vec<usize> = self.exchanges[..sparse]
            .iter()
            .map(|e| e.own.len())
            .collect();
        let layout = self.shape.values_layout(&kept, Direction::Up);
        let exchanges = self.exchanges[..sparse].iter();
        let pieces: Vec<Piece<'_>> = exchanges
            .map(|exchange| exchange.piece(PieceValues::Rows(&exchange.own), self.shape.codec_up))
            .collect();
        let mut body = Vec::with_capacity(layout.bytes);
        backend.encode(&pieces, &mut body);
        let body = Bytes::from(body);
        for (exchange, range) in self.exchanges.iter_mut().zip(&layout.sparse) {
            exchange.sent = body.slice(range.clone());
        }
        traffic.sent.values += body.len() as u64;
        self.outgoing(1, FrameFlags::default(), body, ctx, traffic)
    }

    /// Moves feedback state on and puts the results in place. `came` is told every sparse segment's rows.
    pub(super) fn commit(
        &mut self,
        backend: &mut dyn Backend,
        measure: bool,
        came: &mut dyn FnMut(&SegmentShape, Option<&[u32]>),
    ) -> Committed {
        let mut total = Committed {
            rounds: 1,
            counted: u32::from(self.exchanges.iter().all(|exchange| exchange.counted)),
            ..Committed::default()
        };
        let dense_round = self.shape.is_dense();
        let (abstained, measure) = (self.abstains, measure && !self.abstains);
        let (restored, ending): (Vec<&Exchange>, Vec<&Exchange>) = self
            .exchanges
            .iter()
            .partition(|exchange| self.restored && exchange.sparse);
        for exchange in restored {
            exchange.restore(&self.shape, backend);
            came(&exchange.shape, None);
        }
        let all_rows = |exchange: &Exchange| dense_round || !exchange.sparse;
        let ends: Vec<SegmentCommit<'_>> = ending
            .iter()
            .map(|exchange| SegmentCommit {
                abstained,
                ..exchange.end(all_rows(exchange), &self.shape, measure)
            })
            .collect();
        for (exchange, energies) in ending.into_iter().zip(backend.commit(&ends)) {
            total.residual += energies.residual;
            if exchange.sparse {
                total.sparse.input += energies.input;
                total.sparse.sent += energies.sent;
                let rows = (!all_rows(exchange))
                    .then_some(exchange.union.as_deref().unwrap_or(&exchange.own));
                let count = rows.map_or(exchange.shape.rows, <[u32]>::len);
                total.elements_came += (count * exchange.shape.width) as u64;
                came(&exchange.shape, rows);
            }
        }
        for exchange in &mut self.exchanges {
            exchange.sent = Bytes::new();
            exchange.mean = Bytes::new();
        }
        total
    }

    pub(super) fn outgoing(
        &mut self,
        phase: usize,
        flags: FrameFlags,
        body: Bytes,
        ctx: &StepContext<'_>,
        traffic: &mut Traffic,
    ) -> Outgoing {
        traffic.sent.control += HEADER_BYTES as u64;
        let frame = Outgoing {
            shard: self.shape.shard,
            header: FrameHeader {
                kind: self.up(phase),
                flags,
                bucket: self.shape.bucket,
                epoch: ctx.epoch,
                step: ctx.step,
                update: ctx.update,
                body_bytes: u32::try_from(body.len())
                    .expect("the plan keeps bodies below MAX_BODY_BYTES"),
                roster_bytes: 0,
                lead: 0,
            },
            body,
            // Where H may have to be made anew, another frame may follow the last.
            last: phase + 1 >= self.phases.len() + usize::from(self.shape.changes_estimates),
        };
        self.unanswered = Some(frame.clone());
        frame
    }

    fn differs(&self, header: &FrameHeader) -> StepError {
        StepError::AnswerDiffers {
            shard: self.shape.shard,
            bucket: self.shape.bucket,
            kind: header.kind,
            step: header.step,
        }
    }

    fn unexpected(&self, header: &FrameHeader) -> StepError {
        StepError::UnexpectedFrame {
            shard: self.shape.shard,
            bucket: self.shape.bucket,
            kind: header.kind,
            state: self.state.name(),
        }
    }

    fn body_error(&self, source: WireError) -> StepError {
        StepError::Body {
            shard: self.shape.shard,
            bucket: self.shape.bucket,
            source,
        }
    }
}

fn assign(exchanges: &mut [Exchange], ranges: &[Range<usize>], body: &Bytes, counted: bool) {
    for (exchange, range) in exchanges.iter_mut().zip(ranges) {
        exchange.mean = body.slice(range.clone());
        exchange.counted = counted;
    }
}

fn bytes_of(ranges: &[Range<usize>]) -> u64 {
    ranges.iter().map(|range| range.len() as u64).sum()
}
