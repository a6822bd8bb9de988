//! What goes into the machine and what comes out of it.

use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, Step};
use arc_topk_common::wire::{Control, FrameHeader, Hello, RefusalCode};
use bytes::Bytes;
use core::time::Duration;
use serde::Serialize;

/// Names one connection of a worker for the life of the process. The shell counts them up.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct SessionId(pub u64);

/// What one shard is told when it starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardConfig {
    /// Its position in the list of addresses; 0 coordinates.
    pub shard: ShardId,
    /// Shards of the job.
    pub shards: u16,
    /// Job it serves.
    pub job: String,
    /// Random per process, so that workers notice a restart.
    pub incarnation: u64,
    /// Workers that make the job complete.
    pub world: u16,
    /// Rounds of shard 0 wait while fewer take part in them, and fewer members end the job; those that are about to join
    /// count.
    pub min_workers: u16,
    /// Workers that may be connected at once, those that join later included.
    pub max_workers: u16,
    /// So many contributions close a phase once `straggler_timeout` has passed; 0: those of all live workers.
    pub quorum: u16,
    /// How long a phase that has its quorum waits for the others.
    pub straggler_timeout: Duration,
    /// How long shard 0, counted from its first event, does not begin a job although the world is complete: it may have been
    /// restarted, and members of a running job notice that only when the old connection has been silent for a while.
    pub start_grace: Duration,
    /// Whether workers whose parameters differ from those of the most must join again.
    pub resync: bool,
}

impl ShardConfig {
    /// Shard `shard` of `shards` for `world` workers, everything else at its default: rounds wait for all, one worker is
    /// enough to go on, and as many may be there as the job started with.
    #[must_use]
    pub fn new(job: &str, shard: ShardId, shards: u16, world: u16) -> Self {
        Self {
            shard,
            shards,
            job: job.to_owned(),
            incarnation: 1,
            world,
            min_workers: 1,
            max_workers: world,
            quorum: 0,
            straggler_timeout: Duration::from_secs(1),
            start_grace: Duration::ZERO,
            resync: false,
        }
    }
}

/// A worker's report on a finished step, for people.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Report {
    /// Step just finished.
    pub step: Step,
    /// Training loss.
    pub loss: f32,
    /// Seconds of the step.
    pub step_seconds: f32,
    /// Seconds of it spent waiting for communication.
    pub wait_seconds: f32,
    /// Bytes sent so far.
    pub bytes_sent: u64,
    /// Bytes received so far.
    pub bytes_received: u64,
    /// What dense f32 would have sent so far, one direction.
    pub bytes_dense_equivalent: u64,
    /// Share of the sketch's energy in the chosen rows, NaN when there was no sketch.
    pub captured_energy: f32,
    /// ‖residual‖/‖gradient‖, NaN when not measured.
    pub residual_ratio: f32,
}

impl Report {
    /// The report inside a control message, if it is one.
    #[must_use]
    pub fn from_control(message: &Control) -> Option<Self> {
        let Control::Report {
            step,
            loss,
            step_seconds,
            wait_seconds,
            bytes_sent,
            bytes_received,
            bytes_dense_equivalent,
            captured_energy,
            residual_ratio,
        } = *message
        else {
            return None;
        };
        Some(Self {
            step,
            loss,
            step_seconds,
            wait_seconds,
            bytes_sent,
            bytes_received,
            bytes_dense_equivalent,
            captured_energy,
            residual_ratio,
        })
    }
}

/// What happened outside.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// A worker introduced itself.
    Hello {
        /// On this connection.
        session: SessionId,
        /// With this.
        hello: Box<Hello>,
    },
    /// A whole round frame came.
    Round {
        /// From this connection.
        session: SessionId,
        /// Its header.
        header: FrameHeader,
        /// Its body.
        body: Bytes,
    },
    /// A member's control message other than Leave and Report.
    Control {
        /// From this connection.
        session: SessionId,
        /// It.
        message: Control,
    },
    /// A worker leaves in order.
    Leave {
        /// This one.
        session: SessionId,
    },
    /// A worker reports.
    Report {
        /// This one.
        session: SessionId,
        /// This.
        report: Report,
    },
    /// What the peer sent cannot be read as a message: it is refused and removed.
    Violation {
        /// The peer.
        session: SessionId,
        /// What it did, and what to do about it.
        detail: String,
    },
    /// The connection is gone.
    Closed {
        /// Which.
        session: SessionId,
        /// Why, for people.
        reason: String,
        /// The peer closed it: its process ends and will not be back. Otherwise it may have lost its way and return.
        for_good: bool,
    },
    /// Nothing happened, but time went by. Needed by [`Shard::next_deadline`](super::Shard::next_deadline).
    Tick,
    /// The process ends.
    Shutdown {
        /// Why, for people.
        reason: String,
    },
}

/// What the shell has to do, in this order.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Send on the control stream.
    Control {
        /// Of this session.
        session: SessionId,
        /// This.
        message: Control,
    },
    /// Send on the stream of the round that the header names.
    Round {
        /// Of this session.
        session: SessionId,
        /// Header.
        header: FrameHeader,
        /// Body.
        body: Bytes,
    },
    /// Close the connection, after what was queued before. A `Control::Refused` went ahead.
    Close {
        /// This session.
        session: SessionId,
        /// Code for the connection's close.
        code: RefusalCode,
        /// Cause and remedy.
        detail: String,
    },
    /// Nothing to send: for metrics, log and status page.
    Observe(Observation),
}

/// How a round ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All members of the job's start contributed.
    Complete,
    /// A mean was formed without some that were lost.
    Partial,
    /// Some gradient (or a sum) was not finite: all skip the update.
    NonFinite,
    /// Nobody was left to answer.
    Abandoned,
}

impl Outcome {
    /// Label in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Partial => "partial",
            Self::NonFinite => "non_finite",
            Self::Abandoned => "abandoned",
        }
    }
}

/// Bytes of frame bodies by what they hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Traffic {
    /// Sketches.
    pub sketch: u64,
    /// Chosen rows.
    pub selection: u64,
    /// Values of chosen rows.
    pub values: u64,
    /// Dense tensors and dense rounds.
    pub dense: u64,
}

impl Traffic {
    /// All kinds together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.sketch + self.selection + self.values + self.dense
    }

    pub(crate) fn add(&mut self, other: Self, times: u64) {
        self.sketch += other.sketch * times;
        self.selection += other.selection * times;
        self.values += other.values * times;
        self.dense += other.dense * times;
    }
}

/// One round, when it closed.
#[derive(Clone, PartialEq, Debug)]
pub struct RoundClosed {
    /// Step.
    pub step: Step,
    /// Bucket.
    pub bucket: BucketId,
    /// Update number.
    pub update: u64,
    /// How.
    pub outcome: Outcome,
    /// Workers in the last mean.
    pub contributors: u16,
    /// Bytes of bodies that came, all workers together.
    pub received: Traffic,
    /// Bytes of bodies that went, all workers together.
    pub sent: Traffic,
    /// What the workers would have sent as dense f32, all together, one direction.
    pub dense_equivalent_bytes: u64,
    /// Share of the averaged sketch's energy in the chosen rows, 0..=1; `None` without a sketch.
    pub captured_energy: Option<f32>,
    /// Share of the compressible elements that travelled; `None` if there are none.
    pub density: Option<f32>,
    /// From the first frame to the last answer.
    pub seconds: f64,
}

/// What people and metrics may want to know.
#[derive(Clone, PartialEq, Debug)]
pub enum Observation {
    /// A Hello was accepted.
    Joined {
        /// Session.
        session: SessionId,
        /// Its rank, once it has one.
        rank: Option<Rank>,
        /// Host name and process id.
        host: String,
        /// Workers that are there now.
        joined: u16,
    },
    /// The world is complete.
    Started {
        /// Epoch.
        epoch: Epoch,
        /// Workers.
        world: u16,
        /// First step.
        step: Step,
    },
    /// The connection of a member is gone. It may come back.
    Away {
        /// Rank.
        rank: Rank,
        /// Why.
        reason: String,
    },
    /// A member is back, on a new connection.
    Returned {
        /// Rank.
        rank: Rank,
        /// How long it was away.
        seconds: f64,
    },
    /// A worker joined the running job.
    JoinedLater {
        /// Rank.
        rank: Rank,
        /// First step.
        step: Step,
    },
    /// This process knows nothing and is told by members of a running job.
    Recovering {
        /// Members that it waits for.
        members: u16,
    },
    /// It knows enough to go on.
    Recovered {
        /// Lowest step with an open round.
        step: Step,
        /// Members that have told what they hold.
        told: u16,
        /// Of so many.
        members: u16,
        /// Answers that workers held.
        adopted: u64,
        /// Since the first of them came.
        seconds: f64,
    },
    /// A member held an answer to a round that has none here, and it was taken over.
    Adopted {
        /// Who held it.
        rank: Rank,
        /// Step.
        step: Step,
        /// Bucket.
        bucket: BucketId,
    },
    /// A contribution came after its phase was closed: its worker keeps it in the residual.
    Late {
        /// Rank.
        rank: Rank,
        /// After the close.
        seconds: f64,
    },
    /// A worker is late most of the time, or no longer.
    Straggling {
        /// Rank.
        rank: Rank,
        /// Whether it is.
        persistent: bool,
    },
    /// Parameters of workers are not the same.
    DigestsDiffer {
        /// Step.
        step: Step,
        /// Those that differ from the most.
        ranks: Vec<Rank>,
    },
    /// A worker left in order.
    Left {
        /// Rank, if it had one.
        rank: Option<Rank>,
        /// Workers that remain.
        remaining: u16,
    },
    /// A worker was removed from the members.
    Lost {
        /// Rank, if it had one.
        rank: Option<Rank>,
        /// Why.
        reason: String,
        /// Workers that remain.
        remaining: u16,
    },
    /// A peer was refused.
    Refused {
        /// Session.
        session: SessionId,
        /// Why.
        code: RefusalCode,
        /// Cause and remedy.
        detail: String,
    },
    /// A round closed.
    RoundClosed(Box<RoundClosed>),
    /// The others waited for this worker, the last of its phase.
    Waited {
        /// The straggler.
        rank: Rank,
        /// From the last but one arrival to its own.
        seconds: f64,
    },
    /// A worker reported.
    Reported {
        /// Rank.
        rank: Rank,
        /// What.
        report: Report,
    },
    /// Nobody is left: the shard is ready for another start.
    Emptied,
}
