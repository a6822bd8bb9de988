//! What a worker measures.

use super::*;

/// Metrics of a worker.
#[derive(Debug)]
pub struct WorkerMetrics {
    registry: Registry,
    shared: Shared,
    dense_equivalent_bytes: IntCounterVec,
    steps: IntCounterVec,
    step_seconds: Histogram,
    phase_seconds: HistogramVec,
    validation_loss: Gauge,
    gradient_norm: Gauge,
    learning_rate: Gauge,
    device_seconds: prometheus::CounterVec,
    device_copied_bytes: IntCounterVec,
    device_memory_bytes: IntGaugeVec,
    tokens: IntCounter,
    members: IntGauge,
    reconnects: IntCounterVec,
    away_seconds: prometheus::CounterVec,
    joins: IntCounter,
    superseded: IntCounter,
    behind_steps: IntCounter,
    late_contributions: IntCounter,
    digest_mismatches: IntCounter,
    certificate_expiry: IntGaugeVec,
    snapshots: IntCounterVec,
    snapshot_bytes: IntCounter,
    snapshot_seconds: Histogram,
}

shared_methods!(WorkerMetrics, Flow::Up, Flow::Down);

impl Default for WorkerMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl WorkerMetrics {
    /// Registers all metrics of a worker.
    #[must_use]
    pub fn new() -> Self {
        let r = Register(Registry::new());
        let metrics = Self {
            shared: Shared::new(&r, "worker"),
            dense_equivalent_bytes: r.counters(
                "arc_dense_equivalent_bytes_total",
                "Bytes that dense f32 would have exchanged for the same steps, by direction",
                &["direction"],
            ),
            steps: r.counters("arc_steps_total", "Steps ended, by outcome", &["outcome"]),
            step_seconds: r.histogram("arc_step_seconds", "Time of a whole step", STEP_SECONDS),
            phase_seconds: r.histograms(
                "arc_step_phase_seconds",
                "Time of a step's phases",
                STEP_SECONDS,
                &["phase"],
            ),
            validation_loss: r.gauge("arc_validation_loss", "Latest validation loss"),
            gradient_norm: r.gauge(
                "arc_gradient_norm",
                "Norm of this worker's gradient, latest measurement",
            ),
            learning_rate: r.gauge("arc_learning_rate", "Learning rate of the latest step"),
            device_seconds: r.add(prometheus::CounterVec::new(
                Opts::new(
                    "arc_device_seconds_total",
                    "Time that this worker's GPU spent on compression, by kernel",
                ),
                &["kernel"],
            )),
            device_copied_bytes: r.counters(
                "arc_device_copied_bytes_total",
                "Bytes copied over the bus of this worker's GPU, by direction",
                &["direction"],
            ),
            device_memory_bytes: r.add(IntGaugeVec::new(
                Opts::new(
                    "arc_device_memory_bytes",
                    "Memory that compression holds on this worker's GPU, by use",
                ),
                &["use"],
            )),
            tokens: r.counter(
                "arc_samples_total",
                "Tokens or images that this worker has trained on",
            ),
            members: r.count("arc_members", "Workers in the job, those that are away for a moment included"),
            reconnects: r.counters(
                "arc_reconnects_total",
                "Connections to a shard that were lost and are back, by shard",
                &["shard"],
            ),
            away_seconds: r.add(prometheus::CounterVec::new(
                Opts::new(
                    "arc_shard_away_seconds_total",
                    "Time without a connection to a shard, from its loss to its return, by shard",
                ),
                &["shard"],
            )),
            joins: r.counter(
                "arc_joins_total",
                "Times that this worker joined a job that was running already",
            ),
            superseded: r.counter(
                "arc_superseded_total",
                "Times that the job went on without this worker for too long, so that it had to join again",
            ),
            behind_steps: r.counter(
                "arc_behind_steps_total",
                "Steps that had closed without this worker and whose results it replayed",
            ),
            late_contributions: r.counter(
                "arc_uncounted_steps_total",
                "Steps in which some of this worker's contributions came too late to be counted; they stay in its residual",
            ),
            digest_mismatches: r.counter(
                "arc_digest_mismatches_total",
                "Comparisons in which the workers' parameters were not all the same",
            ),
            // Without labels, and not there before it is set: training without shards has no certificate.
            certificate_expiry: r.add(IntGaugeVec::new(
                Opts::new(
                    "arc_certificate_expiry_timestamp_seconds",
                    "End of the validity of the certificate shown to shards, Unix time",
                ),
                &[],
            )),
            snapshots: r.counters("arc_snapshots_total", "Snapshots that were due, by outcome", &["outcome"]),
            snapshot_bytes: r.counter(
                "arc_snapshot_uploaded_bytes_total",
                "Bytes of snapshots that this worker put into the shards' store",
            ),
            snapshot_seconds: r.histogram(
                "arc_snapshot_upload_seconds",
                "Time of a snapshot's upload, which runs beside training",
                LONG_SECONDS,
            ),
            registry: r.0,
        };
        SnapshotEnd::ALL
            .iter()
            .for_each(|end| drop(metrics.snapshots.with_label_values(&[end.label()])));
        StepEnd::ALL
            .iter()
            .for_each(|end| drop(metrics.steps.with_label_values(&[end.label()])));
        StepPhase::ALL
            .iter()
            .for_each(|phase| drop(metrics.phase_seconds.with_label_values(&[phase.label()])));
        Flow::ALL.iter().for_each(|flow| {
            drop(
                metrics
                    .dense_equivalent_bytes
                    .with_label_values(&[flow.label()]),
            )
        });
        // Zeros on the CPU.
        for kernel in DeviceKernel::ALL {
            metrics.add_device_seconds(*kernel, 0.0);
        }
        for direction in DeviceCopy::ALL {
            metrics.add_device_copied(*direction, 0);
        }
        for held_for in DeviceMemory::ALL {
            metrics.set_device_memory(*held_for, 0);
        }
        metrics
    }

    /// The job has so many shards, of whose connections none has been lost yet.
    pub fn expect_shards(&self, shards: u16) {
        for shard in 0..shards {
            let label = peer_label(shard);
            drop(self.reconnects.with_label_values(&[&label]));
            drop(self.away_seconds.with_label_values(&[&label]));
        }
    }

    /// The certificate that new connections show ends at this Unix time, seconds.
    pub fn set_certificate_expiry(&self, timestamp: u64) {
        self.certificate_expiry
            .with_label_values(&[] as &[&str])
            .set(i64::try_from(timestamp).unwrap_or(i64::MAX));
    }

    /// A step ended after `seconds`; dense f32 would have sent, and received, `dense_equivalent_bytes`.
    pub fn step_ended(&self, end: StepEnd, seconds: f64, dense_equivalent_bytes: u64) {
        self.steps.with_label_values(&[end.label()]).inc();
        self.step_seconds.observe(seconds);
        Flow::ALL.iter().for_each(|flow| {
            self.dense_equivalent_bytes
                .with_label_values(&[flow.label()])
                .inc_by(dense_equivalent_bytes)
        });
    }

    /// A phase of a step took `seconds`.
    pub fn phase_ended(&self, phase: StepPhase, seconds: f64) {
        self.phase_seconds
            .with_label_values(&[phase.label()])
            .observe(seconds);
    }

    /// Latest validation loss.
    pub fn set_validation_loss(&self, loss: f64) {
        self.validation_loss.set(loss);
    }

    /// Latest learning rate.
    pub fn set_learning_rate(&self, rate: f64) {
        self.learning_rate.set(rate);
    }

    /// Norm of the gradient.
    pub fn set_gradient_norm(&self, norm: f64) {
        self.gradient_norm.set(norm);
    }

    /// This worker's GPU spent `seconds` more on a kernel.
    pub fn add_device_seconds(&self, kernel: DeviceKernel, seconds: f64) {
        self.device_seconds
            .with_label_values(&[kernel.label()])
            .inc_by(seconds.max(0.0));
    }

    /// So many bytes more went over the bus of this worker's GPU.
    pub fn add_device_copied(&self, direction: DeviceCopy, bytes: u64) {
        self.device_copied_bytes
            .with_label_values(&[direction.label()])
            .inc_by(bytes);
    }

    /// So many bytes of the GPU's memory are held.
    pub fn set_device_memory(&self, held_for: DeviceMemory, bytes: u64) {
        self.device_memory_bytes
            .with_label_values(&[held_for.label()])
            .set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// Workers in the job.
    pub fn set_members(&self, members: u16) {
        self.members.set(i64::from(members));
    }

    /// The connection to `shard` is back, `away_seconds` after it was lost.
    pub fn reconnected(&self, shard: u16, away_seconds: f64) {
        let label = peer_label(shard);
        self.reconnects.with_label_values(&[&label]).inc();
        self.away_seconds
            .with_label_values(&[&label])
            .inc_by(away_seconds.max(0.0));
    }

    /// This worker joined a job that was running already.
    pub fn joined_running_job(&self) {
        self.joins.inc();
    }

    /// The job went on without this worker for too long.
    pub fn superseded(&self) {
        self.superseded.inc();
    }

    /// A step had closed without this worker.
    pub fn behind(&self) {
        self.behind_steps.inc();
    }

    /// Some of a step's contributions came too late.
    pub fn uncounted(&self) {
        self.late_contributions.inc();
    }

    /// The workers' parameters were not all the same.
    pub fn digests_differ(&self) {
        self.digest_mismatches.inc();
    }

    /// What became of a snapshot that was due.
    pub fn snapshot_ended(&self, end: SnapshotEnd) {
        self.snapshots.with_label_values(&[end.label()]).inc();
    }

    /// A snapshot's part was stored.
    pub fn snapshot_uploaded(&self, bytes: u64, seconds: f64) {
        self.snapshot_bytes.inc_by(bytes);
        self.snapshot_seconds.observe(seconds);
    }

    /// Tokens or images of a step.
    pub fn add_samples(&self, samples: u64) {
        self.tokens.inc_by(samples);
    }
}
