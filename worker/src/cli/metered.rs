//! A reducer that counts for Prometheus, and the pages that show the counts.

use super::error::CliError;
use crate::backend::DeviceStats;
use crate::record::StepRecord;
use crate::reducer::{LiveRanks, ReduceError, Reducer, StepStart, TrainReport};
use crate::session::QuicReducer;
use crate::step::{ByteCounts, StepOutcome, TensorResult, WorkerState};
use arc_topk_common::ids::{Rank, RunId, Step, TensorId};
use arc_topk_common::metrics::{
    ConnectionFigures, DeviceCopy, DeviceKernel, DeviceMemory, Flow, StepEnd, StepPhase, Traffic,
    WorkerMetrics,
};
use arc_topk_common::plan::Plan;
use arc_topk_ps::server::admin::{self, Admin, Answer};
use arc_topk_transport::IdentitySource;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::UNIX_EPOCH;

/// Steps between two looks at the connections: reading them takes locks that sending needs.
const CONNECTIONS_EVERY: u64 = 10;

/// Passes everything on, and counts.
pub(super) struct MeteredReducer {
    inner: QuicReducer,
    metrics: Arc<WorkerMetrics>,
}

impl MeteredReducer {
    /// Counts what `inner` does.
    pub(super) fn new(inner: QuicReducer, metrics: Arc<WorkerMetrics>) -> Self {
        Self { inner, metrics }
    }

    fn count(&self, outcome: &StepOutcome) {
        let stats = &outcome.stats;
        for (flow, bytes) in [(Flow::Up, &stats.sent), (Flow::Down, &stats.received)] {
            for (kind, bytes) in by_kind(bytes) {
                self.metrics.add_bytes(kind, flow, bytes);
            }
        }
        if let Some(norm) = stats.gradient_norm {
            self.metrics.set_gradient_norm(f64::from(norm));
        }
        let wide = |value: Option<f32>| value.map(f64::from);
        // A skipped step moved no rows: it says nothing of the density.
        let density = (!outcome.skipped).then_some(f64::from(stats.density));
        self.metrics.set_compression(
            density,
            wide(stats.captured_energy),
            wide(stats.residual_ratio()),
        );
        if let Some(device) = &stats.device {
            self.count_device(device);
        }
        if outcome.step.0.is_multiple_of(CONNECTIONS_EVERY) {
            for (shard, figures) in self.inner.connections() {
                let figures = ConnectionFigures {
                    round_trip_seconds: figures.rtt.as_secs_f64(),
                    congestion_window_bytes: figures.congestion_window_bytes,
                    lost_packets: figures.lost_packets,
                    sent_bytes: figures.sent_bytes,
                    received_bytes: figures.received_bytes,
                };
                self.metrics.observe_connection(shard.0, figures);
            }
        }
    }
}

impl MeteredReducer {
    fn count_device(&self, device: &DeviceStats) {
        let seconds = [
            (DeviceKernel::Sketch, device.seconds.sketch),
            (DeviceKernel::Gather, device.seconds.gather),
            (DeviceKernel::Commit, device.seconds.commit),
            (DeviceKernel::Energy, device.seconds.energy),
        ];
        for (kernel, seconds) in seconds {
            self.metrics.add_device_seconds(kernel, seconds);
        }
        let metrics = &self.metrics;
        metrics.add_device_copied(DeviceCopy::In, device.bytes_in);
        metrics.add_device_copied(DeviceCopy::Out, device.bytes_out);
        metrics.set_device_memory(DeviceMemory::State, device.state_bytes);
        metrics.set_device_memory(DeviceMemory::Scratch, device.scratch_bytes);
    }
}

fn by_kind(bytes: &ByteCounts) -> [(Traffic, u64); 5] {
    [
        (Traffic::Sketch, bytes.sketch),
        (Traffic::Selection, bytes.selection),
        (Traffic::Values, bytes.values),
        (Traffic::Dense, bytes.dense),
        (Traffic::Control, bytes.control),
    ]
}

impl Reducer for MeteredReducer {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn world(&self) -> u16 {
        self.inner.world()
    }

    fn plan(&self) -> &Plan {
        self.inner.plan()
    }

    fn start_step(&self) -> Step {
        self.inner.start_step()
    }

    fn run(&self) -> Option<RunId> {
        self.inner.run()
    }

    fn members(&self) -> Vec<Rank> {
        Reducer::members(&self.inner)
    }

    fn live_ranks(&self) -> LiveRanks {
        self.inner.live_ranks()
    }

    fn live_workers(&self) -> u16 {
        self.inner.live_workers()
    }

    fn is_leader(&self) -> bool {
        self.inner.is_leader()
    }

    fn begin(&mut self) -> Result<StepStart, ReduceError> {
        self.inner.begin()
    }

    fn push(&mut self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
        self.inner.push(tensor, gradient)
    }

    fn finish(&mut self) -> Result<StepOutcome, ReduceError> {
        let outcome = self.inner.finish()?;
        self.count(&outcome);
        Ok(outcome)
    }

    fn for_each_result(&mut self, f: &mut dyn FnMut(TensorResult<'_>)) {
        self.inner.for_each_result(f);
    }

    fn export_state(&mut self) -> WorkerState {
        self.inner.export_state()
    }

    fn import_state(&mut self, state: WorkerState) -> Result<(), ReduceError> {
        self.inner.import_state(state)
    }

    fn export_shared(&mut self) -> WorkerState {
        self.inner.export_shared()
    }

    fn needs_snapshot(&self) -> Option<(RunId, Step)> {
        self.inner.needs_snapshot()
    }

    fn donation_due(&self) -> bool {
        self.inner.donation_due()
    }

    fn donating(&mut self, step: Step) {
        self.inner.donating(step);
    }

    fn donation_ended(&mut self, step: Step, stored: bool) {
        self.inner.donation_ended(step, stored);
    }

    fn step_aside(&mut self) {
        self.inner.step_aside();
    }

    fn digest(&mut self, step: Step, digest: [u8; 32]) {
        self.inner.digest(step, digest);
    }

    fn report(&mut self, report: TrainReport) {
        self.inner.report(report);
    }

    fn leave(self: Box<Self>) {
        Box::new(self.inner).leave();
    }
}

/// What the worker's pages show.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) metrics: Arc<WorkerMetrics>,
    latest: Mutex<Option<StepRecord>>,
    rank: AtomicU64,
    /// What this worker shows to shards, once it knows.
    identity: OnceLock<IdentitySource>,
}

impl Pages {
    /// Pages about `metrics`; not ready before [`Pages::joined`].
    pub(super) fn new(metrics: Arc<WorkerMetrics>) -> Self {
        metrics.observe_process();
        Self {
            metrics,
            latest: Mutex::default(),
            rank: AtomicU64::new(u64::MAX),
            identity: OnceLock::new(),
        }
    }

    /// Shards are shown this.
    pub(super) fn shows(&self, identity: &IdentitySource) {
        let _shown_already = self.identity.set(identity.clone());
    }

    /// The worker is a member of its job.
    pub(super) fn joined(&self, rank: Rank) {
        self.rank.store(u64::from(rank.0), Ordering::Relaxed);
    }

    /// A step is done.
    pub(super) fn step(&self, record: &StepRecord) {
        let end = if record.skipped {
            StepEnd::Skipped
        } else {
            StepEnd::Applied
        };
        self.metrics.step_ended(
            end,
            f64::from(record.step_seconds),
            record.dense_equivalent_bytes,
        );
        let phases = [
            (StepPhase::Compute, record.compute_seconds),
            (StepPhase::Compress, record.compress_seconds),
            (StepPhase::Wait, record.wait_seconds),
            (StepPhase::Update, record.update_seconds),
        ];
        phases
            .into_iter()
            .for_each(|(phase, seconds)| self.metrics.phase_ended(phase, f64::from(seconds)));
        if record.behind {
            self.metrics.behind();
        } else {
            self.metrics
                .set_training(record.step, f64::from(record.loss));
        }
        if record.late {
            self.metrics.uncounted();
        }
        self.metrics.set_learning_rate(f64::from(record.lr));
        self.metrics.add_samples(record.tokens);
        if let Some(loss) = record.validation_loss {
            self.metrics.set_validation_loss(f64::from(loss));
        }
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some(record.clone());
    }

    fn rank(&self) -> Option<u64> {
        Some(self.rank.load(Ordering::Relaxed)).filter(|rank| *rank != u64::MAX)
    }
}

impl Admin for Pages {
    fn metrics(&self) -> String {
        let identity = self.identity.get().map(IdentitySource::settled);
        if let Some(end) = identity.and_then(|identity| identity.not_after().ok()) {
            let timestamp = end.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            self.metrics.set_certificate_expiry(timestamp);
        }
        self.metrics.text()
    }

    fn ready(&self) -> Answer<'_, Result<(), String>> {
        let joined = self
            .rank()
            .map(drop)
            .ok_or_else(|| "waiting for the other workers".to_owned());
        Box::pin(async move { joined })
    }

    fn status(&self) -> Answer<'_, String> {
        let latest = self
            .latest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let status = serde_json::json!({ "component": "worker", "rank": self.rank(), "latest_step": latest });
        Box::pin(async move { status.to_string() })
    }

    fn page(&self) -> &'static str {
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>arc-worker</title>\
         <style>:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;margin:2rem}</style>\
         <h1>arc-worker</h1><p><a href=\"/status\">status</a> · <a href=\"/metrics\">metrics</a> · \
         <a href=\"/readyz\">ready</a></p><p>The job's live page is that of shard 0.</p></html>"
    }
}

/// Takes `address` and serves `pages` on a thread of its own until the process ends. Returns the bound address.
pub(super) fn serve(address: SocketAddr, pages: Arc<Pages>) -> Result<SocketAddr, CliError> {
    let system = |action| move |source| CliError::System { action, source };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(system("start the runtime"))?;
    let listener = runtime.block_on(admin::bind(address))?;
    let bound = listener
        .local_addr()
        .map_err(system("read the admin address"))?;
    let work = move || {
        if let Err(error) = runtime.block_on(admin::serve(listener, pages, std::future::pending()))
        {
            tracing::warn!(%error, "the admin pages ended");
        }
    };
    std::thread::Builder::new()
        .name("arc-admin".into())
        .spawn(work)
        .map_err(system("start a thread"))?;
    Ok(bound)
}
