//! Real shards in this process, and workers that join them over loopback.

pub mod proxy;

use crate::support::{Got, Gradients};
use arc_topk_common::ids::{ShardId, TensorId};
use arc_topk_common::plan::PlanSpec;
use arc_topk_ps::server::{ServeOptions, Server, Timeouts};
use arc_topk_ps::shard::{ShardConfig, Status};
use arc_topk_ps::store::StoreOptions;
use arc_topk_transport::certs::{Authority, CertRequest, Role};
use arc_topk_transport::{Identity, TransportConfig};
use arc_topk_worker::reducer::{ReduceError, Reducer};
use arc_topk_worker::session::{ConnectError, NetConfig, QuicReducer};
use arc_topk_worker::step::{RowsCame, StepOutcome};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// The shards of a job, and what workers need to join it.
pub struct Job {
    pub runtime: Runtime,
    pub servers: Vec<Server>,
    pub authority: Authority,
    pub dir: TempDir,
    pub world: u16,
}

/// A machine busy with other tests must not look like a lost peer.
pub fn transport() -> TransportConfig {
    TransportConfig {
        idle_timeout: Duration::from_secs(30),
        ..TransportConfig::default()
    }
}

pub fn request() -> CertRequest {
    CertRequest::new("job", &[], 2)
}

impl Job {
    pub fn start(shards: u16, world: u16) -> Self {
        let mut job = Self::prepare(world);
        for shard in 0..shards {
            let server = job.serve("127.0.0.1:0".parse().unwrap(), shard, shards);
            job.servers.push(server);
        }
        job
    }

    /// Everything but the shards.
    pub fn prepare(world: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(&request()).unwrap();
        for role in [Role::Shard, Role::Worker] {
            let place = dir.path().join(role.dir());
            authority.issue(&place, role, &request()).unwrap();
        }
        Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            servers: Vec::new(),
            authority,
            dir,
            world,
        }
    }

    pub fn options(&self, listen: SocketAddr, shard: u16, shards: u16) -> ServeOptions {
        let patience = Duration::from_secs(2);
        ServeOptions {
            listen,
            admin: None,
            identity: Identity::load(&self.place("shard")).unwrap().into(),
            transport: transport(),
            shard: ShardConfig::new("job", ShardId(shard), shards, self.world),
            chaos_delay: Duration::ZERO,
            store: StoreOptions::default(),
            timeouts: Timeouts {
                hello: patience,
                header: patience,
                body: patience,
            },
        }
    }

    pub fn serve(&self, listen: SocketAddr, shard: u16, shards: u16) -> Server {
        let options = self.options(listen, shard, shards);
        self.runtime.block_on(Server::start(options)).unwrap()
    }

    pub fn place(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn addresses(&self) -> Vec<String> {
        let addresses = self.servers.iter().map(Server::quic_address);
        addresses.map(|address| address.to_string()).collect()
    }

    /// For a worker of this job; joins as soon as [`QuicReducer::connect`] is called.
    pub fn config(&self) -> NetConfig {
        let identity = Identity::load(&self.place("worker")).unwrap();
        let mut config = NetConfig::new("job", &self.addresses(), identity);
        config.io_threads = 1;
        config.connect_timeout = Duration::from_secs(60);
        config.transport = transport();
        config
    }

    /// All workers of the world, by rank.
    pub fn join(&self, spec: &PlanSpec) -> Vec<QuicReducer> {
        self.join_as(&self.config(), spec)
    }

    /// All workers of the world, with these settings, by rank.
    pub fn join_as(&self, config: &NetConfig, spec: &PlanSpec) -> Vec<QuicReducer> {
        let mut workers: Vec<QuicReducer> = (0..self.world)
            .map(|_| self.join_one(config.clone(), spec))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|thread| thread.join().unwrap().unwrap())
            .collect();
        workers.sort_by_key(Reducer::rank);
        workers
    }

    pub fn join_one(
        &self,
        config: NetConfig,
        spec: &PlanSpec,
    ) -> std::thread::JoinHandle<Result<QuicReducer, ConnectError>> {
        let spec = spec.clone();
        std::thread::spawn(move || QuicReducer::connect(config, spec))
    }

    pub fn status(&self, shard: usize) -> Status {
        let status = self.servers[shard].status();
        self.runtime.block_on(status).unwrap()
    }

    /// Waits until the status of `shard` is as wished. A minute is long enough for any machine.
    pub fn status_when(&self, shard: usize, wished: impl Fn(&Status) -> bool) -> Status {
        let mut status = self.status(shard);
        for _ in 0..12_000 {
            if wished(&status) {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
            status = self.status(shard);
        }
        panic!("shard {shard} is not as wished after a minute: {status:?}");
    }

    pub fn shutdown(self) {
        for server in self.servers {
            self.runtime.block_on(server.shutdown("the test ends"));
        }
    }
}

/// One step: gradients in the order of backward.
pub fn step(worker: &mut QuicReducer, own: &[Vec<f32>]) -> Result<StepOutcome, ReduceError> {
    worker.begin()?;
    for (id, gradient) in own.iter().enumerate().rev() {
        worker.push(TensorId(id as u32), gradient)?;
    }
    worker.finish()
}

/// One step of all workers, each on a thread of its own.
pub fn step_all(
    workers: &mut [QuicReducer],
    gradients: &Gradients,
) -> Vec<Result<StepOutcome, ReduceError>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .iter_mut()
            .zip(gradients)
            .map(|(worker, own)| scope.spawn(move || step(worker, own)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

pub fn results(worker: &mut QuicReducer) -> Vec<Got> {
    let mut got = Vec::new();
    worker.for_each_result(&mut |result| {
        got.push(Got {
            tensor: result.tensor,
            values: result.values.to_vec(),
            rows: match result.rows {
                RowsCame::All => None,
                RowsCame::Rows(rows) => Some(rows.to_vec()),
            },
        });
    });
    got
}

pub fn leave_all(workers: Vec<QuicReducer>) {
    for worker in workers {
        Box::new(worker).leave();
    }
}
