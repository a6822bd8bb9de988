//! What a shard measures.

use super::*;

/// Metrics of a shard.
#[derive(Debug)]
pub struct ShardMetrics {
    registry: Registry,
    shared: Shared,
    dense_equivalent_bytes: IntCounterVec,
    rounds: IntCounterVec,
    round_seconds: Histogram,
    aggregate_seconds: Histogram,
    open_rounds: IntGauge,
    parked_bytes: IntGauge,
    members: IntGauge,
    world: IntGauge,
    epoch: IntGauge,
    lost_workers: IntCounter,
    refusals: IntCounterVec,
    failed_handshakes: IntCounter,
    certificate_expiry: IntGauge,
    certificate_renewals: IntCounterVec,
    straggler_wait_seconds: prometheus::CounterVec,
}

shared_methods!(ShardMetrics, Flow::Down, Flow::Up);

impl Default for ShardMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl ShardMetrics {
    /// Registers all metrics of a shard.
    #[must_use]
    pub fn new() -> Self {
        let r = Register(Registry::new());
        let metrics = Self {
            shared: Shared::new(&r, "shard"),
            dense_equivalent_bytes: r.counters(
                "arc_dense_equivalent_bytes_total",
                "Bytes that dense f32 would have exchanged for the same rounds, by direction",
                &["direction"],
            ),
            rounds: r.counters(
                "arc_rounds_total",
                "Rounds closed, by outcome",
                &["outcome"],
            ),
            round_seconds: r.histogram(
                "arc_round_seconds",
                "Time from a round's first frame to its last answer",
                ROUND_SECONDS,
            ),
            aggregate_seconds: r.histogram(
                "arc_aggregate_seconds",
                "Time spent decoding, summing and encoding for one frame",
                ROUND_SECONDS,
            ),
            open_rounds: r.count("arc_open_rounds", "Rounds that wait for contributions"),
            parked_bytes: r.count(
                "arc_parked_bytes",
                "Contributions that arrived before those of lower ranks, held until their turn",
            ),
            members: r.count("arc_members", "Live workers"),
            world: r.count("arc_world_size", "Workers that the job started with"),
            epoch: r.count("arc_epoch", "Version of the membership"),
            lost_workers: r.counter(
                "arc_lost_workers_total",
                "Workers that vanished or were removed",
            ),
            refusals: r.counters("arc_refusals_total", "Peers refused, by code", &["code"]),
            failed_handshakes: r.counter(
                "arc_failed_handshakes_total",
                "Connections that ended in the TLS handshake: wrong certificate, authority or protocol",
            ),
            certificate_expiry: r.count(
                "arc_certificate_expiry_timestamp_seconds",
                "End of the validity of the certificate shown to workers, Unix time",
            ),
            certificate_renewals: r.counters(
                "arc_certificate_renewals_total",
                "Changes of the certificate files while the shard runs, by outcome",
                &["outcome"],
            ),
            straggler_wait_seconds: r.add(prometheus::CounterVec::new(
                Opts::new(
                    "arc_straggler_wait_seconds_total",
                    "Time the others waited for a worker that came last, by its rank",
                ),
                &["rank"],
            )),
            registry: r.0,
        };
        RoundOutcome::ALL
            .iter()
            .for_each(|outcome| drop(metrics.rounds.with_label_values(&[outcome.label()])));
        CertificateRenewal::ALL.iter().for_each(|outcome| {
            drop(
                metrics
                    .certificate_renewals
                    .with_label_values(&[outcome.label()]),
            )
        });
        Flow::ALL.iter().for_each(|flow| {
            drop(
                metrics
                    .dense_equivalent_bytes
                    .with_label_values(&[flow.label()]),
            )
        });
        metrics
    }

    /// A round closed, `seconds` after its first frame.
    pub fn round_closed(&self, outcome: RoundOutcome, seconds: f64) {
        self.rounds.with_label_values(&[outcome.label()]).inc();
        self.round_seconds.observe(seconds);
    }

    /// Bytes that dense f32 would have exchanged.
    pub fn add_dense_equivalent(&self, flow: Flow, bytes: u64) {
        self.dense_equivalent_bytes
            .with_label_values(&[flow.label()])
            .inc_by(bytes);
    }

    /// A frame was aggregated.
    pub fn aggregated(&self, seconds: f64) {
        self.aggregate_seconds.observe(seconds);
    }

    /// Rounds open now, and bytes that they park.
    pub fn set_open_rounds(&self, rounds: usize, parked_bytes: usize) {
        self.open_rounds.set(rounds as i64);
        self.parked_bytes.set(parked_bytes as i64);
    }

    /// Who is there now.
    pub fn set_members(&self, members: u16, world: u16, epoch: u32) {
        self.members.set(i64::from(members));
        self.world.set(i64::from(world));
        self.epoch.set(i64::from(epoch));
    }

    /// A worker vanished or was removed.
    pub fn worker_lost(&self) {
        self.lost_workers.inc();
    }

    /// A peer was refused.
    pub fn refused(&self, code: crate::wire::RefusalCode) {
        self.refusals.with_label_values(&[code.label()]).inc();
    }

    /// A connection ended in its handshake.
    pub fn handshake_failed(&self) {
        self.failed_handshakes.inc();
    }

    /// The certificate in use ends at this Unix time, seconds.
    pub fn set_certificate_expiry(&self, timestamp: u64) {
        self.certificate_expiry
            .set(i64::try_from(timestamp).unwrap_or(i64::MAX));
    }

    /// The certificate files were changed.
    pub fn certificate_renewed(&self, outcome: CertificateRenewal) {
        self.certificate_renewals
            .with_label_values(&[outcome.label()])
            .inc();
    }

    /// The others waited for `rank`.
    pub fn waited(&self, rank: u16, seconds: f64) {
        self.straggler_wait_seconds
            .with_label_values(&[&peer_label(rank)])
            .inc_by(seconds.max(0.0));
    }
}
