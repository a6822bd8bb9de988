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
//! | ef21, a worker was lost | … | Restore, instead of the last mean | Estimates | EstimatesMean |
//!
//! Bodies are segments in plan order: first all sparse segments, then all dense ones ([`RoundShape`] has every
//! body's layout and decides the phases). A shard that owns only dense tensors of a bucket holds a dense round
//! whatever the compressor; one that owns nothing of it holds none.
//!
//! After a body of an answer stand the ranks whose contributions it holds (the *roster*): a worker that keeps an answer can
//! tell it to a shard that has forgotten it, and that shard can tell everyone whether they were counted.
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
mod roster;
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
pub use roster::{MAX_ROSTER_BYTES, decode_roster, encode_roster};
pub use round::{Direction, Layout, Phase, RoundShape, SegmentShape, SelectedRows};
pub use selection::{append_selection, decode_selection, encode_selection, selection_limit};
pub use store::{
    HeldPiece, HeldSnapshot, MAX_LISTED_PIECES, MAX_LISTED_SNAPSHOTS, MAX_PARTS, MAX_PIECE_BYTES,
    MAX_PIECES, MAX_STORE_MESSAGE_BYTES, MOST_FILLING_SNAPSHOTS, Manifest, Owner,
    PART_HEADER_BYTES, PartInfo, PieceMeta, STORE_ALPN, Sha256Bytes, SnapshotId, StoreCode,
    StoreRequest, StoreResponse, piece_range,
};

use crate::ids::{BucketId, Epoch, Rank, RunId, Step};
use crate::plan::PlanSpec;

/// ALPN of this version.
pub const ALPN: &[u8] = b"arc-topk/2";
/// Version inside Hello, for an error that names both versions.
pub const PROTOCOL_VERSION: u16 = 2;
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
    /// Up, after Restore: the estimates h of the compressible segments, and the dense ones as in a dense round.
    Estimates = 9,
    /// Down, under ef21 and ef21m, in the place of the last mean: somebody whose h is a part of H was not counted.
    /// Nothing of this round is applied to compressible tensors; H is made anew from the h of those that are here. No body.
    Restore = 10,
    /// Down: their mean, the new H.
    EstimatesMean = 12,
}

/// Flags of a round frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FrameFlags {
    /// Up: this worker's gradient has a NaN or Inf; the body is empty. Down: some worker's had (body empty):
    /// all skip this update.
    pub non_finite: bool,
    /// Down: this worker's contribution is part of the result (per phase).
    pub counted: bool,
    /// Up: this worker contributes nothing to the round and only wants its results; the body is empty. It is not waited for.
    pub absent: bool,
    /// Up: an answer that this worker got from an earlier incarnation of the shard, told to the present one. The kind is
    /// that of the answer.
    pub held: bool,
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
    /// The last so many bytes of the body say whose contributions the answer holds ([`encode_roster`]). Answers only.
    pub roster_bytes: u16,
    /// Answers: how many steps the shard was ahead of this frame's step when it sent it. A worker that is behind need
    /// not compute gradients for steps that are closed.
    pub lead: u16,
}

impl FrameHeader {
    /// Bytes of the body without the roster.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.body_bytes.saturating_sub(u32::from(self.roster_bytes)) as usize
    }
}

/// A worker's place in a running job, as shard 0 gave it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Place {
    /// The start of the job.
    pub run: RunId,
    /// Its rank.
    pub rank: Rank,
    /// Version of the membership that the rest describes.
    pub epoch: Epoch,
    /// Ranks from this one on have never been given.
    pub next_rank: u16,
    /// All members, ascending.
    pub members: Vec<Rank>,
}

/// Into which jobs a worker can come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum JoinWhen {
    /// One that it starts with the others: it cannot take its state from a snapshot.
    #[default]
    Start = 0,
    /// Any.
    Any = 1,
    /// One that runs already: it was a member of that, and has no state of its own any more.
    Running = 2,
}

/// What a worker comes for.
#[derive(Clone, PartialEq, Debug)]
pub enum Intent {
    /// To be given a place. Shard 0 only.
    Join {
        /// Rank asked for, if any; honoured where the job starts.
        rank: Option<Rank>,
        /// World size the worker expects; `None`: whatever the shard was told.
        world: Option<u16>,
        /// Step at which it starts (0, or that of its checkpoint). All that start a job must agree.
        start_step: Step,
        /// Into which jobs it can come.
        when: JoinWhen,
    },
    /// To take the place it has: for the first time at this shard, or again after the connection or the shard was lost.
    Member {
        /// That place.
        place: Place,
        /// The step that is open there, or else the next one.
        step: Step,
        /// Whether rounds from `step` on wait for it; a worker that is still fetching its state says so later
        /// ([`Control::Ready`]).
        waited: bool,
    },
}

/// First message of a worker on the control stream.
#[derive(Clone, PartialEq, Debug)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u16,
    /// Job name; a shard serves one.
    pub job: String,
    /// Random per attempt to join, the same towards every shard.
    pub incarnation: [u8; 16],
    /// Which shard the worker thinks it talks to: a wrong order of addresses is refused.
    pub shard: u16,
    /// Host name and process id, for people.
    pub host: String,
    /// What it comes for.
    pub intent: Intent,
    /// The plan.
    pub plan: PlanSpec,
}

/// Answer to a Hello.
#[derive(Clone, PartialEq, Debug)]
pub struct Welcome {
    /// Random per shard process: another one than before means that the shard was restarted.
    pub shard_incarnation: u64,
    /// The shard wants to be told what the worker holds: see [`Control::Retelling`].
    pub retell: bool,
    /// Place of this worker.
    pub place: Place,
    /// To one that joins: its first step. To others: the lowest step with an open round here.
    pub step: Step,
    /// To one that joins: its state is in the snapshot store, under the run and this step.
    pub snapshot: bool,
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
    /// The job went on without this worker, further than it can follow: it may join again, with the state of a snapshot.
    Superseded = 11,
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
    /// Shard 0 → worker: the members of the job. Worker → other shards: the same, passed on.
    Membership {
        /// New epoch.
        epoch: Epoch,
        /// Ranks from this one on have never been given.
        next_rank: u16,
        /// Members, ascending.
        members: Vec<Rank>,
        /// Those of them whose connection is gone; they may come back. Ascending.
        away: Vec<Rank>,
        /// What happened, for people.
        reason: String,
    },
    /// Worker → shard, after a Welcome that asked for it: so many frames flagged `held` follow.
    Retelling {
        /// How many.
        frames: u32,
    },
    /// Worker → shard: another shard cannot be reached, so this worker cannot go on; do not wait for it.
    Away,
    /// Worker → shard: wait for this worker in rounds from this step on.
    Ready {
        /// First step.
        step: Step,
    },
    /// Worker → shard 0: hash of the parameters.
    Digest {
        /// Next step: all updates before it are applied.
        step: Step,
        /// SHA-256 of all parameters in registration order.
        digest: [u8; 32],
    },
    /// Shard 0 → workers: their parameters are not the same.
    DigestsDiffer {
        /// As in [`Control::Digest`].
        step: Step,
        /// Those that differ from the most.
        ranks: Vec<Rank>,
    },
    /// Shard 0 → worker: put a snapshot of the replica into the store at the next step's end, for one that joins.
    Donate,
    /// Worker → shards: the snapshot is on its way to the store. Somebody will replay the rounds from its step on.
    Donating {
        /// Its step.
        step: Step,
    },
    /// Worker → shard 0: the snapshot is in the store.
    Donated {
        /// Its step.
        step: Step,
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
