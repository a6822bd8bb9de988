//! One worker's connection: its place, its first message and its round streams.

use super::control::{self, SessionHandle, turn_away};
use super::frames::{self, FrameFault};
use super::{Hub, observe, store};
use crate::shard::{Event, SessionId};
use arc_topk_common::ids::{BucketId, Step};
use arc_topk_common::metrics::Flow;
use arc_topk_common::wire::{Control, FrameHeader, Hello};
use arc_topk_transport::{
    Connection, ControlStream, Endpoint, LEAVE_CODE, REDIAL_CODE, RecvStream, SendStream, Service,
    TransportError, connection_error, write_frame,
};
use bytes::Bytes;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// One of the connections that the shard bears, from before its handshake to its end.
struct Place(Arc<Hub>);

impl Place {
    fn take(hub: &Arc<Hub>) -> Option<Self> {
        let free = |taken| (taken < hub.connections_limit).then_some(taken + 1);
        hub.connections
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, free)
            .ok()
            .map(|_| Self(hub.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes connections until the endpoint closes.
pub(super) async fn accept(hub: Arc<Hub>, endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        // When places run short, an address must show first that it exists: a forged one takes none.
        let scarce = 2 * hub.connections.load(Ordering::Relaxed) >= hub.connections_limit;
        if scarce && !incoming.remote_address_validated() {
            if let Err(error) = incoming.retry() {
                error.into_incoming().refuse();
            }
            continue;
        }
        let open = !hub.closing.load(Ordering::Relaxed);
        let Some(place) = open.then(|| Place::take(&hub)).flatten() else {
            incoming.refuse();
            continue;
        };
        let hub = hub.clone();
        tokio::spawn(async move {
            let _held_to_the_end = place;
            let peer = incoming.remote_address().to_string();
            match incoming.await {
                Ok(connection) => match Service::of(&connection) {
                    Some(Service::Store) => store::serve(hub, connection, &peer).await,
                    Some(Service::Training) | None => serve(hub, connection, &peer).await,
                },
                Err(error) => {
                    hub.metrics.handshake_failed();
                    let error = connection_error(&peer, &error);
                    tracing::warn!(%peer, %error, "a handshake failed");
                }
            }
        });
    }
}

/// The first message, if it is a Hello and comes in time; any other peer is turned away.
async fn greeting(
    hub: &Hub,
    connection: &Connection,
    peer: &str,
) -> Option<(ControlStream, Box<Hello>)> {
    let patience = hub.timeouts.hello;
    let first = timeout(patience, async {
        let mut control = ControlStream::accept(connection, peer).await?;
        let hello = control.receiver.recv_within(&hub.long_hellos).await;
        Ok::<_, TransportError>((control, hello))
    });
    let (control, detail) = match first.await {
        Ok(Ok((control, Ok(Some(Control::Hello(hello)))))) => return Some((control, hello)),
        Ok(Ok((control, Ok(_)))) => (
            Some(control),
            "the first control message must be a Hello: run arc-worker of the same release"
                .to_owned(),
        ),
        Ok(Err(error) | Ok((_, Err(error)))) if connection.close_reason().is_some() => {
            tracing::debug!(peer, %error, "a connection ended before its Hello");
            return None;
        }
        Ok(Ok((control, Err(error)))) => {
            (Some(control), format!("the Hello cannot be read: {error}"))
        }
        Ok(Err(error)) => (None, format!("no control stream came: {error}")),
        Err(_) => (
            None,
            format!(
                "no Hello came within {:.1} s of the handshake: run arc-worker of the same release",
                patience.as_secs_f64()
            ),
        ),
    };
    turn_away(hub, control, connection, detail).await;
    None
}

/// A connection, from its handshake to its end.
async fn serve(hub: Arc<Hub>, connection: Connection, peer: &str) {
    let Some((control, hello)) = greeting(&hub, &connection, peer).await else {
        return;
    };
    let id = SessionId(hub.next_session.fetch_add(1, Ordering::Relaxed));
    let (handle, asked) = SessionHandle::new(connection.clone());
    hub.sessions.insert(id, handle);
    let mut tasks = JoinSet::new();
    let writer = control::write(hub.clone(), control.sender, asked, connection.clone());
    let writer = tokio::spawn(writer);
    let message = Control::Hello(hello);
    observe::control(&hub, Flow::Up, &message);
    if let Control::Hello(hello) = message {
        hub.event(Event::Hello { session: id, hello }).await;
    }
    let reader = control::read(hub.clone(), id, control.receiver, connection.clone());
    tasks.spawn(reader);
    let received = Arc::new(AtomicU64::new(0));
    let error = loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                while tasks.try_join_next().is_some() {}
                let session = RoundSession {
                    hub: hub.clone(),
                    id,
                    connection: connection.clone(),
                    received: received.clone(),
                };
                tasks.spawn(round_stream(session, send, recv));
            }
            Err(error) => break connection_error(peer, &error),
        }
    };
    tasks.shutdown().await;
    // The connection's end may overtake the Leave message.
    if matches!(&error, TransportError::Closed { code, .. } if *code == u64::from(LEAVE_CODE)) {
        hub.event(Event::Leave { session: id }).await;
    }
    hub.event(Event::Closed {
        session: id,
        reason: error.to_string(),
        for_good: is_for_good(&error),
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

/// Whether the worker itself has ended the session. One that fell silent may have lost its way, and one that dials again
/// says so.
fn is_for_good(end: &TransportError) -> bool {
    matches!(end, TransportError::Closed { code, .. } if *code != u64::from(REDIAL_CODE))
}

fn violation(session: SessionId, detail: String) -> Event {
    Event::Violation { session, detail }
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

/// What the rounds of a session share.
struct RoundSession {
    hub: Arc<Hub>,
    id: SessionId,
    connection: Connection,
    /// Bytes read from its round streams.
    received: Arc<AtomicU64>,
}

/// One round, phase by phase.
async fn round_stream(session: RoundSession, mut send: SendStream, mut recv: RecvStream) {
    let RoundSession { hub, id, .. } = &session;
    let id = *id;
    let mut registration: Option<Registration<'_>> = None;
    let (answer, mut answers) = mpsc::unbounded_channel();
    loop {
        let limit = hub.body_limit.load(Ordering::Relaxed);
        let header = registration.is_none().then_some(hub.timeouts.header);
        let patience = frames::Patience {
            received: &session.received,
            header,
            body: hub.timeouts.body,
        };
        let (header, body) = match frames::read(&mut recv, limit, patience).await {
            Ok(frame) => frame,
            Err(fault) => return faulty(hub, id, &fault).await,
        };
        observe::header(hub, Flow::Up);
        wait_at_random(hub.chaos_delay).await;
        if header.flags.held && registration.is_none() {
            return held(&session, (send, recv), (header, body)).await;
        }
        let key = (id, header.step, header.bucket);
        match &registration {
            None => {
                hub.streams.insert(key, answer.clone());
                registration = Some(Registration { hub, key });
            }
            Some(registration) if registration.key != key || header.flags.held => {
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
        match answer_with(&session, &mut send, &header, body).await {
            None => return faulty(hub, id, &FrameFault::NotTaken(hub.timeouts.body)).await,
            Some(Err(error)) => {
                return tracing::debug!(session = id.0, %error, "an answer was not taken");
            }
            Some(Ok(())) => observe::header(hub, Flow::Down),
        }
        if !header.kind.goes_on() || header.flags.non_finite {
            // Already finished means that the peer stopped it.
            let _stopped = send.finish();
            return;
        }
    }
}

/// Answers that the worker holds, told to a shard that has forgotten them. Nothing comes back.
async fn held(
    session: &RoundSession,
    (mut send, mut recv): (SendStream, RecvStream),
    first: (FrameHeader, Bytes),
) {
    let RoundSession { hub, id, .. } = session;
    let id = *id;
    // Already finished means that the peer stopped it.
    let _stopped = send.finish();
    let mut next = Some(first);
    while let Some((header, body)) = next {
        if !header.flags.held {
            let detail =
                "the stream of held answers brought another frame; run the same release everywhere";
            return hub.event(violation(id, detail.to_owned())).await;
        }
        let round = Event::Round {
            session: id,
            header,
            body,
        };
        hub.event(round).await;
        let limit = hub.body_limit.load(Ordering::Relaxed);
        let patience = frames::Patience {
            received: &session.received,
            header: Some(hub.timeouts.header),
            body: hub.timeouts.body,
        };
        next = match frames::read(&mut recv, limit, patience).await {
            Ok(frame) => Some(frame),
            Err(FrameFault::Finished) => None,
            Err(fault) => return faulty(hub, id, &fault).await,
        };
        if next.is_some() {
            observe::header(hub, Flow::Up);
        }
    }
}

/// `None` if the peer grants no room for the answer, while nothing else goes to it either: it would keep its places, and a
/// member that reads nothing would hold up the others' rounds once it has no stream left.
async fn answer_with(
    session: &RoundSession,
    send: &mut SendStream,
    header: &FrameHeader,
    body: Bytes,
) -> Option<Result<(), TransportError>> {
    let sent = || session.connection.stats().udp_tx.bytes;
    let writing = write_frame(send, header, body, "the worker");
    frames::while_moving(session.hub.timeouts.body, &sent, &mut sent(), writing).await
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
