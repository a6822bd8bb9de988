//! The class `LocalShards`: the shards of one job, in this process, for jobs on one machine.

use super::errors::ArcError;
use arc_topk_common::ids::ShardId;
use arc_topk_ps::server::{ServeOptions, Server, Timeouts};
use arc_topk_ps::shard::ShardConfig;
use arc_topk_ps::store::StoreOptions;
use arc_topk_transport::certs::{CertRequest, make_job_certs};
use arc_topk_transport::{Identity, TransportConfig};
use pyo3::prelude::*;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;

struct Running {
    runtime: Runtime,
    servers: Vec<Server>,
}

/// The shards of one job, on loopback ports of the system's choice, with certificates of their own.
#[pyclass(frozen, module = "arc_topk._native")]
pub(crate) struct LocalShards {
    addresses: Vec<String>,
    certs: PathBuf,
    running: Mutex<Option<Running>>,
}

fn failed(error: impl std::fmt::Display) -> PyErr {
    ArcError::new_err(error.to_string())
}

fn start(directory: &Path, job: &str, shards: u16, workers: u16) -> PyResult<(Running, PathBuf)> {
    let made = make_job_certs(directory, &CertRequest::new(job, &[], 30)).map_err(failed)?;
    let identity = Identity::load(&made.shard).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("arc-shards")
        .enable_all()
        .build()
        .map_err(failed)?;
    let mut servers = Vec::new();
    for shard in (0..shards).map(ShardId) {
        let options = ServeOptions {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            admin: None,
            identity: identity.clone().into(),
            transport: TransportConfig::default(),
            // No earlier start of the job can have members.
            shard: ShardConfig {
                start_grace: Duration::ZERO,
                ..ShardConfig::new(job, shard, shards, workers)
            },
            timeouts: Timeouts::default(),
            chaos_delay: Duration::ZERO,
            store: StoreOptions::default(),
        };
        servers.push(runtime.block_on(Server::start(options)).map_err(failed)?);
    }
    Ok((Running { runtime, servers }, made.worker))
}

#[pymethods]
impl LocalShards {
    /// Starts them. Keys lie in `directory`, which should be the caller's alone.
    #[new]
    fn new(
        py: Python<'_>,
        directory: PathBuf,
        job: &str,
        shards: u16,
        workers: u16,
    ) -> PyResult<Self> {
        if shards == 0 || workers == 0 {
            return Err(super::errors::config(
                "a job has at least one shard and one worker",
            ));
        }
        let (running, certs) = py.detach(|| start(&directory, job, shards, workers))?;
        let addresses = running.servers.iter();
        Ok(Self {
            addresses: addresses
                .map(|server| server.quic_address().to_string())
                .collect(),
            certs,
            running: Mutex::new(Some(running)),
        })
    }

    /// `HOST:PORT` of every shard, in their order.
    #[getter]
    fn addresses(&self) -> Vec<String> {
        self.addresses.clone()
    }

    /// Directory of the workers' certificate.
    #[getter]
    fn certs(&self) -> PathBuf {
        self.certs.clone()
    }

    /// Ends them. Workers that are there are told.
    fn stop(&self, py: Python<'_>) {
        let running = || {
            let mut held = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Running { runtime, servers }) = held.take() {
                for server in servers {
                    runtime.block_on(server.shutdown("the job on this machine is over"));
                }
                runtime.shutdown_timeout(Duration::from_secs(5));
            }
        };
        py.detach(running);
    }
}
