//! The wire format: the only place that knows byte layout, limits and versions.
//!
//! A session is one QUIC connection from a worker to a shard. Its first bidirectional stream is the
//! control stream, carrying [`Control`] messages both ways. Every round (step, bucket) with this shard is
//! one further bidirectional stream, opened by the worker: up and down alternate, phase by phase.
//!
//! | compressor / round | up 1 | down 1 | up 2 | down 2 |
//! |---|---|---|---|---|
//! | arc | Sketch: sketches ‖ dense tensors | Selection: rows ‖ mean of dense tensors | Values | Mean |
//! | randk | Values: values ‖ dense tensors | Mean: values ‖ dense tensors | | |
//! | topk | Sparse: (rows, values)… ‖ dense tensors | SparseMean: likewise | | |
//! | dense round | Dense: all segments | DenseMean | | |
//!
//! Bodies are segments in plan order: first all sparse segments, then all dense ones ([`RoundShape`] has every
//! body's layout and decides the phases). A shard that owns only dense tensors of a bucket holds a dense round
//! whatever the compressor; one that owns nothing of it holds none.
//!
//! Everything received is read by bounded readers: a length is compared with its limit and with the bytes that
//! are there before anything is allocated, and what is not the one canonical encoding is refused ([`WireError`]).

pub mod any_bytes;
mod codec;
mod control;
mod error;
mod header;
mod plan_spec;
#[cfg(test)]
mod properties;
mod round;
#[cfg(test)]
mod round_tests;
mod selection;
mod store;
#[cfg(test)]
mod tests;

pub use control::{
    CONTROL_LENGTH_BYTES, MAX_DETAIL_BYTES, MAX_HOST_BYTES, MAX_JOB_BYTES, MAX_WORLD,
};
pub use error::{Blame, WireError};
pub use plan_spec::{
    MAX_DIMENSIONS, MAX_NAME_BYTES, MAX_TENSORS, MAX_TRAINER_BYTES, encode_plan_spec,
};
pub use round::{Direction, Layout, Phase, RoundShape, SegmentShape, SelectedRows};
pub use selection::{append_selection, decode_selection, encode_selection, selection_limit};
pub use store::{
    HeldPiece, HeldSnapshot, MAX_LISTED_PIECES, MAX_LISTED_SNAPSHOTS, MAX_PARTS, MAX_PIECE_BYTES,
    MAX_PIECES, MAX_STORE_MESSAGE_BYTES, Manifest, Owner, PART_HEADER_BYTES, PartInfo, PieceMeta,
    RunId, STORE_ALPN, Sha256Bytes, SnapshotId, StoreCode, StoreRequest, StoreResponse,
    piece_range,
};

use crate::ids::{BucketId, Epoch, Rank, Step};
use crate::plan::PlanSpec;

/// ALPN of this version.
pub const ALPN: &[u8] = b"arc-topk/1";
/// Version inside Hello, for an error that names both versions.
pub const PROTOCOL_VERSION: u16 = 1;
/// Bytes of an encoded [`FrameHeader`].
pub const HEADER_BYTES: usize = 32;
/// Largest round body, bytes.
pub const MAX_BODY_BYTES: usize = 256 << 20;
/// Largest control message, bytes.
pub const MAX_CONTROL_BYTES: usize = 16 << 20;

/// Kind of a round frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum FrameKind {
    /// Up: sketches.
    Sketch = 1,
    /// Down: chosen rows.
    Selection = 2,
    /// Up: values of the chosen rows.
    Values = 3,
    /// Down: their mean.
    Mean = 4,
    /// Up: everything.
    Dense = 5,
    /// Down: its mean.
    DenseMean = 6,
    /// Up: own rows with indices (topk).
    Sparse = 7,
    /// Down: the union, averaged.
    SparseMean = 8,
}

/// Flags of a round frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrameFlags {
    /// Up: this worker's gradient has a NaN or Inf; the body is empty. Down: some worker's had (body empty):
    /// all skip this update.
    pub non_finite: bool,
    /// Down: this worker's contribution is part of the result (per phase).
    pub counted: bool,
}

/// Header of a round frame (32 bytes on the wire).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Kind.
    pub kind: FrameKind,
    /// Flags.
    pub flags: FrameFlags,
    /// Bucket.
    pub bucket: BucketId,
    /// Epoch the sender believes in.
    pub epoch: Epoch,
    /// Step.
    pub step: Step,
    /// Update number (skipped rounds not counted): decides warm-up and density. Equal on all workers.
    pub update: u64,
    /// Bytes of the body that follows.
    pub body_bytes: u32,
}

/// First message of a worker on the control stream.
#[derive(Clone, PartialEq, Debug)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u16,
    /// Job name; a shard serves one.
    pub job: String,
    /// Random per process, the same towards every shard.
    pub incarnation: [u8; 16],
    /// Towards shard 0: the rank asked for, if any. Towards others: the rank that shard 0 gave.
    pub rank: Option<Rank>,
    /// World size the worker expects; `None`: whatever the shard was told.
    pub world: Option<u16>,
    /// Step at which it starts (0, or that of its checkpoint). All must agree.
    pub start_step: Step,
    /// Which shard the worker thinks it talks to: a wrong order of addresses is refused.
    pub shard: u16,
    /// Host name and process id, for people.
    pub host: String,
    /// The plan.
    pub plan: PlanSpec,
}

/// Answer to a Hello.
#[derive(Clone, PartialEq, Debug)]
pub struct Welcome {
    /// Epoch.
    pub epoch: Epoch,
    /// Rank of this worker.
    pub rank: Rank,
    /// World size.
    pub world: u16,
    /// First step.
    pub start_step: Step,
}

/// Why a peer was refused or a job stopped. The detail names cause and remedy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum RefusalCode {
    /// Protocol versions differ.
    Version = 1,
    /// Another job is served here.
    Job = 2,
    /// The plan differs; the detail names the first difference.
    Plan = 3,
    /// The rank is taken, or out of range.
    Rank = 4,
    /// The world is full, or world sizes differ.
    World = 5,
    /// Start steps differ.
    Step = 6,
    /// The peer broke the protocol.
    Protocol = 7,
    /// Too few workers are left.
    TooFewWorkers = 8,
    /// The shard shuts down.
    Shutdown = 9,
    /// Addresses in the wrong order.
    Shard = 10,
}

/// Messages of the control stream.
#[derive(Clone, PartialEq, Debug)]
pub enum Control {
    /// Worker → shard, first.
    Hello(Box<Hello>),
    /// Shard → worker: all are there, go.
    Welcome(Welcome),
    /// Shard → worker, before Welcome: `joined` of `world` are there.
    Waiting {
        /// Workers that have joined.
        joined: u16,
        /// World size.
        world: u16,
    },
    /// Shard → worker: refused or stopped; the connection closes.
    Refused {
        /// Why.
        code: RefusalCode,
        /// Cause and remedy, for people.
        detail: String,
    },
    /// Shard → worker: who is live now.
    Membership {
        /// New epoch.
        epoch: Epoch,
        /// Live ranks, ascending.
        members: Vec<Rank>,
        /// What happened, for people.
        reason: String,
    },
    /// Worker → shard: leaves in order, after this step.
    Leave,
    /// Worker → shard, for the status page.
    Report {
        /// Step just finished.
        step: Step,
        /// Training loss.
        loss: f32,
        /// Seconds of the step.
        step_seconds: f32,
        /// Seconds of it in which the trainer waited for communication.
        wait_seconds: f32,
        /// Bytes sent and received by this worker so far (payload), and what dense f32 would have sent.
        bytes_sent: u64,
        /// Received.
        bytes_received: u64,
        /// Dense equivalent, one direction.
        bytes_dense_equivalent: u64,
        /// Share of the sketch's energy that the chosen rows hold, 0..=1, NaN in dense rounds.
        captured_energy: f32,
        /// ‖residual‖/‖gradient‖, NaN when not measured.
        residual_ratio: f32,
    },
}
