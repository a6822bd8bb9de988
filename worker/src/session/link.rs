//! Tasks that move frames and control messages of one connection.

use super::shared::{Shared, Work};
use super::{NetEvent, NetObserver};
use crate::step::Outgoing;
use arc_topk_common::ids::{BucketId, ShardId};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{Control, FrameHeader, RoundShape};
use arc_topk_transport::{
    Connection, ControlReceiver, ControlSender, TransportError, connection_error, read_frame,
    write_frame,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

/// How long a leaving worker waits for shards to have its last words.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// The way to one shard.
pub(super) struct Link {
    pub(super) shard: ShardId,
    pub(super) connection: Connection,
    pub(super) peer: Arc<str>,
}

/// Where the engine puts the frames of one round.
pub(super) struct RoundOut(UnboundedSender<Outgoing>);

impl RoundOut {
    /// Bounded by the round: it has at most two frames up. A task that has ended has told why.
    pub(super) fn send(&self, frame: Outgoing) {
        let _ended_with_a_failure = self.0.send(frame);
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
            shard: self.shard,
            connection: self.connection.clone(),
            peer: Arc::clone(&self.peer),
            shared: Arc::clone(shared),
            bucket: header.bucket,
            limit: largest_answer(plan, self.shard, header),
        };
        runtime.spawn(task.run(frames));
        RoundOut(sender)
    }
}

/// Bytes of the longest body that the shard may answer with in this round.
fn largest_answer(plan: &Plan, shard: ShardId, header: &FrameHeader) -> usize {
    let shape = RoundShape::new(plan, header.bucket, shard, header.update);
    let answers = shape.phases().iter();
    let limits = answers.map(|phase| shape.body_limit(phase.down));
    limits.max().unwrap_or(0)
}

/// One round's stream: up and down alternate.
struct RoundTask {
    shard: ShardId,
    connection: Connection,
    peer: Arc<str>,
    shared: Arc<Shared>,
    bucket: BucketId,
    limit: usize,
}

impl RoundTask {
    async fn run(self, frames: UnboundedReceiver<Outgoing>) {
        if let Err(error) = self.exchange(frames).await {
            self.shared.fail_transport(self.shard, &error);
        }
    }

    async fn exchange(
        &self,
        mut frames: UnboundedReceiver<Outgoing>,
    ) -> Result<(), TransportError> {
        let halves = self.connection.open_bi().await;
        let (mut send, mut recv) = halves.map_err(|e| connection_error(&self.peer, &e))?;
        // The next forward needs the highest bucket first; see the session's doc.
        let _closed_already = send.set_priority(i32::from(self.bucket.0));
        // The channel ends when a round that needs no second frame (non-finite) is forgotten.
        while let Some(frame) = frames.recv().await {
            write_frame(&mut send, &frame.header, frame.body, &self.peer).await?;
            if frame.last {
                let _closed_already = send.finish();
            }
            let answer = read_frame(&mut recv, self.limit, &self.peer).await?;
            let Some((header, body)) = answer else {
                return Err(TransportError::Truncated {
                    what: "a round, before its answer",
                    missing: arc_topk_common::wire::HEADER_BYTES,
                });
            };
            self.shared.arrived(Work::Frame {
                shard: self.shard,
                header,
                body,
            });
            if frame.last {
                break;
            }
        }
        Ok(())
    }
}

/// The sending side of a control stream, and the tasks that serve it.
pub(super) struct ControlOut {
    messages: UnboundedSender<Control>,
    writer: JoinHandle<()>,
}

impl ControlOut {
    /// Queues a message.
    pub(super) fn send(&self, message: Control) {
        let _ended_with_a_failure = self.messages.send(message);
    }
}

/// Serves the control stream of `shard`.
pub(super) fn spawn_control(
    runtime: &Handle,
    shared: &Arc<Shared>,
    shard: ShardId,
    sender: ControlSender,
    receiver: ControlReceiver,
    observer: Option<NetObserver>,
) -> ControlOut {
    let (messages, queue) = unbounded_channel();
    runtime.spawn(read_control(Arc::clone(shared), shard, receiver, observer));
    ControlOut {
        messages,
        writer: runtime.spawn(write_control(Arc::clone(shared), sender, queue)),
    }
}

/// Ends when the queue does, once the peer has everything. Failures are told by the reading side.
async fn write_control(
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

async fn read_control(
    shared: Arc<Shared>,
    shard: ShardId,
    mut receiver: ControlReceiver,
    observer: Option<NetObserver>,
) {
    loop {
        let received = receiver.recv().await;
        if let Ok(Some(message)) = &received {
            shared.control.add_received(message);
        }
        match received {
            Ok(Some(Control::Membership {
                epoch,
                members,
                reason,
            })) => {
                tracing::warn!(shard = shard.0, epoch = epoch.0, %reason, "{} workers remain", members.len());
                if shard == ShardId(0) {
                    shared.set_members(members.clone());
                    shared.arrived(Work::Epoch(epoch));
                }
                if let Some(observer) = &observer {
                    observer(&NetEvent::Membership {
                        shard,
                        epoch,
                        members,
                        reason,
                    });
                }
            }
            Ok(Some(Control::Refused { code, detail })) => {
                return shared.fail_refused(shard, code, detail);
            }
            Ok(Some(other)) => {
                tracing::warn!(shard = shard.0, ?other, "unexpected control message");
            }
            Ok(None) => {
                return shared.fail(crate::reducer::ReduceError::Disconnected {
                    shard: shard.0,
                    detail: "the shard ended the session without a reason; look at its log"
                        .to_owned(),
                });
            }
            Err(error) => return shared.fail_transport(shard, &error),
        }
    }
}

/// Tells every shard that this worker leaves, and waits until their machines have the message.
pub(super) async fn leave(controls: Vec<ControlOut>) {
    let mut waiting = Vec::with_capacity(controls.len());
    for control in controls {
        control.send(Control::Leave);
        drop(control.messages);
        waiting.push(control.writer);
    }
    let all = async {
        for writer in waiting {
            let _acknowledged = writer.await;
        }
    };
    if tokio::time::timeout(LEAVE_TIMEOUT, all).await.is_err() {
        tracing::debug!("not every shard confirmed the leave in time");
    }
}
