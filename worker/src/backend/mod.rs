//! Where compression runs: the storage of one worker's gradients and feedback state, and the passes over it.
//!
//! [`StepMachine`](crate::step::StepMachine) decides what happens and when; a backend does it. It is called once per bucket
//! and phase, or once per round, with all segments (the rows of one tensor that one shard owns) at once, so that a device needs
//! one launch for each and nothing but bytes for the wire crosses the bus. [`CpuBackend`] runs
//! [`Kernels`].

mod cpu;
pub mod device;
mod lent;
mod norms;
mod rules;

pub use cpu::CpuBackend;
pub use device::{DeviceGradient, DeviceStats};
pub use lent::Lent;

use arc_topk_common::compress::{Kernels, ProjectionKey, ValueCodec};
use arc_topk_common::ids::{BucketId, TensorId};
use arc_topk_common::plan::{Plan, Segment};
use half::{bf16, f16};
use std::sync::Arc;

/// A gradient as the trainer has it: row-major, without padding.
#[derive(Clone, Copy, Debug)]
pub enum Gradient<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
    /// IEEE single, in memory that is the backend's until [`Backend::give_back`]. While the step is open, what brings the feedback
    /// state back may lie there alone; then the result does.
    Lent(Lent),
    /// On a GPU, in memory that is the backend's until [`Backend::give_back`].
    OnDevice(&'a DeviceGradient),
    /// No gradient on this worker: zeros.
    Absent,
}

impl Gradient<'_> {
    /// Number of elements; `None` if it is absent.
    #[must_use]
    pub fn elements(&self) -> Option<usize> {
        match self {
            Self::F32(values) => Some(values.len()),
            Self::Bf16(values) => Some(values.len()),
            Self::F16(values) => Some(values.len()),
            Self::Lent(lent) => Some(lent.elements()),
            Self::OnDevice(lent) => Some(lent.elements()),
            Self::Absent => None,
        }
    }
}

impl<'a> From<&'a [f32]> for Gradient<'a> {
    fn from(values: &'a [f32]) -> Self {
        Self::F32(values)
    }
}

/// What one step does with a tensor when its gradient comes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LoadPass {
    /// All rows travel this step.
    pub dense_round: bool,
    /// Sketch with this projection in the same pass.
    pub sketch: Option<ProjectionKey>,
    /// Measure ‖g‖² as well.
    pub measure: bool,
}

/// What [`Backend::open`] found and made.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Opened {
    /// By shard, whether U of all its segments of the bucket is finite.
    pub finite: Vec<bool>,
    /// By shard, what was encoded.
    pub frames: Vec<Vec<u8>>,
    /// ‖g‖² over the bucket's tensors, if it was asked for.
    pub gradient_energy: f64,
}

/// What of a segment to encode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PieceValues<'a> {
    /// The sketch (rows × r).
    Sketch,
    /// A\[rows,:\], as one array: absolute rows of the segment, ascending.
    Rows(&'a [u32]),
    /// All of A in a dense round, or of a tensor that travels whole.
    All,
    /// The estimate h (ef21 and ef21m).
    Estimates,
}

/// An array of values in a frame.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Piece<'a> {
    /// Of this segment.
    pub segment: Segment,
    /// These values of it.
    pub values: PieceValues<'a>,
    /// In this encoding.
    pub codec: ValueCodec,
}

/// Rows of a segment, by absolute row number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SentRows<'a> {
    /// Every row of the segment.
    All,
    /// These, ascending.
    Some(&'a [u32]),
    /// topk: this worker sent `own`, the mean is over the union `all` (both ascending; `own` ⊆ `all`).
    Union {
        /// Rows of this worker.
        own: &'a [u32],
        /// Rows of all workers.
        all: &'a [u32],
    },
}

/// How a segment's round ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SegmentCommit<'a> {
    /// Segment.
    pub segment: Segment,
    /// All rows travelled.
    pub dense_round: bool,
    /// Rows that travelled.
    pub rows: SentRows<'a>,
    /// What this worker sent, encoded; `None` if it was not counted.
    pub sent: Option<&'a [u8]>,
    /// It did not load a gradient, or one that must leave no trace: e and v stay as they are, to the bit. `sent` is
    /// `None` then.
    pub abstained: bool,
    /// Encoding of `sent`.
    pub codec_up: ValueCodec,
    /// The mean, encoded.
    pub mean: &'a [u8],
    /// Encoding of `mean`.
    pub codec_down: ValueCodec,
    /// Measure energies.
    pub measure: bool,
}

/// Energies of one segment, from [`Backend::commit`].
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Energies {
    /// ‖A‖² over the segment.
    pub input: f64,
    /// ‖A\[I\]‖² over the rows that this worker sent.
    pub sent: f64,
    /// ‖A − C(A)‖² afterwards, with what rounding lost where the feedback rule keeps it.
    pub residual: f64,
}

/// Named arrays of one tensor's feedback state. Empty ones are left out.
pub type StateArrays = Vec<(&'static str, Vec<f32>)>;

/// A device that does not work any more. What it holds is lost; the remedy is in the text.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceFault(pub String);

/// One worker's buffers and feedback state.
///
/// Order of calls in a step: [`load`](Backend::load) for every tensor of a bucket, then [`open`](Backend::open) for the bucket (of none if
/// the worker abstains), then any of [`encode`](Backend::encode) and [`top_rows`](Backend::top_rows), then either
/// [`commit`](Backend::commit) or [`restore`](Backend::restore) once for every segment, or [`abandon`](Backend::abandon) (the step is
/// skipped or forgotten, whatever of it had come). Only those two change feedback state, as seen by [`export`](Backend::export).
///
/// A call on a device can fail. [`failure`](Backend::failure) tells afterwards; nothing that a backend says after its failure
/// means anything, and it stays failed.
pub trait Backend: Send {
    /// Takes over a gradient.
    fn load(&mut self, tensor: TensorId, gradient: Gradient<'_>, pass: LoadPass);

    /// All gradients of a bucket are loaded: U is formed and, where it was asked for, sketched; `frames` (by shard, what its first
    /// frame holds, in order) are encoded.
    fn open(&mut self, bucket: BucketId, frames: &[Vec<Piece<'_>>]) -> Opened;

    /// Appends the encodings, one after the other.
    fn encode(&mut self, pieces: &[Piece<'_>], out: &mut Vec<u8>);

    /// The `k` rows of a segment with the largest ‖A_j‖², absolute, ascending; a tie goes to the lower row.
    fn top_rows(&mut self, segment: Segment, k: usize) -> Vec<u32>;

    /// Ends the rounds of segments: feedback state moves on, and their parts of the results are in place. Energies of each.
    fn commit(&mut self, ends: &[SegmentCommit<'_>]) -> Vec<Energies>;

    /// Ends a segment's round with a new H (ef21 and ef21m): result = H = the encoded mean; h and v stay, but for a worker
    /// that was not counted, which takes H for its h.
    fn restore(&mut self, segment: Segment, codec: ValueCodec, mean: &[u8], counted: bool);

    /// Forgets what was loaded and not ended by [`commit`](Backend::commit) or [`restore`](Backend::restore): feedback state is what
    /// it was before the [`load`](Backend::load), to the bit. A backend that keeps U apart from the state has nothing to do.
    fn abandon(&mut self) {}

    /// The result of a tensor after every segment was committed (elements, without padding). Empty if it lies on a device,
    /// where the gradient was lent.
    fn result(&self, tensor: TensorId) -> &[f32];

    /// [Abandons](Backend::abandon) what is open; then memory that was lent is not touched any more. The results that lie there are no
    /// longer the backend's to give.
    fn give_back(&mut self);

    /// An event of the device (a `CUevent`) that happens once the results lie where gradients were lent; `None`: they do already.
    /// It is good until the next call.
    fn finished(&mut self) -> Option<u64> {
        None
    }

    /// What the device did so far, and what lies on it; `None` without one.
    fn device_stats(&self) -> Option<DeviceStats> {
        None
    }

    /// Why the device does not work any more; `None` while it does.
    fn failure(&self) -> Option<DeviceFault> {
        None
    }

    /// Feedback state of a tensor. While a step is open: that before it.
    fn export(&self, tensor: TensorId) -> StateArrays;

    /// Names and lengths of the arrays that [`Backend::export`] gives for a tensor.
    fn state_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)>;

    /// Names and lengths of further arrays that [`Backend::export`] may give or leave out.
    fn optional_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)>;

    /// Replaces one array of a tensor's feedback state; what is open of the tensor is [abandoned](Backend::abandon). Name and length
    /// are from [`Backend::state_lengths`] or [`Backend::optional_lengths`]; an optional one that is left out is empty.
    fn import(&mut self, tensor: TensorId, name: &'static str, values: &[f32]);
}

/// Makes a worker's backend, once its plan is known.
pub type MakeBackend = Arc<dyn Fn(&Plan) -> Result<Box<dyn Backend>, DeviceFault> + Send + Sync>;

/// In main memory, with these loops.
#[must_use]
pub fn on_cpu(kernels: Arc<dyn Kernels>) -> MakeBackend {
    Arc::new(move |plan| Ok(Box::new(CpuBackend::new(plan, Arc::clone(&kernels)))))
}
