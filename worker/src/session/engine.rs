//! The thread that runs the member's machine and hands its frames to streams.

use super::link::{Link, RoundOut};
use super::shared::{Core, Event, Next, Pushed, Shared, What, Work};
use super::{NetEvent, NetObserver};
use crate::backend::Gradient;
use crate::member::{Input, Notice, Output};
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
    /// By shard; `None` while it is dialled.
    links: Vec<Option<Link>>,
    runtime: Handle,
    observer: Option<NetObserver>,
    /// Streams of the rounds of the newest step, each of the connection that is there.
    rounds: BTreeMap<(ShardId, BucketId), RoundOut>,
    out: Vec<Output>,
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

/// Starts the engine; it ends when `shared` is closed.
pub(super) fn spawn(
    plan: &Arc<Plan>,
    shared: Arc<Shared>,
    runtime: Handle,
    observer: Option<NetObserver>,
) -> std::io::Result<JoinHandle<()>> {
    let engine = Engine {
        links: (0..plan.spec.shards).map(|_| None).collect(),
        plan: Arc::clone(plan),
        shared,
        runtime,
        observer,
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
        let mut deadline = None;
        loop {
            let work = match self.shared.next(deadline) {
                Next::Work(work) => Some(work),
                Next::Deadline => None,
                Next::Closed => return,
            };
            let started = Instant::now();
            let complete;
            {
                let shared = Arc::clone(&self.shared);
                let mut core = shared.core();
                match work {
                    Some(work) => self.handle(work, &mut core),
                    None => self.tick(&mut core),
                }
                let member = &core.member;
                if let Err(fault) = member.machine().check_device() {
                    self.shared.fail(fault.into());
                }
                complete = member.is_complete().then_some(core.attempt);
                deadline = member.next_deadline();
                std::mem::swap(&mut self.out, &mut core.out);
            }
            self.act();
            self.shared.worked(started.elapsed(), complete);
        }
    }

    fn tick(&mut self, core: &mut Core) {
        core.member.tick(self.shared.now(), &mut core.out);
    }

    fn handle(&mut self, work: Work, core: &mut Core) {
        let Core {
            member,
            out,
            attempt: open,
        } = core;
        match work {
            // The machine knows already; what follows from it lies in its outputs.
            Work::Told => {}
            Work::Begin => {
                // Ends the tasks of rounds that closed early. Those of this step may be there before this comes.
                let step = member.machine().step();
                self.rounds.retain(|_, round| round.step == step);
            }
            Work::Fill(attempt, tensor, pushed) => {
                let gradient = match &pushed {
                    Pushed::Copied(values) => Gradient::F32(values),
                    Pushed::Lent(lent) => Gradient::Lent(*lent),
                    Pushed::OnDevice(lent) => Gradient::OnDevice(lent),
                };
                // What was lent for a step that has ended may be gone.
                let filled = if attempt == *open {
                    member.fill(tensor, gradient, out)
                } else {
                    Ok(())
                };
                if let Err(error) = filled {
                    self.shared.fail(error.into());
                }
                if let Pushed::Copied(values) = pushed {
                    self.shared.recycle(values);
                }
            }
            Work::Flush(attempt) => {
                // The rounds of a step may close before this comes, and the trainer go on.
                if attempt == *open {
                    // A device that failed is found below.
                    let _failed = member.flush(out);
                }
            }
            Work::Intent { shard, reply } => {
                // The shard's supervisor may have ended meanwhile.
                let _ended = reply.send(member.intent(shard));
            }
            Work::Refused { shard, message } => {
                let refused = Input::Control { shard, message };
                member.handle(self.shared.now(), refused, out);
            }
            Work::Left(reply) => {
                // The machine's Leave was queued when it was told.
                let links = self.links.iter_mut().filter_map(Option::take);
                let _gone = reply.send(links.map(|link| link.control.end()).collect());
            }
            Work::Net(event) => {
                if let Some(input) = self.input(event) {
                    member.handle(self.shared.now(), input, out);
                }
            }
        }
    }

    /// What the machine is told of an event; `None` if the event is of a connection that is gone.
    fn input(&mut self, event: Event) -> Option<Input> {
        let (shard, generation) = (event.shard, event.generation);
        let current = self.links[shard.index()].as_ref();
        let current = current.is_some_and(|link| link.generation == generation);
        match event.what {
            What::Up { link, welcome } => {
                self.change(shard, Some(link));
                // The machine began with this one.
                let first = shard == ShardId(0) && generation == 0;
                (!first).then_some(Input::LinkUp { shard, welcome })
            }
            _ if !current => None,
            What::Down { reason } => {
                self.change(shard, None);
                Some(Input::LinkDown { shard, reason })
            }
            What::Control(message) => Some(Input::Control { shard, message }),
            What::Frame(header, body) => {
                self.shared.answered(shard, header.bucket);
                Some(Input::Frame {
                    shard,
                    header,
                    body,
                })
            }
        }
    }

    /// Streams belong to the connection that was.
    fn change(&mut self, shard: ShardId, link: Option<Link>) {
        self.rounds.retain(|(of, _), _| *of != shard);
        self.shared.link(shard, link.is_some());
        self.links[shard.index()] = link;
    }

    fn act(&mut self) {
        let mut out = std::mem::take(&mut self.out);
        let mut held: BTreeMap<ShardId, Vec<Outgoing>> = BTreeMap::new();
        for output in out.drain(..) {
            match output {
                Output::Frame(frame) if frame.header.flags.held => {
                    held.entry(frame.shard).or_default().push(frame);
                }
                Output::Frame(frame) => self.send(frame),
                Output::Control { shard, message } => {
                    if let Some(link) = &self.links[shard.index()] {
                        link.control.send(message);
                    }
                }
                // Every shard has a supervisor, which dials whenever there is no connection.
                Output::Dial { .. } => {}
                Output::Fail(error) => self.shared.fail(error),
                Output::Notice(notice) => self.notice(notice),
            }
        }
        self.out = out;
        for (shard, held) in held {
            if let Some(link) = &self.links[shard.index()] {
                link.tell(&self.runtime, &self.shared, held);
            }
        }
    }

    /// A frame for a shard that is being dialled is dropped: the machine has it sent again when the shard is back.
    fn send(&mut self, frame: Outgoing) {
        let Some(link) = &self.links[frame.shard.index()] else {
            return;
        };
        let (runtime, shared) = (&self.runtime, &self.shared);
        let key = (frame.shard, frame.header.bucket);
        shared.sent(frame.shard, &frame.header);
        let open = || link.open_round(runtime, shared, &self.plan, &frame.header);
        let round = self.rounds.entry(key).or_insert_with(open);
        if round.step != frame.header.step {
            *round = open();
        }
        round.send(frame);
    }

    fn notice(&self, notice: Notice) {
        if let Some(event) = told(notice)
            && let Some(observer) = &self.observer
        {
            observer(&event);
        }
    }
}

/// Logs a notice. What of it the observer is told.
fn told(notice: Notice) -> Option<NetEvent> {
    match notice {
        Notice::ShardLost { shard, reason } => {
            tracing::warn!(shard = shard.0, %reason, "the connection with a shard is lost; dialling again");
            let cause = reason;
            Some(NetEvent::ShardLost { shard, cause })
        }
        Notice::ShardBack {
            shard,
            after,
            restarted,
            told,
            again,
        } => {
            let seconds = after.as_secs_f64();
            tracing::info!(
                shard = shard.0,
                seconds,
                restarted,
                told,
                again,
                "the shard is back"
            );
            Some(NetEvent::ShardBack { shard, after })
        }
        Notice::Membership {
            place,
            away,
            reason,
        } => {
            let epoch = place.epoch;
            let members = place.members;
            tracing::warn!(epoch = epoch.0, members = members.len(), ?away, %reason, "workers have changed");
            Some(NetEvent::Membership {
                epoch,
                members,
                away,
                reason,
            })
        }
        Notice::DigestsDiffer { step, ranks } => {
            tracing::error!(%step, ?ranks, "parameters of workers are not the same");
            Some(NetEvent::DigestsDiffer { step, ranks })
        }
        Notice::Away => {
            tracing::warn!("the other shards were told not to wait for this worker");
            None
        }
        Notice::Ready { step } => {
            tracing::info!(%step, "the shards wait for this worker");
            None
        }
        Notice::Behind { step, job } => {
            tracing::debug!(%step, %job, "the job is ahead: this step only takes results");
            None
        }
        Notice::DonationAsked => {
            tracing::info!("a worker that joins needs a copy of this one's state");
            None
        }
    }
}
