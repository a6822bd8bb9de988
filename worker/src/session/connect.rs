//! Joining: shard 0 first, which gives the rank, then all others at once.

use super::{CLOSE_TIMEOUT, ConnectError, NetConfig, NetEvent};
use arc_topk_common::ids::ShardId;
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Control, Hello, PROTOCOL_VERSION, RefusalCode, Welcome};
use arc_topk_transport::{
    Connection, ControlStream, Endpoint, TransportError, VarInt, client_endpoint, connect_resolved,
    resolve, split_host,
};
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// First pause between attempts; it doubles up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// A shard that has welcomed this worker.
pub(super) struct Joined {
    pub(super) shard: ShardId,
    /// Name for errors: `shard 1 at HOST:PORT`.
    pub(super) peer: String,
    pub(super) connection: Connection,
    pub(super) control: ControlStream,
    /// Kept as long as the connection: it drives the socket.
    pub(super) endpoint: Endpoint,
}

/// Joins at every shard. The result is in the order of the shards.
pub(super) async fn join_all(
    config: &NetConfig,
    plan: &Plan,
) -> Result<(Vec<Joined>, Welcome), ConnectError> {
    if config.shards.is_empty() {
        return Err(ConnectError::ShardCount {
            plan: plan.spec.shards,
            addresses: 0,
        });
    }
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        job: config.job.clone(),
        incarnation: incarnation(),
        rank: config.rank,
        world: config.world,
        start_step: config.start_step,
        shard: 0,
        host: host_name(),
        plan: plan.spec.clone(),
    };
    let (first, welcome) = join_one(config.clone(), hello.clone()).await?;
    let mut others = JoinSet::new();
    for shard in 1..plan.spec.shards {
        let hello = Hello {
            rank: Some(welcome.rank),
            world: Some(welcome.world),
            shard,
            ..hello.clone()
        };
        others.spawn(join_one(config.clone(), hello));
    }
    let mut joined = vec![first];
    while let Some(result) = others.join_next().await {
        let (shard, _) = result.map_err(|e| ConnectError::Runtime(e.to_string()))??;
        joined.push(shard);
    }
    joined.sort_by_key(|joined| joined.shard);
    Ok((joined, welcome))
}

async fn join_one(config: NetConfig, hello: Hello) -> Result<(Joined, Welcome), ConnectError> {
    let shard = ShardId(hello.shard);
    let address = config.shards[shard.index()].clone();
    let deadline = Instant::now() + config.connect_timeout;
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match attempt(&config, &hello, &address).await {
            Err(ConnectError::Transport { source, .. }) => source,
            other => return other,
        };
        if !may_pass(&error) || Instant::now() + pause >= deadline {
            return Err(ConnectError::Transport {
                shard: shard.0,
                address,
                source: over_all(error, config.connect_timeout),
            });
        }
        let cause = error.to_string();
        tracing::info!(shard = shard.0, %cause, "the shard does not answer yet; trying again");
        config.observe(&NetEvent::Retrying { shard, cause });
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
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

async fn attempt(
    config: &NetConfig,
    hello: &Hello,
    address: &str,
) -> Result<(Joined, Welcome), ConnectError> {
    let shard = ShardId(hello.shard);
    let peer = format!("shard {shard} at {address}");
    let failed = |source| failure(shard, address, source);
    let (name, _) = split_host(address).map_err(failed)?;
    let target = resolve(address).await.map_err(failed)?;
    let endpoint = client_endpoint(target, &config.transport).map_err(failed)?;
    let identity = config.identity.current();
    let connection = connect_resolved(&endpoint, target, name, &identity, &config.transport)
        .await
        .map_err(failed)?;
    let mut control = ControlStream::open(&connection, &peer)
        .await
        .map_err(failed)?;
    control
        .send(&Control::Hello(Box::new(hello.clone())))
        .await
        .map_err(failed)?;
    let welcome = await_welcome(config, shard, address, &mut control).await;
    if welcome.is_err() {
        connection.close(VarInt::from_u32(0), b"gave up joining");
        // The close frame goes out only while the endpoint lives.
        let _lost_shard_never_answers =
            tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
    }
    let joined = Joined {
        shard,
        peer,
        connection,
        control,
        endpoint,
    };
    Ok((joined, welcome?))
}

async fn await_welcome(
    config: &NetConfig,
    shard: ShardId,
    address: &str,
    control: &mut ControlStream,
) -> Result<Welcome, ConnectError> {
    let deadline = Instant::now() + config.join_timeout;
    let (mut joined, mut world) = (1, config.world.unwrap_or(0));
    loop {
        let message = match tokio::time::timeout_at(deadline, control.recv()).await {
            Err(_) => {
                return Err(ConnectError::Join {
                    joined,
                    world,
                    seconds: config.join_timeout.as_secs(),
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
                config.observe(&NetEvent::Waiting { joined, world });
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
