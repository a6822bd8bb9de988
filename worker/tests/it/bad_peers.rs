//! Peers that are wrong or hostile: each gets an error that names cause and remedy, and the honest workers go on.

use crate::net::{Job, leave_all, request, results, step_all, transport};
use crate::support::{self, algorithm, cluster, gradients, model, spec};
use arc_topk_common::config::algorithm::Feedback;
use arc_topk_common::ids::{BucketId, Epoch, Rank, Step};
use arc_topk_common::plan::PlanSpec;
use arc_topk_common::wire::{
    ALPN, Control, FrameFlags, FrameHeader, FrameKind, HEADER_BYTES, Hello, Intent, JoinWhen,
    PROTOCOL_VERSION, RefusalCode,
};
use arc_topk_ps::server::{ServeError, Server};
use arc_topk_ps::shard::Stage;
use arc_topk_transport::certs::{Authority, Role};
use arc_topk_transport::{
    Connection, ControlStream, Identity, PeerFault, TransportError, connect, connection_error,
};
use arc_topk_worker::reducer::Reducer;
use arc_topk_worker::session::{ConnectError, NetConfig, QuicReducer};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

fn plan() -> PlanSpec {
    spec(algorithm(Feedback::Ef14, 0.3), 1, model())
}

/// Two honest workers step, `strike` does its worst, and the workers step on as if nothing had been.
fn untouched_by(strike: impl FnOnce(&Job)) {
    let job = Job::start(1, 2);
    let spec = plan();
    let mut workers = job.join(&spec);
    let mut memory = cluster(&spec, 2);
    let mut steps = |workers: &mut [QuicReducer], numbers: std::ops::Range<u64>| {
        for number in numbers {
            let gradients = gradients(&spec, 2, number);
            support::step(&mut memory, &gradients);
            for outcome in step_all(workers, &gradients) {
                outcome.unwrap();
            }
        }
        for (rank, worker) in (0..).zip(workers) {
            assert!(results(worker) == support::results(&memory, rank));
        }
    };
    steps(&mut workers, 0..2);
    strike(&job);
    steps(&mut workers, 2..4);
    assert_eq!(job.status(0).totals.lost, 0);
    leave_all(workers);
    job.shutdown();
}

fn refusal(config: NetConfig, spec: PlanSpec) -> (RefusalCode, String) {
    match QuicReducer::connect(config, spec).err().unwrap() {
        ConnectError::Refused { code, detail, .. } => (code, detail),
        other => panic!("{other:?}"),
    }
}

fn transport_error(config: NetConfig) -> TransportError {
    match QuicReducer::connect(config, plan()).err().unwrap() {
        ConnectError::Transport { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_certificate_of_another_authority() {
    untouched_by(|job| {
        let stranger = Authority::new(&request()).unwrap();
        let place = job.place("stranger");
        stranger.issue(&place, Role::Worker, &request()).unwrap();
        let mut config = job.config();
        config.identity = Identity::load(&place).unwrap().into();
        let error = transport_error(config);
        assert!(
            matches!(
                error,
                TransportError::PeerCertificate {
                    fault: PeerFault::UnknownAuthority,
                    ..
                }
            ),
            "{error:?}"
        );

        // The same, but trusting this job's shards: then it is they who refuse.
        let mut config = job.config();
        config.identity = Identity::load_files(
            &job.place("worker/ca.pem"),
            &place.join("cert.pem"),
            &place.join("key.pem"),
        )
        .unwrap()
        .into();
        let error = transport_error(config);
        assert!(
            matches!(
                error,
                TransportError::OwnCertificate {
                    fault: PeerFault::UnknownAuthority,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("arc-ps certs"), "{error}");
    });
}

#[test]
fn an_expired_certificate() {
    untouched_by(|job| {
        let mut expired = request();
        expired.not_before -= Duration::from_secs(3 * 86_400);
        expired.not_after -= Duration::from_secs(4 * 86_400);
        let place = job.place("expired");
        let issued = job.authority.issue(&place, Role::Worker, &expired);
        issued.unwrap();
        let mut config = job.config();
        // A peer that does not look at its own certificate.
        config.identity = Identity::load_unchecked(
            &place.join("ca.pem"),
            &place.join("cert.pem"),
            &place.join("key.pem"),
        )
        .unwrap()
        .into();
        let error = transport_error(config);
        assert!(
            matches!(
                error,
                TransportError::OwnCertificate {
                    fault: PeerFault::Expired,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("check both clocks"), "{error}");
    });
}

/// Why the shard of `job` ends a connection made with this certificate and protocol.
fn ended(job: &Job, alpn: &[u8], certificate: Option<&Path>) -> TransportError {
    job.runtime.block_on(async {
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = job.servers[0].quic_address();
        let connecting = endpoint
            .connect_with(raw_tls(job, alpn, certificate), address, "localhost")
            .unwrap();
        // TLS 1.3: what the shard thinks of a certificate shows after the handshake has ended here.
        let error = match connecting.await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        };
        connection_error("the shard", &error)
    })
}

fn raw_tls(job: &Job, alpn: &[u8], certificate: Option<&Path>) -> quinn::ClientConfig {
    use rustls::pki_types::PrivateKeyDer;
    use rustls::pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    let ca = Identity::load(&job.place("worker")).unwrap();
    roots.add(ca.ca().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match certificate {
        Some(dir) => {
            let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap();
            let chain = Identity::load(dir).unwrap().chain().to_vec();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    quinn::ClientConfig::new(Arc::new(quic))
}

#[test]
fn no_certificate_at_all() {
    untouched_by(|job| {
        let error = ended(job, ALPN, None);
        assert!(
            matches!(
                error,
                TransportError::OwnCertificate {
                    fault: PeerFault::Missing,
                    ..
                }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("--certs DIR"), "{error}");
    });
}

#[test]
fn another_protocol_on_the_connection() {
    untouched_by(|job| {
        let error = ended(job, b"arc-topk/1", Some(&job.place("worker")));
        assert!(matches!(error, TransportError::Alpn { .. }), "{error:?}");
        assert!(
            error.to_string().contains("does not speak arc-topk/2"),
            "{error}"
        );
    });
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        job: "job".to_owned(),
        incarnation: [9; 16],
        shard: 0,
        host: "a bad peer".to_owned(),
        intent: Intent::Join {
            rank: None,
            world: None,
            start_step: Step(0),
            when: JoinWhen::Start,
        },
        plan: plan(),
    }
}

async fn dial(job: &Job) -> Connection {
    let address = job.servers[0].quic_address().to_string();
    let identity = Identity::load(&job.place("worker")).unwrap();
    connect(&address, &identity, &transport()).await.unwrap()
}

/// A peer with a good certificate and a Hello of its own making.
async fn join(job: &Job, hello: Hello) -> (Connection, ControlStream) {
    let connection = dial(job).await;
    let mut control = ControlStream::open(&connection, "the shard").await.unwrap();
    let hello = Control::Hello(Box::new(hello));
    control.send(&hello).await.unwrap();
    (connection, control)
}

/// Skips what comes before the refusal.
async fn refused(control: &mut ControlStream) -> (RefusalCode, String) {
    loop {
        if let Control::Refused { code, detail } = control.recv().await.unwrap().unwrap() {
            return (code, detail);
        }
    }
}

#[test]
fn another_version_in_the_hello() {
    untouched_by(|job| {
        let other = Hello {
            protocol: PROTOCOL_VERSION + 1,
            ..hello()
        };
        let (code, detail) = job.runtime.block_on(async {
            let (_connection, mut control) = join(job, other).await;
            refused(&mut control).await
        });
        assert_eq!(code, RefusalCode::Version);
        assert!(detail.contains("same release"), "{detail}");
    });
}

#[test]
fn a_worker_too_many() {
    untouched_by(|job| {
        let (code, detail) = refusal(job.config(), plan());
        assert_eq!(code, RefusalCode::World, "{detail}");
    });
}

/// One honest worker waits for a second; `strike` fails to be it; an honest one then is.
fn gathering_untouched_by(strike: impl FnOnce(&Job)) {
    let job = Job::start(1, 2);
    let spec = plan();
    let mut config = job.config();
    config.rank = Some(Rank(0));
    let first = job.join_one(config, &spec);
    job.status_when(0, |status| status.stage == Stage::Gathering);
    strike(&job);
    let second = job.join_one(job.config(), &spec);
    let mut workers = [first, second].map(|thread| thread.join().unwrap().unwrap());
    assert_eq!((workers[0].rank(), workers[1].rank()), (Rank(0), Rank(1)));
    for outcome in step_all(&mut workers, &gradients(&spec, 2, 0)) {
        outcome.unwrap();
    }
    leave_all(workers.into());
    job.shutdown();
}

#[test]
fn a_taken_rank() {
    gathering_untouched_by(|job| {
        let mut config = job.config();
        config.rank = Some(Rank(0));
        let (code, detail) = refusal(config, plan());
        assert_eq!(code, RefusalCode::Rank);
        assert!(detail.contains("rank 0 is taken"), "{detail}");
    });
}

#[test]
fn another_plan() {
    gathering_untouched_by(|job| {
        let mut other = plan();
        other.tensors[2].shape = vec![41, 24];
        let (code, detail) = refusal(job.config(), other);
        assert_eq!(code, RefusalCode::Plan);
        assert!(detail.contains("up") && detail.contains("41"), "{detail}");

        let mut other = plan();
        other.algorithm.density = 0.25;
        let (code, detail) = refusal(job.config(), other);
        assert_eq!(code, RefusalCode::Plan);
        assert!(detail.contains("density"), "{detail}");
    });
}

#[test]
fn another_job_world_or_start() {
    gathering_untouched_by(|job| {
        let mut config = job.config();
        config.job = "another".to_owned();
        assert_eq!(refusal(config, plan()).0, RefusalCode::Job);
        let mut config = job.config();
        config.world = Some(5);
        assert_eq!(refusal(config, plan()).0, RefusalCode::World);
        let mut config = job.config();
        config.start_step = Step(7);
        assert_eq!(refusal(config, plan()).0, RefusalCode::Step);
    });
}

#[test]
fn addresses_and_plans_that_do_not_fit_each_other() {
    let job = Job::start(2, 1);
    let spec = spec(algorithm(Feedback::Ef14, 0.3), 2, model());
    let mut swapped = job.config();
    swapped.shards.reverse();
    let (code, detail) = refusal(swapped, spec.clone());
    assert_eq!(code, RefusalCode::Shard, "{detail}");
    let mut short = job.config();
    short.shards.pop();
    let error = QuicReducer::connect(short, spec).err().unwrap();
    assert!(
        matches!(
            error,
            ConnectError::ShardCount {
                plan: 2,
                addresses: 1
            }
        ),
        "{error:?}"
    );
    job.shutdown();
}

/// A member of a job of three misbehaves: it is told `words`, and the two others go on without it.
fn removed_for(words: &str, strike: impl AsyncFnOnce(&Connection) -> Vec<quinn::SendStream>) {
    let job = Job::start(1, 3);
    let spec = plan();
    let honest = [0, 1].map(|_| job.join_one(job.config(), &spec));
    let (connection, mut control) = job.runtime.block_on(join(&job, hello()));
    let mut workers = honest.map(|thread| thread.join().unwrap().unwrap());
    let (code, detail) = job.runtime.block_on(async {
        let _kept = strike(&connection).await;
        refused(&mut control).await
    });
    assert_eq!(code, RefusalCode::Protocol);
    assert!(detail.contains(words), "{detail}");
    job.status_when(0, |status| status.members.len() == 2);
    for number in 0..2 {
        for outcome in step_all(&mut workers, &gradients(&spec, 2, number)) {
            assert!(!outcome.unwrap().skipped);
        }
    }
    let (left, right) = workers.split_at_mut(1);
    assert!(results(&mut left[0]) == results(&mut right[0]));
    leave_all(workers.into());
    job.shutdown();
}

fn header(body_bytes: u32) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Sketch,
        flags: FrameFlags::default(),
        bucket: BucketId(0),
        epoch: Epoch(1),
        step: Step(0),
        update: 0,
        body_bytes,
        roster_bytes: 0,
        lead: 0,
    }
}

async fn stream_with(connection: &Connection, bytes: &[u8]) -> quinn::SendStream {
    let (mut send, _) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    send
}

#[test]
fn a_frame_longer_than_its_limit() {
    removed_for("above the limit of", async |connection: &Connection| {
        vec![stream_with(connection, &header(200 << 20).encode()).await]
    });
}

#[test]
fn a_frame_of_the_wrong_length() {
    removed_for("bytes", async |connection: &Connection| {
        let mut bytes = header(3).encode().to_vec();
        bytes.extend([0; 3]);
        vec![stream_with(connection, &bytes).await]
    });
}

#[test]
fn streams_on_which_nothing_comes() {
    removed_for("no frame came on it", async |connection: &Connection| {
        let mut kept = Vec::new();
        for _ in 0..3 {
            // A stream is opened by its first byte.
            kept.push(stream_with(connection, &[1]).await);
        }
        kept
    });
}

#[test]
fn garbage_on_a_round_stream() {
    removed_for("header cannot be read", async |connection: &Connection| {
        vec![stream_with(connection, &[0xa5; 4 * HEADER_BYTES]).await]
    });
}

#[test]
fn a_frame_of_a_step_far_ahead() {
    removed_for("step", async |connection: &Connection| {
        let ahead = FrameHeader {
            step: Step(1000),
            ..header(0)
        };
        vec![stream_with(connection, &ahead.encode()).await]
    });
}

#[test]
fn garbage_after_the_handshake() {
    untouched_by(|job| {
        let error = job.runtime.block_on(async {
            let connection = dial(job).await;
            let _kept = stream_with(&connection, &[0xa5; 4096]).await;
            connection_error("the shard", &connection.closed().await)
        });
        match &error {
            TransportError::Closed { code, reason, .. } => {
                assert_eq!(*code, RefusalCode::Protocol as u64);
                assert!(reason.contains("Hello"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn many_connections_that_say_nothing() {
    untouched_by(|job| {
        let errors = job.runtime.block_on(async {
            let mut idle = Vec::new();
            for _ in 0..8 {
                idle.push(dial(job).await);
            }
            let mut errors = Vec::new();
            for connection in idle {
                errors.push(connection_error("the shard", &connection.closed().await));
            }
            errors
        });
        for error in errors {
            assert!(error.to_string().contains("no Hello came"), "{error}");
        }
    });
}

#[test]
fn datagrams_that_are_not_quic() {
    untouched_by(|job| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for length in [0, 1, 7, 1200, 9000] {
            let garbage: Vec<u8> = (0..length).map(|at: u32| (at * 37 + 11) as u8).collect();
            socket
                .send_to(&garbage, job.servers[0].quic_address())
                .unwrap();
        }
    });
}

#[test]
fn a_port_in_use() {
    untouched_by(|job| {
        let taken = job.servers[0].quic_address();
        let options = job.options(taken, 0, 1);
        let error = job.runtime.block_on(Server::start(options)).unwrap_err();
        assert!(
            matches!(
                error,
                ServeError::Transport(TransportError::PortInUse { .. })
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("--listen"), "{error}");
    });
}
