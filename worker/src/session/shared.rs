//! What the trainer's thread, the engine and the network tasks share.

use super::link::Link;
use crate::backend::{DeviceGradient, Lent};
use crate::member::{Member, Output};
use crate::reducer::ReduceError;
use arc_topk_common::ids::{BucketId, ShardId, TensorId};
use arc_topk_common::wire::{Control, FrameHeader, FrameKind, Intent, Welcome};
use arc_topk_transport::{Connection, Endpoint};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// What a connection with a shard brings.
pub(super) struct Event {
    pub(super) shard: ShardId,
    /// Which of the shard's connections.
    pub(super) generation: u64,
    pub(super) what: What,
}

pub(super) enum What {
    /// It is there: the shard has welcomed this worker.
    Up {
        link: Link,
        welcome: Welcome,
    },
    /// It is gone.
    Down {
        reason: String,
    },
    Frame(FrameHeader, Bytes),
    Control(Control),
}

/// Work for the engine.
pub(super) enum Work {
    /// From a shard.
    Net(Event),
    /// A shard is about to be dialled: what to say?
    Intent {
        shard: ShardId,
        reply: oneshot::Sender<Intent>,
    },
    /// A step opens. The machine knows already; what follows from it lies in its outputs.
    Begin,
    /// A gradient of a step.
    Fill(Attempt, TensorId, Pushed),
    /// No more gradients in this step.
    Flush(Attempt),
    /// A shard does not want this worker, whichever connection says so.
    Refused { shard: ShardId, message: Control },
    /// The trainer told the machine something: its outputs are to be sent.
    Told,
    /// This worker has left: the tasks that still say so come back.
    Left(mpsc::Sender<Vec<JoinHandle<()>>>),
}

impl Work {
    /// Whether the gradient of which it is has been computed: shards' answers are handled meanwhile, if not.
    fn is_computed(&self) -> bool {
        match self {
            Self::Fill(_, _, Pushed::OnDevice(gradient)) => gradient.is_ready(),
            _ => true,
        }
    }
}

/// One opening of a step. What was queued for one that has ended, with a commit or without, is dropped.
pub(super) type Attempt = u64;

/// A gradient on its way to the engine.
pub(super) enum Pushed {
    Copied(Vec<f32>),
    Lent(Lent),
    OnDevice(DeviceGradient),
}

/// What the engine finds when it asks for work.
pub(super) enum Next {
    Work(Work),
    /// Nothing came until the deadline.
    Deadline,
    /// The session has closed.
    Closed,
}

/// The machine and what it wants done. Both under one lock, so that whoever calls the machine, what follows is done in
/// the order of the calls.
pub(super) struct Core {
    pub(super) member: Member,
    pub(super) out: Vec<Output>,
    /// The one that is open, or will be next.
    pub(super) attempt: Attempt,
}

impl Core {
    /// What is open ends without a trace: what was lent is not touched any more, not even what is still queued.
    pub(super) fn abandon(&mut self) {
        self.attempt += 1;
        self.member.abandon();
    }
}

/// A connected shard.
pub(super) struct Peer {
    pub(super) connection: Connection,
    /// Drives the connection's socket.
    pub(super) endpoint: Endpoint,
}

/// Time between two looks at whether a gradient is there that a GPU computes.
const GPU_POLL: Duration = Duration::from_micros(50);

/// Least time between two looks of a trainer that waits.
const SHORTEST_WAIT: Duration = Duration::from_millis(10);

/// Queues and progress, all under one lock that is held only for pushes and pops.
struct Inner {
    /// Taken first.
    from_shards: VecDeque<Work>,
    from_trainer: VecDeque<Work>,
    queued_bytes: usize,
    /// Buffers for copies of gradients, to be used again: a fresh one costs its page faults each step.
    spare: Vec<Vec<f32>>,
    spare_bytes: usize,
    /// What fails from here on is no failure.
    leaving: bool,
    closed: bool,
    /// The newest attempt whose rounds have all closed.
    complete: Option<Attempt>,
    failure: Option<ReduceError>,
    last_progress: Instant,
    /// Rounds that wait for a shard, and the frame that was sent last.
    awaited: BTreeMap<(ShardId, BucketId), FrameKind>,
    /// Shards that are being dialled again.
    lost: BTreeSet<ShardId>,
    compress: Duration,
}

/// Bytes of control messages since they were last taken.
#[derive(Debug, Default)]
pub(super) struct ControlBytes {
    sent: AtomicU64,
    received: AtomicU64,
}

impl ControlBytes {
    pub(super) fn add_sent(&self, message: &Control) {
        self.sent
            .fetch_add(message.framed_bytes(), Ordering::Relaxed);
    }

    pub(super) fn add_received(&self, message: &Control) {
        self.received
            .fetch_add(message.framed_bytes(), Ordering::Relaxed);
    }

    /// (sent, received)
    pub(super) fn take(&self) -> (u64, u64) {
        (
            self.sent.swap(0, Ordering::Relaxed),
            self.received.swap(0, Ordering::Relaxed),
        )
    }
}

/// See the module.
pub(super) struct Shared {
    core: Mutex<Core>,
    started: Instant,
    pub(super) control: ControlBytes,
    /// The newest connection of every shard.
    peers: Mutex<BTreeMap<ShardId, Peer>>,
    inner: Mutex<Inner>,
    /// Something to do for the engine.
    work: Condvar,
    /// Something to see for the trainer: room in the queue, completion or failure.
    progress: Condvar,
    queue_bytes: usize,
}

impl Shared {
    pub(super) fn new(core: Core, queue_bytes: usize) -> Self {
        Self {
            core: Mutex::new(core),
            started: Instant::now(),
            control: ControlBytes::default(),
            peers: Mutex::new(BTreeMap::new()),
            inner: Mutex::new(Inner {
                from_shards: VecDeque::new(),
                from_trainer: VecDeque::new(),
                queued_bytes: 0,
                spare: Vec::new(),
                spare_bytes: 0,
                leaving: false,
                closed: false,
                complete: None,
                failure: None,
                last_progress: Instant::now(),
                awaited: BTreeMap::new(),
                lost: BTreeSet::new(),
                compress: Duration::ZERO,
            }),
            work: Condvar::new(),
            progress: Condvar::new(),
            queue_bytes,
        }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        // After a panic of the engine the session has failed and says so; the state between steps is whole.
        self.core.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The machine's clock.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The newest connection of every shard.
    pub(super) fn peers(&self) -> MutexGuard<'_, BTreeMap<ShardId, Peer>> {
        self.peers
            .lock()
            .expect("no code that can panic runs under this lock")
    }

    pub(super) fn register(&self, shard: ShardId, peer: Peer) {
        self.peers().insert(shard, peer);
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("no code that can panic runs under this lock")
    }

    // The trainer's side.

    pub(super) fn check(&self) -> Result<(), ReduceError> {
        self.inner().failure.clone().map_or(Ok(()), Err)
    }

    pub(super) fn begin(&self) {
        let mut inner = self.inner();
        inner.last_progress = Instant::now();
        inner.from_trainer.push_back(Work::Begin);
        self.work.notify_one();
    }

    /// Tells the machine something between steps and has the engine send what follows.
    pub(super) fn tell(&self, what: impl FnOnce(&mut Member, &mut Vec<Output>)) {
        let mut core = self.core();
        let Core { member, out, .. } = &mut *core;
        what(member, out);
        drop(core);
        self.after_all(Work::Told);
    }

    /// Queues work after all that the trainer queued.
    pub(super) fn after_all(&self, work: Work) {
        self.inner().from_trainer.push_back(work);
        self.work.notify_one();
    }

    /// Copies the gradient into the queue; waits for room in it, which the engine makes without the network.
    pub(super) fn push(
        &self,
        attempt: Attempt,
        tensor: TensorId,
        gradient: &[f32],
    ) -> Result<(), ReduceError> {
        let bytes = size_of_val(gradient);
        let mut inner = self.inner();
        while inner.failure.is_none()
            && inner.queued_bytes > 0
            && inner.queued_bytes + bytes > self.queue_bytes
        {
            inner = self
                .progress
                .wait(inner)
                .expect("no code that can panic runs under this lock");
        }
        if let Some(failure) = &inner.failure {
            return Err(failure.clone());
        }
        inner.queued_bytes += bytes;
        let mut copy = inner.take_spare(gradient.len());
        drop(inner);
        copy.clear();
        copy.extend_from_slice(gradient);
        self.after_all(Work::Fill(attempt, tensor, Pushed::Copied(copy)));
        Ok(())
    }

    /// Queues a gradient that stays where it is.
    pub(super) fn lend(
        &self,
        attempt: Attempt,
        tensor: TensorId,
        gradient: Pushed,
    ) -> Result<(), ReduceError> {
        self.check()?;
        self.after_all(Work::Fill(attempt, tensor, gradient));
        Ok(())
    }

    pub(super) fn flush(&self, attempt: Attempt) {
        let mut inner = self.inner();
        inner.last_progress = Instant::now();
        inner.from_trainer.push_back(Work::Flush(attempt));
        self.work.notify_one();
    }

    /// Returns when every round of `attempt` has closed, or with the reason why not.
    pub(super) fn wait_complete(
        &self,
        attempt: Attempt,
        limit: Duration,
    ) -> Result<(), ReduceError> {
        let mut inner = self.inner();
        loop {
            if let Some(failure) = &inner.failure {
                return Err(failure.clone());
            }
            if inner.complete == Some(attempt) {
                return Ok(());
            }
            if !inner.lost.is_empty() {
                // The patience with shards that are dialled is another.
                inner.last_progress = Instant::now();
            }
            let quiet = inner.last_progress.elapsed();
            if quiet >= limit && !inner.awaited.is_empty() {
                let stalled = inner.stalled(limit);
                return Err(inner.fail(stalled));
            }
            let rest = limit.saturating_sub(quiet).max(SHORTEST_WAIT);
            inner = self
                .progress
                .wait_timeout(inner, rest)
                .expect("no code that can panic runs under this lock")
                .0;
        }
    }

    pub(super) fn take_compress_time(&self) -> Duration {
        std::mem::take(&mut self.inner().compress)
    }

    /// From here on a closing shard is no failure, and is not dialled again.
    pub(super) fn leave(&self) {
        self.inner().leaving = true;
    }

    pub(super) fn is_ending(&self) -> bool {
        let inner = self.inner();
        inner.leaving || inner.closed
    }

    /// Ends the engine after what it is doing now.
    pub(super) fn close(&self) {
        self.inner().closed = true;
        self.work.notify_all();
    }

    // The network's side.

    pub(super) fn arrived(&self, shard: ShardId, generation: u64, what: What) {
        let event = Event {
            shard,
            generation,
            what,
        };
        self.urgent(Work::Net(event));
    }

    /// Queues work before all that the trainer queued.
    pub(super) fn urgent(&self, work: Work) {
        let mut inner = self.inner();
        inner.last_progress = Instant::now();
        inner.from_shards.push_back(work);
        self.work.notify_one();
    }

    /// Keeps the first failure; none after the session has closed.
    pub(super) fn fail(&self, failure: ReduceError) {
        let mut inner = self.inner();
        if !inner.closed && !inner.leaving {
            inner.fail(failure);
        }
        self.progress.notify_all();
    }

    // The engine's side.

    /// The next piece of work, what shards sent first. Waits until `deadline` on the machine's clock.
    pub(super) fn next(&self, deadline: Option<Duration>) -> Next {
        let mut inner = self.inner();
        loop {
            if inner.closed {
                return Next::Closed;
            }
            let next = inner.from_shards.pop_front();
            let computed = inner.from_trainer.front().is_none_or(Work::is_computed);
            let next = next.or_else(|| {
                let own = computed.then(|| inner.from_trainer.pop_front());
                own.flatten()
            });
            if let Some(work) = next {
                return Next::Work(work);
            }
            let rest = deadline.map(|deadline| deadline.saturating_sub(self.now()));
            if rest.is_some_and(|rest| rest.is_zero()) {
                return Next::Deadline;
            }
            // Nobody tells when the GPU has come so far.
            let rest = if computed {
                rest
            } else {
                Some(rest.unwrap_or(GPU_POLL).min(GPU_POLL))
            };
            inner = match rest {
                Some(rest) => self
                    .work
                    .wait_timeout(inner, rest)
                    .map(|woken| woken.0)
                    .ok(),
                None => self.work.wait(inner).ok(),
            }
            .expect("no code that can panic runs under this lock");
        }
    }

    /// Books a connection that is new, or that is gone with what was awaited from it.
    pub(super) fn link(&self, shard: ShardId, up: bool) {
        let mut inner = self.inner();
        inner.awaited.retain(|(of, _), _| *of != shard);
        if up {
            inner.lost.remove(&shard);
        } else {
            inner.lost.insert(shard);
        }
        inner.last_progress = Instant::now();
    }

    /// Books a frame that goes out.
    pub(super) fn sent(&self, shard: ShardId, header: &FrameHeader) {
        let mut inner = self.inner();
        inner.awaited.insert((shard, header.bucket), header.kind);
    }

    /// Books a frame that came and is about to be handled.
    pub(super) fn answered(&self, shard: ShardId, bucket: BucketId) {
        self.inner().awaited.remove(&(shard, bucket));
    }

    /// Takes a gradient's buffer back.
    pub(super) fn recycle(&self, buffer: Vec<f32>) {
        let mut inner = self.inner();
        inner.queued_bytes -= size_of_val(buffer.as_slice());
        let bytes = buffer.capacity() * size_of::<f32>();
        if inner.spare_bytes + bytes <= self.queue_bytes {
            inner.spare_bytes += bytes;
            inner.spare.push(buffer);
        }
        self.progress.notify_all();
    }

    /// Books the time of one piece of work.
    pub(super) fn worked(&self, time: Duration, complete: Option<Attempt>) {
        let mut inner = self.inner();
        inner.compress += time;
        inner.last_progress = Instant::now();
        if complete.is_some() && inner.complete != complete {
            inner.complete = complete;
            self.progress.notify_all();
        }
    }
}

impl Inner {
    fn fail(&mut self, failure: ReduceError) -> ReduceError {
        self.failure.get_or_insert(failure).clone()
    }

    /// The smallest spare buffer that is large enough, or the largest.
    fn take_spare(&mut self, elements: usize) -> Vec<f32> {
        let fits = (0..self.spare.len())
            .filter(|at| self.spare[*at].capacity() >= elements)
            .min_by_key(|at| self.spare[*at].capacity());
        let Some(at) = fits else {
            return Vec::with_capacity(elements);
        };
        let buffer = self.spare.swap_remove(at);
        self.spare_bytes -= buffer.capacity() * size_of::<f32>();
        buffer
    }

    fn stalled(&self, limit: Duration) -> ReduceError {
        let ((shard, bucket), sent) = self
            .awaited
            .first_key_value()
            .expect("asked only while a round waits");
        ReduceError::Stalled {
            shard: shard.0,
            bucket: bucket.0,
            sent: format!("{sent:?}"),
            rounds: self.awaited.len(),
            seconds: limit.as_secs_f32(),
        }
    }
}
