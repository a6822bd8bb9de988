//! What Python asks for. It comes as one JSON object, so that names, types and unknown settings are checked in one place.

use arc_topk_common::compress::fast::Fast;
use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::ids::{Rank, Step};
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_common::wire::JoinWhen;
use arc_topk_transport::IdentitySource;
use arc_topk_transport::certs::Role;
use arc_topk_worker::backend::device::nvidia::on_gpu;
use arc_topk_worker::backend::{MakeBackend, on_cpu};
use arc_topk_worker::session::NetConfig;
use pyo3::PyResult;
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where the shards are, and as whom to come.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct Peers {
    /// `HOST:PORT` of every shard, in the same order on all workers.
    pub(crate) shards: Vec<String>,
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

impl Peers {
    pub(crate) fn parse(json: &str) -> PyResult<Self> {
        read(json)
    }

    pub(crate) fn identity(&self) -> PyResult<IdentitySource> {
        IdentitySource::files(&self.ca, &self.cert, &self.key, Role::Worker)
            .map_err(super::errors::config)
    }
}

/// Reads `json`; an error names the setting as Python does.
fn read<'a, T: Deserialize<'a>>(json: &'a str) -> PyResult<T> {
    let mut json = serde_json::Deserializer::from_str(json);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = ["algorithm.", "peers."];
        let setting = inner.iter().find_map(|of| path.strip_prefix(of));
        let setting = setting.unwrap_or(&path);
        let said = error.inner().to_string();
        // Where it stands in the text is of no use to who did not write it.
        let said = said.split(" at line ").next().unwrap_or(&said);
        let text = match setting {
            // Of no single one.
            "." | "algorithm" => said.to_owned(),
            _ => format!("{setting}: {said}"),
        };
        super::errors::config(text)
    })
}

/// A tensor, as Python names it.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct Tensor {
    name: String,
    shape: Vec<u64>,
    dtype: String,
    density: Option<f32>,
}

/// How to join, and with what.
#[derive(Clone, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub(crate) struct Options {
    peers: Peers,
    job: String,
    rank: Option<u16>,
    world: Option<u16>,
    algorithm: AlgorithmConfig,
    tensors: Vec<Tensor>,
    /// What all workers must have alike beside the plan, as text.
    trainer: String,
    start_step: u64,
    start_update: u64,
    /// The GPU that the tensors are on, by number; null: they are in main memory, or are copied there.
    gpu: Option<usize>,
    /// `start`, `any` or `running`.
    when: String,
    connect_timeout: f64,
    join_timeout: f64,
    reconnect_timeout: f64,
    progress_timeout: f64,
}

impl Options {
    pub(crate) fn parse(json: &str) -> PyResult<Self> {
        let options: Self = read(json)?;
        options
            .algorithm
            .validate()
            .map_err(super::errors::config)?;
        Ok(options)
    }

    pub(crate) fn gpu(&self) -> Option<usize> {
        self.gpu
    }

    /// Where this worker compresses.
    pub(crate) fn backend(&self) -> MakeBackend {
        self.gpu.map_or_else(|| on_cpu(Arc::new(Fast)), on_gpu)
    }

    pub(crate) fn plan(&self) -> PyResult<PlanSpec> {
        let tensor = |tensor: &Tensor| {
            Ok(TensorSpec {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                dtype: match tensor.dtype.as_str() {
                    "float32" => DType::F32,
                    "bfloat16" => DType::Bf16,
                    "float16" => DType::F16,
                    other => {
                        return Err(super::errors::config(format!(
                            "{} is of type {other}: gradients of float32, bfloat16 and float16 can be averaged",
                            tensor.name
                        )));
                    }
                },
                density: tensor.density,
            })
        };
        Ok(PlanSpec {
            trainer: self.trainer.clone(),
            algorithm: self.algorithm.clone(),
            shards: u16::try_from(self.peers.shards.len()).map_err(super::errors::config)?,
            tensors: self.tensors.iter().map(tensor).collect::<PyResult<_>>()?,
        })
    }

    pub(crate) fn net(&self) -> PyResult<NetConfig> {
        let when = match self.when.as_str() {
            "start" => JoinWhen::Start,
            "any" => JoinWhen::Any,
            "running" => JoinWhen::Running,
            other => {
                return Err(super::errors::config(format!(
                    "when {other:?} is not known"
                )));
            }
        };
        let seconds = |name: &str, seconds: f64| {
            Duration::try_from_secs_f64(seconds)
                .map_err(|cause| super::errors::config(format!("{name} of {seconds} s: {cause}")))
        };
        Ok(NetConfig {
            rank: self.rank.map(Rank),
            world: self.world,
            start_step: Step(self.start_step),
            start_update: self.start_update,
            when,
            connect_timeout: seconds("connect_timeout", self.connect_timeout)?,
            join_timeout: seconds("join_timeout", self.join_timeout)?,
            reconnect_timeout: seconds("reconnect_timeout", self.reconnect_timeout)?,
            progress_timeout: seconds("progress_timeout", self.progress_timeout)?,
            ..NetConfig::new(&self.job, &self.peers.shards, self.peers.identity()?)
        })
    }
}
