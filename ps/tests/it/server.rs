//! The shell over real QUIC on loopback: rounds, bad peers, admin pages, shutdown.

use crate::net::{
    PATIENCE, Worker, answer, certs, header, hello, join, options, quick, running, running_with,
    shows,
};
use arc_topk_common::ids::{Epoch, Rank, Step};
use arc_topk_common::wire::{Control, FrameKind, HEADER_BYTES, Hello, Intent, RefusalCode};
use arc_topk_ps::server::{ServeError, ServeOptions, Server, Timeouts};
use arc_topk_ps::shard::Stage;
use arc_topk_transport::{
    ControlStream, SendStream, TransportConfig, TransportError, connect, write_frame,
};
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// Bytes of messages on a control stream.
fn framed(messages: &[Control]) -> usize {
    messages.iter().map(|m| 4 + m.encode().len()).sum()
}

#[tokio::test]
async fn headers_and_control_messages_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut workers) = running(dir.path(), 2).await;
    let mut flagged = header(0, 0);
    flagged.flags.non_finite = true;
    for (worker, header) in workers.iter().zip([flagged, header(0, 64)]) {
        let (mut send, mut recv) = worker.connection.open_bi().await.unwrap();
        let body = vec![0; header.body_bytes as usize];
        write_frame(&mut send, &header, body.into(), "shard")
            .await
            .unwrap();
        // The first waits for the second's.
        tokio::spawn(async move { answer(&mut recv).await });
        drop(send.finish());
    }
    let report = Control::Report {
        step: Step(0),
        loss: 1.0,
        step_seconds: 0.1,
        wait_seconds: 0.1,
        bytes_sent: 1,
        bytes_received: 1,
        bytes_dense_equivalent: 1,
        captured_energy: f32::NAN,
        residual_ratio: f32::NAN,
    };
    workers[0].control.send(&report).await.unwrap();
    let hello = Control::Hello(Box::new(hello()));
    let up = framed(&[hello.clone(), hello, report]) + 2 * HEADER_BYTES;
    let waiting = Control::Waiting {
        joined: 1,
        world: 2,
    };
    let welcome = Control::Welcome(workers[0].welcome.clone().unwrap());
    let down = framed(&[waiting, welcome.clone(), welcome]) + 2 * HEADER_BYTES;
    for (direction, bytes) in [("up", up), ("down", down)] {
        let name = "arc_communication_bytes_total";
        shows(
            &server,
            &format!("{name}{{direction=\"{direction}\",kind=\"control\"}} {bytes}"),
        )
        .await;
    }
    server.shutdown("test").await;
}

#[tokio::test]
async fn workers_get_the_mean_and_the_pages_show_it() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, workers) = running(dir.path(), 2).await;
    for step in 0..3 {
        let mut streams = Vec::new();
        for (value, worker) in [1.0, 3.0].into_iter().zip(&workers) {
            streams.push(worker.send_dense(step, value).await);
        }
        for (_, recv) in &mut streams {
            let (header, body) = answer(recv).await;
            assert!(header.flags.counted && header.kind == FrameKind::DenseMean);
            let values = &body[..header.payload_bytes()];
            assert!(values.chunks(4).all(|value| value == 2f32.to_le_bytes()));
        }
    }
    let admin = server.admin_address().unwrap();
    assert!(get(admin, "/healthz").await.ends_with("ok\n"));
    assert!(get(admin, "/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(get(admin, "/").await.contains("<title>arc-ps</title>"));
    let status = get(admin, "/status").await;
    assert!(
        status.contains("\"rounds_complete\":3")
            && status.contains("\"stage\":\"running\"")
            && status.contains("\"store\":{\"ready\":true,\"directory\":null"),
        "{status}"
    );
    let metrics = get(admin, "/metrics").await;
    assert!(
        metrics.contains("arc_rounds_total{outcome=\"complete\"} 3"),
        "{metrics}"
    );
    assert!(
        metrics.contains("arc_communication_bytes_total{direction=\"up\",kind=\"dense\"} 384"),
        "{metrics}"
    );
    server.shutdown("test").await;
}

#[tokio::test]
async fn a_worker_that_vanishes_is_removed_and_the_round_closes() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut workers) = running(dir.path(), 2).await;
    let (_send, mut recv) = workers[0].send_dense(0, 5.0).await;
    // Ranks are given in order of arrival, which need not be that of the connections.
    let stays = workers[0].rank();
    workers.pop().unwrap().connection.close(0u32.into(), b"");
    let (header, _) = answer(&mut recv).await;
    assert!(header.flags.counted);
    let Control::Membership { epoch, members, .. } = workers[0].message().await else {
        panic!()
    };
    assert_eq!(epoch, Epoch(2));
    assert_eq!(members, [stays]);
    server.shutdown("test").await;
}

/// It closes with the code that says so, or is silent; either way the other one's round waits for it a moment.
#[tokio::test]
async fn a_worker_that_dials_again_has_its_place_and_its_round() {
    let dir = tempfile::tempdir().unwrap();
    let (server, identity, workers) = running(dir.path(), 2).await;
    let _lost_with_its_connection = workers[0].send_dense(0, 1.0).await;
    shows(&server, "arc_open_rounds 1").await;
    let place = workers[0].welcome.clone().unwrap().place;
    let again = Hello {
        intent: Intent::Member {
            place: place.clone(),
            step: Step(0),
            waited: true,
        },
        ..hello()
    };
    // The new connection may come before the old one's end is known.
    let mut back = Worker::hello(&server, &identity, again).await;
    assert_eq!(back.welcome().await, place.rank);
    let code = arc_topk_transport::REDIAL_CODE;
    workers[0].connection.close(code.into(), b"dialling again");
    let mut streams = [
        back.send_dense(0, 1.0).await,
        workers[1].send_dense(0, 3.0).await,
    ];
    for (_, recv) in &mut streams {
        let (header, body) = answer(recv).await;
        assert!(header.flags.counted);
        let values = &body[..header.payload_bytes()];
        assert!(values.chunks(4).all(|value| value == 2f32.to_le_bytes()));
    }
    assert_eq!(server.status().await.unwrap().totals.lost, 0);
    server.shutdown("test").await;
}

#[tokio::test]
async fn shutdown_tells_workers() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut workers) = running(dir.path(), 1).await;
    let told = tokio::spawn(async move { workers[0].refusal().await });
    tokio::time::timeout(PATIENCE, server.shutdown("SIGTERM"))
        .await
        .unwrap();
    let (code, detail) = told.await.unwrap();
    assert_eq!(code, RefusalCode::Shutdown);
    assert!(detail.contains("SIGTERM"), "{detail}");
}

#[tokio::test]
async fn a_wrong_certificate_costs_a_handshake_and_a_count() {
    let dir = tempfile::tempdir().unwrap();
    let (server, identity, workers) = running(&dir.path().join("a"), 1).await;
    let (_, stranger) = certs(&dir.path().join("b"));
    // Both sides refuse: the stranger's authority is unknown here, and ours there.
    let address = server.quic_address().to_string();
    let refused = connect(&address, &stranger, &TransportConfig::default()).await;
    assert!(
        matches!(refused, Err(TransportError::PeerCertificate { .. })),
        "{refused:?}"
    );
    shows(&server, "arc_failed_handshakes_total 1").await;
    let (_send, mut recv) = workers[0].send_dense(0, 1.0).await;
    answer(&mut recv).await;
    drop(identity);
    server.shutdown("test").await;
}

#[tokio::test]
async fn no_hello_closes_the_connection_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (server, worker, _) = running_with(dir.path(), 0, quick()).await;
    let address = server.quic_address().to_string();
    let connection = connect(&address, &worker, &TransportConfig::default())
        .await
        .unwrap();
    let closed = tokio::time::timeout(PATIENCE, connection.closed())
        .await
        .unwrap();
    assert!(
        closed.to_string().contains("no Hello came within 0.3 s"),
        "{closed}"
    );
    server.shutdown("test").await;
}

#[tokio::test]
async fn a_second_worker_with_a_taken_rank_is_refused_and_the_first_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (shard, identity) = certs(dir.path());
    let server = Server::start(options(shard, 2)).await.unwrap();
    let ranked = Hello {
        intent: join(Some(Rank(0))),
        ..hello()
    };
    let mut first = Worker::hello(&server, &identity, ranked.clone()).await;
    assert_eq!(
        first.message().await,
        Control::Waiting {
            joined: 1,
            world: 2
        }
    );
    let (code, detail) = Worker::hello(&server, &identity, ranked)
        .await
        .refusal()
        .await;
    assert_eq!(code, RefusalCode::Rank);
    assert!(detail.contains("rank 0 is taken by test"), "{detail}");
    let mut second = Worker::hello(&server, &identity, hello()).await;
    assert_eq!(
        (first.welcome().await, second.welcome().await),
        (Rank(0), Rank(1))
    );
    server.shutdown("test").await;
}

/// Rank of the offender's words after `offend`; the other worker's round closes without it.
async fn offence(
    timeouts: Timeouts,
    offend: impl AsyncFnOnce(&Worker) -> Vec<SendStream>,
) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (server, _, mut workers) = running_with(dir.path(), 2, timeouts).await;
    let (_send, mut recv) = workers[0].send_dense(0, 5.0).await;
    let mut offender = workers.pop().unwrap();
    let kept = offend(&offender).await;
    let (code, detail) = offender.refusal().await;
    assert_eq!(code, RefusalCode::Protocol);
    let (header, _) = answer(&mut recv).await;
    assert!(header.flags.counted);
    assert_eq!(server.status().await.unwrap().stage, Stage::Running);
    drop(kept);
    server.shutdown("test").await;
    detail
}

#[tokio::test]
async fn a_stream_on_which_nothing_comes() {
    let detail = offence(quick(), async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        // A stream is opened by its first byte.
        send.write_all(&[0]).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a stream was opened and no frame came on it within 0.3 s"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_body_that_stands_still() {
    let detail = offence(quick(), async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        send.write_all(&header(0, 64).encode()).await.unwrap();
        send.write_all(&[0; 10]).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a frame stood still for 0.3 s after"),
        "{detail}"
    );
}

#[tokio::test]
async fn a_frame_longer_than_the_plan_allows() {
    let detail = offence(Timeouts::default(), async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        send.write_all(&header(0, 1 << 20).encode()).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a frame announces 1048576 bytes, above the limit of "),
        "{detail}"
    );
}

#[tokio::test]
async fn a_header_that_means_nothing() {
    let detail = offence(Timeouts::default(), async |worker: &Worker| {
        let (mut send, _) = worker.connection.open_bi().await.unwrap();
        send.write_all(&[0xff; HEADER_BYTES]).await.unwrap();
        vec![send]
    });
    let detail = detail.await;
    assert!(
        detail.starts_with("a frame's header cannot be read"),
        "{detail}"
    );
}

/// A refusal that the peer takes no byte of.
#[tokio::test]
async fn a_peer_that_reads_nothing_is_closed_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (server, identity, _workers) = running(dir.path(), 1).await;
    let deaf = TransportConfig {
        stream_window_bytes: 0,
        ..TransportConfig::default()
    };
    let address = server.quic_address().to_string();
    let connection = connect(&address, &identity, &deaf).await.unwrap();
    let mut control = ControlStream::open(&connection, "shard").await.unwrap();
    let hello = Control::Hello(Box::new(hello()));
    control.send(&hello).await.unwrap();
    let closed = tokio::time::timeout(PATIENCE, connection.closed())
        .await
        .unwrap();
    let closed = closed.to_string();
    assert!(closed.contains("the job runs already"), "{closed}");
    server.shutdown("test").await;
}

/// Connections that say nothing take places too, and give them back.
#[tokio::test]
async fn connections_are_bounded_before_their_hello() {
    let dir = tempfile::tempdir().unwrap();
    let (shard, identity) = certs(dir.path());
    let patient = Timeouts {
        hello: 10 * PATIENCE,
        ..Timeouts::default()
    };
    let options = ServeOptions {
        timeouts: patient,
        ..options(shard, 1)
    };
    let server = Server::start(options).await.unwrap();
    let address = server.quic_address();
    let config = TransportConfig::default();
    let endpoint = arc_topk_transport::client_endpoint(address, &config).unwrap();
    let dial = || {
        arc_topk_transport::connect_resolved(&endpoint, address, "localhost", &identity, &config)
    };
    let mut silent = Vec::new();
    // Twice the world and 64.
    for _ in 0..66 {
        silent.push(dial().await.unwrap());
    }
    let refused = dial().await;
    assert!(
        matches!(refused, Err(TransportError::ConnectRefused { .. })),
        "{refused:?}"
    );
    silent.pop().unwrap().close(0u32.into(), b"");
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while dial().await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "a place comes back");
    }
    server.shutdown("test").await;
}

#[tokio::test]
async fn a_first_message_that_is_no_hello_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (shard, identity) = certs(dir.path());
    let server = Server::start(options(shard, 1)).await.unwrap();
    let address = server.quic_address().to_string();
    let config = TransportConfig::default();
    let connection = connect(&address, &identity, &config).await.unwrap();
    let mut control = ControlStream::open(&connection, "shard").await.unwrap();
    control.send(&Control::Leave).await.unwrap();
    let mut worker = Worker {
        connection,
        control,
        welcome: None,
        elements: 0,
    };
    let (code, detail) = worker.refusal().await;
    assert_eq!(code, RefusalCode::Protocol);
    assert!(detail.contains("must be a Hello"), "{detail}");
    shows(&server, "arc_refusals_total{code=\"protocol\"} 1").await;
    server.shutdown("test").await;
}

#[tokio::test]
async fn addresses_in_use_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (shard, _) = certs(dir.path());
    let first = Server::start(options(shard, 1)).await.unwrap();
    let (shard, _) = certs(&dir.path().join("again"));
    let mut same_port = options(shard, 1);
    same_port.listen = first.quic_address();
    let error = Server::start(same_port.clone()).await.unwrap_err();
    assert!(
        matches!(
            error,
            ServeError::Transport(TransportError::PortInUse { .. })
        ),
        "{error}"
    );
    same_port.listen = "127.0.0.1:0".parse().unwrap();
    same_port.admin = first.admin_address();
    let error = Server::start(same_port).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("choose another address with --admin"),
        "{error}"
    );
    first.shutdown("test").await;
}
