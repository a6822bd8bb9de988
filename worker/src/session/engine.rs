//! The thread that runs the step machine and hands its frames to streams.

use super::link::{Link, RoundOut};
use super::shared::{Shared, Work};
use crate::reducer::ReduceError;
use crate::step::Outgoing;
use arc_topk_common::ids::{BucketId, ShardId};
use arc_topk_common::plan::Plan;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::runtime::Handle;

struct Engine {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    links: Vec<Link>,
    runtime: Handle,
    /// Streams of the rounds of this step.
    rounds: BTreeMap<(ShardId, BucketId), RoundOut>,
    out: Vec<Outgoing>,
}

/// Tells the trainer if the engine dies, which would otherwise wait for it.
struct Obituary(Arc<Shared>);

impl Drop for Obituary {
    fn drop(&mut self) {
        self.0.fail(ReduceError::Ended {
            detail: "the engine's thread ended; if it panicked, the log says where: report it with the log, \
                     and resume from the last checkpoint"
                .to_owned(),
        });
    }
}

/// Starts the engine; it ends when `shared` is closed. `links` are in the order of the shards.
pub(super) fn spawn(
    plan: &Arc<Plan>,
    shared: Arc<Shared>,
    links: Vec<Link>,
    runtime: Handle,
) -> std::io::Result<JoinHandle<()>> {
    let engine = Engine {
        plan: Arc::clone(plan),
        shared,
        links,
        runtime,
        rounds: BTreeMap::new(),
        out: Vec::new(),
    };
    std::thread::Builder::new()
        .name("arc-engine".to_owned())
        .spawn(move || engine.run())
}

impl Engine {
    fn run(mut self) {
        let _obituary = Obituary(Arc::clone(&self.shared));
        while let Some(work) = self.shared.next() {
            let started = Instant::now();
            let complete = self.handle(work);
            self.send();
            self.shared.worked(started.elapsed(), complete);
        }
    }

    /// Returns whether the step is complete.
    fn handle(&mut self, work: Work) -> bool {
        let mut machine = self.shared.machine();
        let out = &mut self.out;
        let result = match work {
            Work::Begin => {
                machine.begin();
                // Ends the tasks of rounds that closed early.
                self.rounds.clear();
                Ok(())
            }
            Work::Fill(tensor, gradient) => {
                let filled = machine.fill(tensor, &gradient, out);
                self.shared.recycle(gradient);
                filled
            }
            Work::Flush => {
                machine.flush(out);
                Ok(())
            }
            Work::Frame {
                shard,
                header,
                body,
            } => {
                self.shared.answered(shard, header.bucket);
                machine.handle(shard, header, body, out)
            }
            Work::Epoch(epoch) => {
                machine.set_epoch(epoch);
                // Completes nothing: the trainer may have gone on since the step's last frame, and must not be told
                // of that completion again.
                return false;
            }
        };
        if let Err(error) = result {
            self.shared.fail(ReduceError::Step(error));
        }
        machine.is_complete()
    }

    fn send(&mut self) {
        for frame in self.out.drain(..) {
            let key = (frame.shard, frame.header.bucket);
            self.shared.sent(frame.shard, &frame.header);
            let round = self.rounds.entry(key).or_insert_with(|| {
                let link = &self.links[frame.shard.index()];
                link.open_round(&self.runtime, &self.shared, &self.plan, &frame.header)
            });
            round.send(frame);
        }
    }
}
