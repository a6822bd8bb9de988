//! Members that misbehave: each is removed, and the other steps on.

use super::*;
use arc_topk_common::ids::Step;
use arc_topk_common::wire::{HEADER_BYTES, MAX_ROSTER_BYTES};
use arc_topk_transport::{VarInt, read_frame};

/// A member misbehaves in `strike` and its connection is closed with `words`; the other member steps on without it.
async fn member(
    timeouts: Timeouts,
    config: TransportConfig,
    words: &str,
    strike: impl AsyncFnOnce(&mut Offender) -> Kept,
) {
    let site = Site::start(2, timeouts).await;
    let mut worker = site.join().await;
    let mut offender = site.offender(&config).await;
    worker.welcome().await;
    let mut honest = Honest::start(worker);
    let before = Before::now();
    let kept = timeout(2 * PATIENCE, strike(&mut offender)).await;
    let kept = kept.expect("the shard has had enough");
    honest.goes_on().await;
    before.is_about_now();
    let closed = closed(&offender.connection).await.to_string();
    assert!(closed.contains(words), "{closed}");
    honest.goes_on().await;
    drop(kept);
    let status = site.server.status().await.unwrap();
    assert_eq!((status.members.len(), status.totals.lost), (1, 1));
    honest.stop().await;
    site.server.shutdown("test").await;
}

/// With default patience.
async fn offence(words: &str, strike: impl AsyncFnOnce(&mut Offender) -> Kept) {
    member(timeouts(), patient(), words, strike).await;
}

fn short_header() -> Timeouts {
    Timeouts {
        header: Duration::from_millis(400),
        ..timeouts()
    }
}

fn short_body() -> Timeouts {
    Timeouts {
        body: Duration::from_secs(1),
        ..timeouts()
    }
}

#[tokio::test]
async fn a_frame_that_trickles() {
    let strike = async |peer: &mut Offender| {
        let (mut send, recv) = peer.stream_with(&frame_claim(BODY)).await.unwrap();
        trickle(&mut send, std::iter::repeat(0)).await;
        vec![(send, recv)]
    };
    member(short_body(), patient(), "a frame stood still", strike).await;
}

#[tokio::test]
async fn a_header_that_trickles() {
    let strike = async |peer: &mut Offender| {
        let (mut send, recv) = peer.stream_with(&[]).await.unwrap();
        trickle(&mut send, frame_claim(BODY)).await;
        vec![(send, recv)]
    };
    member(short_header(), patient(), "no frame came on it", strike).await;
}

#[tokio::test]
async fn a_flood_of_streams() {
    let strike = async |peer: &mut Offender| {
        let mut streams = Vec::new();
        // Ends when the shard has had enough.
        while let Some(stream) = peer.stream_with(&frame_claim(BODY)[..1]).await {
            streams.push(stream);
        }
        let granted = streams.len();
        assert!(granted < 100, "{granted} streams were granted");
        streams
    };
    member(short_header(), patient(), "no frame came on it", strike).await;
}

#[tokio::test]
async fn streams_that_are_opened_and_reset() {
    offence("gave up the stream", async |peer: &mut Offender| {
        while let Some((mut send, _)) = peer.stream_with(&[1]).await {
            let _gone = send.reset(VarInt::from_u32(7));
        }
        Vec::new()
    })
    .await;
}

#[tokio::test]
async fn a_body_that_claims_too_much() {
    offence("above the limit", async |peer: &mut Offender| {
        let claim = frame_claim(200 << 20);
        peer.stream_with(&claim).await.into_iter().collect()
    })
    .await;
}

/// Every body is announced at its full length, and none comes.
#[tokio::test]
async fn bodies_that_are_claimed_and_never_sent() {
    let strike = async |peer: &mut Offender| {
        let mut streams = Vec::new();
        while let Some(stream) = peer.stream_with(&frame_claim(BODY)).await {
            streams.push(stream);
        }
        streams
    };
    member(short_body(), patient(), "stood still", strike).await;
}

#[tokio::test]
async fn garbage_on_the_control_stream() {
    let words = "control message cannot be read";
    offence(words, async |peer: &mut Offender| {
        let bytes = [&control_claim(4096)[..], &garbage(4096)].concat();
        peer.control.0.write_all(&bytes).await.unwrap();
        Vec::new()
    })
    .await;
}

#[tokio::test]
async fn garbage_on_round_streams() {
    offence("header cannot be read", async |peer: &mut Offender| {
        let mut streams = Vec::new();
        for _ in 0..3 {
            streams.extend(peer.stream_with(&garbage(4 * HEADER_BYTES)).await);
        }
        streams
    })
    .await;
}

#[tokio::test]
async fn a_second_hello() {
    offence("no second Hello", async |peer: &mut Offender| {
        peer.control.0.write_all(&framed_hello()).await.unwrap();
        Vec::new()
    })
    .await;
}

#[tokio::test]
async fn a_control_stream_that_ends_without_a_leave() {
    offence("ended without a leave", async |peer: &mut Offender| {
        peer.control.0.finish().unwrap();
        Vec::new()
    })
    .await;
}

/// That it wants to hear nothing is its own affair as long as it contributes; it does not.
#[tokio::test]
async fn a_control_stream_that_is_stopped_and_a_frame_cut_short() {
    offence("a frame ended after", async |peer: &mut Offender| {
        peer.control.1.stop(VarInt::from_u32(0)).unwrap();
        let bytes = [frame_claim(BODY), garbage(1000)].concat();
        let (mut send, recv) = peer.stream_with(&bytes).await.unwrap();
        send.finish().unwrap();
        vec![(send, recv)]
    })
    .await;
}

/// It contributes, and takes no byte of an answer.
#[tokio::test]
async fn a_member_that_reads_nothing() {
    let deaf = TransportConfig {
        stream_window_bytes: 0,
        ..patient()
    };
    let strike = async |peer: &mut Offender| {
        let mut streams = Vec::new();
        for step in 0.. {
            let Some((mut send, recv)) = peer.stream_with(&[]).await else {
                break;
            };
            write_dense(&mut send, step, 1.0, BODY / 4).await;
            streams.push((send, recv));
        }
        streams
    };
    member(short_body(), deaf, "was not taken", strike).await;
}

/// Reports go through the same queue as frames. All step on.
#[tokio::test]
async fn a_flood_of_reports() {
    let site = Site::start(2, timeouts()).await;
    let mut worker = site.join().await;
    let mut peer = site.offender(&patient()).await;
    worker.welcome().await;
    let mut honest = Honest::start(worker);
    let before = Before::now();
    let connection = peer.connection.clone();
    let steps = tokio::spawn(async move {
        for step in 0.. {
            let Ok((mut send, mut recv)) = connection.open_bi().await else {
                return;
            };
            write_dense(&mut send, step, 1.0, BODY / 4).await;
            if read_frame(&mut recv, BODY + MAX_ROSTER_BYTES, "shard")
                .await
                .is_err()
            {
                return;
            }
        }
    });
    let connection = peer.connection.clone();
    let flood = tokio::spawn(async move {
        let burst = framed(&report()).repeat(500);
        while peer.control.0.write_all(&burst).await.is_ok() {
            // Or its own frames would never find room.
            tokio::time::sleep(DRIP).await;
        }
    });
    for _ in 0..5 {
        honest.goes_on().await;
    }
    assert!(!flood.is_finished() && !steps.is_finished());
    before.is_about_now();
    connection.close(VarInt::from_u32(0), b"");
    honest.goes_on().await;
    honest.stop().await;
    site.server.shutdown("test").await;
}

fn report() -> Control {
    Control::Report {
        step: Step(0),
        loss: 1.0,
        step_seconds: 0.1,
        wait_seconds: 0.1,
        bytes_sent: 1,
        bytes_received: 1,
        bytes_dense_equivalent: 1,
        captured_energy: f32::NAN,
        residual_ratio: f32::NAN,
    }
}
