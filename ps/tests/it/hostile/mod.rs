//! Broken and hostile peers at the socket. While each does its worst, an honest worker steps on at the same shard, and the
//! memory of this process, in which both are, stays far below what was claimed or sent.

mod member;
mod outside;

use crate::net::{PATIENCE, Worker, answer, header, hello, options, spec_of, write_dense};
use arc_topk_common::wire::{CONTROL_LENGTH_BYTES, Control, Hello};
use arc_topk_ps::server::{Server, Timeouts};
use arc_topk_transport::certs::{Authority, CertRequest, Role};
use arc_topk_transport::{
    Connection, Endpoint, Identity, RecvStream, SendStream, TransportConfig, TransportError,
    client_endpoint, connect, connect_resolved, connection_error,
};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

/// Rows of four f32 in the plan: a body of 1 MiB.
const ROWS: u64 = 1 << 16;
/// Bytes of such a body.
const BODY: usize = 16 * ROWS as usize;
/// Between two bytes of a trickle.
const DRIP: Duration = Duration::from_millis(20);
/// What this process may grow by: other tests run in it too.
const GROWTH: usize = 512 << 20;

/// The bytes that no honest worker sends, all in one place: they follow `common::wire`.
mod crafted {
    use super::*;

    /// The start of a control message that claims a length.
    pub(super) fn control_claim(length: u32) -> [u8; CONTROL_LENGTH_BYTES] {
        length.to_le_bytes()
    }

    /// A control message as it travels.
    pub(super) fn framed(message: &Control) -> Vec<u8> {
        let body = message.encode();
        let length = u32::try_from(body.len()).unwrap();
        [&control_claim(length)[..], &body].concat()
    }

    /// A frame header that claims a body.
    pub(super) fn frame_claim(length: usize) -> Vec<u8> {
        header(0, length).encode().to_vec()
    }

    /// Bytes that mean nothing.
    pub(super) fn garbage(length: usize) -> Vec<u8> {
        let byte = |at: usize| (at.wrapping_mul(2_654_435_761) >> 7) as u8 | 0x80;
        (0..length).map(byte).collect()
    }
}
use crafted::{control_claim, frame_claim, framed, garbage};

fn own_hello() -> Hello {
    Hello {
        plan: spec_of(ROWS),
        ..hello()
    }
}

fn framed_hello() -> Vec<u8> {
    framed(&Control::Hello(Box::new(own_hello())))
}

/// A worker that steps until it is told to stop.
struct Honest {
    steps: watch::Receiver<u64>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl Honest {
    fn start(worker: Worker) -> Self {
        let (count, steps) = watch::channel(0);
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let (_sender, mut control) = (worker.control.sender, worker.control.receiver);
            // News of members are read, as a worker does.
            let news = tokio::spawn(async move {
                while let Ok(Some(message)) = control.recv().await {
                    assert!(!matches!(message, Control::Refused { .. }), "{message:?}");
                }
            });
            for step in 0.. {
                let (mut send, mut recv) = worker.connection.open_bi().await.unwrap();
                write_dense(&mut send, step, 1.0, worker.elements).await;
                let (header, _) = answer(&mut recv).await;
                assert!(header.flags.counted, "step {step}");
                count.send_replace(step + 1);
                if stopped.try_recv() != Err(oneshot::error::TryRecvError::Empty) {
                    break;
                }
            }
            assert!(!news.is_finished());
        });
        Self { steps, stop, task }
    }

    /// Waits for some more steps.
    async fn goes_on(&mut self) {
        let wished = *self.steps.borrow() + 5;
        timeout(PATIENCE, self.steps.wait_for(|steps| *steps >= wished))
            .await
            .expect("the honest worker goes on")
            .unwrap();
    }

    async fn stop(self) {
        drop(self.stop);
        self.task.await.unwrap();
    }
}

/// A peer with a good certificate and a good Hello, and nothing good to come.
struct Offender {
    connection: Connection,
    /// Both halves of the control stream.
    control: (SendStream, RecvStream),
}

/// Streams that are to stay open.
type Kept = Vec<(SendStream, RecvStream)>;

impl Offender {
    /// `None` if the connection has ended.
    async fn stream_with(&self, bytes: &[u8]) -> Option<(SendStream, RecvStream)> {
        let (mut send, recv) = self.connection.open_bi().await.ok()?;
        send.write_all(bytes).await.ok()?;
        Some((send, recv))
    }
}

/// A shard, and what peers need.
struct Site {
    server: Server,
    authority: Authority,
    dir: TempDir,
    identity: Identity,
}

fn request() -> CertRequest {
    CertRequest::new("job", &[], 2)
}

impl Site {
    async fn start(world: u16, timeouts: Timeouts) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(&request()).unwrap();
        for role in [Role::Shard, Role::Worker] {
            let place = dir.path().join(role.dir());
            authority.issue(&place, role, &request()).unwrap();
        }
        let mut options = options(Identity::load(&dir.path().join("shard")).unwrap(), world);
        options.timeouts = timeouts;
        options.transport = patient();
        let server = Server::start(options).await.unwrap();
        let identity = Identity::load(&dir.path().join("worker")).unwrap();
        Self {
            server,
            authority,
            dir,
            identity,
        }
    }

    fn address(&self) -> String {
        self.server.quic_address().to_string()
    }

    fn socket(&self) -> Endpoint {
        client_endpoint(self.server.quic_address(), &patient()).unwrap()
    }

    async fn dial_from(&self, socket: &Endpoint) -> Result<Connection, TransportError> {
        let address = self.server.quic_address();
        connect_resolved(socket, address, "localhost", &self.identity, &patient()).await
    }

    async fn join(&self) -> Worker {
        Worker::hello_with(&self.server, &self.identity, own_hello(), &patient()).await
    }

    async fn offender(&self, config: &TransportConfig) -> Offender {
        let connection = connect(&self.address(), &self.identity, config)
            .await
            .unwrap();
        let mut control = connection.open_bi().await.unwrap();
        control.0.write_all(&framed_hello()).await.unwrap();
        Offender {
            connection,
            control,
        }
    }
}

/// A machine that is busy with other tests must not look like a lost peer.
fn patient() -> TransportConfig {
    TransportConfig {
        idle_timeout: PATIENCE,
        connect_timeout: PATIENCE,
        ..TransportConfig::default()
    }
}

/// Short where a peer is to run out of it, long where an honest one is waited for.
fn timeouts() -> Timeouts {
    Timeouts {
        hello: Duration::from_secs(1),
        ..Timeouts::default()
    }
}

/// Resident bytes of this process.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Memory at some moment.
struct Before(usize);

impl Before {
    fn now() -> Self {
        Self(resident())
    }

    fn is_about_now(&self) {
        let grown = resident().saturating_sub(self.0);
        assert!(grown < GROWTH, "grown by {grown} bytes");
    }
}

/// Writes until the peer stops it.
async fn trickle(send: &mut SendStream, bytes: impl IntoIterator<Item = u8>) {
    for byte in bytes {
        if send.write_all(&[byte]).await.is_err() {
            return;
        }
        tokio::time::sleep(DRIP).await;
    }
}

async fn closed(connection: &Connection) -> TransportError {
    let error = timeout(PATIENCE, connection.closed()).await.unwrap();
    connection_error("the shard", &error)
}
