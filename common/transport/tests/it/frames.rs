//! Frames and control messages on real streams: both sides of every limit, and what is cut short.

use arc_topk_common::ids::{BucketId, Epoch, Step};
use arc_topk_common::wire::{
    Control, FrameFlags, FrameHeader, FrameKind, MAX_CONTROL_BYTES, WireError,
};
use arc_topk_transport::certs::{CertRequest, make_job_certs};
use arc_topk_transport::{
    Connection, ControlStream, Endpoint, Identity, LongMessages, RecvStream, SendStream,
    TransportConfig, TransportError, connect, read_frame, server_endpoint, write_frame,
};
use bytes::Bytes;

struct Pair {
    client: Connection,
    server: Connection,
    _endpoint: Endpoint,
    _dir: tempfile::TempDir,
}

async fn pair() -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let certs = make_job_certs(dir.path(), &CertRequest::new("job", &[], 2)).unwrap();
    let config = TransportConfig::default();
    let shard = Identity::load(&certs.shard).unwrap();
    let endpoint = server_endpoint("127.0.0.1:0".parse().unwrap(), &shard, &config).unwrap();
    let address = endpoint.local_addr().unwrap().to_string();
    let worker = Identity::load(&certs.worker).unwrap();
    let (server, client) = tokio::join!(
        async { endpoint.accept().await.unwrap().await.unwrap() },
        connect(&address, &worker, &config)
    );
    arc_topk_transport::admit(&server, &config, 100);
    Pair {
        client: client.unwrap(),
        server,
        _endpoint: endpoint,
        _dir: dir,
    }
}

fn header(body_bytes: usize) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Dense,
        flags: FrameFlags::default(),
        bucket: BucketId(3),
        epoch: Epoch(1),
        step: Step(7),
        update: 6,
        body_bytes: body_bytes as u32,
        roster_bytes: 0,
        lead: 0,
    }
}

/// A stream whose far end has been handed `bytes` and, if `end`, its end.
async fn stream_with(pair: &Pair, bytes: &[u8], end: bool) -> (SendStream, RecvStream) {
    let (mut send, _) = pair.client.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    if end {
        send.finish().unwrap();
    }
    let (_, recv) = pair.server.accept_bi().await.unwrap();
    (send, recv)
}

#[tokio::test]
async fn frames_arrive_whole_and_the_end_is_told() {
    let pair = pair().await;
    let (mut send, _) = pair.client.open_bi().await.unwrap();
    let bodies = [0, 1, 65_536, 65_537, 5 << 20].map(|len| {
        let body: Vec<u8> = (0..len).map(|at: usize| (at % 251) as u8).collect();
        Bytes::from(body)
    });
    let sent = bodies.clone();
    let writer = tokio::spawn(async move {
        for body in sent {
            write_frame(&mut send, &header(body.len()), body, "peer")
                .await
                .unwrap();
        }
        send.finish().unwrap();
        let _all_acknowledged = send.stopped().await;
    });
    let (_, mut recv) = pair.server.accept_bi().await.unwrap();
    for body in bodies {
        let (got, bytes) = read_frame(&mut recv, 5 << 20, "peer")
            .await
            .unwrap()
            .unwrap();
        assert_eq!(got, header(body.len()));
        assert!(bytes == body);
    }
    assert_eq!(read_frame(&mut recv, 0, "peer").await, Ok(None));
    writer.await.unwrap();
}

#[tokio::test]
async fn a_body_above_its_limit_is_refused_by_its_header_alone() {
    let pair = pair().await;
    let (_send, mut recv) = stream_with(&pair, &header(101).encode(), false).await;
    let error = read_frame(&mut recv, 100, "peer").await.unwrap_err();
    let expected = TransportError::TooLong {
        what: "a frame",
        claimed: 101,
        limit: 100,
    };
    assert_eq!(error, expected);
}

#[tokio::test]
async fn frames_cut_short_are_told_from_the_end() {
    let pair = pair().await;
    let mut bytes = header(100).encode().to_vec();
    bytes.extend([0; 60]);
    for (cut, missing) in [(31, 1), (1, 31), (32, 100), (92, 40)] {
        let (_send, mut recv) = stream_with(&pair, &bytes[..cut], true).await;
        match read_frame(&mut recv, 100, "peer").await {
            Err(TransportError::Truncated { missing: told, .. }) => assert_eq!(told, missing),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn garbage_and_abandoned_streams_are_told() {
    let pair = pair().await;
    let (_send, mut recv) = stream_with(&pair, &[0xee; 64], true).await;
    let error = read_frame(&mut recv, 100, "peer").await.unwrap_err();
    assert!(
        matches!(error, TransportError::Wire(WireError::Unknown { .. })),
        "{error:?}"
    );

    let (mut send, mut recv) = stream_with(&pair, &header(100).encode(), false).await;
    send.reset(9u32.into()).unwrap();
    let error = read_frame(&mut recv, 100, "peer").await.unwrap_err();
    assert_eq!(error, TransportError::StreamReset { code: 9 });
}

#[tokio::test]
async fn control_messages_have_a_limit_too() {
    let pair = pair().await;
    let (_send, recv) =
        stream_with(&pair, &(MAX_CONTROL_BYTES as u32 + 1).to_le_bytes(), false).await;
    let (spare, _) = pair.client.open_bi().await.unwrap();
    let mut control = ControlStream::from_halves(spare, recv, "peer");
    let error = control.recv().await.unwrap_err();
    assert!(
        matches!(
            error,
            TransportError::TooLong {
                limit: MAX_CONTROL_BYTES,
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_lost_connection_is_no_end_of_stream() {
    let pair = pair().await;
    let mut control = ControlStream::open(&pair.client, "the shard")
        .await
        .unwrap();
    control.send(&Control::Leave).await.unwrap();
    pair.server.close(8u32.into(), b"too few workers");
    let error = control.recv().await.unwrap_err();
    let expected = TransportError::Closed {
        peer: "the shard".to_owned(),
        code: 8,
        reason: "too few workers".to_owned(),
    };
    assert_eq!(error, expected);
}

#[tokio::test]
async fn long_messages_wait_for_room_and_short_ones_do_not() {
    let pair = pair().await;
    let long = u32::try_from(MAX_CONTROL_BYTES).unwrap().to_le_bytes();
    let budget = LongMessages::new(0);
    let mut receivers = Vec::new();
    let mut kept = Vec::new();
    for bytes in [&long[..], &long[..], &framed(&Control::Leave)] {
        let (mut send, _) = pair.client.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        kept.push(send);
        let (answer, recv) = pair.server.accept_bi().await.unwrap();
        receivers.push(ControlStream::from_halves(answer, recv, "peer").receiver);
    }
    let [first, second, third] = &mut receivers[..] else {
        unreachable!("three were pushed");
    };
    let mut waiting = Box::pin(first.recv_within(&budget));
    assert!(still_waits(waiting.as_mut()).await);
    // It ends at once where there is room: its stream does.
    kept[1].finish().unwrap();
    let mut blocked = Box::pin(second.recv_within(&budget));
    assert!(still_waits(blocked.as_mut()).await);
    assert_eq!(third.recv_within(&budget).await, Ok(Some(Control::Leave)));
    drop(waiting);
    let error = blocked.await.unwrap_err();
    assert!(
        matches!(error, TransportError::Truncated { .. }),
        "{error:?}"
    );
}

fn framed(message: &Control) -> Vec<u8> {
    let body = message.encode();
    let length = u32::try_from(body.len()).unwrap();
    [&length.to_le_bytes()[..], &body].concat()
}

/// Whether the future is not ready after both sides had time to talk.
async fn still_waits(future: impl Future) -> bool {
    tokio::time::timeout(std::time::Duration::from_millis(300), future)
        .await
        .is_err()
}
