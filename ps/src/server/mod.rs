//! The async shell around the machine: QUIC sessions, the thread that owns the machine, admin HTTP.
//!
//! ```text
//! endpoint ─ session task per connection ─┬─ control reader, control writer
//!                                         └─ task per round stream ──┐ frames
//!                 replies (dashmap: session, step, bucket → stream)  ▼
//!                                  └────────── owner thread: Shard::handle
//! ```
//!
//! It decides nothing: what a peer sends becomes an event, what the machine answers is written. What it adds are bounds in
//! time and size that need a clock or a socket: no more connections than a small multiple of the world, those in their
//! handshake counted; a Hello within [`Timeouts::hello`]; until the Welcome one stream and a window of
//! [`HELLO_WINDOW_BYTES`](arc_topk_transport::config::HELLO_WINDOW_BYTES), afterwards as many streams as the plan has rounds;
//! no body longer than the plan allows; a connection that keeps moving, and does not only trickle, while a frame is awaited
//! or an answer is to be taken ([`Timeouts::header`], [`Timeouts::body`]).

pub mod admin;
mod control;
mod frames;
mod observe;
mod owner;
mod renewal;
mod session;
mod store;

pub use store::{SnapshotStatus, StoreStatus};

use crate::shard::{Event, SessionId, Shard, ShardConfig, Status};
use crate::store::StoreOptions;
use crate::store::disk::DiskError;
use admin::{Admin, AdminBindError, Answer, SHARD_PAGE};
use arc_topk_common::ids::{BucketId, Step};
use arc_topk_common::metrics::ShardMetrics;
use arc_topk_common::wire::FrameHeader;
use arc_topk_transport::{
    Endpoint, IdentitySource, Listener, LongMessages, TransportConfig, TransportError, VarInt,
};
use bytes::Bytes;
use control::SessionHandle;
use core::net::SocketAddr;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use core::time::Duration;
use dashmap::DashMap;
use owner::Command;
use renewal::Renewal;
use serde::Serialize;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// Events that may wait for the machine; senders wait beyond it, and QUIC's windows fill.
const EVENTS_QUEUED: usize = 1024;
/// Interval at which connections are measured and the machine is told the time.
const TICK: Duration = Duration::from_secs(1);
/// Least time between two ticks.
const SHORTEST_TICK: Duration = Duration::from_millis(5);
/// Memory for long Hellos that come at the same time, bytes. Without it every connection could fill the longest message.
const HELLO_BYTES: usize = 64 << 20;
/// What a shutdown waits for refusals to reach their workers.
const GOODBYE: Duration = Duration::from_secs(2);

/// Patience with peers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// From a handshake to the Hello.
    pub hello: Duration,
    /// With less than 16 KiB on all round streams of the connection, from a round stream's opening to its first header.
    pub header: Duration,
    /// With less than 16 KiB on all round streams of the connection, while a body comes or an answer waits to be taken.
    pub body: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let patience = Duration::from_secs(10);
        Self {
            hello: patience,
            header: patience,
            body: patience,
        }
    }
}

/// What a server needs.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// UDP address for workers.
    pub listen: SocketAddr,
    /// HTTP address of the admin pages, if any.
    pub admin: Option<SocketAddr>,
    /// Certificate of this shard. Files are looked at every few seconds: when they change, new connections see the new ones,
    /// and sessions go on.
    pub identity: IdentitySource,
    /// Settings of QUIC.
    pub transport: TransportConfig,
    /// What the machine is told; the incarnation is drawn at the start.
    pub shard: ShardConfig,
    /// Patience with peers.
    pub timeouts: Timeouts,
    /// Every frame waits a random time up to this before it is handled. Zero but in tests.
    pub chaos_delay: Duration,
    /// Where snapshots go, and how many.
    pub store: StoreOptions,
}

/// Why a server cannot start. Every text names cause and remedy.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The UDP side.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The HTTP side.
    #[error(transparent)]
    Admin(#[from] AdminBindError),
    /// The directory of snapshots.
    #[error(transparent)]
    Store(#[from] DiskError),
    /// The system gives no thread, or does not tell an address.
    #[error(
        "the operating system refused {what}: {source}; look at the limits of this user (ulimit -a)"
    )]
    System {
        /// What was asked for.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

/// What tasks share.
#[derive(Debug)]
pub(crate) struct Hub {
    commands: mpsc::Sender<Command>,
    sessions: DashMap<SessionId, SessionHandle>,
    /// Where the answers of an open round go.
    streams: DashMap<(SessionId, Step, BucketId), mpsc::UnboundedSender<(FrameHeader, Bytes)>>,
    /// Longest body under the current plan.
    body_limit: AtomicUsize,
    /// Streams that a session may hold open under the current plan.
    stream_limit: AtomicU32,
    closing: AtomicBool,
    started: Instant,
    next_session: AtomicU64,
    /// Connections that are there, handshakes among them.
    connections: AtomicUsize,
    connections_limit: usize,
    /// When the machine wants to be told the time, on the clock that counts from `started`.
    deadline: watch::Sender<Option<Duration>>,
    long_hellos: LongMessages,
    transport: TransportConfig,
    timeouts: Timeouts,
    chaos_delay: Duration,
    metrics: ShardMetrics,
    store: Arc<store::Store>,
}

impl Hub {
    /// Gauges of the store.
    fn observe_store(&self) {
        let (snapshots, bytes) = self.store.load();
        self.metrics.set_snapshots(snapshots, bytes);
    }

    /// Hands an event to the machine; waits while its queue is full.
    async fn event(&self, event: Event) {
        // The owner ends only with the process: then nobody needs the event.
        let _ended = self.commands.send(Command::Event(event)).await;
    }

    /// The machine's status; `None` once it has ended.
    async fn status(&self) -> Option<Status> {
        let (reply, status) = oneshot::channel();
        self.commands.send(Command::Status(reply)).await.ok()?;
        status.await.ok().map(|status| *status)
    }
}

/// What `/status` says.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    status: Status,
    store: StoreStatus,
}

impl Admin for Hub {
    fn metrics(&self) -> String {
        self.metrics.text()
    }

    fn ready(&self) -> Answer<'_, Result<(), String>> {
        Box::pin(async {
            if self.closing.load(Ordering::Relaxed) {
                return Err("shutting down".to_owned());
            }
            // A machine that answers takes workers.
            self.status()
                .await
                .map(drop)
                .ok_or_else(|| "the shard's thread has ended".to_owned())
        })
    }

    fn status(&self) -> Answer<'_, String> {
        Box::pin(async {
            let shown = Hub::status(self).await.map(|status| Shown {
                status,
                store: self.store.status(),
            });
            shown
                .and_then(|shown| serde_json::to_string(&shown).ok())
                .unwrap_or_else(|| "null".to_owned())
        })
    }

    fn page(&self) -> &'static str {
        SHARD_PAGE
    }
}

/// A running shard.
#[derive(Debug)]
pub struct Server {
    hub: Arc<Hub>,
    endpoint: Endpoint,
    quic_address: SocketAddr,
    admin_address: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    renewal: JoinHandle<()>,
    hurry: Arc<Notify>,
}

impl Server {
    /// Takes the addresses and serves from then on.
    ///
    /// # Errors
    /// An address that is in use or not of this machine, certificates that do not fit.
    pub async fn start(options: ServeOptions) -> Result<Self, ServeError> {
        let system = |what| move |source| ServeError::System { what, source };
        let store = Arc::new(store::Store::open(options.store)?);
        let identity = options.identity.current();
        let bound = Listener::bind(options.listen, &identity, &options.transport)?;
        let endpoint = bound.endpoint().clone();
        let quic_address = endpoint
            .local_addr()
            .map_err(system("the address of its UDP socket"))?;
        let listener = match options.admin {
            Some(address) => Some(admin::bind(address).await?),
            None => None,
        };
        let admin_address = match &listener {
            Some(listener) => Some(
                listener
                    .local_addr()
                    .map_err(system("the address of its HTTP socket"))?,
            ),
            None => None,
        };
        let (commands, queue) = mpsc::channel(EVENTS_QUEUED);
        let most = options.shard.world.max(options.shard.max_workers);
        let metrics = ShardMetrics::new();
        metrics.observe_process();
        metrics.set_shards(options.shard.shards);
        let hub = Arc::new(Hub {
            commands,
            sessions: DashMap::new(),
            streams: DashMap::new(),
            body_limit: AtomicUsize::new(0),
            stream_limit: AtomicU32::new(1),
            closing: AtomicBool::new(false),
            started: Instant::now(),
            next_session: AtomicU64::new(1),
            connections: AtomicUsize::new(0),
            connections_limit: 2 * usize::from(most) + 64,
            deadline: watch::Sender::new(None),
            long_hellos: LongMessages::new(HELLO_BYTES),
            transport: options.transport,
            timeouts: options.timeouts,
            chaos_delay: options.chaos_delay,
            metrics,
            store,
        });
        let shard = ShardConfig {
            incarnation: incarnation(),
            ..options.shard
        };
        owner::spawn(Shard::new(shard), queue, hub.clone()).map_err(system("a thread"))?;
        let (stop, stopped) = watch::channel(false);
        if let Some(listener) = listener {
            let mut until = stopped.clone();
            let served = admin::serve(listener, hub.clone(), async move {
                drop(until.wait_for(|stop| *stop).await)
            });
            tokio::spawn(served);
        }
        tokio::spawn(session::accept(hub.clone(), endpoint.clone()));
        tokio::spawn(tick(hub.clone(), stopped.clone()));
        let hurry = Arc::new(Notify::new());
        let renewal = Renewal {
            hub: hub.clone(),
            listener: bound,
            source: options.identity,
            hurry: hurry.clone(),
        };
        // Before anybody can look at the metrics.
        renewal.end_of(&identity);
        let renewal = tokio::spawn(renewal.run(identity, stopped));
        let reading = hub.clone();
        // Training need not wait for gigabytes to be read; the store's requests do.
        tokio::task::spawn_blocking(move || {
            reading.store.restore();
            reading.observe_store();
        });
        Ok(Self {
            hub,
            endpoint,
            quic_address,
            admin_address,
            stop,
            renewal,
            hurry,
        })
    }

    /// UDP address that workers dial.
    #[must_use]
    pub fn quic_address(&self) -> SocketAddr {
        self.quic_address
    }

    /// HTTP address of the admin pages.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// The machine's status; `None` after it ended.
    pub async fn status(&self) -> Option<Status> {
        self.hub.status().await
    }

    /// What the snapshot store holds.
    #[must_use]
    pub fn store_status(&self) -> StoreStatus {
        self.hub.store.status()
    }

    /// Metrics in Prometheus' text format.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.hub.metrics.text()
    }

    /// Looks at the certificate files now instead of within a few seconds, and takes them if they were changed.
    pub fn renew_identity(&self) {
        self.hurry.notify_one();
    }

    /// Tells the workers, closes, and ends within a few seconds.
    pub async fn shutdown(self, reason: &str) {
        self.hub.closing.store(true, Ordering::Relaxed);
        // No new sessions from here on, nor by a certificate that comes just now.
        self.renewal.abort();
        let _ended = self.renewal.await;
        self.endpoint.set_server_config(None);
        self.hub
            .event(Event::Shutdown {
                reason: reason.to_owned(),
            })
            .await;
        let gone = async {
            while !self.hub.sessions.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        // Workers that do not read their refusal see the connection close instead.
        let _slow = tokio::time::timeout(GOODBYE, gone).await;
        let _ended = self.hub.commands.send(Command::Stop).await;
        let _nobody = self.stop.send(true);
        self.endpoint.close(VarInt::from_u32(0), reason.as_bytes());
        let _slow = tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
        self.hub.store.release();
    }
}

/// What no other process has: the hasher's keys come from the operating system.
fn incarnation() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// Measures connections, and tells the machine that time goes by: each second, and when it wishes.
async fn tick(hub: Arc<Hub>, mut stopped: watch::Receiver<bool>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut deadline = hub.deadline.subscribe();
    loop {
        tokio::select! {
            _ = interval.tick() => observe::connections(&hub),
            () = wished(&hub, &mut deadline) => {}
            _ = stopped.wait_for(|stop| *stop) => return,
        }
        hub.event(Event::Tick).await;
    }
}

/// Waits until the machine's deadline, whichever it is by then.
async fn wished(hub: &Hub, deadline: &mut watch::Receiver<Option<Duration>>) {
    // A machine that wishes for a moment that has passed must not be asked again and again.
    let earliest = tokio::time::Instant::now() + SHORTEST_TICK;
    loop {
        let until = *deadline.borrow_and_update();
        let changed = deadline.changed();
        let Some(until) = until else {
            // The sender lives in the hub.
            let _never_closed = changed.await;
            continue;
        };
        let until = tokio::time::Instant::from_std(hub.started + until).max(earliest);
        tokio::select! {
            _ = changed => {}
            () = tokio::time::sleep_until(until) => return,
        }
    }
}
