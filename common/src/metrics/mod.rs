//! Every metric: its name, labels, help and buckets, in this one module.
//!
//! Names start with `arc_`, have base units (seconds, bytes, ratios) and end in `_total` if they only grow. Labels are
//! bounded: kinds, directions, phases and outcomes are enumerated here; ranks and shards at or above
//! [`MAX_PEER_LABELS`] share the label `other`. A process registers [`ShardMetrics`] or [`WorkerMetrics`] once and writes
//! them through typed methods; `text` is what `/metrics` answers.

mod shard;
#[cfg(test)]
mod tests;
mod worker;

pub use shard::ShardMetrics;
pub use worker::WorkerMetrics;

use crate::wire::FrameKind;
use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Peers (ranks, shards) that have a label of their own.
pub const MAX_PEER_LABELS: u16 = 256;
/// Media type of [`ShardMetrics::text`] and [`WorkerMetrics::text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Bucket bounds of steps and their phases, seconds: a laptop's milliseconds to a slow link's minutes.
const STEP_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0,
];
/// Bucket bounds of one round or one aggregation, seconds.
const ROUND_SECONDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// Bucket bounds of uploads, recoveries and lateness, seconds.
const LONG_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0, 600.0,
];

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            /// Every value of the label.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The label's value.
            #[must_use]
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label),* }
            }
        }
    };
}

labels!(
    /// What bytes are for (label `kind`).
    Traffic {
        /// Sketches.
        Sketch = "sketch",
        /// Chosen rows.
        Selection = "selection",
        /// Values of chosen rows.
        Values = "values",
        /// Dense tensors and dense rounds.
        Dense = "dense",
        /// Frame headers and control messages.
        Control = "control",
    }
);
labels!(
    /// Towards the shards or the workers (label `direction`).
    Flow {
        /// Worker → shard.
        Up = "up",
        /// Shard → worker.
        Down = "down",
    }
);
labels!(
    /// What a worker's GPU computes (label `kernel`).
    DeviceKernel {
        /// The pass over gradient and feedback state that sketches.
        Sketch = "sketch",
        /// Encoding of values.
        Gather = "gather",
        /// Feedback state and results at the end of a round.
        Commit = "commit",
        /// Energies of rows, in steps that measure.
        Energy = "energy",
    }
);
labels!(
    /// Over the bus of a worker's GPU (label `direction`).
    DeviceCopy {
        /// To the GPU's memory.
        In = "in",
        /// From it.
        Out = "out",
    }
);
labels!(
    /// What a GPU's memory is held for (label `use`).
    DeviceMemory {
        /// Feedback state.
        State = "state",
        /// Everything else: tables, sketches and frames.
        Scratch = "scratch",
    }
);
labels!(
    /// How a round ended (label `outcome`).
    RoundOutcome {
        /// With all workers of the start.
        Complete = "complete",
        /// Without some that were lost.
        Partial = "partial",
        /// A gradient or sum was not finite: all skip the update.
        NonFinite = "non_finite",
        /// Nobody was left to answer.
        Abandoned = "abandoned",
    }
);
labels!(
    /// What became of certificate files that were changed (label `outcome`).
    CertificateRenewal {
        /// New connections see them.
        Taken = "taken",
        /// They cannot be used; those from before stay in use.
        Refused = "refused",
    }
);
labels!(
    /// How a step ended (label `outcome`).
    StepEnd {
        /// The update was applied.
        Applied = "applied",
        /// Some worker's gradient was not finite.
        Skipped = "skipped",
    }
);
labels!(
    /// Parts of a step (label `phase`).
    StepPhase {
        /// Forward and backward.
        Compute = "compute",
        /// Sketches, gathering, scattering.
        Compress = "compress",
        /// Waiting for shards after the last gradient.
        Wait = "wait",
        /// The optimizer.
        Update = "update",
    }
);

labels!(
    /// What became of a snapshot that was due (label `outcome`).
    SnapshotEnd {
        /// All of this worker's parts are stored.
        Stored = "stored",
        /// The one before was not done.
        Skipped = "skipped",
        /// A shard's store could not be reached or refused it.
        Failed = "failed",
    }
);
labels!(
    /// What is asked of the snapshot store (label `request`).
    StoreRequestKind {
        /// Keep a piece.
        Put = "put",
        /// Send a piece.
        Get = "get",
        /// Say what there is.
        List = "list",
        /// Keep a snapshot.
        Commit = "commit",
        /// Nothing that could be read.
        Unreadable = "unreadable",
    }
);
labels!(
    /// How a request of the snapshot store ended (label `outcome`).
    StoreOutcome {
        /// As asked.
        Done = "done",
        /// It broke a rule or a limit.
        Refused = "refused",
        /// The disk failed, the bytes were not those announced, or the peer went.
        Failed = "failed",
    }
);

impl Traffic {
    /// Where a whole frame's body is counted, if its parts are not told apart.
    #[must_use]
    pub fn of(kind: FrameKind) -> Self {
        match kind {
            FrameKind::Sketch => Self::Sketch,
            FrameKind::Selection => Self::Selection,
            FrameKind::Values | FrameKind::Mean | FrameKind::Sparse | FrameKind::SparseMean => {
                Self::Values
            }
            FrameKind::Dense
            | FrameKind::DenseMean
            | FrameKind::Estimates
            | FrameKind::Restore
            | FrameKind::EstimatesMean => Self::Dense,
        }
    }
}

/// Registers metrics in a registry of their own.
struct Register(Registry);

impl Register {
    fn add<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> C {
        let metric = metric.expect("names, labels and buckets in this module are legal");
        self.0
            .register(Box::new(metric.clone()))
            .expect("names in this module are distinct");
        metric
    }
    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }
    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }
    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::new(name, help))
    }
    fn count(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }
    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.add(GaugeVec::new(Opts::new(name, help), labels))
    }
    fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(
            HistogramOpts::new(name, help).buckets(bounds.to_vec()),
        ))
    }
    fn histograms(&self, name: &str, help: &str, bounds: &[f64], labels: &[&str]) -> HistogramVec {
        self.add(HistogramVec::new(
            HistogramOpts::new(name, help).buckets(bounds.to_vec()),
            labels,
        ))
    }
}

fn peer_label(peer: u16) -> String {
    if peer < MAX_PEER_LABELS {
        peer.to_string()
    } else {
        "other".to_owned()
    }
}

fn text(registry: &Registry) -> String {
    // Encoding fails only for families without metrics, which gather leaves out.
    TextEncoder::new()
        .encode_to_string(&registry.gather())
        .unwrap_or_default()
}

#[cfg(target_os = "linux")]
fn observe_process(registry: &Registry) {
    let collector = prometheus::process_collector::ProcessCollector::for_self();
    // It is there already if this was called before.
    let _known = registry.register(Box::new(collector));
}

#[cfg(not(target_os = "linux"))]
fn observe_process(_registry: &Registry) {}

/// Metrics that shards and workers have in common.
#[derive(Debug)]
struct Shared {
    bytes: IntCounterVec,
    round_trip_seconds: GaugeVec,
    congestion_window_bytes: GaugeVec,
    lost_packets: IntCounterVec,
    udp_bytes: IntCounterVec,
    captured_energy_ratio: Gauge,
    density_ratio: Gauge,
    residual_ratio: Gauge,
    training_loss: Gauge,
    step: IntGauge,
    /// Cumulative figures of each peer's connection, of which counters take the growth.
    connections: Mutex<HashMap<u16, ConnectionFigures>>,
}

/// State of a QUIC connection, as its transport counts it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct ConnectionFigures {
    /// Smoothed round trip, seconds.
    pub round_trip_seconds: f64,
    /// Congestion window, bytes.
    pub congestion_window_bytes: u64,
    /// Packets lost since the connection began.
    pub lost_packets: u64,
    /// UDP payload bytes sent since the connection began.
    pub sent_bytes: u64,
    /// UDP payload bytes received since the connection began.
    pub received_bytes: u64,
}

impl Shared {
    fn new(r: &Register, component: &str) -> Self {
        r.gauges(
            "arc_build_info",
            "Always 1; version and component of this process",
            &["version", "component"],
        )
        .with_label_values(&[env!("CARGO_PKG_VERSION"), component])
        .set(1.0);
        let shared = Self {
            bytes: r.counters(
                "arc_communication_bytes_total",
                "Payload bytes exchanged, by kind and direction (up: worker to shard)",
                &["kind", "direction"],
            ),
            round_trip_seconds: r.gauges("arc_quic_round_trip_seconds", "Smoothed QUIC round trip to a peer", &["peer"]),
            congestion_window_bytes: r.gauges("arc_quic_congestion_window_bytes", "QUIC congestion window towards a peer", &["peer"]),
            lost_packets: r.counters("arc_quic_lost_packets_total", "QUIC packets to a peer that were counted as lost", &["peer"]),
            udp_bytes: r.counters(
                "arc_quic_udp_bytes_total",
                "UDP payload bytes of all connections, retransmissions and overhead included (up: worker to shard)",
                &["direction"],
            ),
            captured_energy_ratio: r.gauge(
                "arc_captured_energy_ratio",
                "Share of the energy (squared norm) that the chosen rows hold in the latest sparse step (shards: round), 0 to 1",
            ),
            density_ratio: r.gauge("arc_density_ratio", "Share of the compressible elements that travelled in the latest step (shards: round), 0 to 1"),
            residual_ratio: r.gauge(
                "arc_residual_gradient_ratio",
                "Norm of what feedback holds back over the norm of the gradient, latest measurement",
            ),
            training_loss: r.gauge("arc_training_loss", "Training loss of the latest step (shards: mean of the workers' latest finite reports)"),
            step: r.count("arc_step", "Number of the latest step"),
            connections: Mutex::default(),
        };
        for kind in Traffic::ALL {
            for flow in Flow::ALL {
                shared
                    .bytes
                    .with_label_values(&[kind.label(), flow.label()]);
            }
        }
        Flow::ALL
            .iter()
            .for_each(|flow| drop(shared.udp_bytes.with_label_values(&[flow.label()])));
        shared
    }

    fn observe_connection(&self, peer: u16, now: ConnectionFigures, sends: Flow, receives: Flow) {
        let mut connections = self
            .connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = connections.insert(peer, now).unwrap_or_default();
        // A smaller count means a new connection, which began at zero.
        let growth = |now: u64, before: u64| if now < before { now } else { now - before };
        let label = peer_label(peer);
        self.round_trip_seconds
            .with_label_values(&[&label])
            .set(now.round_trip_seconds);
        self.congestion_window_bytes
            .with_label_values(&[&label])
            .set(now.congestion_window_bytes as f64);
        self.lost_packets
            .with_label_values(&[&label])
            .inc_by(growth(now.lost_packets, before.lost_packets));
        self.udp_bytes
            .with_label_values(&[sends.label()])
            .inc_by(growth(now.sent_bytes, before.sent_bytes));
        self.udp_bytes
            .with_label_values(&[receives.label()])
            .inc_by(growth(now.received_bytes, before.received_bytes));
    }

    fn forget_connection(&self, peer: u16) {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&peer);
        if peer < MAX_PEER_LABELS {
            // Absent labels are not an error: the peer may never have been measured.
            let _ = self
                .round_trip_seconds
                .remove_label_values(&[&peer_label(peer)]);
            let _ = self
                .congestion_window_bytes
                .remove_label_values(&[&peer_label(peer)]);
        }
    }

    fn set_training(&self, step: u64, loss: f64) {
        self.step.set(i64::try_from(step).unwrap_or(i64::MAX));
        self.training_loss.set(loss);
    }

    fn set_compression(
        &self,
        density: Option<f64>,
        captured_energy: Option<f64>,
        residual_ratio: Option<f64>,
    ) {
        let set = |gauge: &Gauge, value: Option<f64>| {
            if let Some(value) = value.filter(|v| v.is_finite()) {
                gauge.set(value);
            }
        };
        set(&self.density_ratio, density);
        set(&self.captured_energy_ratio, captured_energy);
        set(&self.residual_ratio, residual_ratio);
    }
}

macro_rules! shared_methods {
    ($metrics:ident, $sends:expr, $receives:expr) => {
        impl $metrics {
            /// All metrics in Prometheus' text form.
            #[must_use]
            pub fn text(&self) -> String {
                text(&self.registry)
            }

            /// The registry, for exporters of another kind.
            #[must_use]
            pub fn registry(&self) -> &Registry {
                &self.registry
            }

            /// Adds CPU time, memory and the like of this process under the names that all Prometheus clients use for them
            /// (`process_…`; on Linux). For the metrics of a whole process, once.
            pub fn observe_process(&self) {
                observe_process(&self.registry);
            }

            /// Payload bytes sent or received.
            pub fn add_bytes(&self, kind: Traffic, flow: Flow, bytes: u64) {
                self.shared
                    .bytes
                    .with_label_values(&[kind.label(), flow.label()])
                    .inc_by(bytes);
            }

            /// Cumulative figures of the connection to a peer (rank or shard); call it now and then.
            pub fn observe_connection(&self, peer: u16, figures: ConnectionFigures) {
                self.shared
                    .observe_connection(peer, figures, $sends, $receives);
            }

            /// The connection to a peer has ended.
            pub fn forget_connection(&self, peer: u16) {
                self.shared.forget_connection(peer);
            }

            /// Latest step and its training loss.
            pub fn set_training(&self, step: u64, loss: f64) {
                self.shared.set_training(step, loss);
            }

            /// Latest measurements of compression; `None` and NaN keep the value before.
            pub fn set_compression(
                &self,
                density: Option<f64>,
                captured_energy: Option<f64>,
                residual_ratio: Option<f64>,
            ) {
                self.shared
                    .set_compression(density, captured_energy, residual_ratio);
            }
        }
    };
}

use shared_methods;
