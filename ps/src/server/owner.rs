//! The thread that owns the machine. Sums run at memory speed and would hold up an async worker; here they hold up
//! nothing but each other.

use super::{Hub, observe};
use crate::shard::{Action, Event, Shard, Status};
use arc_topk_common::wire::Control;
use core::sync::atomic::Ordering;
use std::io;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};

/// Streams that a worker may have open beside those of rounds: one for answers that it tells.
const HELD_STREAMS: u32 = 1;

/// What the owner is asked.
#[derive(Debug)]
pub(super) enum Command {
    Event(Event),
    Status(oneshot::Sender<Box<Status>>),
    Stop,
}

pub(super) fn spawn(shard: Shard, queue: mpsc::Receiver<Command>, hub: Arc<Hub>) -> io::Result<()> {
    let name = format!("shard-{}", shard.config().shard);
    std::thread::Builder::new()
        .name(name)
        .spawn(move || own(shard, queue, &hub))
        .map(drop)
}

fn own(mut shard: Shard, mut queue: mpsc::Receiver<Command>, hub: &Hub) {
    let mut actions = Vec::new();
    while let Some(command) = queue.blocking_recv() {
        match command {
            Command::Stop => return,
            Command::Status(reply) => {
                // Whoever asked may have gone.
                let _gone = reply.send(Box::new(shard.status(hub.started.elapsed())));
            }
            Command::Event(event) => {
                let begun = Instant::now();
                let (is_frame, is_tick) = (
                    matches!(event, Event::Round { .. }),
                    matches!(event, Event::Tick),
                );
                shard.handle(hub.started.elapsed(), event, &mut actions);
                if is_frame {
                    hub.metrics.aggregated(begun.elapsed().as_secs_f64());
                }
                set_limits(hub, &shard);
                set_deadline(hub, &shard);
                if is_tick || actions.iter().any(observe::changes_membership) {
                    observe::load(hub, &shard);
                }
                actions.drain(..).for_each(|action| route(hub, action));
            }
        }
    }
}

fn route(hub: &Hub, action: Action) {
    match action {
        Action::Control { session, message } => {
            let Some(handle) = hub.sessions.get(&session) else {
                return;
            };
            if let Control::Welcome(welcome) = &message {
                handle.set_rank(welcome.place.rank);
                let streams = hub.stream_limit.load(Ordering::Relaxed);
                arc_topk_transport::admit(&handle.connection, &hub.transport, streams);
            }
            handle.queue(message);
        }
        Action::Round {
            session,
            header,
            body,
        } => {
            let stream = hub.streams.get(&(session, header.step, header.bucket));
            // A worker that gave the stream up is about to be removed.
            let sent = stream.is_some_and(|stream| stream.send((header, body)).is_ok());
            if !sent {
                tracing::debug!(?session, step = %header.step, bucket = %header.bucket, "no stream for an answer");
            }
        }
        Action::Close {
            session,
            code,
            detail,
        } => {
            if let Some(handle) = hub.sessions.get(&session) {
                handle.end(code, detail);
            }
        }
        Action::Observe(observation) => observe::observation(hub, &observation),
    }
}

fn set_limits(hub: &Hub, shard: &Shard) {
    let rounds = u32::try_from(shard.open_rounds_limit()).unwrap_or(u32::MAX - 1);
    let streams = rounds.saturating_add(1 + HELD_STREAMS);
    hub.stream_limit.store(streams, Ordering::Relaxed);
    hub.body_limit.store(shard.body_limit(), Ordering::Relaxed);
}

fn set_deadline(hub: &Hub, shard: &Shard) {
    let deadline = shard.next_deadline();
    hub.deadline.send_if_modified(|known| {
        let modified = *known != deadline;
        *known = deadline;
        modified
    });
}
