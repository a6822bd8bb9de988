//! The way to a shard: dialled, greeted, welcomed.

use super::{CLOSE_TIMEOUT, ConnectError, NetConfig, NetEvent};
use arc_topk_common::ids::ShardId;
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Control, Hello, Intent, PROTOCOL_VERSION, RefusalCode, Welcome};
use arc_topk_transport::{
    Connection, ControlStream, Endpoint, TransportError, VarInt, client_endpoint, connect_resolved,
    resolve, split_host,
};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// First pause between attempts; it doubles.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause while shards may be starting.
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// A shard that has welcomed this worker.
pub(super) struct Dialled {
    pub(super) shard: ShardId,
    /// Name for errors: `shard 1 at HOST:PORT`.
    pub(super) peer: Arc<str>,
    pub(super) connection: Connection,
    pub(super) control: ControlStream,
    /// Kept as long as the connection: it drives the socket.
    pub(super) endpoint: Endpoint,
    pub(super) welcome: Welcome,
}

impl Dialled {
    /// Closes it again, for a worker that cannot join after all.
    pub(super) async fn hang_up(self) {
        hang_up(&self.connection, &self.endpoint, 0, b"gave up joining").await;
    }
}

/// How long an attempt may take.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    /// Until the handshake is done.
    pub(super) handshake: Duration,
    /// From the Hello to the Welcome.
    pub(super) welcome: Duration,
}

/// Dials the shards of one worker.
pub(super) struct Dialer {
    pub(super) config: NetConfig,
    plan: Arc<Plan>,
    /// Random per session, the same towards every shard.
    incarnation: [u8; 16],
    host: String,
}

impl Dialer {
    pub(super) fn new(config: NetConfig, plan: Arc<Plan>) -> Self {
        Self {
            config,
            plan,
            incarnation: incarnation(),
            host: host_name(),
        }
    }

    /// Joins at shard 0, which gives the place.
    pub(super) async fn join(&self) -> Result<Dialled, ConnectError> {
        let intent = Intent::Join {
            rank: self.config.rank,
            world: self.config.world,
            start_step: self.config.start_step,
            when: self.config.when,
        };
        self.first(ShardId(0), intent).await
    }

    /// Takes the place at all other shards, at once. In the order of the shards.
    pub(super) async fn join_others(
        self: &Arc<Self>,
        mut intent: impl FnMut(ShardId) -> Intent,
    ) -> Result<Vec<Dialled>, ConnectError> {
        let mut others = JoinSet::new();
        for shard in (1..self.plan.spec.shards).map(ShardId) {
            let (dialer, intent) = (Arc::clone(self), intent(shard));
            others.spawn(async move { dialer.first(shard, intent).await });
        }
        let mut dialled = Vec::with_capacity(others.len());
        let mut failure = None;
        while let Some(result) = others.join_next().await {
            match result.map_err(|e| ConnectError::Runtime(e.to_string())) {
                Ok(Ok(other)) => dialled.push(other),
                Ok(Err(error)) | Err(error) => {
                    others.abort_all();
                    failure = failure.or(Some(error));
                }
            }
        }
        if let Some(failure) = failure {
            for other in dialled {
                other.hang_up().await;
            }
            return Err(failure);
        }
        dialled.sort_by_key(|other| other.shard);
        Ok(dialled)
    }

    /// Tries until a shard that may still be starting answers.
    async fn first(&self, shard: ShardId, intent: Intent) -> Result<Dialled, ConnectError> {
        let patience = Patience {
            handshake: self.config.transport.connect_timeout,
            welcome: self.config.join_timeout,
        };
        let deadline = Instant::now() + self.config.connect_timeout;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.attempt(shard, intent.clone(), patience, 0).await {
                Err(ConnectError::Transport { source, .. }) => source,
                other => return other,
            };
            if !may_pass(&error) || Instant::now() + pause >= deadline {
                return Err(ConnectError::Transport {
                    shard: shard.0,
                    address: self.address(shard).to_owned(),
                    source: over_all(error, self.config.connect_timeout),
                });
            }
            self.retrying(shard, error.to_string());
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    pub(super) fn retrying(&self, shard: ShardId, cause: String) {
        tracing::info!(shard = shard.0, %cause, "the shard does not answer yet; trying again");
        self.config.observe(&NetEvent::Retrying { shard, cause });
    }

    fn address(&self, shard: ShardId) -> &str {
        &self.config.shards[shard.index()]
    }

    /// One attempt. A connection that brings no Welcome is closed with `code`.
    pub(super) async fn attempt(
        &self,
        shard: ShardId,
        intent: Intent,
        patience: Patience,
        code: u32,
    ) -> Result<Dialled, ConnectError> {
        let address = self.address(shard);
        let peer: Arc<str> = format!("shard {shard} at {address}").into();
        let failed = |source| failure(shard, address, source);
        let (name, _) = split_host(address).map_err(failed)?;
        let target = resolve(address).await.map_err(failed)?;
        let mut transport = self.config.transport.clone();
        transport.connect_timeout = patience.handshake;
        let endpoint = client_endpoint(target, &transport).map_err(failed)?;
        let identity = &self.config.identity.current();
        let connection = connect_resolved(&endpoint, target, name, identity, &transport)
            .await
            .map_err(failed)?;
        let greeted = self
            .greet(shard, &connection, &peer, intent, patience.welcome)
            .await;
        let (control, welcome) = match greeted {
            Ok(greeted) => greeted,
            Err(error) => {
                hang_up(&connection, &endpoint, code, b"gave up joining").await;
                return Err(error);
            }
        };
        Ok(Dialled {
            shard,
            peer,
            connection,
            control,
            endpoint,
            welcome,
        })
    }

    async fn greet(
        &self,
        shard: ShardId,
        connection: &Connection,
        peer: &str,
        intent: Intent,
        patience: Duration,
    ) -> Result<(ControlStream, Welcome), ConnectError> {
        let failed = |source| failure(shard, self.address(shard), source);
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            job: self.config.job.clone(),
            incarnation: self.incarnation,
            shard: shard.0,
            host: self.host.clone(),
            intent,
            plan: self.plan.spec.clone(),
        };
        let mut control = ControlStream::open(connection, peer)
            .await
            .map_err(failed)?;
        control
            .send(&Control::Hello(Box::new(hello)))
            .await
            .map_err(failed)?;
        let welcome = self.welcome(shard, &mut control, patience).await?;
        Ok((control, welcome))
    }

    async fn welcome(
        &self,
        shard: ShardId,
        control: &mut ControlStream,
        patience: Duration,
    ) -> Result<Welcome, ConnectError> {
        let deadline = Instant::now() + patience;
        let address = self.address(shard);
        let (mut joined, mut world) = (1, self.config.world.unwrap_or(0));
        loop {
            let message = match tokio::time::timeout_at(deadline, control.recv()).await {
                Err(_) => {
                    return Err(ConnectError::Join {
                        joined,
                        world,
                        seconds: patience.as_secs(),
                    });
                }
                Ok(message) => message.map_err(|e| failure(shard, address, e))?,
            };
            match message {
                Some(Control::Welcome(welcome)) => return Ok(welcome),
                Some(Control::Waiting {
                    joined: now,
                    world: of,
                }) => {
                    (joined, world) = (now, of);
                    self.config.observe(&NetEvent::Waiting { joined, world });
                }
                Some(Control::Refused { code, detail }) => {
                    return Err(refused(shard, address, code, detail));
                }
                // Somebody left while the job gathered.
                Some(Control::Membership { .. }) => {}
                other => {
                    return Err(ConnectError::Answer {
                        shard: shard.0,
                        address: address.to_owned(),
                        answer: other.map_or("the end of the stream".to_owned(), |m| kind(&m)),
                    });
                }
            }
        }
    }
}

/// Closes; the close frame goes out only while the endpoint lives.
async fn hang_up(connection: &Connection, endpoint: &Endpoint, code: u32, reason: &[u8]) {
    connection.close(VarInt::from_u32(code), reason);
    let _lost_shard_never_answers = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
}

/// Whether another attempt may succeed without anybody's doing: the shard may still be starting.
fn may_pass(error: &TransportError) -> bool {
    matches!(
        error,
        TransportError::ConnectTimeout { .. }
            | TransportError::ConnectRefused { .. }
            | TransportError::IdleTimeout { .. }
            | TransportError::Reset { .. }
            | TransportError::Unresolvable { .. }
    )
}

/// A timeout of the last attempt, told as that of all attempts.
fn over_all(error: TransportError, waited: Duration) -> TransportError {
    match error {
        TransportError::ConnectTimeout { peer, .. } => {
            TransportError::ConnectTimeout { peer, waited }
        }
        other => other,
    }
}

fn kind(message: &Control) -> String {
    let shown = format!("{message:?}");
    let end = shown.find(|c: char| !c.is_alphanumeric());
    shown[..end.unwrap_or(shown.len())].to_owned()
}

/// A refusal may reach this side as the connection's close before its control message does.
fn failure(shard: ShardId, address: &str, source: TransportError) -> ConnectError {
    if let TransportError::Closed { code, reason, .. } = &source
        && let Some(code) = RefusalCode::from_number(*code)
    {
        return refused(shard, address, code, reason.clone());
    }
    ConnectError::Transport {
        shard: shard.0,
        address: address.to_owned(),
        source,
    }
}

fn refused(shard: ShardId, address: &str, code: RefusalCode, detail: String) -> ConnectError {
    ConnectError::Refused {
        shard: shard.0,
        address: address.to_owned(),
        code,
        detail,
    }
}

/// Sixteen bytes that no other process has: the hasher's keys come from the operating system.
fn incarnation() -> [u8; 16] {
    let mut bytes = [0; 16];
    for half in bytes.chunks_exact_mut(8) {
        let random = RandomState::new().hash_one(std::process::id());
        half.copy_from_slice(&random.to_le_bytes());
    }
    bytes
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .or_else(|_| std::env::var("HOSTNAME").map_err(std::io::Error::other))
        .unwrap_or_else(|_| "unknown host".to_owned());
    format!("{} pid {}", name.trim(), std::process::id())
}
