//! Shards and the wires to them, without sockets.

use crate::step::Outgoing;
use arc_topk_common::ids::{Epoch, Rank, ShardId, Step};
use arc_topk_common::plan::PlanSpec;
use arc_topk_common::wire::{
    Control, FrameHeader, Hello, Intent, JoinWhen, PROTOCOL_VERSION, Place,
};
use arc_topk_ps::shard::{Action, Event, Report, SessionId, Shard, ShardConfig};
use bytes::Bytes;
use core::time::Duration;
use std::collections::BTreeMap;

/// What a shard sends to a worker.
#[derive(Debug)]
pub(super) enum Delivery {
    Round {
        shard: ShardId,
        header: FrameHeader,
        body: Bytes,
    },
    Place(Place),
    Epoch(Epoch),
    Refused {
        shard: ShardId,
        code: String,
        detail: String,
    },
}

/// The real shard machines. Rank q is session q everywhere.
pub(super) struct Network {
    shards: Vec<Shard>,
    actions: Vec<Action>,
    /// Events so far: the machines' clock, in milliseconds.
    events: u64,
}

impl Network {
    /// Starts the shards and introduces all workers to them. What they answer goes to `deliver`.
    pub(super) fn connect(
        spec: &PlanSpec,
        world: u16,
        min_workers: u16,
        start: Step,
        deliver: &mut dyn FnMut(Rank, Delivery),
    ) -> Self {
        let config = |shard| ShardConfig {
            min_workers,
            ..ShardConfig::new(JOB, ShardId(shard), spec.shards, world)
        };
        let shards = (0..spec.shards)
            .map(|shard| Shard::new(config(shard)))
            .collect();
        let mut network = Self {
            shards,
            actions: Vec::new(),
            events: 0,
        };
        let mut places = BTreeMap::new();
        let mut seat = |rank, delivery| {
            if let Delivery::Place(place) = &delivery {
                places.insert(rank, place.clone());
            }
            deliver(rank, delivery);
        };
        for rank in (0..world).map(Rank) {
            let intent = Intent::Join {
                rank: Some(rank),
                world: Some(world),
                start_step: start,
                when: JoinWhen::Start,
            };
            network.introduce(spec, rank, ShardId(0), intent, &mut seat);
        }
        for shard in (1..spec.shards).map(ShardId) {
            for (rank, place) in &places {
                let intent = Intent::Member {
                    place: place.clone(),
                    step: start,
                    waited: true,
                };
                network.introduce(spec, *rank, shard, intent, deliver);
            }
        }
        network
    }

    /// A worker says hello, and that it has nothing to tell: all shards are as new as the job.
    fn introduce(
        &mut self,
        spec: &PlanSpec,
        rank: Rank,
        shard: ShardId,
        intent: Intent,
        deliver: &mut dyn FnMut(Rank, Delivery),
    ) {
        let (session, hello) = (session(rank), Box::new(hello(spec, rank, shard, intent)));
        self.handle(shard, Event::Hello { session, hello }, deliver);
        if shard.0 > 0 {
            let message = Control::Retelling { frames: 0 };
            self.handle(shard, Event::Control { session, message }, deliver);
        }
    }

    /// A worker's frame arrives.
    pub(super) fn frame(
        &mut self,
        rank: Rank,
        frame: Outgoing,
        deliver: &mut dyn FnMut(Rank, Delivery),
    ) {
        let Outgoing {
            shard,
            header,
            body,
            ..
        } = frame;
        self.handle(
            shard,
            Event::Round {
                session: session(rank),
                header,
                body,
            },
            deliver,
        );
    }

    /// A worker is gone: its sessions with all shards are closed, or left in order.
    pub(super) fn remove(
        &mut self,
        rank: Rank,
        in_order: bool,
        deliver: &mut dyn FnMut(Rank, Delivery),
    ) {
        for shard in 0..self.shards.len() as u16 {
            let session = session(rank);
            let event = if in_order {
                Event::Leave { session }
            } else {
                Event::Closed {
                    session,
                    reason: "taken out of the memory cluster".to_owned(),
                    for_good: true,
                }
            };
            self.handle(ShardId(shard), event, deliver);
        }
    }

    /// A worker's report for shard 0's status.
    pub(super) fn report(
        &mut self,
        rank: Rank,
        report: Report,
        deliver: &mut dyn FnMut(Rank, Delivery),
    ) {
        self.handle(
            ShardId(0),
            Event::Report {
                session: session(rank),
                report,
            },
            deliver,
        );
    }

    /// A shard, to look at.
    pub(super) fn shard(&self, shard: ShardId) -> &Shard {
        &self.shards[shard.index()]
    }

    fn handle(&mut self, shard: ShardId, event: Event, deliver: &mut dyn FnMut(Rank, Delivery)) {
        self.events += 1;
        self.shards[shard.index()].handle(
            Duration::from_millis(self.events),
            event,
            &mut self.actions,
        );
        for action in self.actions.drain(..) {
            match action {
                Action::Round {
                    session,
                    header,
                    body,
                } => {
                    deliver(
                        rank(session),
                        Delivery::Round {
                            shard,
                            header,
                            body,
                        },
                    );
                }
                Action::Control { session, message } => {
                    if let Some(delivery) = control(shard, message) {
                        deliver(rank(session), delivery);
                    }
                }
                // A refusal went ahead of the close.
                Action::Close { .. } | Action::Observe(_) => {}
            }
        }
    }
}

const JOB: &str = "memory";

fn session(rank: Rank) -> SessionId {
    SessionId(u64::from(rank.0))
}

fn rank(session: SessionId) -> Rank {
    Rank(session.0 as u16)
}

fn control(shard: ShardId, message: Control) -> Option<Delivery> {
    match message {
        Control::Welcome(welcome) if shard.0 == 0 => Some(Delivery::Place(welcome.place)),
        // Shard 0 coordinates: its epochs count.
        Control::Membership { epoch, .. } if shard.0 == 0 => Some(Delivery::Epoch(epoch)),
        Control::Refused { code, detail } => Some(Delivery::Refused {
            shard,
            code: format!("{code:?}"),
            detail,
        }),
        _ => None,
    }
}

fn hello(spec: &PlanSpec, rank: Rank, shard: ShardId, intent: Intent) -> Hello {
    let mut incarnation = [0; 16];
    incarnation[..2].copy_from_slice(&rank.0.to_le_bytes());
    Hello {
        protocol: PROTOCOL_VERSION,
        job: JOB.to_owned(),
        incarnation,
        shard: shard.0,
        host: format!("memory:{rank}"),
        intent,
        plan: spec.clone(),
    }
}
