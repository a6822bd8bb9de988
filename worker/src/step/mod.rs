//! One training step as a machine without sockets, clocks or threads of its own: gradients and frames in, frames and
//! results out.
//!
//! # Order of calls
//!
//! [`begin`](StepMachine::begin), [`fill`](StepMachine::fill) per tensor in any order,
//! [`flush`](StepMachine::flush), [`handle`](StepMachine::handle) for every frame that comes (also between fills), and
//! when [`is_complete`](StepMachine::is_complete): [`commit`](StepMachine::commit), then
//! [`for_each_result`](StepMachine::for_each_result). Frames to send are pushed onto `out`.
//!
//! # A round (bucket b with shard s)
//!
//! | state | event | next | frame out |
//! |---|---|---|---|
//! | filling | last gradient of the bucket, all finite | awaiting 0 | Sketch (arc), Values (randk), Sparse (topk), Dense |
//! | filling | last gradient, one not finite in s's rows | awaiting 0 | the same kind, empty, `non_finite` |
//! | filling | the step abstains | awaiting 0 | the same kind, empty, `absent` |
//! | awaiting 0 (arc) | Selection | awaiting 1 | Values of the chosen rows, last |
//! | awaiting 0 (others) | Mean, SparseMean, DenseMean | closed | |
//! | awaiting 1 | Mean | closed | |
//! | awaiting the last (ef21) | Restore | awaiting estimates | Estimates, last |
//! | awaiting estimates | EstimatesMean | closed | |
//! | awaiting 0, abstaining or not finite (arc) | Selection | awaiting 1 | Values, empty, `absent`, last |
//! | awaiting any | the phase's answer with `non_finite` | non-finite | (the stream just ends) |
//! | any | an answer that came before, the same bytes | same | |
//! | any | an answer that came before, other bytes | same | [`StepError::AnswerDiffers`] |
//! | any | any other frame | same | [`StepError::UnexpectedFrame`] |
//!
//! # Invariants
//!
//! - Feedback state, as [`export_state`](StepMachine::export_state) tells it, changes in `commit` alone, and only if every round of the
//!   step closed and none was non-finite. Until then what was sent is kept, and what the backend needs to go back. A step that is
//!   skipped, forgotten or [abandoned](StepMachine::abandon) leaves the state as it was, bit for bit.
//! - What a round contributes to the state is decided by the answers' rosters, or their `counted` flags if the machine
//!   was not told its rank (dense tensors of an arc round: by the Selection's; values: by the Mean's). What was not counted
//!   stays whole in ef14's residual, that of tensors that travel whole too; under ef21 and ef21m h becomes H.
//! - A step that abstains leaves e and v as they are, bit for bit; h becomes H.
//! - Frames of a round depend on nothing but its own bucket: the order of fills and of answers cannot be seen in any byte.
//!
//! # Passes over memory
//!
//! Per element of a compressible tensor at density μ, with f32 buffers, arc and ef14:
//!
//! | when | reads | writes |
//! |---|---|---|
//! | `fill`, chunk by chunk | g, e | U in e's place, e in g's (and it is sketched while it is in a cache) |
//! | Selection | μ of U | |
//! | `commit` | μ of U | μ of e, which is U but for them; the result in g's place, past the caches |
//!
//! That is 5 passes and 3 μ. U in a buffer of its own, and e = U − sent at the end, would be 7 or another array of the model's size; the
//! step that is undone, which is rare, pays one for that. ef21m does the same with v; ef21 and none have U = g.
//!
//! Beyond the open step, the machine holds the answers of the last [`RETAINED_STEPS`] steps, so that it can tell them to a
//! shard that was restarted: about density × model each, in wire types.
//!
//! A copy of g lets the trainer keep its gradient, and is 2 passes more; one that is lent ([`Gradient::Lent`]) is not copied, and the
//! result takes its place. Measured steps (every [`StepMachine::set_measure_every`]-th) read
//! U and e once more; g is measured in `fill`'s cached chunk.

mod commit;
mod elastic;
mod error;
mod estimates;
mod exchange;
mod result;
mod round;
mod state;
mod stats;

pub use elastic::RETAINED_STEPS;
pub use error::{ImportError, StepError};
pub use result::{RowsCame, TensorResult};
pub use state::{SHARED_ARRAY, WorkerState};
pub use stats::{ByteCounts, StepOutcome, StepStats};

use crate::backend::{Backend, CpuBackend, DeviceStats, Gradient, LoadPass, Opened, Piece};
use arc_topk_common::compress::{Kernels, ProjectionKey};
use arc_topk_common::config::algorithm::{Compressor, RoundKind};
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, Step, TensorId};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::FrameHeader;
use bytes::Bytes;
use elastic::Kept;
use round::{Committed, Round, State, Traffic};
use std::collections::VecDeque;
use std::sync::Arc;

/// Steps between measurements of energies and norms, unless set otherwise.
const MEASURE_EVERY: u64 = 10;

/// A frame to send.
#[derive(Clone, PartialEq, Debug)]
pub struct Outgoing {
    /// To this shard, on the stream of the round (step, bucket).
    pub shard: ShardId,
    /// Header.
    pub header: FrameHeader,
    /// Body.
    pub body: Bytes,
    /// No further frame goes up on this round's stream.
    pub last: bool,
}

/// What a round must know of its step.
struct StepContext<'a> {
    plan: &'a Plan,
    epoch: Epoch,
    rank: Option<Rank>,
    step: Step,
    update: u64,
}

impl StepContext<'_> {
    fn key(&self, tensor: TensorId) -> ProjectionKey {
        ProjectionKey {
            seed: self.plan.spec.algorithm.seed,
            tensor: tensor.0,
            step: self.step.0,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Progress {
    /// Between steps, before the first one or after a skipped one: there are no results.
    Idle,
    /// Between begin and commit.
    Open,
    /// Between steps, with results.
    Committed,
}

/// Rows of a tensor's result that are fresh.
#[derive(Clone, Debug, Default)]
struct Came {
    all: bool,
    rows: Vec<u32>,
}

/// The machine. One per worker.
pub struct StepMachine {
    plan: Arc<Plan>,
    backend: Box<dyn Backend>,
    epoch: Epoch,
    /// This worker's, if it was told.
    rank: Option<Rank>,
    step: Step,
    update: u64,
    /// The open step only takes results.
    abstains: bool,
    progress: Progress,
    measure_every: u64,
    /// By bucket, then shard; `None` where the shard owns nothing of the bucket.
    rounds: Vec<Option<Round>>,
    /// Rounds that have not closed.
    open_rounds: usize,
    filled: Vec<bool>,
    /// Per bucket, tensors that are not filled.
    missing: Vec<usize>,
    came: Vec<Came>,
    traffic: Traffic,
    gradient_energy: f64,
    /// As the last step left them.
    device_stats: DeviceStats,
    /// Answers of the last committed steps, oldest first.
    kept: VecDeque<Kept>,
    /// Per shard, the lowest step that it still worked on when it was last heard.
    job: Vec<Option<Step>>,
}

impl StepMachine {
    /// A machine on the CPU with zero feedback state, about to begin step `start`, update number `update`.
    #[must_use]
    pub fn new(
        plan: Arc<Plan>,
        kernels: Arc<dyn Kernels>,
        epoch: Epoch,
        start: Step,
        update: u64,
    ) -> Self {
        let backend = Box::new(CpuBackend::new(&plan, kernels));
        Self::with_backend(plan, backend, epoch, start, update)
    }

    /// As [`StepMachine::new`], on any backend that was made for the same plan.
    #[must_use]
    pub fn with_backend(
        plan: Arc<Plan>,
        backend: Box<dyn Backend>,
        epoch: Epoch,
        start: Step,
        update: u64,
    ) -> Self {
        let tensors = plan.tensors.len();
        Self {
            backend,
            epoch,
            rank: None,
            step: start,
            update,
            abstains: false,
            progress: Progress::Idle,
            measure_every: MEASURE_EVERY,
            rounds: Vec::new(),
            open_rounds: 0,
            filled: vec![false; tensors],
            missing: vec![0; plan.buckets.len()],
            came: vec![Came::default(); tensors],
            traffic: Traffic::default(),
            gradient_energy: 0.0,
            device_stats: DeviceStats::default(),
            kept: VecDeque::new(),
            job: vec![None; usize::from(plan.spec.shards)],
            plan,
        }
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The step that is open, or else the next one.
    #[must_use]
    pub fn step(&self) -> Step {
        self.step
    }

    /// The update number of that step.
    #[must_use]
    pub fn update(&self) -> u64 {
        self.update
    }

    /// Membership has changed: later frames carry this epoch.
    pub fn set_epoch(&mut self, epoch: Epoch) {
        self.epoch = epoch;
    }

    /// Measure energies and norms in every `steps`-th step (1: in all; 0: never). Default 10. Changes no result.
    pub fn set_measure_every(&mut self, steps: u64) {
        self.measure_every = steps;
    }

    /// Opens the step. An open step that was not committed is forgotten.
    pub fn begin(&mut self) {
        let shards = self.plan.spec.shards;
        let Self {
            rounds,
            plan,
            update,
            ..
        } = self;
        rounds.clear();
        for bucket in &plan.buckets {
            rounds.extend(
                (0..shards).map(|shard| Round::new(plan, bucket.id, ShardId(shard), *update)),
            );
        }
        self.open_rounds = self.rounds.iter().flatten().count();
        // What is open of the step before is abandoned with it.
        self.backend.give_back();
        self.filled.fill(false);
        for (missing, bucket) in self.missing.iter_mut().zip(&self.plan.buckets) {
            *missing = bucket.tensors.len();
        }
        self.traffic = Traffic::default();
        self.gradient_energy = 0.0;
        self.abstains = false;
        self.progress = Progress::Open;
    }

    /// Forgets the open step, whatever of it has come: feedback state is what it was when the step began, to the bit, and memory that
    /// was lent is not touched any more. Without one, nothing happens.
    pub fn abandon(&mut self) {
        if self.progress == Progress::Open {
            self.backend.give_back();
            self.rounds.clear();
            self.progress = Progress::Idle;
        }
    }

    /// Hands over a gradient. When its bucket is complete, the first frames of its rounds are pushed onto `out`.
    ///
    /// # Errors
    /// If no step is open, or the tensor is unknown, has another length, or is already there. Nothing changes then.
    pub fn fill(
        &mut self,
        tensor: TensorId,
        gradient: &[f32],
        out: &mut Vec<Outgoing>,
    ) -> Result<(), StepError> {
        self.fill_any(tensor, Gradient::F32(gradient), out)
    }

    /// [`StepMachine::fill`] for gradients of any type, or none. In a step that abstains they are ignored.
    ///
    /// # Errors
    /// As [`StepMachine::fill`].
    pub fn fill_any(
        &mut self,
        tensor: TensorId,
        gradient: Gradient<'_>,
        out: &mut Vec<Outgoing>,
    ) -> Result<(), StepError> {
        self.check_fill(tensor, gradient)?;
        if self.abstains {
            return Ok(());
        }
        let bucket = self.plan.tensors[tensor.index()].bucket;
        self.backend.load(tensor, gradient, self.load_pass(tensor));
        self.filled[tensor.index()] = true;
        self.missing[bucket.index()] -= 1;
        if self.missing[bucket.index()] == 0 {
            self.open_bucket(bucket, out);
        }
        self.check_device()
    }

    /// No more gradients come in this step: the missing ones count as zeros.
    ///
    /// # Errors
    /// If the device does not work any more.
    pub fn flush(&mut self, out: &mut Vec<Outgoing>) -> Result<(), StepError> {
        if self.progress != Progress::Open || self.abstains {
            return Ok(());
        }
        let plan = Arc::clone(&self.plan);
        for tensor in plan.buckets.iter().flat_map(|bucket| &bucket.tensors) {
            if !self.filled[tensor.index()] {
                self.fill_any(*tensor, Gradient::Absent, out)?;
            }
        }
        Ok(())
    }

    /// A frame came from a shard. The answer, if there is one, is pushed onto `out`. An answer that came before is
    /// ignored, as are those of committed steps: both come when a connection was lost and found again.
    ///
    /// # Errors
    /// If the frame does not belong here or cannot be read: the session with this shard should end. Nothing changes.
    pub fn handle(
        &mut self,
        shard: ShardId,
        header: FrameHeader,
        body: Bytes,
        out: &mut Vec<Outgoing>,
    ) -> Result<(), StepError> {
        self.note_lead(shard, &header);
        if header.step < self.step {
            return Ok(());
        }
        self.check_frame(shard, &header)?;
        let at = self.round_at(header.bucket, shard);
        let ctx = StepContext {
            plan: &self.plan,
            epoch: self.epoch,
            rank: self.rank,
            step: self.step,
            update: self.update,
        };
        let round = self.rounds[at].as_mut().expect("checked above");
        let before = round.state();
        let answer = round.handle(&header, body, &mut *self.backend, &ctx, &mut self.traffic)?;
        if round.state() != before && matches!(round.state(), State::Closed | State::NonFinite) {
            self.open_rounds -= 1;
        }
        self.check_device()?;
        out.extend(answer);
        Ok(())
    }

    /// Whether the device that the backend computes on still works. To be asked after [`StepMachine::commit`], which cannot
    /// tell; results and state mean nothing if it does not.
    ///
    /// # Errors
    /// If it does not.
    pub fn check_device(&self) -> Result<(), StepError> {
        self.backend
            .failure()
            .map_or(Ok(()), |fault| Err(StepError::Device(fault)))
    }

    /// Whether every gradient is there and every round has closed.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.progress == Progress::Open
            && self.open_rounds == 0
            && self.missing.iter().all(|missing| *missing == 0)
    }

    /// Ends the step. Feedback state changes here and nowhere else, unless the step is skipped.
    ///
    /// # Panics
    /// If the step is not complete ([`StepMachine::is_complete`]).
    pub fn commit(&mut self) -> StepOutcome {
        assert!(
            self.is_complete(),
            "commit needs every round of the step to be closed"
        );
        let skipped = self
            .rounds
            .iter()
            .flatten()
            .any(|round| round.state() == State::NonFinite);
        let measured = self.measures();
        let committed = if skipped {
            self.backend.abandon();
            Committed::default()
        } else {
            self.commit_rounds(measured)
        };
        let mut outcome = StepOutcome {
            step: self.step,
            update: self.update,
            skipped,
            kind: self.kind(),
            stats: self.stats(&committed, measured && !skipped),
        };
        if let Some(stats) = self.backend.device_stats() {
            outcome.stats.device = Some(stats.since(&self.device_stats));
            self.device_stats = stats;
        }
        self.keep_answers();
        self.step.0 += 1;
        self.update += u64::from(!skipped);
        self.progress = if skipped {
            Progress::Idle
        } else {
            Progress::Committed
        };
        outcome
    }

    /// Calls `f` with every tensor's result in the order of registration; not at all after a skipped step.
    pub fn for_each_result(&self, f: &mut dyn FnMut(TensorResult<'_>)) {
        if self.progress != Progress::Committed {
            return;
        }
        for (tensor, came) in self.plan.tensors.iter().zip(&self.came) {
            f(TensorResult {
                tensor: tensor.id,
                values: self.backend.result(tensor.id),
                rows: if came.all {
                    RowsCame::All
                } else {
                    RowsCame::Rows(&came.rows)
                },
                width: tensor.width,
            });
        }
    }

    /// Memory that was lent with [`Gradient::Lent`] is not touched any more: results that were not taken yet are gone with it.
    pub fn give_back(&mut self) {
        self.backend.give_back();
        if self.progress == Progress::Committed {
            self.progress = Progress::Idle;
        }
    }

    /// An event of the device (a `CUevent`) that happens once results lie where gradients were lent; `None`: they do already.
    pub fn finished(&mut self) -> Option<u64> {
        self.backend.finished()
    }

    fn kind(&self) -> RoundKind {
        self.plan.spec.algorithm.round_kind(self.update)
    }

    fn measures(&self) -> bool {
        self.measure_every > 0 && self.step.0.is_multiple_of(self.measure_every)
    }

    fn round_at(&self, bucket: BucketId, shard: ShardId) -> usize {
        bucket.index() * usize::from(self.plan.spec.shards) + shard.index()
    }

    fn load_pass(&self, tensor: TensorId) -> LoadPass {
        let sparse = self.plan.tensors[tensor.index()].sparse;
        let dense_round = !sparse || self.kind() == RoundKind::Dense;
        let sketches = !dense_round && self.plan.spec.algorithm.compressor == Compressor::Arc;
        let ctx = StepContext {
            plan: &self.plan,
            epoch: self.epoch,
            rank: self.rank,
            step: self.step,
            update: self.update,
        };
        LoadPass {
            dense_round,
            sketch: sketches.then(|| ctx.key(tensor)),
            measure: self.measures(),
        }
    }

    fn check_fill(&self, tensor: TensorId, gradient: Gradient<'_>) -> Result<(), StepError> {
        if self.progress != Progress::Open {
            return Err(StepError::NotBegun);
        }
        let Some(plan) = self.plan.tensors.get(tensor.index()) else {
            return Err(StepError::UnknownTensor {
                tensor: tensor.0,
                tensors: self.plan.tensors.len(),
            });
        };
        if self.filled[tensor.index()] {
            return Err(StepError::FilledTwice {
                tensor: plan.spec.name.clone(),
                step: self.step,
            });
        }
        match gradient.elements() {
            Some(actual) if actual != plan.elements => Err(StepError::GradientLength {
                tensor: plan.spec.name.clone(),
                expected: plan.elements,
                actual,
            }),
            _ => Ok(()),
        }
    }

    fn check_frame(&self, shard: ShardId, header: &FrameHeader) -> Result<(), StepError> {
        if self.progress != Progress::Open
            || header.step != self.step
            || header.update != self.update
        {
            return Err(StepError::WrongStep {
                shard,
                step: self.step,
                update: self.update,
                got_step: header.step,
                got_update: header.update,
            });
        }
        let known =
            shard.0 < self.plan.spec.shards && header.bucket.index() < self.plan.buckets.len();
        if known && self.rounds[self.round_at(header.bucket, shard)].is_some() {
            return Ok(());
        }
        Err(StepError::UnexpectedFrame {
            shard,
            bucket: header.bucket,
            kind: header.kind,
            state: "not held",
        })
    }

    /// Every gradient of the bucket is there, or the step abstains.
    fn open_bucket(&mut self, bucket: BucketId, out: &mut Vec<Outgoing>) {
        let shards = usize::from(self.plan.spec.shards);
        let ctx = StepContext {
            plan: &self.plan,
            epoch: self.epoch,
            rank: self.rank,
            step: self.step,
            update: self.update,
        };
        let start = bucket.index() * shards;
        let rounds = &mut self.rounds[start..start + shards];
        for round in rounds.iter_mut().flatten() {
            round.prepare(&ctx);
        }
        let opened = if self.abstains {
            Opened::default()
        } else {
            let rounds = rounds.iter().map(Option::as_ref);
            let frames: Vec<Vec<Piece<'_>>> = rounds
                .map(|round| round.map_or_else(Vec::new, Round::first_pieces))
                .collect();
            self.backend.open(bucket, &frames)
        };
        if self.backend.failure().is_some() {
            return;
        }
        self.gradient_energy += opened.gradient_energy;
        let mut frames = opened.frames.into_iter();
        let mut finite = opened.finite.into_iter();
        for round in rounds {
            let (encoded, finite) = (frames.next().unwrap_or_default(), finite.next());
            let Some(round) = round else { continue };
            if finite == Some(false) {
                round.mark_non_finite();
            }
            out.push(round.open(encoded, &mut *self.backend, &ctx, &mut self.traffic));
        }
    }
}
