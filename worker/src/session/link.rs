//! Tasks that move frames and control messages of one connection.

use super::shared::{Shared, What};
use crate::reducer::ReduceError;
use crate::step::Outgoing;
use arc_topk_common::ids::{BucketId, ShardId, Step};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Control, Direction, FrameHeader, MAX_ROSTER_BYTES, RoundShape};
use arc_topk_transport::{
    Connection, ControlSender, TransportError, connection_error, read_frame, write_frame,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

/// How long a leaving worker waits for shards to have its last words.
pub(super) const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// A stream that ends may be the first sign that its connection does: how long the connection's end is awaited before the
/// stream's counts as a fault of the shard.
const STREAM_GRACE: Duration = Duration::from_secs(1);

/// One connection with a shard. What it brings is worth nothing once another one has taken its place.
pub(super) struct Link {
    /// Counts the shard's connections.
    pub(super) generation: u64,
    pub(super) shard: ShardId,
    pub(super) connection: Connection,
    pub(super) peer: Arc<str>,
    pub(super) control: ControlOut,
}

/// Where the engine puts the frames of one round.
pub(super) struct RoundOut {
    pub(super) step: Step,
    frames: UnboundedSender<Outgoing>,
}

impl RoundOut {
    /// Bounded by the round: it has at most two frames up. A task that has ended has told why.
    pub(super) fn send(&self, frame: Outgoing) {
        let _ended_with_its_connection = self.frames.send(frame);
    }
}

impl Link {
    /// Starts the task of the round that `header` opens.
    pub(super) fn open_round(
        &self,
        runtime: &Handle,
        shared: &Arc<Shared>,
        plan: &Plan,
        header: &FrameHeader,
    ) -> RoundOut {
        let (sender, frames) = unbounded_channel();
        let task = RoundTask {
            streams: self.streams(shared),
            generation: self.generation,
            bucket: header.bucket,
            limit: largest_answer(plan, self.shard, header),
        };
        runtime.spawn(task.run(frames));
        RoundOut {
            step: header.step,
            frames: sender,
        }
    }

    /// Tells the shard answers that this worker holds, on one stream of their own: a Selection must come before its Mean.
    pub(super) fn tell(&self, runtime: &Handle, shared: &Arc<Shared>, held: Vec<Outgoing>) {
        let streams = self.streams(shared);
        runtime.spawn(async move {
            let told = streams.tell(held).await;
            streams.end(told).await;
        });
    }

    fn streams(&self, shared: &Arc<Shared>) -> Streams {
        Streams {
            shard: self.shard,
            connection: self.connection.clone(),
            peer: Arc::clone(&self.peer),
            shared: Arc::clone(shared),
        }
    }
}

/// Bytes of the longest body that the shard may answer with in this round.
fn largest_answer(plan: &Plan, shard: ShardId, header: &FrameHeader) -> usize {
    let shape = RoundShape::new(plan, header.bucket, shard, header.update);
    shape.largest_body(Direction::Down) + MAX_ROSTER_BYTES
}

/// What every stream of a connection needs.
struct Streams {
    shard: ShardId,
    connection: Connection,
    peer: Arc<str>,
    shared: Arc<Shared>,
}

impl Streams {
    async fn tell(&self, held: Vec<Outgoing>) -> Result<(), TransportError> {
        let halves = self.connection.open_bi().await;
        let (mut send, _no_answer_comes) = halves.map_err(|e| connection_error(&self.peer, &e))?;
        // The shard, and with it everyone else, waits for these.
        let _closed_already = send.set_priority(i32::MAX - 1);
        for frame in held {
            write_frame(&mut send, &frame.header, frame.body, &self.peer).await?;
        }
        let _closed_already = send.finish();
        Ok(())
    }

    /// A stream that failed while its connection lives: the shard does not do what it should.
    async fn end(&self, result: Result<(), TransportError>) {
        let Err(error) = result else {
            return;
        };
        let ends = self.connection.closed();
        // Its supervisor knows why the connection ended, and what to do.
        if tokio::time::timeout(STREAM_GRACE, ends).await.is_err() {
            self.shared.fail(ReduceError::Disconnected {
                shard: self.shard.0,
                detail: error.to_string(),
            });
        }
    }
}

/// One round's stream: up and down alternate.
struct RoundTask {
    streams: Streams,
    generation: u64,
    bucket: BucketId,
    limit: usize,
}

impl RoundTask {
    async fn run(self, frames: UnboundedReceiver<Outgoing>) {
        let exchanged = self.exchange(frames).await;
        self.streams.end(exchanged).await;
    }

    async fn exchange(
        &self,
        mut frames: UnboundedReceiver<Outgoing>,
    ) -> Result<(), TransportError> {
        let Streams {
            connection, peer, ..
        } = &self.streams;
        let halves = connection.open_bi().await;
        let (mut send, mut recv) = halves.map_err(|e| connection_error(peer, &e))?;
        // The next forward needs the highest bucket first; see the session's doc.
        let _closed_already = send.set_priority(i32::from(self.bucket.0));
        // The channel ends when a round that needs no second frame (non-finite) is forgotten.
        while let Some(frame) = frames.recv().await {
            write_frame(&mut send, &frame.header, frame.body, peer).await?;
            if frame.last {
                let _closed_already = send.finish();
            }
            let answer = read_frame(&mut recv, self.limit, peer).await?;
            let Some((header, body)) = answer else {
                return Err(TransportError::Truncated {
                    what: "a round, before its answer",
                    missing: arc_topk_common::wire::HEADER_BYTES,
                });
            };
            let Streams { shared, shard, .. } = &self.streams;
            shared.arrived(*shard, self.generation, What::Frame(header, body));
            if frame.last {
                break;
            }
        }
        Ok(())
    }
}

/// The sending side of a control stream, and the task that serves it.
pub(super) struct ControlOut {
    messages: UnboundedSender<Control>,
    writer: JoinHandle<()>,
}

impl ControlOut {
    pub(super) fn new(messages: UnboundedSender<Control>, writer: JoinHandle<()>) -> Self {
        Self { messages, writer }
    }

    /// Queues a message.
    pub(super) fn send(&self, message: Control) {
        let _ended_with_its_connection = self.messages.send(message);
    }

    /// No message follows. The task ends when the shard has all.
    pub(super) fn end(self) -> JoinHandle<()> {
        self.writer
    }
}

/// Ends when the queue does, once the peer has everything. Failures are told by the reading side.
pub(super) async fn write_control(
    shared: Arc<Shared>,
    mut sender: ControlSender,
    mut queue: UnboundedReceiver<Control>,
) {
    while let Some(message) = queue.recv().await {
        if sender.send(&message).await.is_err() {
            return;
        }
        shared.control.add_sent(&message);
    }
    let _lost_while_leaving = sender.finish().await;
}

/// Waits until every shard has a leaving worker's last words.
pub(super) async fn left(writers: Vec<JoinHandle<()>>) {
    let all = async {
        for writer in writers {
            let _acknowledged = writer.await;
        }
    };
    if tokio::time::timeout(LEAVE_TIMEOUT, all).await.is_err() {
        tracing::debug!("not every shard confirmed the leave in time");
    }
}
