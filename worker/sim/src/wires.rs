//! Connections between workers and shards, packet by packet.
//!
//! A connection has a control stream and a stream per round; each delivers in order, and none waits for another. What a real
//! network loses, QUIC sends again: loss is delay, and for one stream only. Packets that a partition stops go on when it
//! heals, if both ends still hold the connection then.

use crate::case::NetworkCase;
use crate::random::Random;
use arc_topk_common::ids::{BucketId, Step};
use arc_topk_common::wire::{Control, FrameHeader, HEADER_BYTES};
use bytes::Bytes;
use core::time::Duration;
use std::collections::BTreeMap;

/// A peer that hears nothing for so long gives the connection up.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a connection is looked at for that.
pub const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// Names a connection for the whole run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ConnectionId(pub usize);

/// An end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum End {
    /// The worker's.
    Worker,
    /// The shard's.
    Shard,
}

impl End {
    /// The other one.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::Worker => Self::Shard,
            Self::Shard => Self::Worker,
        }
    }
}

/// A stream of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Stream {
    /// The first one.
    Control,
    /// Of a round.
    Round(Step, BucketId),
    /// Of one held frame.
    Held(u64),
}

/// What travels.
#[derive(Clone, Debug)]
pub enum Packet {
    /// A control message.
    Control(Control),
    /// A frame.
    Frame(FrameHeader, Bytes),
    /// The connection ends.
    Close {
        /// Why.
        reason: String,
    },
}

impl Packet {
    /// Bytes on the wire, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Control(Control::Hello(_)) => 500,
            Self::Control(_) | Self::Close { .. } => 60,
            Self::Frame(_, body) => HEADER_BYTES + body.len(),
        }
    }
}

/// One direction of the way between a worker and a shard.
#[derive(Clone, Debug, Default)]
pub struct Way {
    /// Bytes a second; `None`: as many as come.
    rate: Option<u64>,
    busy: Duration,
    /// Nothing passes before.
    pub blocked: Duration,
    /// What would arrive before, arrives then.
    pub clogged: Duration,
}

/// Both directions.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// To the shard.
    pub up: Way,
    /// To the worker.
    pub down: Way,
}

impl Link {
    /// A link as drawn.
    #[must_use]
    pub fn new(case: &NetworkCase, random: &mut Random) -> Self {
        let mut way = || Way {
            rate: random
                .chance(case.slow_per_mille)
                .then(|| random.pick(&[20_000, 200_000])),
            ..Way::default()
        };
        Self {
            up: way(),
            down: way(),
        }
    }

    /// The direction towards an end.
    pub fn towards(&mut self, end: End) -> &mut Way {
        match end {
            End::Shard => &mut self.up,
            End::Worker => &mut self.down,
        }
    }
}

impl Way {
    /// When a packet arrives that is sent now.
    pub fn arrival(
        &mut self,
        now: Duration,
        bytes: usize,
        case: &NetworkCase,
        random: &mut Random,
    ) -> Duration {
        let start = now.max(self.busy).max(self.blocked);
        let sending = self.rate.map_or(Duration::ZERO, |rate| {
            Duration::from_micros(bytes as u64 * 1_000_000 / rate)
        });
        self.busy = start + sending;
        let mut arrival = self.busy + case.delay + random.time(Duration::ZERO..case.jitter);
        if random.chance(case.loss_per_mille) {
            arrival += random.time(Duration::from_millis(20)..Duration::from_millis(300));
        }
        arrival.max(self.clogged)
    }
}

#[derive(Clone, Debug, Default)]
struct Order {
    sent: u64,
    delivered: u64,
    early: BTreeMap<u64, Packet>,
}

/// A connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Which worker process.
    pub worker: usize,
    /// Which of its lives.
    pub life: u64,
    /// Which shard.
    pub shard: usize,
    /// Which of its processes.
    pub generation: u64,
    /// Open at the worker, and at the shard.
    open: [bool; 2],
    /// When each end last heard something.
    pub heard: [Duration; 2],
    order: [BTreeMap<Stream, Order>; 2],
}

impl Connection {
    /// A connection that both ends hold.
    #[must_use]
    pub fn new(now: Duration, worker: (usize, u64), shard: (usize, u64)) -> Self {
        Self {
            worker: worker.0,
            life: worker.1,
            shard: shard.0,
            generation: shard.1,
            open: [true; 2],
            heard: [now; 2],
            order: [BTreeMap::new(), BTreeMap::new()],
        }
    }

    /// Whether an end holds it.
    #[must_use]
    pub fn is_open(&self, end: End) -> bool {
        self.open[end as usize]
    }

    /// An end lets it go.
    pub fn close(&mut self, end: End) {
        self.open[end as usize] = false;
    }

    /// The place of the next packet towards `end` in its stream.
    pub fn number(&mut self, end: End, stream: Stream) -> u64 {
        let order = self.order[end as usize].entry(stream).or_default();
        order.sent += 1;
        order.sent - 1
    }

    /// A packet arrives; those that can be delivered now, in order.
    pub fn reorder(
        &mut self,
        end: End,
        stream: Stream,
        number: u64,
        packet: Packet,
    ) -> Vec<Packet> {
        let order = self.order[end as usize].entry(stream).or_default();
        order.early.insert(number, packet);
        let mut ready = Vec::new();
        while let Some(packet) = order.early.remove(&order.delivered) {
            order.delivered += 1;
            ready.push(packet);
        }
        ready
    }
}

/// A process' own time: never backwards, not quite the world's.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Clock {
    offset: Duration,
    /// Parts in a million that it is too fast.
    drift: u64,
}

impl Clock {
    /// A clock as drawn.
    #[must_use]
    pub fn new(random: &mut Random) -> Self {
        Self {
            offset: random.time(Duration::ZERO..Duration::from_secs(1000)),
            drift: random.below(500),
        }
    }

    /// Its time now.
    #[must_use]
    pub fn local(&self, now: Duration) -> Duration {
        self.offset + now + now.saturating_mul(self.drift as u32) / 1_000_000
    }

    /// The world's time at which it will show `local` at the earliest.
    #[must_use]
    pub fn global(&self, local: Duration) -> Duration {
        let since = local.saturating_sub(self.offset).as_nanos();
        let nanos = since * 1_000_000 / u128::from(1_000_000 + self.drift);
        Duration::from_nanos(nanos as u64 + 2)
    }

    /// Jumps ahead.
    pub fn jump(&mut self, by: Duration) {
        self.offset += by;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_keep_their_order_and_wait_for_none() {
        let mut connection = Connection::new(Duration::ZERO, (0, 0), (0, 0));
        let close = |text: &str| Packet::Close {
            reason: text.to_owned(),
        };
        let (a, b) = (Stream::Control, Stream::Held(1));
        let first = connection.number(End::Shard, a);
        let second = connection.number(End::Shard, a);
        let other = connection.number(End::Shard, b);
        assert!(
            connection
                .reorder(End::Shard, a, second, close("2"))
                .is_empty()
        );
        assert_eq!(
            connection.reorder(End::Shard, b, other, close("x")).len(),
            1
        );
        assert_eq!(
            connection.reorder(End::Shard, a, first, close("1")).len(),
            2
        );
    }

    #[test]
    fn clocks_agree_with_themselves() {
        let clock = Clock::new(&mut Random::new(1, "clock"));
        for seconds in [0, 1, 77] {
            let now = Duration::from_secs(seconds);
            let there = clock.global(clock.local(now));
            assert!(
                clock.local(there) >= clock.local(now) && there < now + Duration::from_micros(2)
            );
        }
    }
}
