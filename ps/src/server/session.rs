//! One worker's connection: its control stream and its round streams.

use super::frames::{self, FrameFault};
use super::{GOODBYE, Hub};
use crate::shard::{Event, Report, SessionId};
use arc_topk_common::ids::{BucketId, Rank, Step};
use arc_topk_common::wire::{Control, FrameKind, RefusalCode};
use arc_topk_transport::{
    Connection, ControlReceiver, ControlSender, ControlStream, Endpoint, LEAVE_CODE, RecvStream,
    SendStream, VarInt, connection_error, write_frame,
};
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Control messages that may wait for a slow reader.
const CONTROL_QUEUED: usize = 256;
/// After a worker left, the time it has to close its connection.
const LEAVE_PATIENCE: Duration = Duration::from_secs(10);
/// Longest text inside a QUIC close, bytes.
const CLOSE_TEXT_BYTES: usize = 512;
const NO_RANK: u32 = u32::MAX;

/// What the control writer is asked.
#[derive(Debug)]
pub(super) enum Outgoing {
    Message(Control),
    Close(RefusalCode, String),
}

/// How the owner reaches a session.
#[derive(Debug)]
pub(super) struct SessionHandle {
    control: mpsc::Sender<Outgoing>,
    pub(super) connection: Connection,
    rank: AtomicU32,
}

impl SessionHandle {
    pub(super) fn queue(&self, outgoing: Outgoing) {
        if self.control.try_send(outgoing).is_err() {
            // Full: it reads nothing. Closed: it is going already.
            close(
                &self.connection,
                RefusalCode::Protocol,
                "control messages are not read",
            );
        }
    }

    pub(super) fn set_rank(&self, rank: Rank) {
        self.rank.store(u32::from(rank.0), Ordering::Relaxed);
    }

    pub(super) fn rank(&self) -> Option<Rank> {
        u16::try_from(self.rank.load(Ordering::Relaxed))
            .ok()
            .map(Rank)
    }
}

/// Takes connections until the endpoint closes.
pub(super) async fn accept(hub: Arc<Hub>, endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        if hub.sessions.len() >= hub.sessions_limit || hub.closing.load(Ordering::Relaxed) {
            incoming.refuse();
            continue;
        }
        let hub = hub.clone();
        tokio::spawn(async move {
            let peer = incoming.remote_address().to_string();
            match incoming.await {
                Ok(connection) => serve(hub, connection, &peer).await,
                Err(error) => {
                    hub.metrics.handshake_failed();
                    let error = connection_error(&peer, &error);
                    tracing::warn!(%peer, %error, "a handshake failed");
                }
            }
        });
    }
}

/// A connection, from its handshake to its end.
async fn serve(hub: Arc<Hub>, connection: Connection, peer: &str) {
    let id = SessionId(hub.next_session.fetch_add(1, Ordering::Relaxed));
    let patience = hub.timeouts.hello;
    let first = timeout(patience, async {
        let mut control = ControlStream::accept(&connection, peer).await?;
        let hello = control.receiver.recv().await;
        Ok::<_, arc_topk_transport::TransportError>((control, hello))
    });
    let (control, hello) = match first.await {
        Ok(Ok(came)) => came,
        Ok(Err(error)) => {
            return tracing::debug!(peer, %error, "a connection ended before its Hello");
        }
        Err(_) => {
            let detail = format!(
                "no Hello came within {:.1} s of the handshake: run arc-worker of the same release",
                patience.as_secs_f64()
            );
            tracing::warn!(peer, "{detail}");
            hub.metrics.refused(RefusalCode::Protocol);
            return close(&connection, RefusalCode::Protocol, &detail);
        }
    };
    let (sender, queue) = mpsc::channel(CONTROL_QUEUED);
    let handle = SessionHandle {
        control: sender,
        connection: connection.clone(),
        rank: AtomicU32::new(NO_RANK),
    };
    hub.sessions.insert(id, handle);
    let mut tasks = JoinSet::new();
    let writer = tokio::spawn(write_control(control.sender, queue, connection.clone()));
    hub.event(match hello {
        Ok(Some(Control::Hello(hello))) => Event::Hello { session: id, hello },
        Ok(_) => violation(id, "the first control message must be a Hello".to_owned()),
        Err(error) => violation(id, format!("the Hello cannot be read: {error}")),
    })
    .await;
    tasks.spawn(read_control(
        hub.clone(),
        id,
        control.receiver,
        connection.clone(),
    ));
    let error = loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                while tasks.try_join_next().is_some() {}
                tasks.spawn(round_stream(hub.clone(), id, send, recv, peer.to_owned()));
            }
            Err(error) => break connection_error(peer, &error),
        }
    };
    tasks.shutdown().await;
    // The connection's end may overtake the Leave message.
    if matches!(&error, arc_topk_transport::TransportError::Closed { code, .. } if *code == u64::from(LEAVE_CODE))
    {
        hub.event(Event::Leave { session: id }).await;
    }
    hub.event(Event::Closed {
        session: id,
        reason: error.to_string(),
    })
    .await;
    if let Some((_, handle)) = hub.sessions.remove(&id)
        && let Some(rank) = handle.rank()
    {
        hub.metrics.forget_connection(rank.0);
    }
    // With the handle its queue ends, and so does the writer.
    let _ended = writer.await;
}

fn violation(session: SessionId, detail: String) -> Event {
    Event::Violation { session, detail }
}

fn close(connection: &Connection, code: RefusalCode, detail: &str) {
    let mut end = detail.len().min(CLOSE_TEXT_BYTES);
    while !detail.is_char_boundary(end) {
        end -= 1;
    }
    connection.close(VarInt::from_u32(code as u32), &detail.as_bytes()[..end]);
}

async fn write_control(
    mut sender: ControlSender,
    mut queue: mpsc::Receiver<Outgoing>,
    connection: Connection,
) {
    while let Some(outgoing) = queue.recv().await {
        match outgoing {
            Outgoing::Message(message) => {
                // A peer that takes no messages is still to see the close's code and text; a connection
                // that ended is noticed where streams are accepted.
                let _not_taken = sender.send(&message).await;
            }
            Outgoing::Close(code, detail) => {
                // The refusal's text first; a peer that does not take it gets the close alone.
                let _slow = timeout(GOODBYE / 2, sender.finish()).await;
                return close(&connection, code, &detail);
            }
        }
    }
}

async fn read_control(
    hub: Arc<Hub>,
    id: SessionId,
    mut receiver: ControlReceiver,
    connection: Connection,
) {
    loop {
        match receiver.recv().await {
            Ok(Some(Control::Leave)) => {
                hub.event(Event::Leave { session: id }).await;
                // It closes when its last answers are in; one that stays for ever would hold a place.
                tokio::time::sleep(LEAVE_PATIENCE).await;
                return connection.close(VarInt::from_u32(0), b"left");
            }
            Ok(Some(message)) => match Report::from_control(&message) {
                Some(report) => {
                    hub.event(Event::Report {
                        session: id,
                        report,
                    })
                    .await
                }
                None => {
                    let detail = "after the Hello a worker sends only reports and its leave; run the same release everywhere";
                    return hub.event(violation(id, detail.to_owned())).await;
                }
            },
            Ok(None) => {
                return hub
                    .event(violation(
                        id,
                        "the control stream ended without a leave".to_owned(),
                    ))
                    .await;
            }
            Err(arc_topk_transport::TransportError::Wire(error)) => {
                return hub
                    .event(violation(
                        id,
                        format!("a control message cannot be read: {error}"),
                    ))
                    .await;
            }
            // The connection is gone: `serve` sees how it ended, and says so once.
            Err(_) if connection.close_reason().is_some() => return,
            Err(error) => return hub.event(violation(id, error.to_string())).await,
        }
    }
}

/// Takes a round's entry out again, however its task ends.
struct Registration<'a> {
    hub: &'a Hub,
    key: (SessionId, Step, BucketId),
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.hub.streams.remove(&self.key);
    }
}

/// One round, phase by phase.
async fn round_stream(
    hub: Arc<Hub>,
    id: SessionId,
    mut send: SendStream,
    mut recv: RecvStream,
    peer: String,
) {
    let mut registration: Option<Registration<'_>> = None;
    let (answer, mut answers) = mpsc::unbounded_channel();
    loop {
        let limit = hub.body_limit.load(Ordering::Relaxed);
        let patience = registration.is_none().then_some(hub.timeouts.header);
        let (header, body) = match frames::read(&mut recv, limit, patience, hub.timeouts.body).await
        {
            Ok(frame) => frame,
            Err(fault) => return faulty(&hub, id, &fault).await,
        };
        wait_at_random(hub.chaos_delay).await;
        let key = (id, header.step, header.bucket);
        match &registration {
            None => {
                hub.streams.insert(key, answer.clone());
                registration = Some(Registration { hub: &hub, key });
            }
            Some(registration) if registration.key != key => {
                let detail = "a stream carries one round, but frames of two came on it; run the same release everywhere";
                return hub.event(violation(id, detail.to_owned())).await;
            }
            Some(_) => {}
        }
        hub.event(Event::Round {
            session: id,
            header,
            body,
        })
        .await;
        let Some((header, body)) = answers.recv().await else {
            return;
        };
        if let Err(error) = write_frame(&mut send, &header, body, &peer).await {
            return tracing::debug!(peer, %error, "an answer was not taken");
        }
        if header.kind != FrameKind::Selection || header.flags.non_finite {
            // Already finished means that the peer stopped it.
            let _stopped = send.finish();
            return;
        }
    }
}

/// Shuffles the order in which frames of different streams are handled.
async fn wait_at_random(most: Duration) {
    if !most.is_zero() {
        let random = RandomState::new().hash_one(()) as f64 / u64::MAX as f64;
        tokio::time::sleep(most.mul_f64(random)).await;
    }
}

async fn faulty(hub: &Hub, id: SessionId, fault: &FrameFault) {
    let lost = hub
        .sessions
        .get(&id)
        .is_none_or(|handle| handle.connection.close_reason().is_some());
    if !lost {
        hub.event(violation(id, fault.to_string())).await;
    }
}
