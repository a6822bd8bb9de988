//! Why a worker could not join.

use crate::backend::DeviceFault;
use arc_topk_common::plan::PlanError;
use arc_topk_common::wire::RefusalCode;
use arc_topk_transport::TransportError;

/// Why a worker could not join a job.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The plan is not valid.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The device to compute on cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceFault),
    /// The plan was made for another number of shards.
    #[error(
        "the plan has {plan} shards, but {addresses} addresses were given: list every shard once, in the same order on all workers"
    )]
    ShardCount {
        /// By the plan.
        plan: u16,
        /// Given.
        addresses: usize,
    },
    /// A shard cannot be reached, or the handshake failed.
    #[error("shard {shard} at {address}: {source}")]
    Transport {
        /// Shard.
        shard: u16,
        /// As given.
        address: String,
        /// Cause and remedy.
        source: TransportError,
    },
    /// A shard refused this worker.
    #[error("shard {shard} at {address} refused this worker: {detail}")]
    Refused {
        /// Shard.
        shard: u16,
        /// As given.
        address: String,
        /// Why.
        code: RefusalCode,
        /// Cause and remedy.
        detail: String,
    },
    /// The other workers did not come.
    #[error(
        "{joined} of {world} workers joined within {seconds} s: start the missing ones, or start shard 0 with a smaller --workers"
    )]
    Join {
        /// Workers that are there.
        joined: u16,
        /// Workers that the job needs.
        world: u16,
        /// How long it was waited, seconds.
        seconds: u64,
    },
    /// A shard answered with something else than Welcome.
    #[error(
        "shard {shard} at {address} answered a Hello with {answer}: it is another release; run the same release everywhere"
    )]
    Answer {
        /// Shard.
        shard: u16,
        /// As given.
        address: String,
        /// What came.
        answer: String,
    },
    /// Threads cannot be started.
    #[error("cannot start the session's threads: {0}; raise the limit on processes (ulimit -u)")]
    Runtime(String),
}
