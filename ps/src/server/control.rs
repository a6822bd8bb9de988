//! One session's control stream: how the owner reaches it, what is written to it and what is read.

use super::{GOODBYE, Hub, observe};
use crate::shard::{Event, Report, SessionId};
use arc_topk_common::ids::Rank;
use arc_topk_common::metrics::Flow;
use arc_topk_common::wire::{Control, RefusalCode};
use arc_topk_transport::{
    Connection, ControlReceiver, ControlSender, ControlStream, TransportError, VarInt,
};
use core::sync::atomic::{AtomicU32, Ordering};
use core::time::Duration;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// Control messages that may wait for a slow reader.
const CONTROL_QUEUED: usize = 256;
/// After a worker left, the time it has to close its connection.
const LEAVE_PATIENCE: Duration = Duration::from_secs(10);
/// Time for a refusal's text to arrive; a peer that does not take it sees the connection close alone.
const LAST_WORDS: Duration = GOODBYE.checked_div(2).expect("2 is not 0");
/// Longest text inside a QUIC close, bytes.
const CLOSE_TEXT_BYTES: usize = 512;
const NO_RANK: u32 = u32::MAX;

/// Why the machine ends a session.
type Ending = Option<(RefusalCode, String)>;

/// How the owner reaches a session.
#[derive(Debug)]
pub(super) struct SessionHandle {
    messages: mpsc::Sender<Control>,
    ending: watch::Sender<Ending>,
    pub(super) connection: Connection,
    rank: AtomicU32,
}

/// What the session's writer is asked.
pub(super) struct Asked {
    messages: mpsc::Receiver<Control>,
    ending: watch::Receiver<Ending>,
}

impl SessionHandle {
    pub(super) fn new(connection: Connection) -> (Self, Asked) {
        let (messages, queue) = mpsc::channel(CONTROL_QUEUED);
        let (ending, ended) = watch::channel(None);
        let handle = Self {
            messages,
            ending,
            connection,
            rank: AtomicU32::new(NO_RANK),
        };
        let asked = Asked {
            messages: queue,
            ending: ended,
        };
        (handle, asked)
    }

    pub(super) fn queue(&self, message: Control) {
        if self.messages.try_send(message).is_err() {
            // Full: it reads nothing. Closed: it is going already.
            close(
                &self.connection,
                RefusalCode::Protocol,
                "control messages are not read",
            );
        }
    }

    /// Closes the connection, after what was queued if the peer takes that soon.
    pub(super) fn end(&self, code: RefusalCode, detail: String) {
        self.ending.send_replace(Some((code, detail)));
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

pub(super) fn close(connection: &Connection, code: RefusalCode, detail: &str) {
    let mut end = detail.len().min(CLOSE_TEXT_BYTES);
    while !detail.is_char_boundary(end) {
        end -= 1;
    }
    connection.close(VarInt::from_u32(code as u32), &detail.as_bytes()[..end]);
}

/// Refuses a peer that did not begin with a Hello: the machine never hears of it.
pub(super) async fn turn_away(
    hub: &Hub,
    control: Option<ControlStream>,
    connection: &Connection,
    detail: String,
) {
    tracing::warn!(peer = %connection.remote_address(), "{detail}");
    let code = RefusalCode::Protocol;
    hub.metrics.refused(code);
    if let Some(mut control) = control {
        let refusal = Control::Refused {
            code,
            detail: detail.clone(),
        };
        let said = async {
            send(hub, &mut control.sender, &refusal).await;
            control.sender.finish().await
        };
        let _slow = timeout(LAST_WORDS, said).await;
    }
    close(connection, code, &detail);
}

/// Writes until the session's handle is gone or the machine ends the session.
pub(super) async fn write(
    hub: Arc<Hub>,
    mut sender: ControlSender,
    mut asked: Asked,
    connection: Connection,
) {
    let mut ending = asked.ending.clone();
    // A peer may grant no byte on this stream, and would otherwise be refused for ever.
    let late = async {
        if !to_end(&mut ending).await {
            core::future::pending::<()>().await;
        }
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        () = tell(&hub, &mut sender, &mut asked) => {}
        () = late => {}
    }
    if let Some((code, detail)) = &*asked.ending.borrow() {
        close(&connection, *code, detail);
    }
}

/// Waits until the session is to end; false if its handle goes before.
async fn to_end(ending: &mut watch::Receiver<Ending>) -> bool {
    ending.wait_for(Option::is_some).await.is_ok()
}

/// What is queued, and then, once the session is to end, the stream's end.
async fn tell(hub: &Hub, sender: &mut ControlSender, asked: &mut Asked) {
    loop {
        tokio::select! {
            biased;
            message = asked.messages.recv() => match message {
                Some(message) => send(hub, sender, &message).await,
                None => return,
            },
            _ = to_end(&mut asked.ending) => break,
        }
    }
    let _gone = sender.finish().await;
}

async fn send(hub: &Hub, sender: &mut ControlSender, message: &Control) {
    // A connection that ended is noticed where streams are accepted.
    if sender.send(message).await.is_ok() {
        observe::control(hub, Flow::Down, message);
    }
}

fn violation(session: SessionId, detail: impl Into<String>) -> Event {
    let detail = detail.into();
    Event::Violation { session, detail }
}

/// What the machine is told of a message that a worker may send after its Hello and before its leave; `None`: it may not.
fn event_of(session: SessionId, message: Control) -> Option<Event> {
    match &message {
        Control::Report { .. } => {
            Report::from_control(&message).map(|report| Event::Report { session, report })
        }
        Control::Retelling { .. }
        | Control::Away
        | Control::Ready { .. }
        | Control::Digest { .. }
        | Control::Donating { .. }
        | Control::Donated { .. }
        | Control::Membership { .. } => Some(Event::Control { session, message }),
        Control::Hello(_)
        | Control::Welcome(_)
        | Control::Waiting { .. }
        | Control::Refused { .. }
        | Control::DigestsDiffer { .. }
        | Control::Donate
        | Control::Leave => None,
    }
}

/// Reads until the stream or the connection ends.
pub(super) async fn read(
    hub: Arc<Hub>,
    id: SessionId,
    mut receiver: ControlReceiver,
    connection: Connection,
) {
    loop {
        let received = receiver.recv().await;
        if let Ok(Some(message)) = &received {
            observe::control(&hub, Flow::Up, message);
        }
        let event = match received {
            Ok(Some(Control::Leave)) => {
                hub.event(Event::Leave { session: id }).await;
                // It closes when its last answers are in; one that stays for ever would hold a place.
                tokio::time::sleep(LEAVE_PATIENCE).await;
                return connection.close(VarInt::from_u32(0), b"left");
            }
            Ok(Some(message)) => match event_of(id, message) {
                Some(event) => {
                    hub.event(event).await;
                    continue;
                }
                None => violation(
                    id,
                    "after the Hello a worker sends no message of a shard's, and no second Hello; run the same release everywhere",
                ),
            },
            Ok(None) => violation(id, "the control stream ended without a leave"),
            Err(TransportError::Wire(error)) => {
                violation(id, format!("a control message cannot be read: {error}"))
            }
            // The connection is gone: `serve` sees how it ended, and says so once.
            Err(_) if connection.close_reason().is_some() => return,
            Err(error) => violation(id, error.to_string()),
        };
        return hub.event(event).await;
    }
}
