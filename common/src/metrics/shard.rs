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
    retained_bytes: IntGauge,
    members_away: IntGauge,
    members: IntGauge,
    world: IntGauge,
    shards: IntGauge,
    epoch: IntGauge,
    lost_workers: IntCounter,
    refusals: IntCounterVec,
    failed_handshakes: IntCounter,
    certificate_expiry: IntGauge,
    certificate_renewals: IntCounterVec,
    straggler_wait_seconds: prometheus::CounterVec,
    late_contributions: IntCounterVec,
    lateness_seconds: Histogram,
    persistent_straggler: GaugeVec,
    recoveries: IntCounter,
    recovery_seconds: Histogram,
    adopted_results: IntCounter,
    returned_workers: IntCounter,
    joined_workers: IntCounter,
    superseded_workers: IntCounter,
    digest_mismatches: IntCounter,
    snapshots: IntGauge,
    snapshot_bytes: IntGauge,
    snapshot_requests: IntCounterVec,
    snapshot_transfer_bytes: IntCounterVec,
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
            retained_bytes: r.count(
                "arc_retained_bytes",
                "Answers of closed rounds that are kept for workers that come late",
            ),
            members_away: r.count(
                "arc_members_away",
                "Members whose connection is lost and who may come back",
            ),
            members: r.count("arc_members", "Live workers"),
            world: r.count("arc_world_size", "Workers that the job started with"),
            shards: r.count("arc_shards", "Shards that the job has, as this one was told"),
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
            late_contributions: r.counters(
                "arc_late_contributions_total",
                "Contributions to rounds that had closed without them, by rank",
                &["rank"],
            ),
            lateness_seconds: r.histogram(
                "arc_lateness_seconds",
                "Time by which a contribution came after its round had closed without it",
                LONG_SECONDS,
            ),
            persistent_straggler: r.gauges(
                "arc_persistent_straggler",
                "1 for each rank that was late in most of its latest rounds",
                &["rank"],
            ),
            recoveries: r.counter(
                "arc_recoveries_total",
                "Times that workers told this shard of a job that was running before it started",
            ),
            recovery_seconds: r.histogram(
                "arc_recovery_seconds",
                "Time from the first worker that told of a running job until rounds could be formed again",
                LONG_SECONDS,
            ),
            adopted_results: r.counter(
                "arc_adopted_results_total",
                "Results that this shard took from workers that held them, in place of forming them again",
            ),
            returned_workers: r.counter(
                "arc_returned_workers_total",
                "Workers that came back after their connection was lost",
            ),
            joined_workers: r.counter(
                "arc_joined_workers_total",
                "Workers that joined while the job was running",
            ),
            superseded_workers: r.counter(
                "arc_superseded_workers_total",
                "Workers that were told to join again, since the job had gone on without them",
            ),
            digest_mismatches: r.counter(
                "arc_digest_mismatches_total",
                "Comparisons in which the workers' parameters were not all the same",
            ),
            snapshots: r.count("arc_snapshots", "Snapshots of which this shard holds pieces"),
            snapshot_bytes: r.count("arc_snapshot_bytes", "Bytes of snapshots that this shard holds"),
            snapshot_requests: r.counters(
                "arc_snapshot_requests_total",
                "Requests to the snapshot store, by kind and outcome",
                &["request", "outcome"],
            ),
            snapshot_transfer_bytes: r.counters(
                "arc_snapshot_transfer_bytes_total",
                "Bytes of snapshots that came (up) and went (down)",
                &["direction"],
            ),
            registry: r.0,
        };
        // A counter that appears with its first event has not grown, as Prometheus sees it.
        for code in crate::wire::RefusalCode::ALL {
            drop(metrics.refusals.with_label_values(&[code.label()]));
        }
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
            );
            drop(
                metrics
                    .snapshot_transfer_bytes
                    .with_label_values(&[flow.label()]),
            );
        });
        for request in StoreRequestKind::ALL {
            for outcome in StoreOutcome::ALL {
                drop(
                    metrics
                        .snapshot_requests
                        .with_label_values(&[request.label(), outcome.label()]),
                );
            }
        }
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

    /// Bytes of answers that are kept.
    pub fn set_retained(&self, bytes: usize) {
        self.retained_bytes.set(bytes as i64);
    }

    /// Members that are not connected.
    pub fn set_away(&self, members: u16) {
        self.members_away.set(i64::from(members));
    }

    /// Who is there now.
    pub fn set_members(&self, members: u16, world: u16, epoch: u32) {
        self.members.set(i64::from(members));
        self.world.set(i64::from(world));
        self.epoch.set(i64::from(epoch));
    }

    /// A job starts with the ranks below `world`, of which nothing has been counted yet.
    pub fn expect_ranks(&self, world: u16) {
        for rank in 0..world {
            let label = peer_label(rank);
            drop(self.late_contributions.with_label_values(&[&label]));
            drop(self.straggler_wait_seconds.with_label_values(&[&label]));
        }
    }

    /// How many shards the job has.
    pub fn set_shards(&self, shards: u16) {
        self.shards.set(i64::from(shards));
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

    /// A contribution of `rank` came `seconds` after its round had closed without it.
    pub fn late(&self, rank: u16, seconds: f64) {
        self.late_contributions
            .with_label_values(&[&peer_label(rank)])
            .inc();
        self.lateness_seconds.observe(seconds.max(0.0));
    }

    /// Whether `rank` was late in most of its latest rounds. Say false, too, when it is gone.
    pub fn set_persistent_straggler(&self, rank: u16, persistent: bool) {
        let label = peer_label(rank);
        if persistent {
            self.persistent_straggler
                .with_label_values(&[&label])
                .set(1.0);
        } else {
            // One that never was has no label to remove.
            let _ = self.persistent_straggler.remove_label_values(&[&label]);
        }
    }

    /// This shard knows again what workers told it of a running job, `seconds` after the first did.
    pub fn recovered(&self, seconds: f64) {
        self.recoveries.inc();
        self.recovery_seconds.observe(seconds.max(0.0));
    }

    /// A result was taken from a worker that held it.
    pub fn result_adopted(&self) {
        self.adopted_results.inc();
    }

    /// A worker came back.
    pub fn worker_returned(&self) {
        self.returned_workers.inc();
    }

    /// A worker joined while the job was running.
    pub fn worker_joined(&self) {
        self.joined_workers.inc();
    }

    /// A worker was told to join again.
    pub fn worker_superseded(&self) {
        self.superseded_workers.inc();
    }

    /// The workers' parameters were not all the same.
    pub fn digests_differ(&self) {
        self.digest_mismatches.inc();
    }

    /// Snapshots held now, and their bytes.
    pub fn set_snapshots(&self, snapshots: usize, bytes: u64) {
        self.snapshots.set(snapshots as i64);
        self.snapshot_bytes
            .set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    /// A request to the snapshot store ended.
    pub fn store_request(&self, request: StoreRequestKind, outcome: StoreOutcome) {
        self.snapshot_requests
            .with_label_values(&[request.label(), outcome.label()])
            .inc();
    }

    /// Bytes of snapshots came or went.
    pub fn add_store_bytes(&self, flow: Flow, bytes: u64) {
        self.snapshot_transfer_bytes
            .with_label_values(&[flow.label()])
            .inc_by(bytes);
    }
}
