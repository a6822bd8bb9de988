//! Peers that never become members.

use super::*;
use crate::net::shows;
use arc_topk_common::wire::RefusalCode;
use arc_topk_transport::VarInt;
use std::path::Path;
use tokio::task::JoinSet;

/// `strike` from outside the job, whose only member steps on.
async fn outside(timeouts: Timeouts, strike: impl AsyncFnOnce(&Site, &mut Honest)) {
    let site = Site::start(1, timeouts).await;
    let mut worker = site.join().await;
    worker.welcome().await;
    let mut honest = Honest::start(worker);
    honest.goes_on().await;
    let before = Before::now();
    strike(&site, &mut honest).await;
    before.is_about_now();
    honest.goes_on().await;
    let status = site.server.status().await.unwrap();
    assert_eq!((status.members.len(), status.totals.lost), (1, 0));
    honest.stop().await;
    site.server.shutdown("test").await;
}

/// What the shard says of a certificate, or the peer of the shard's.
async fn refused(site: &Site, place: &Path) -> TransportError {
    let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|file| place.join(file));
    let identity = Identity::load_unchecked(&ca, &cert, &key).unwrap();
    match connect(&site.address(), &identity, &patient()).await {
        Ok(connection) => closed(&connection).await,
        Err(error) => error,
    }
}

#[tokio::test]
async fn certificates_that_are_expired_foreign_or_of_the_other_role() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let foreign = Authority::new(&request()).unwrap();
        let mut expired = request();
        expired.not_before -= Duration::from_secs(3 * 86_400);
        expired.not_after -= Duration::from_secs(4 * 86_400);
        let (own, now) = (&site.authority, request());
        let cases = [
            ("expired", own, Role::Worker, &expired, "expired"),
            ("foreign", &foreign, Role::Worker, &now, "not signed by"),
            ("shard", own, Role::Shard, &now, "another role"),
        ];
        for (name, authority, role, request, words) in cases {
            let place = site.dir.path().join(format!("bad-{name}"));
            authority.issue(&place, role, request).unwrap();
            // It trusts this job's shards: they are to be the ones who refuse.
            std::fs::copy(site.dir.path().join("worker/ca.pem"), place.join("ca.pem")).unwrap();
            for _ in 0..5 {
                let error = refused(site, &place).await;
                assert!(
                    matches!(error, TransportError::OwnCertificate { .. }),
                    "{name}: {error:?}"
                );
                assert!(error.to_string().contains(words), "{name}: {error}");
            }
            honest.goes_on().await;
        }
        shows(&site.server, "arc_failed_handshakes_total 15").await;
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_poses_as_a_shard() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let config = patient();
        let any = "127.0.0.1:0".parse().unwrap();
        let posing = arc_topk_transport::server_endpoint(any, &site.identity, &config).unwrap();
        let address = posing.local_addr().unwrap().to_string();
        let accept = async { drop(posing.accept().await.unwrap().await) };
        let dial = connect(&address, &site.identity, &config);
        let ((), refused) = tokio::join!(accept, dial);
        assert!(
            matches!(refused, Err(TransportError::PeerCertificate { .. })),
            "{refused:?}"
        );
        honest.goes_on().await;
    })
    .await;
}

#[tokio::test]
async fn a_hello_that_trickles() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let mut peers = JoinSet::new();
        let socket = site.socket();
        for _ in 0..20 {
            let connection = site.dial_from(&socket).await.unwrap();
            peers.spawn(async move {
                let (mut send, _recv) = connection.open_bi().await.unwrap();
                trickle(&mut send, framed_hello().into_iter().cycle()).await;
                closed(&connection).await
            });
        }
        honest.goes_on().await;
        while let Some(error) = peers.join_next().await {
            let error = error.unwrap().to_string();
            assert!(error.contains("no Hello came within 1.0 s"), "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_flood_of_connections() {
    let slow = Timeouts {
        hello: 10 * PATIENCE,
        ..timeouts()
    };
    outside(slow, async |site: &Site, honest: &mut Honest| {
        let socket = site.socket();
        let mut kept = Vec::new();
        let mut turned_away = 0;
        for _ in 0..10 {
            let mut wave = JoinSet::new();
            for _ in 0..30 {
                let (socket, identity) = (socket.clone(), site.identity.clone());
                let address = site.server.quic_address();
                wave.spawn(async move {
                    connect_resolved(&socket, address, "localhost", &identity, &patient()).await
                });
            }
            for dialled in wave.join_all().await {
                match dialled {
                    Ok(connection) => kept.push(connection),
                    Err(TransportError::ConnectRefused { .. }) => turned_away += 1,
                    Err(other) => panic!("{other:?}"),
                }
            }
            honest.goes_on().await;
        }
        // Twice the world and 64, less the honest worker.
        assert_eq!((kept.len(), turned_away), (65, 235));
    })
    .await;
}

/// Some end as soon as they stand, some within their Hello, over and over.
#[tokio::test]
async fn connections_that_come_and_go() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let socket = site.socket();
        let hello = framed_hello();
        for round in 0..200 {
            let connection = site.dial_from(&socket).await.unwrap();
            if round % 2 == 0 {
                let (mut send, _) = connection.open_bi().await.unwrap();
                send.write_all(&hello[..round % hello.len()]).await.unwrap();
            }
            connection.close(VarInt::from_u32(0), b"");
        }
        honest.goes_on().await;
    })
    .await;
}

#[tokio::test]
async fn a_flood_of_streams_before_the_welcome() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let connection = site.dial_from(&site.socket()).await.unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        send.write_all(&control_claim(1000)).await.unwrap();
        // None of these is ever granted: they wait until the shard has had enough.
        let mut more = JoinSet::new();
        for _ in 0..1000 {
            let connection = connection.clone();
            more.spawn(async move { connection.open_bi().await.is_err() });
        }
        more.spawn(async move { connection.open_uni().await.is_err() });
        honest.goes_on().await;
        let refused = timeout(PATIENCE, more.join_all()).await.unwrap();
        assert!(refused.into_iter().all(|refused| refused));
    })
    .await;
}

#[tokio::test]
async fn control_messages_that_claim_too_much() {
    let slow = Timeouts {
        hello: Duration::from_secs(3),
        ..timeouts()
    };
    outside(slow, async |site: &Site, honest: &mut Honest| {
        let socket = site.socket();
        let mut peers = Vec::new();
        // What is above the limit is refused at once, what is below it is not believed before it comes.
        for (claim, words) in [(u32::MAX, "above the limit"), (16 << 20, "no Hello came")] {
            for _ in 0..25 {
                let connection = site.dial_from(&socket).await.unwrap();
                let (mut send, recv) = connection.open_bi().await.unwrap();
                send.write_all(&control_claim(claim)).await.unwrap();
                // It may be cut off in the middle.
                let _cut_off = send.write_all(&garbage(60_000)).await;
                peers.push((connection, send, recv, words));
            }
        }
        honest.goes_on().await;
        for (connection, _send, _recv, words) in &peers {
            let error = closed(connection).await.to_string();
            assert!(error.contains(words), "{error}");
        }
    })
    .await;
}

/// All but the end of the longest Hello, from as many peers as are let in: four are read, the others wait for room.
#[tokio::test]
async fn long_hellos_that_do_not_end() {
    let slow = Timeouts {
        hello: 10 * PATIENCE,
        ..timeouts()
    };
    outside(slow, async |site: &Site, honest: &mut Honest| {
        let socket = site.socket();
        let bytes = [&control_claim(16 << 20)[..], &garbage(15 << 20)].concat();
        let bytes: &'static [u8] = bytes.leak();
        let (count, mut read) = watch::channel(0);
        let mut peers = JoinSet::new();
        for _ in 0..60 {
            let connection = site.dial_from(&socket).await.unwrap();
            let count = count.clone();
            peers.spawn(async move {
                let (mut send, _recv) = connection.open_bi().await.unwrap();
                send.write_all(bytes).await.unwrap();
                count.send_modify(|count| *count += 1);
                closed(&connection).await
            });
        }
        let four = timeout(PATIENCE, read.wait_for(|count| *count >= 4)).await;
        four.unwrap().unwrap();
        for _ in 0..3 {
            honest.goes_on().await;
        }
        assert_eq!(*read.borrow(), 4);
        peers.shutdown().await;
    })
    .await;
}

#[tokio::test]
async fn garbage_after_the_handshake() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let socket = site.socket();
        for length in [1, 3, 4, 5, 100, 70_000, 2 << 20] {
            let connection = site.dial_from(&socket).await.unwrap();
            let (mut send, _recv) = connection.open_bi().await.unwrap();
            // It may be cut off in the middle.
            let _cut_off = send.write_all(&garbage(length)).await;
            let _cut_off = send.finish();
            match closed(&connection).await {
                TransportError::Closed { code, reason, .. } => {
                    assert_eq!(code, RefusalCode::Protocol as u64, "{reason}");
                    assert!(reason.contains("Hello"), "{reason}");
                }
                other => panic!("{other:?}"),
            }
        }
        honest.goes_on().await;
    })
    .await;
}

#[tokio::test]
async fn streams_that_are_closed_on_one_side() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let socket = site.socket();
        let hello = framed_hello();
        for length in [1, CONTROL_LENGTH_BYTES, hello.len() - 1] {
            let connection = site.dial_from(&socket).await.unwrap();
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            send.write_all(&hello[..length]).await.unwrap();
            send.finish().unwrap();
            // The refusal is not wanted either.
            recv.stop(VarInt::from_u32(0)).unwrap();
            let error = closed(&connection).await.to_string();
            assert!(error.contains("the stream ended inside"), "{error}");
        }
        honest.goes_on().await;
    })
    .await;
}

/// Datagrams that are not QUIC, or only begin like it.
#[tokio::test]
async fn a_flood_of_datagrams() {
    outside(timeouts(), async |site: &Site, honest: &mut Honest| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for round in 0..20_000 {
            let mut datagram = garbage([0, 1, 7, 1200, 9000][round % 5]);
            if let Some(first) = datagram.first_mut() {
                *first = 0xc0 | (round as u8 & 0x3f);
            }
            // A full buffer is what a flood ends in.
            let _full = socket.send_to(&datagram, site.server.quic_address());
            if round % 1000 == 0 {
                tokio::task::yield_now().await;
            }
        }
        honest.goes_on().await;
    })
    .await;
}
