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
    tokens: IntCounter,
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
            tokens: r.counter(
                "arc_samples_total",
                "Tokens or images that this worker has trained on",
            ),
            registry: r.0,
        };
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
        metrics
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

    /// Tokens or images of a step.
    pub fn add_samples(&self, samples: u64) {
        self.tokens.inc_by(samples);
    }
}
