//! Where compression runs: the storage of one worker's gradients and feedback state, and the passes over it.
//!
//! [`StepMachine`](crate::step::StepMachine) decides what happens and when; a backend does it. The unit is the
//! segment (the rows of one tensor that one shard owns), so that a device needs one call per segment and
//! nothing but bytes for the wire crosses the bus. [`CpuBackend`] runs
//! [`Kernels`](arc_topk_common::compress::Kernels).

mod cpu;
mod lent;
mod norms;

pub use cpu::CpuBackend;
pub(crate) use cpu::tensor_segments;
pub use lent::Lent;

use arc_topk_common::compress::{ProjectionKey, ValueCodec};
use arc_topk_common::ids::TensorId;
use arc_topk_common::plan::Segment;
use half::{bf16, f16};

/// A gradient as the trainer has it: row-major, without padding.
#[derive(Clone, Copy, Debug)]
pub enum Gradient<'a> {
    /// IEEE single.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// IEEE half.
    F16(&'a [f16]),
    /// IEEE single, in memory that is the backend's until [`Backend::give_back`]: U and the result take the gradient's place there.
    Lent(Lent),
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

/// What [`Backend::load`] found.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Loaded {
    /// Whether all of U is finite, per segment of the tensor by ascending rows.
    pub finite: Vec<bool>,
    /// ‖g‖², if it was asked for.
    pub gradient_energy: f64,
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

/// One worker's buffers and feedback state.
///
/// Order of calls in a step: [`load`](Backend::load) for every tensor (of none if the worker abstains), then any of the encoders, then either
/// [`commit`](Backend::commit) once for every segment, or nothing (the step is skipped and U is forgotten).
/// Only `commit` changes feedback state.
pub trait Backend: Send {
    /// Takes over a gradient: forms U and, if asked for, the sketch.
    fn load(&mut self, tensor: TensorId, gradient: Gradient<'_>, pass: LoadPass) -> Loaded;

    /// Appends the encoding of a segment's sketch (rows × r).
    fn encode_sketch(&mut self, segment: Segment, codec: ValueCodec, out: &mut Vec<u8>);

    /// Appends the encoding of A\[rows,:\] (absolute rows of the segment, ascending), as one array.
    fn encode_rows(&mut self, segment: Segment, rows: &[u32], codec: ValueCodec, out: &mut Vec<u8>);

    /// Appends the encoding of a whole segment in a dense round.
    fn encode_all(&mut self, segment: Segment, codec: ValueCodec, out: &mut Vec<u8>);

    /// Appends the encoding of a segment's estimate h (ef21 and ef21m).
    fn encode_estimates(&mut self, segment: Segment, codec: ValueCodec, out: &mut Vec<u8>);

    /// Ends a segment's round with a new H (ef21 and ef21m): result = H = the encoded mean; h and v stay, but for a worker
    /// that was not counted, which takes H for its h.
    fn restore(&mut self, segment: Segment, codec: ValueCodec, mean: &[u8], counted: bool);

    /// The `k` rows of a segment with the largest ‖A_j‖², absolute, ascending; a tie goes to the lower row.
    fn top_rows(&mut self, segment: Segment, k: usize) -> Vec<u32>;

    /// Ends a segment's round: feedback state moves on and the segment's part of the result is in place.
    fn commit(&mut self, end: SegmentCommit<'_>) -> Energies;

    /// The result of a tensor after every segment was committed (elements, without padding).
    fn result(&self, tensor: TensorId) -> &[f32];

    /// Memory that was lent is not touched any more. The results that lie there are no longer the backend's to give.
    fn give_back(&mut self);

    /// Feedback state of a tensor.
    fn export(&self, tensor: TensorId) -> StateArrays;

    /// Names and lengths of the arrays that [`Backend::export`] gives for a tensor.
    fn state_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)>;

    /// Names and lengths of further arrays that [`Backend::export`] may give or leave out.
    fn optional_lengths(&self, tensor: TensorId) -> Vec<(&'static str, usize)>;

    /// Replaces one array of a tensor's feedback state. Name and length are from [`Backend::state_lengths`] or
    /// [`Backend::optional_lengths`]; an optional one that is left out is empty.
    fn import(&mut self, tensor: TensorId, name: &'static str, values: &[f32]);
}
