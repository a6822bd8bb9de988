//! What a process is told about its job, its peers and its machine. None of it changes what is computed.

use super::elastic::{ElasticArgs, RestartPolicy};
use super::setting::{SettingError, require};
use crate::wire::{MAX_JOB_BYTES, MAX_LISTED_SNAPSHOTS, MAX_WORLD, MOST_FILLING_SNAPSHOTS};
use clap::Args;
use core::{fmt, str::FromStr};
use serde::{Serialize, Serializer};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Settings of every command.
#[derive(Clone, PartialEq, Debug, Serialize, Args)]
#[command(next_help_heading = "General")]
pub struct CommonArgs {
    /// TOML file with settings of the same names (`density = 0.2`), overridden by environment and flags.
    #[arg(long, value_name = "FILE", env = "ARC_CONFIG")]
    pub config: Option<PathBuf>,
    /// What is logged: error, warn, info, debug, trace, or a filter such as `info,arc_topk_ps=debug`.
    #[arg(long, value_name = "FILTER", env = "ARC_LOG", default_value = "info")]
    pub log: String,
    /// Name of the job. A shard serves one job and refuses workers of another.
    #[arg(long, value_name = "NAME", env = "ARC_JOB", default_value = "default")]
    pub job: String,
}

/// Where certificates lie. `arc-ps certs` makes a directory that fits.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Args)]
#[command(next_help_heading = "Certificates (mutual TLS)")]
pub struct CertArgs {
    /// Directory that `arc-ps certs` made, or its folder for this process (`ca.pem`, `cert.pem`, `key.pem`).
    #[arg(long, value_name = "DIR", env = "ARC_CERTS")]
    pub certs: Option<PathBuf>,
    /// Certificate of the job's authority (PEM), instead of the one in `--certs`.
    #[arg(long, value_name = "FILE", env = "ARC_CA")]
    pub ca: Option<PathBuf>,
    /// This process's certificate (PEM), instead of the one in `--certs`.
    #[arg(long, value_name = "FILE", env = "ARC_CERT")]
    pub cert: Option<PathBuf>,
    /// Private key of `--cert` (PEM), instead of the one in `--certs`.
    #[arg(long, value_name = "FILE", env = "ARC_KEY")]
    pub key: Option<PathBuf>,
}

impl CertArgs {
    /// Paths of authority, certificate and key: `ca.pem`, `cert.pem` and `key.pem` of `--certs`, or of its folder
    /// `role` (`shard` or `worker`) if it has one, as the directory that `arc-ps certs` makes.
    ///
    /// # Errors
    /// If one of the three is given neither itself nor by `--certs`.
    pub fn paths(&self, role: &str) -> Result<[PathBuf; 3], SettingError> {
        let dir = self.certs.as_ref().map(|dir| {
            let own = dir.join(role);
            if own.is_dir() { own } else { dir.clone() }
        });
        let pick = |own: &Option<PathBuf>, name: &'static str, file: &str| {
            let advice = "make certificates with `arc-ps certs --out DIR` and pass --certs DIR";
            own.clone()
                .or_else(|| dir.as_ref().map(|dir| dir.join(file)))
                .ok_or_else(|| {
                    SettingError::new(name, "not set", "a file, or --certs a directory", advice)
                })
        };
        Ok([
            pick(&self.ca, "ca", "ca.pem")?,
            pick(&self.cert, "cert", "cert.pem")?,
            pick(&self.key, "key", "key.pem")?,
        ])
    }
}

/// Address of the admin HTTP server (`/metrics`, `/healthz`, `/readyz`, `/status`, `/`), or `off`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AdminAddress(pub Option<SocketAddr>);

impl FromStr for AdminAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let address = text
            .parse()
            .map_err(|_| "write ADDRESS:PORT, such as 127.0.0.1:9400, or off".to_owned())?;
        Ok(Self(Some(address)))
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("off"),
        }
    }
}

impl Serialize for AdminAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Settings of a shard (`arc-ps`).
#[derive(Clone, PartialEq, Debug, Serialize, Args)]
#[command(next_help_heading = "Shard")]
pub struct ShardArgs {
    /// UDP address on which workers are served. Port 0 takes any free one.
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "ARC_LISTEN",
        default_value = "0.0.0.0:7400"
    )]
    pub listen: SocketAddr,
    /// HTTP address of metrics, health, status and the live page, or `off`.
    #[arg(
        long,
        value_name = "ADDRESS:PORT|off",
        env = "ARC_ADMIN",
        default_value = "127.0.0.1:9400"
    )]
    pub admin: AdminAddress,
    /// Which shard this is, counted from 0. Shard 0 coordinates the workers.
    #[arg(long, value_name = "I", env = "ARC_SHARD", default_value_t = 0)]
    pub shard: u16,
    /// How many shards the job has, 1..=256.
    #[arg(long, value_name = "S", env = "ARC_SHARDS", default_value_t = 1)]
    pub shards: u16,
    /// How many workers the job has, 1..=4096. Training starts when all are there.
    #[arg(long, value_name = "N", env = "ARC_WORKERS")]
    pub workers: u16,
    /// With fewer workers no round closes, and if the missing ones do not come back the job is ended. Raise it if a
    /// smaller world would waste time.
    #[arg(long, value_name = "N", env = "ARC_MIN_WORKERS", default_value_t = 1)]
    pub min_workers: u16,
    /// Workers that come, go or lag.
    #[command(flatten)]
    #[serde(flatten)]
    pub elastic: ElasticArgs,
    /// Seconds after its start for which shard 0 begins no job, although all workers are there: if it was restarted, members
    /// of a job that runs notice that a moment later, and must not find another one begun.
    #[arg(
        long,
        value_name = "SECONDS",
        env = "ARC_START_GRACE_SECONDS",
        default_value_t = 4.0
    )]
    pub start_grace_seconds: f64,
    /// Snapshots.
    #[command(flatten)]
    #[serde(flatten)]
    pub snapshots: SnapshotArgs,
}

/// What a shard (`arc-ps`) keeps of the job's snapshots, from which workers join and a job restarts.
#[derive(Clone, PartialEq, Debug, Serialize, Args)]
#[command(next_help_heading = "Snapshots")]
pub struct SnapshotArgs {
    /// Directory for this shard's pieces of snapshots, used by no other process. Without it they are held in memory: they
    /// serve workers that join, and are lost with the process. Files of shards that no longer exist can be copied into it.
    #[arg(long, value_name = "DIR", env = "ARC_SNAPSHOT_DIR")]
    pub snapshot_dir: Option<PathBuf>,
    /// Complete snapshots to keep, 1..=16; older ones are removed.
    #[arg(long, value_name = "N", env = "ARC_SNAPSHOT_KEEP", default_value_t = 2)]
    pub snapshot_keep: u16,
    /// Most bytes of snapshots to hold, on the disk or in memory. A snapshot that does not fit is refused. Room is needed
    /// for one more than are kept.
    #[arg(
        long,
        value_name = "BYTES",
        env = "ARC_SNAPSHOT_LIMIT_BYTES",
        default_value_t = 8 << 30
    )]
    pub snapshot_limit_bytes: u64,
}

impl SnapshotArgs {
    /// Checks ranges.
    ///
    /// # Errors
    /// The first setting outside its range.
    pub fn validate(&self) -> Result<(), SettingError> {
        let most = MAX_LISTED_SNAPSHOTS - MOST_FILLING_SNAPSHOTS;
        let advice =
            "it is how far back a job can go if the newest snapshot is damaged; 2 is usual";
        require(
            (1..=most).contains(&usize::from(self.snapshot_keep)),
            "snapshot_keep",
            self.snapshot_keep,
            "1 to 16",
            advice,
        )?;
        let advice = "it is in bytes: a shard's share of parameters, optimizer and feedback state of all workers, times one more than --snapshot-keep";
        require(
            self.snapshot_limit_bytes >= 1 << 20,
            "snapshot_limit_bytes",
            self.snapshot_limit_bytes,
            "1048576 or more",
            advice,
        )
    }
}

impl ShardArgs {
    /// Checks ranges.
    ///
    /// # Errors
    /// The first setting outside its range.
    pub fn validate(&self) -> Result<(), SettingError> {
        let advice = "it is the number of parameter servers of the job; one per 4 to 16 workers is a good start";
        require(
            (1..=256).contains(&self.shards),
            "shards",
            self.shards,
            "1 to 256",
            advice,
        )?;
        let advice = "shards are counted from 0: with --shards 2 they are --shard 0 and --shard 1";
        require(
            self.shard < self.shards,
            "shard",
            self.shard,
            "below shards",
            advice,
        )?;
        check_workers(self.workers)?;
        let advice = "it is how many workers must stay alive for the job to go on; 1 is usual";
        require(
            (1..=self.workers).contains(&self.min_workers),
            "min_workers",
            self.min_workers,
            "1 to workers",
            advice,
        )?;
        let seconds = self.start_grace_seconds;
        let advice = "4 suits the 3 s after which a lost shard is noticed; 0 begins at once";
        require(
            (0.0..=600.0).contains(&seconds),
            "start_grace_seconds",
            seconds,
            "0 to 600",
            advice,
        )?;
        self.elastic.validate(self.workers)?;
        self.snapshots.validate()
    }
}

/// Settings of a worker's connections.
#[derive(Clone, PartialEq, Debug, Serialize, Args)]
#[command(next_help_heading = "Connection to the shards")]
pub struct PeerArgs {
    /// Addresses of all shards, shard 0 first; the same order on every worker.
    #[arg(
        long,
        value_name = "HOST:PORT,…",
        env = "ARC_SHARD_ADDRESSES",
        value_delimiter = ',',
        required = true
    )]
    pub shard_addresses: Vec<String>,
    /// Name in the shards' certificates, where it is not the host of their address.
    #[arg(long, value_name = "NAME", env = "ARC_SERVER_NAME")]
    pub server_name: Option<String>,
    /// Rank of this worker, counted from 0. Without it shard 0 gives one in the order of arrival; set it for runs that
    /// can be repeated to the bit.
    #[arg(long, value_name = "R", env = "ARC_RANK")]
    pub rank: Option<u16>,
    /// Number of workers that this one expects. Without it, whatever the shards were told.
    #[arg(long, value_name = "N", env = "ARC_WORKERS")]
    pub workers: Option<u16>,
    /// HTTP address of this worker's metrics and health, or `off`.
    #[arg(
        long,
        value_name = "ADDRESS:PORT|off",
        env = "ARC_ADMIN",
        default_value = "off"
    )]
    pub admin: AdminAddress,
    /// Seconds to keep trying to reach a shard that does not answer yet.
    #[arg(
        long,
        value_name = "SECONDS",
        env = "ARC_CONNECT_TIMEOUT_SECONDS",
        default_value_t = 60.0
    )]
    pub connect_timeout_seconds: f64,
    /// Seconds to keep trying to reach a shard that was lost while training. The shard may start anew meanwhile: the
    /// workers tell it what it must know.
    #[arg(
        long,
        value_name = "SECONDS",
        env = "ARC_RECONNECT_TIMEOUT_SECONDS",
        default_value_t = 300.0
    )]
    pub reconnect_timeout_seconds: f64,
    /// Seconds without any answer from a shard after which a step is given up. Lost peers show within seconds by
    /// themselves; this is for those that hang. Must exceed the longest pause of any worker, such as a validation.
    #[arg(
        long,
        value_name = "SECONDS",
        env = "ARC_PROGRESS_TIMEOUT_SECONDS",
        default_value_t = 600.0
    )]
    pub progress_timeout_seconds: f64,
}

impl PeerArgs {
    /// Checks ranges.
    ///
    /// # Errors
    /// The first setting outside its range.
    pub fn validate(&self) -> Result<(), SettingError> {
        let count = self.shard_addresses.len();
        let advice = "list every shard as host:port, comma-separated, shard 0 first";
        require(
            (1..=256).contains(&count),
            "shard_addresses",
            format!("a list of {count}"),
            "a list of 1 to 256",
            advice,
        )?;
        for address in &self.shard_addresses {
            let port = address
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
            require(
                port,
                "shard_addresses",
                address,
                "HOST:PORT each",
                "add the port, 7400 unless --listen said otherwise",
            )?;
        }
        if let Some(workers) = self.workers {
            check_workers(workers)?;
            let advice = "ranks are counted from 0; leave it out to be given one";
            require(
                self.rank.is_none_or(|r| r < workers),
                "rank",
                self.rank.unwrap_or(0),
                "below workers",
                advice,
            )?;
        }
        let seconds = self.connect_timeout_seconds;
        let advice = "it is how long to wait for shards that are still starting; 60 is usual";
        require(
            (0.1..=86400.0).contains(&seconds),
            "connect_timeout_seconds",
            seconds,
            "0.1 to 86400",
            advice,
        )?;
        let seconds = self.reconnect_timeout_seconds;
        let advice = "it is how long a lost shard may take to come back before this worker gives up; 300 is usual";
        require(
            (0.1..=86400.0).contains(&seconds),
            "reconnect_timeout_seconds",
            seconds,
            "0.1 to 86400",
            advice,
        )?;
        let seconds = self.progress_timeout_seconds;
        let advice = "it is how long a step may stand still before it is given up; 600 is usual";
        require(
            (1.0..=86400.0).contains(&seconds),
            "progress_timeout_seconds",
            seconds,
            "1 to 86400",
            advice,
        )
    }
}

/// Settings of `arc-worker local`: shards and workers of a whole job on this machine.
#[derive(Clone, PartialEq, Debug, Serialize, Args)]
#[command(next_help_heading = "Local job")]
pub struct LocalArgs {
    /// Workers to start, 1..=4096.
    #[arg(long, value_name = "N", env = "ARC_WORKERS", default_value_t = 4)]
    pub workers: u16,
    /// Shards to start, 1..=256.
    #[arg(long, value_name = "S", env = "ARC_SHARDS", default_value_t = 2)]
    pub shards: u16,
    /// HTTP address of shard 0's live page; the other shards take free ports. `off` for none.
    #[arg(
        long,
        value_name = "ADDRESS:PORT|off",
        env = "ARC_ADMIN",
        default_value = "127.0.0.1:9400"
    )]
    pub admin: AdminAddress,
    /// What becomes of a worker or shard that dies.
    #[arg(long, env = "ARC_RESTART", value_enum, default_value_t = RestartPolicy::OnFailure)]
    pub restart: RestartPolicy,
    /// Workers that come, go or lag.
    #[command(flatten)]
    pub elastic: ElasticArgs,
}

impl LocalArgs {
    /// Checks ranges.
    ///
    /// # Errors
    /// The first setting outside its range.
    pub fn validate(&self) -> Result<(), SettingError> {
        require(
            (1..=256).contains(&self.shards),
            "shards",
            self.shards,
            "1 to 256",
            "2 are enough on one machine",
        )?;
        check_workers(self.workers)?;
        self.elastic.validate(self.workers)
    }
}

impl CommonArgs {
    /// Checks the job's name.
    ///
    /// # Errors
    /// If it is empty or too long.
    pub fn validate(&self) -> Result<(), SettingError> {
        let bytes = self.job.len();
        let advice = "it only tells jobs apart; a short word will do";
        require(
            (1..=MAX_JOB_BYTES).contains(&bytes),
            "job",
            format!("{bytes} bytes long"),
            "1 to 128 bytes",
            advice,
        )
    }
}

fn check_workers(workers: u16) -> Result<(), SettingError> {
    let advice = "it is the world size: how many processes train together";
    require(
        (1..=MAX_WORLD).contains(&usize::from(workers)),
        "workers",
        workers,
        "1 to 4096",
        advice,
    )
}
