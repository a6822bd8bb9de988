//! `arc.cuh` in Rust: what kernels take. Addresses are plain numbers, since this crate touches no memory; 0 is none.

use bytemuck::NoUninit;

/// Type of a gradient's or parameter's elements.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, NoUninit)]
pub enum Element {
    /// IEEE single.
    #[default]
    F32 = 0,
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half.
    F16 = 2,
}

impl Element {
    /// Bytes of an element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Type on the wire, as `ValueType` of the common crate.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, NoUninit)]
pub enum Wire {
    /// IEEE single.
    #[default]
    F32 = 0,
    /// bfloat16.
    Bf16 = 1,
    /// IEEE half.
    F16 = 2,
    /// A scale and signed bytes per block.
    Int8 = 3,
    /// A scale and signed nibbles per block.
    Int4 = 4,
}

/// Rows of one tensor that one shard owns. Addresses are those of the segment's own first element. The rule follows from what is
/// there: `blended` alone is ef14, `local` alone ef21, both ef21m, neither none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Segment {
    /// Gradient; 0: zeros.
    pub gradient: u64,
    /// Where the result goes, in the gradient's type; may be `gradient`; 0: nowhere.
    pub result: u64,
    /// e or v, `padded` floats.
    pub blended: u64,
    /// h.
    pub local: u64,
    /// H.
    pub global: u64,
    /// `parts` × `rows` × r floats: sums that encoding adds and divides by √r; 0: none is wanted.
    pub sketch: u64,
    /// The tensor's Gaussian V, `width` × r floats.
    pub projection: u64,
    /// `parts` × `rows` doubles, for the energies of rows.
    pub energy: u64,
    /// Elements of gradient and result.
    pub elements: u32,
    /// Elements of state: rows·width, but for dense tensors, whose rows are only a way to read them.
    pub padded: u32,
    /// Absolute number of the first row: what row lists count in.
    pub row_start: u32,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub width: u32,
    /// Columns of a part.
    pub part_columns: u32,
    /// Parts of a row.
    pub parts: u32,
    /// log₂ of the threads that share a row.
    pub lanes_log2: u32,
    /// Id, for the projection.
    pub tensor: u32,
    /// Type of the gradient.
    pub element: Element,
    /// U = keep·blended + take·gradient.
    pub keep: f32,
    /// As above.
    pub take: f32,
    /// Zero.
    pub reserved: [u32; 4],
}

/// What a block works on: some rows of a segment and one part of their columns; some values of a piece.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, NoUninit)]
pub struct Tile {
    /// Segment, piece, projection or tensor: position in the launch's array.
    pub segment: u32,
    /// First row (or value), from the segment's own first on.
    pub row: u32,
    /// Rows (or values).
    pub rows: u32,
    /// Part of the columns.
    pub part: u32,
}

/// Of the sketches and `arc_inspect`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct SketchArgs {
    /// [`Segment`]s.
    pub segments: u64,
    /// [`Tile`]s.
    pub tiles: u64,
    /// A u32 per segment, set to 1 where U is not finite.
    pub not_finite: u64,
    /// ‖g‖² per tile, a double each; 0 if it is not wanted.
    pub energy: u64,
    /// Seed of the job.
    pub seed: u64,
    /// Step.
    pub step: u64,
    /// r.
    pub rank: u32,
    /// 1 in a dense round.
    pub dense_round: u32,
    /// Multiplies the gradient first.
    pub unscale: f32,
    /// Zero.
    pub reserved: u32,
}

/// Where a Gaussian V goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Projection {
    /// `entries` floats.
    pub out: u64,
    /// width × r.
    pub entries: u32,
    /// Tensor id.
    pub tensor: u32,
}

/// Of `arc_gaussian`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct GaussianArgs {
    /// [`Projection`]s.
    pub projections: u64,
    /// [`Tile`]s: entries.
    pub tiles: u64,
    /// Seed of the job.
    pub seed: u64,
    /// Step.
    pub step: u64,
}

/// Where the values of a [`Piece`] come from.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, NoUninit)]
pub enum PieceSource {
    /// A, of the rows listed or of all.
    #[default]
    Input = 0,
    /// The sketch.
    Sketch = 1,
    /// h.
    Estimates = 2,
}

/// An array of values to encode.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Piece {
    /// Absolute rows, ascending, u32 each; 0: the whole segment.
    pub rows: u64,
    /// Where the bytes go.
    pub out: u64,
    /// How many values.
    pub values: u32,
    /// Of which segment.
    pub segment: u32,
    /// Where they come from.
    pub source: PieceSource,
    /// Type on the wire.
    pub wire: Wire,
    /// Values that share a scale.
    pub quant_block: u32,
    /// 1 in a dense round.
    pub dense_round: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

/// Of `arc_gather`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct GatherArgs {
    /// [`Segment`]s.
    pub segments: u64,
    /// [`Piece`]s.
    pub pieces: u64,
    /// [`Tile`]s: values.
    pub tiles: u64,
    /// A u32 per segment, set to 1 where a value is not finite; 0 if it is not wanted.
    pub not_finite: u64,
    /// r.
    pub rank: u32,
    /// 1/√r.
    pub scale: f32,
    /// Multiplies the gradient first.
    pub unscale: f32,
    /// Zero.
    pub reserved: u32,
}

/// How a round ended for a segment.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, NoUninit)]
pub struct CommitFlags(pub u32);

impl CommitFlags {
    /// All rows travelled.
    pub const ALL: Self = Self(1);
    /// This worker was counted.
    pub const COUNTED: Self = Self(2);
    /// It loaded no gradient: e and v stay. Never with [`CommitFlags::COUNTED`].
    pub const ABSTAINED: Self = Self(4);
    /// With [`CommitFlags::ALL`]: H is the mean; h too, unless the worker was counted; v stays.
    pub const RESTORE: Self = Self(8);

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The end of a segment's round.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct Commit {
    /// Absolute rows that travelled, ascending, u32 each; not read with [`CommitFlags::ALL`].
    pub rows: u64,
    /// What this worker sent, encoded; read if it was counted and has state.
    pub sent: u64,
    /// The mean, encoded.
    pub mean: u64,
    /// How many rows.
    pub count: u32,
    /// How it ended.
    pub flags: CommitFlags,
    /// Encoding of `sent`.
    pub wire_up: Wire,
    /// Values that share a scale in it.
    pub quant_up: u32,
    /// Encoding of `mean`.
    pub wire_down: Wire,
    /// Values that share a scale in it.
    pub quant_down: u32,
}

/// Of `arc_commit`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct CommitArgs {
    /// [`Segment`]s.
    pub segments: u64,
    /// [`Commit`]s, one per segment.
    pub commits: u64,
    /// [`Tile`]s.
    pub tiles: u64,
    /// Multiplies the gradient first, as it did in the sketch.
    pub unscale: f32,
    /// Multiplies the result last.
    pub rescale: f32,
}

/// What [`EnergyArgs`] asks for.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, NoUninit)]
pub enum EnergySource {
    /// ‖A_j‖².
    #[default]
    Input = 0,
    /// Of e (or v).
    Blended = 1,
}

/// Of `arc_energy`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct EnergyArgs {
    /// [`Segment`]s.
    pub segments: u64,
    /// [`Tile`]s.
    pub tiles: u64,
    /// Of what.
    pub source: EnergySource,
    /// 1 in a dense round.
    pub dense_round: u32,
    /// Multiplies the gradient first.
    pub unscale: f32,
    /// Zero.
    pub reserved: u32,
}

/// What a step of τ updates multiplies with; one for every τ up to the cap.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug, Default, NoUninit)]
pub struct AdamTau {
    /// Clip factor over τ.
    pub grad: f32,
    /// β₁^τ.
    pub keep1: f32,
    /// 1 − β₁^τ.
    pub take1: f32,
    /// β₂^τ.
    pub keep2: f32,
    /// 1 − β₂^τ.
    pub take2: f32,
    /// Sum of the last τ learning rates.
    pub lr: f32,
}

/// A parameter that takes a step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct AdamTensor {
    /// Parameter.
    pub parameter: u64,
    /// What takes the gradient's place, in the parameter's type.
    pub gradient: u64,
    /// m, rows × width floats.
    pub first: u64,
    /// v, rows × width floats.
    pub second: u64,
    /// i64 per row: step in which it came last; 0 is the start.
    pub last: u64,
    /// i64 per row: T, the sum of its τ.
    pub seen: u64,
    /// Rows that came, ascending, u32 each; 0: all.
    pub came: u64,
    /// Number of this step, from 1 on.
    pub step: i64,
    /// How many rows came.
    pub came_count: u32,
    /// Elements of parameter and gradient.
    pub elements: u32,
    /// Columns.
    pub width: u32,
    /// log₂ of the threads that share a row.
    pub lanes_log2: u32,
    /// Type of the parameter.
    pub element: Element,
    /// 1 − learning rate · weight decay.
    pub keep: f32,
}

/// Of `arc_adamw`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, NoUninit)]
pub struct AdamArgs {
    /// [`AdamTensor`]s.
    pub tensors: u64,
    /// [`Tile`]s.
    pub tiles: u64,
    /// [`AdamTau`]s.
    pub taus: u64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f32,
    /// How many [`AdamTau`]s.
    pub cap: u32,
}

// The same numbers as in arc.cuh, whose static_asserts hold the other side.
const _: () = {
    assert!(size_of::<Segment>() == 128);
    assert!(core::mem::offset_of!(Segment, elements) == 64);
    assert!(core::mem::offset_of!(Segment, take) == 108);
    assert!(size_of::<Tile>() == 16);
    assert!(size_of::<SketchArgs>() == 64 && core::mem::offset_of!(SketchArgs, rank) == 48);
    assert!(size_of::<Projection>() == 16);
    assert!(size_of::<GaussianArgs>() == 32);
    assert!(size_of::<Piece>() == 48 && core::mem::offset_of!(Piece, values) == 16);
    assert!(size_of::<GatherArgs>() == 48);
    assert!(size_of::<Commit>() == 48 && core::mem::offset_of!(Commit, count) == 24);
    assert!(size_of::<CommitArgs>() == 32);
    assert!(size_of::<EnergyArgs>() == 32);
    assert!(size_of::<AdamTau>() == 24);
    assert!(size_of::<AdamTensor>() == 88 && core::mem::offset_of!(AdamTensor, came_count) == 64);
    assert!(size_of::<AdamArgs>() == 48);
};
