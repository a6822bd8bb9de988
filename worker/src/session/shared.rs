//! What the trainer's thread, the engine and the network tasks share.

use crate::reducer::ReduceError;
use crate::step::StepMachine;
use arc_topk_common::ids::{BucketId, Epoch, Rank, ShardId, TensorId};
use arc_topk_common::wire::{Control, FrameHeader, FrameKind, RefusalCode};
use arc_topk_transport::TransportError;
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Work for the engine.
pub(super) enum Work {
    /// A frame from a shard.
    Frame {
        shard: ShardId,
        header: FrameHeader,
        body: Bytes,
    },
    /// Membership changed.
    Epoch(Epoch),
    /// A step opens.
    Begin,
    /// A gradient.
    Fill(TensorId, Vec<f32>),
    /// No more gradients in this step.
    Flush,
}

/// Queues and progress, all under one lock that is held only for pushes and pops.
struct Inner {
    /// Taken first.
    from_shards: VecDeque<Work>,
    from_trainer: VecDeque<Work>,
    queued_bytes: usize,
    /// Buffers for copies of gradients, to be used again: a fresh one costs its page faults each step.
    spare: Vec<Vec<f32>>,
    spare_bytes: usize,
    closed: bool,
    complete: bool,
    failure: Option<ReduceError>,
    last_progress: Instant,
    /// Rounds that wait for a shard, and the frame that was sent last.
    awaited: BTreeMap<(ShardId, BucketId), FrameKind>,
    compress: Duration,
    members: Option<Vec<Rank>>,
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
    machine: Mutex<StepMachine>,
    pub(super) control: ControlBytes,
    inner: Mutex<Inner>,
    /// Something to do for the engine.
    work: Condvar,
    /// Something to see for the trainer: room in the queue, completion or failure.
    progress: Condvar,
    queue_bytes: usize,
}

impl Shared {
    pub(super) fn new(machine: StepMachine, queue_bytes: usize) -> Self {
        Self {
            machine: Mutex::new(machine),
            control: ControlBytes::default(),
            inner: Mutex::new(Inner {
                from_shards: VecDeque::new(),
                from_trainer: VecDeque::new(),
                queued_bytes: 0,
                spare: Vec::new(),
                spare_bytes: 0,
                closed: false,
                complete: false,
                failure: None,
                last_progress: Instant::now(),
                awaited: BTreeMap::new(),
                compress: Duration::ZERO,
                members: None,
            }),
            work: Condvar::new(),
            progress: Condvar::new(),
            queue_bytes,
        }
    }

    pub(super) fn machine(&self) -> MutexGuard<'_, StepMachine> {
        // After a panic of the engine the session has failed and says so; the state between steps is whole.
        self.machine.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("no code that can panic runs under this lock")
    }

    pub(super) fn members(&self) -> Option<Vec<Rank>> {
        self.inner().members.clone()
    }

    pub(super) fn set_members(&self, members: Vec<Rank>) {
        self.inner().members = Some(members);
    }

    // The trainer's side.

    pub(super) fn check(&self) -> Result<(), ReduceError> {
        self.inner().failure.clone().map_or(Ok(()), Err)
    }

    pub(super) fn begin(&self) {
        let mut inner = self.inner();
        inner.complete = false;
        inner.last_progress = Instant::now();
        inner.from_trainer.push_back(Work::Begin);
        self.work.notify_one();
    }

    /// Copies the gradient into the queue; waits for room in it, which the engine makes without the network.
    pub(super) fn push(&self, tensor: TensorId, gradient: &[f32]) -> Result<(), ReduceError> {
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
        self.inner()
            .from_trainer
            .push_back(Work::Fill(tensor, copy));
        self.work.notify_one();
        Ok(())
    }

    pub(super) fn flush(&self) {
        let mut inner = self.inner();
        inner.last_progress = Instant::now();
        inner.from_trainer.push_back(Work::Flush);
        self.work.notify_one();
    }

    /// Returns when every round of the step has closed, or with the reason why not.
    pub(super) fn wait_complete(&self, limit: Duration) -> Result<(), ReduceError> {
        let mut inner = self.inner();
        loop {
            if let Some(failure) = &inner.failure {
                return Err(failure.clone());
            }
            if inner.complete {
                return Ok(());
            }
            let quiet = inner.last_progress.elapsed();
            if quiet >= limit && !inner.awaited.is_empty() {
                let stalled = inner.stalled(limit);
                return Err(inner.fail(stalled));
            }
            let rest = limit.saturating_sub(quiet).max(Duration::from_millis(10));
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

    /// Ends the engine after what it is doing now.
    pub(super) fn close(&self) {
        self.inner().closed = true;
        self.work.notify_all();
    }

    // The network's side.

    pub(super) fn arrived(&self, work: Work) {
        let mut inner = self.inner();
        inner.last_progress = Instant::now();
        inner.from_shards.push_back(work);
        self.work.notify_one();
    }

    /// Keeps the first failure; none after the session has closed.
    pub(super) fn fail(&self, failure: ReduceError) {
        let mut inner = self.inner();
        if !inner.closed {
            inner.fail(failure);
        }
        self.progress.notify_all();
    }

    pub(super) fn fail_transport(&self, shard: ShardId, error: &TransportError) {
        if let TransportError::Closed { code, reason, .. } = error
            && let Some(code) = RefusalCode::from_number(*code)
        {
            return self.fail_refused(shard, code, reason.clone());
        }
        self.fail(ReduceError::Disconnected {
            shard: shard.0,
            detail: error.to_string(),
        });
    }

    pub(super) fn fail_refused(&self, shard: ShardId, code: RefusalCode, detail: String) {
        self.fail(ReduceError::Refused {
            shard: shard.0,
            code: format!("{code:?}"),
            detail,
        });
    }

    // The engine's side.

    /// The next piece of work, frames from shards first; `None` when the session has closed.
    pub(super) fn next(&self) -> Option<Work> {
        let mut inner = self.inner();
        loop {
            if inner.closed {
                return None;
            }
            let next = inner.from_shards.pop_front();
            if let Some(work) = next.or_else(|| inner.from_trainer.pop_front()) {
                return Some(work);
            }
            inner = self
                .work
                .wait(inner)
                .expect("no code that can panic runs under this lock");
        }
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
    pub(super) fn worked(&self, time: Duration, complete: bool) {
        let mut inner = self.inner();
        inner.compress += time;
        inner.last_progress = Instant::now();
        if complete {
            inner.complete = true;
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
