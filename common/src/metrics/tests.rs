#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use prometheus::proto::MetricType;

/// Gauges that count or measure something without a unit.
const UNITLESS: [&str; 14] = [
    "arc_members_away",
    "arc_persistent_straggler",
    "arc_build_info",
    "arc_members",
    "arc_snapshots",
    "arc_world_size",
    "arc_shards",
    "arc_epoch",
    "arc_open_rounds",
    "arc_step",
    "arc_training_loss",
    "arc_validation_loss",
    "arc_gradient_norm",
    "arc_learning_rate",
];

fn exercised() -> [Registry; 2] {
    let figures = ConnectionFigures {
        round_trip_seconds: 0.01,
        congestion_window_bytes: 9,
        lost_packets: 1,
        sent_bytes: 5,
        received_bytes: 6,
    };
    let shard = ShardMetrics::new();
    shard.observe_connection(0, figures);
    shard.refused(crate::wire::RefusalCode::Plan);
    shard.waited(1, 0.5);
    shard.late(2, 0.25);
    shard.set_persistent_straggler(2, true);
    shard.recovered(0.5);
    let worker = WorkerMetrics::new();
    worker.observe_connection(0, figures);
    worker.reconnected(1, 0.5);
    worker.snapshot_uploaded(10, 0.5);
    worker.add_device_seconds(DeviceKernel::Sketch, 0.5);
    worker.add_device_copied(DeviceCopy::Out, 10);
    worker.set_device_memory(DeviceMemory::State, 10);
    [shard.registry().clone(), worker.registry().clone()]
}

#[test]
fn names_are_legal_and_every_metric_has_a_help_text() {
    for registry in exercised() {
        let families = registry.gather();
        assert!(families.len() > 15);
        for family in families {
            let name = family.name();
            assert!(
                name.starts_with("arc_")
                    && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{name}"
            );
            assert!(family.help().len() > 10, "{name} needs a help text");
            let unit = ["_seconds", "_bytes", "_ratio"]
                .iter()
                .any(|unit| name.ends_with(unit));
            match family.get_field_type() {
                MetricType::COUNTER => assert!(name.ends_with("_total"), "{name}"),
                MetricType::HISTOGRAM => assert!(unit, "{name}"),
                _ => assert!(unit || UNITLESS.contains(&name), "{name}"),
            }
        }
    }
}

#[test]
fn connection_counters_take_the_growth() {
    let metrics = WorkerMetrics::new();
    let lost = |lost_packets| ConnectionFigures {
        lost_packets,
        ..ConnectionFigures::default()
    };
    for packets in [3, 5, 2] {
        metrics.observe_connection(1, lost(packets));
    }
    assert!(
        metrics
            .text()
            .contains("arc_quic_lost_packets_total{peer=\"1\"} 7\n"),
        "3, 2 more, 2 of a new connection"
    );
    metrics.forget_connection(1);
    assert!(!metrics.text().contains("arc_quic_round_trip_seconds{"));
}

#[test]
fn what_has_not_happened_yet_is_counted_as_nothing() {
    let (shard, worker) = (ShardMetrics::new(), WorkerMetrics::new());
    shard.expect_ranks(2);
    worker.expect_shards(2);
    let text = shard.text() + &worker.text();
    for line in [
        "arc_refusals_total{code=\"plan\"} 0\n",
        "arc_late_contributions_total{rank=\"1\"} 0\n",
        "arc_straggler_wait_seconds_total{rank=\"0\"} 0\n",
        "arc_reconnects_total{shard=\"1\"} 0\n",
        "arc_shard_away_seconds_total{shard=\"0\"} 0\n",
    ] {
        assert!(text.contains(line), "{line}");
    }
}

#[test]
fn labels_are_bounded() {
    let metrics = ShardMetrics::new();
    (0..u16::MAX).step_by(7).for_each(|rank| {
        metrics.waited(rank, 1.0);
        metrics.late(rank, 1.0);
        metrics.set_persistent_straggler(rank, true);
    });
    let text = metrics.text();
    for name in [
        "arc_straggler_wait_seconds_total{",
        "arc_late_contributions_total{",
        "arc_persistent_straggler{",
    ] {
        let series = text.lines().filter(|line| line.starts_with(name)).count();
        assert!(
            (2..=usize::from(MAX_PEER_LABELS) + 1).contains(&series),
            "{name}"
        );
    }
}

#[test]
fn a_straggler_that_is_none_any_more_has_no_series() {
    let metrics = ShardMetrics::new();
    for rank in [3, 300, 400] {
        metrics.set_persistent_straggler(rank, true);
        metrics.late(rank, 1.0);
    }
    metrics.set_persistent_straggler(3, false);
    metrics.set_persistent_straggler(5, false);
    let text = metrics.text();
    assert!(text.contains("arc_persistent_straggler{rank=\"other\"} 1\n"));
    assert!(!text.contains("arc_persistent_straggler{rank=\"3\"}"));
    assert!(text.contains("arc_late_contributions_total{rank=\"other\"} 2\n"));
}

#[test]
fn measurements_that_are_missing_keep_the_value_before() {
    let metrics = WorkerMetrics::new();
    metrics.set_compression(Some(0.2), Some(0.7), None);
    metrics.set_compression(Some(0.1), Some(f64::NAN), Some(2.0));
    let text = metrics.text();
    for line in [
        "arc_density_ratio 0.1",
        "arc_captured_energy_ratio 0.7",
        "arc_residual_gradient_ratio 2",
    ] {
        assert!(text.contains(&format!("{line}\n")), "{line}");
    }
}

#[test]
fn bytes_are_told_apart_from_the_start() {
    let metrics = ShardMetrics::new();
    metrics.add_bytes(Traffic::of(FrameKind::Mean), Flow::Down, 12);
    let text = metrics.text();
    assert!(
        text.contains("arc_communication_bytes_total{direction=\"down\",kind=\"values\"} 12\n")
    );
    assert!(text.contains("arc_communication_bytes_total{direction=\"up\",kind=\"sketch\"} 0\n"));
    assert!(text.contains("arc_rounds_total{outcome=\"non_finite\"} 0\n"));
    assert!(text.contains("arc_certificate_renewals_total{outcome=\"refused\"} 0\n"));
    assert!(text.contains("arc_build_info{component=\"shard\",version="));
}

#[test]
fn a_worker_without_a_certificate_shows_no_end_of_it() {
    let metrics = WorkerMetrics::new();
    // A zero would be one that ended long ago.
    assert!(!metrics.text().contains("certificate_expiry"));
    metrics.set_certificate_expiry(1_800_000_000);
    let line = "arc_certificate_expiry_timestamp_seconds 1800000000\n";
    assert!(metrics.text().contains(line));
}

#[cfg(target_os = "linux")]
#[test]
fn a_process_shows_its_cpu_time_and_memory_once() {
    let metrics = WorkerMetrics::new();
    assert!(!metrics.text().contains("process_"));
    metrics.observe_process();
    metrics.observe_process();
    let text = metrics.text();
    for name in ["process_cpu_seconds_total", "process_resident_memory_bytes"] {
        let value = |line: &str| line.strip_prefix(name)?.trim().parse::<f64>().ok();
        let values: Vec<f64> = text.lines().filter_map(value).collect();
        assert_eq!(values.len(), 1, "{name}");
        assert!(values[0] >= 0.0, "{name}");
    }
    assert!(!text.contains("process_resident_memory_bytes 0\n"));
}
