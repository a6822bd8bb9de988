//! Observations become metrics and log lines.

use super::Hub;
use crate::shard::{Action, Observation, Outcome, RoundClosed, Shard, Traffic};
use arc_topk_common::metrics::{ConnectionFigures, Flow, RoundOutcome, Traffic as Kind};
use arc_topk_common::wire::{Control, FrameKind, HEADER_BYTES, RefusalCode};
use arc_topk_transport::summary;

pub(super) fn changes_membership(action: &Action) -> bool {
    matches!(
        action,
        Action::Observe(
            Observation::Joined { .. }
                | Observation::Started { .. }
                | Observation::Away { .. }
                | Observation::Returned { .. }
                | Observation::JoinedLater { .. }
                | Observation::Recovered { .. }
                | Observation::Left { .. }
                | Observation::Lost { .. }
                | Observation::Emptied
        )
    )
}

/// Gauges of the machine's state.
pub(super) fn load(hub: &Hub, shard: &Shard) {
    let load = shard.load();
    hub.metrics
        .set_members(load.members, shard.config().world, load.epoch.0);
    hub.metrics
        .set_open_rounds(load.open_rounds, load.parked_bytes);
    hub.metrics.set_retained(load.retained_bytes);
    hub.metrics.set_away(load.away);
    if let Some((step, loss)) = load.training {
        hub.metrics.set_training(step.0, loss);
    }
}

/// Figures of every connection whose rank is known.
pub(super) fn connections(hub: &Hub) {
    for session in &hub.sessions {
        let Some(rank) = session.rank() else {
            continue;
        };
        let now = summary(&session.connection);
        let figures = ConnectionFigures {
            round_trip_seconds: now.rtt.as_secs_f64(),
            congestion_window_bytes: now.congestion_window_bytes,
            lost_packets: now.lost_packets,
            sent_bytes: now.sent_bytes,
            received_bytes: now.received_bytes,
        };
        hub.metrics.observe_connection(rank.0, figures);
    }
}

pub(super) fn observation(hub: &Hub, observation: &Observation) {
    match observation {
        Observation::Joined {
            host, rank, joined, ..
        } => {
            tracing::info!(host, rank = rank.map(|r| r.0), joined, "a worker joined");
        }
        Observation::Started { epoch, world, step } => {
            hub.metrics.expect_ranks(*world);
            tracing::info!(%epoch, world, %step, "all workers are here: the job starts");
        }
        Observation::Left { rank, remaining } => {
            tracing::info!(rank = rank.map(|r| r.0), remaining, "a worker left");
        }
        Observation::Lost {
            rank,
            reason,
            remaining,
        } => {
            hub.metrics.worker_lost();
            tracing::warn!(
                rank = rank.map(|r| r.0),
                reason,
                remaining,
                "a worker was lost"
            );
        }
        Observation::Refused {
            session,
            code,
            detail,
        } => {
            hub.metrics.refused(*code);
            if *code == RefusalCode::Superseded {
                hub.metrics.worker_superseded();
            }
            tracing::warn!(session = session.0, ?code, detail, "a peer was refused");
        }
        Observation::RoundClosed(round) => round_closed(hub, round),
        Observation::Waited { rank, seconds } => hub.metrics.waited(rank.0, *seconds),
        Observation::Reported { rank, report } => {
            hub.metrics
                .set_compression(None, None, Some(f64::from(report.residual_ratio)));
            tracing::debug!(%rank, step = %report.step, loss = report.loss, "a worker reported");
        }
        Observation::Away { rank, reason } => {
            tracing::warn!(%rank, reason, "a worker is away");
        }
        Observation::Returned { rank, seconds } => {
            hub.metrics.worker_returned();
            tracing::info!(%rank, seconds, "a worker is back");
        }
        Observation::JoinedLater { rank, step } => {
            hub.metrics.worker_joined();
            tracing::info!(%rank, %step, "a worker joins with a snapshot");
        }
        Observation::Recovering { members } => {
            tracing::info!(members, "a job is under way: its workers tell where it is");
        }
        Observation::Recovered {
            step,
            told,
            members,
            adopted,
            seconds,
        } => {
            hub.metrics.recovered(*seconds);
            tracing::info!(%step, told, members, adopted, seconds, "the job goes on");
        }
        Observation::Adopted { rank, step, bucket } => {
            hub.metrics.result_adopted();
            tracing::debug!(%rank, %step, %bucket, "took over an answer that a worker held");
        }
        Observation::Late { rank, seconds } => {
            hub.metrics.late(rank.0, *seconds);
            tracing::debug!(%rank, seconds, "a contribution came after its phase had closed");
        }
        Observation::Straggling { rank, persistent } => {
            hub.metrics.set_persistent_straggler(rank.0, *persistent);
            tracing::warn!(%rank, persistent, "a worker is late most of the time, or no longer");
        }
        Observation::DigestsDiffer { step, ranks } => {
            hub.metrics.digests_differ();
            tracing::error!(%step, ?ranks, "the parameters of workers are not the same");
        }
        Observation::Emptied => {
            tracing::info!("nobody is left: ready for another start of the job")
        }
    }
}

fn round_closed(hub: &Hub, round: &RoundClosed) {
    let outcome = match round.outcome {
        Outcome::Complete => RoundOutcome::Complete,
        Outcome::Partial => RoundOutcome::Partial,
        Outcome::NonFinite => RoundOutcome::NonFinite,
        Outcome::Abandoned => RoundOutcome::Abandoned,
    };
    hub.metrics.round_closed(outcome, round.seconds);
    add(hub, round.received, Flow::Up);
    add(hub, round.sent, Flow::Down);
    hub.metrics
        .add_dense_equivalent(Flow::Up, round.dense_equivalent_bytes);
    hub.metrics
        .add_dense_equivalent(Flow::Down, round.dense_equivalent_bytes);
    hub.metrics.set_compression(
        round.density.map(f64::from),
        round.captured_energy.map(f64::from),
        None,
    );
    tracing::debug!(step = %round.step, bucket = %round.bucket, outcome = round.outcome.label(), contributors = round.contributors, seconds = round.seconds, "a round closed");
}

/// A frame's header came or went.
pub(super) fn header(hub: &Hub, flow: Flow) {
    hub.metrics
        .add_bytes(Kind::Control, flow, HEADER_BYTES as u64);
}

/// A control message came or went.
pub(super) fn control(hub: &Hub, flow: Flow, message: &Control) {
    hub.metrics
        .add_bytes(Kind::Control, flow, message.framed_bytes());
}

fn add(hub: &Hub, traffic: Traffic, flow: Flow) {
    let kinds = [
        (FrameKind::Sketch, traffic.sketch),
        (FrameKind::Selection, traffic.selection),
        (FrameKind::Values, traffic.values),
        (FrameKind::Dense, traffic.dense),
    ];
    for (kind, bytes) in kinds {
        hub.metrics.add_bytes(Kind::of(kind), flow, bytes);
    }
}
