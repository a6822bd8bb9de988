//! How a worker joins a job, and what it is told meanwhile.

use arc_topk_common::ids::{Epoch, Rank, ShardId, Step};
use arc_topk_common::wire::JoinWhen;
use arc_topk_transport::{IdentitySource, TransportConfig};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// What a session tells about itself while it runs.
#[derive(Clone, PartialEq, Debug)]
pub enum NetEvent {
    /// A shard does not answer yet, or not again; it is tried again.
    Retrying {
        /// Shard.
        shard: ShardId,
        /// Cause, for people.
        cause: String,
    },
    /// Shard 0 waits for the other workers, or for one of them to give its state to this one.
    Waiting {
        /// Workers that are there.
        joined: u16,
        /// Workers that the job needs.
        world: u16,
    },
    /// Workers joined, left, were lost or came back.
    Membership {
        /// New epoch.
        epoch: Epoch,
        /// Members of the job, ascending.
        members: Vec<Rank>,
        /// Those of them that lost their connection and may come back, ascending.
        away: Vec<Rank>,
        /// What happened, for people.
        reason: String,
    },
    /// The connection with a shard is lost; it is dialled again.
    ShardLost {
        /// Shard.
        shard: ShardId,
        /// Cause, for people.
        cause: String,
    },
    /// A shard that was lost is back.
    ShardBack {
        /// Shard.
        shard: ShardId,
        /// How long it was gone.
        after: Duration,
    },
    /// Parameters of workers are not the same, says shard 0.
    DigestsDiffer {
        /// Before this step.
        step: Step,
        /// Those that differ from the most.
        ranks: Vec<Rank>,
    },
}

/// Receives [`NetEvent`]s, on any thread; must not block.
pub type NetObserver = Arc<dyn Fn(&NetEvent) + Send + Sync>;

/// How a worker joins a job.
#[derive(Clone)]
pub struct NetConfig {
    /// `HOST:PORT` of every shard, in the same order on all workers. Certificates must name HOST.
    pub shards: Vec<String>,
    /// Certificate, key and CA of this worker; every connection that begins takes the newest.
    pub identity: IdentitySource,
    /// Job name.
    pub job: String,
    /// Rank to ask for; `None` takes the lowest free one.
    pub rank: Option<Rank>,
    /// World size to insist on; `None` takes the shard's.
    pub world: Option<u16>,
    /// First step: 0, or that of the checkpoint. All workers that start the job must agree.
    pub start_step: Step,
    /// First update (skipped steps not counted): 0, or that of the checkpoint.
    pub start_update: u64,
    /// Into which jobs it can come. One that can take its state from a snapshot may join a job that runs already: then
    /// [`QuicReducer::connect`](super::QuicReducer::connect) may return one that
    /// [needs a snapshot](crate::reducer::Reducer::needs_snapshot).
    pub when: JoinWhen,
    /// How long shards are tried before giving up: they may start after the workers.
    pub connect_timeout: Duration,
    /// How long shard 0 may wait for the other workers.
    pub join_timeout: Duration,
    /// How long a shard that was lost is dialled again before the session fails.
    pub reconnect_timeout: Duration,
    /// How long no shard may answer, while rounds are open, before the step fails. Must exceed the longest
    /// time by which workers drift apart (a validation pass on one of them, say). Time in which a lost shard is dialled
    /// does not count: `reconnect_timeout` bounds it.
    pub progress_timeout: Duration,
    /// Threads for QUIC.
    pub io_threads: usize,
    /// Bytes of gradients that may wait for the engine before [`Reducer::push`](crate::reducer::Reducer::push) blocks.
    pub queue_bytes: usize,
    /// Tuning of QUIC.
    pub transport: TransportConfig,
    /// Told of waiting, retries, lost shards and membership.
    pub observer: Option<NetObserver>,
}

impl NetConfig {
    /// Joins `job` at `shards` with every other setting at its default.
    #[must_use]
    pub fn new(job: &str, shards: &[String], identity: impl Into<IdentitySource>) -> Self {
        Self {
            shards: shards.to_vec(),
            identity: identity.into(),
            job: job.to_owned(),
            rank: None,
            world: None,
            start_step: Step(0),
            start_update: 0,
            when: JoinWhen::Start,
            connect_timeout: Duration::from_secs(30),
            join_timeout: Duration::from_secs(600),
            reconnect_timeout: Duration::from_secs(300),
            progress_timeout: Duration::from_secs(600),
            io_threads: 2,
            queue_bytes: 128 << 20,
            transport: TransportConfig::default(),
            observer: None,
        }
    }

    pub(super) fn observe(&self, event: &NetEvent) {
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }
}

impl fmt::Debug for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetConfig")
            .field("shards", &self.shards)
            .field("job", &self.job)
            .field("rank", &self.rank)
            .field("world", &self.world)
            .finish_non_exhaustive()
    }
}
