//! Packets between processes, connections that break, and silence.

use super::{Happening, World};
use crate::check::{LifeId, Violation};
use crate::wires::{Connection, ConnectionId, End, IDLE_TIMEOUT, KEEP_ALIVE, Link, Packet, Stream};
use core::time::Duration;

/// An attempt that is not answered ends after this time.
const DIAL_TIMEOUT: Duration = Duration::from_millis(1000);

impl World<'_> {
    pub(super) fn link(&mut self, worker: usize, shard: usize) -> &mut Link {
        let (case, random) = (&self.case.network, &mut self.randoms.network);
        self.links
            .entry((worker, shard))
            .or_insert_with(|| Link::new(case, random))
    }

    fn arrival(&mut self, worker: usize, shard: usize, end: End, bytes: usize) -> Duration {
        let now = self.now;
        self.link(worker, shard);
        let (case, random) = (&self.case.network, &mut self.randoms.network);
        let link = self.links.get_mut(&(worker, shard)).expect("made above");
        link.towards(end).arrival(now, bytes, case, random)
    }

    /// Sends towards `end`.
    pub(super) fn send(
        &mut self,
        connection: ConnectionId,
        end: End,
        stream: Stream,
        packet: Packet,
    ) {
        let wire = &mut self.connections[connection.0];
        if !wire.is_open(end.peer()) {
            return;
        }
        let (worker, shard) = (wire.worker, wire.shard);
        let number = wire.number(end, stream);
        let at = self.arrival(worker, shard, end, packet.bytes());
        self.schedule_at(
            at,
            Happening::Arrive {
                connection,
                end,
                stream,
                number,
                packet,
            },
        );
    }

    pub(super) fn arrive(
        &mut self,
        connection: ConnectionId,
        end: End,
        stream: Stream,
        number: u64,
        packet: Packet,
    ) -> Result<(), Violation> {
        if !self.holds(connection, end) {
            return Ok(());
        }
        let (worker, shard) = {
            let wire = &self.connections[connection.0];
            (wire.worker, wire.shard)
        };
        let blocked = self.link(worker, shard).towards(end).blocked;
        if blocked > self.now {
            // Lost on the way; it is sent again when the way is free.
            let at = self.arrival(worker, shard, end, packet.bytes());
            self.schedule_at(
                at,
                Happening::Arrive {
                    connection,
                    end,
                    stream,
                    number,
                    packet,
                },
            );
            return Ok(());
        }
        let now = self.now;
        let wire = &mut self.connections[connection.0];
        wire.heard[end as usize] = now;
        for packet in wire.reorder(end, stream, number, packet) {
            if !self.holds(connection, end) {
                break;
            }
            match (end, packet) {
                (End::Shard, Packet::Close { reason }) => {
                    self.shard_lost(connection, &reason, true)?;
                }
                (End::Worker, Packet::Close { reason }) => self.worker_lost(connection, &reason)?,
                (End::Shard, packet) => self.shard_receives(connection, packet)?,
                (End::Worker, packet) => self.worker_receives(connection, packet)?,
            }
        }
        Ok(())
    }

    /// Whether the process at this end is there and holds the connection.
    pub(super) fn holds(&self, connection: ConnectionId, end: End) -> bool {
        let wire = &self.connections[connection.0];
        wire.is_open(end)
            && match end {
                End::Shard => {
                    let shard = &self.shards[wire.shard];
                    shard.up && shard.generation == wire.generation
                }
                End::Worker => {
                    let worker = &self.workers[wire.worker];
                    worker.alive && worker.life.0 == wire.life
                }
            }
    }

    /// A worker opens a connection.
    pub(super) fn dial(&mut self, life: LifeId, worker: usize, shard: usize) {
        if !self.wants(life, worker, shard) {
            return;
        }
        let way = &mut self.link(worker, shard).up;
        let blocked = way.blocked;
        let at = if blocked > self.now {
            self.now + DIAL_TIMEOUT
        } else {
            self.arrival(worker, shard, End::Shard, 1200)
        };
        self.schedule_at(
            at,
            Happening::Knock {
                life,
                worker,
                shard,
            },
        );
    }

    /// The attempt reaches the shard, if there is one.
    pub(super) fn knock(
        &mut self,
        life: LifeId,
        worker: usize,
        shard: usize,
    ) -> Result<(), Violation> {
        if !self.wants(life, worker, shard) {
            return Ok(());
        }
        let now = self.now;
        let link = self.link(worker, shard);
        let reaches = link.up.blocked <= now && link.down.blocked <= now;
        if !reaches || !self.shards[shard].up {
            let after = self
                .randoms
                .network
                .time(Duration::from_millis(100)..Duration::from_millis(500));
            self.schedule(
                after,
                Happening::Dial {
                    life,
                    worker,
                    shard,
                },
            );
            return Ok(());
        }
        let generation = self.shards[shard].generation;
        let id = ConnectionId(self.connections.len());
        self.connections
            .push(Connection::new(now, (worker, life.0), (shard, generation)));
        let phase = self.randoms.network.time(Duration::ZERO..KEEP_ALIVE);
        self.schedule(phase, Happening::KeepAlive(id));
        self.shard_meets(shard, id);
        self.worker_connected(worker, shard, id)
    }

    /// Both ends see whether they still hear each other.
    pub(super) fn keep_alive(&mut self, id: ConnectionId) -> Result<(), Violation> {
        let (now, wire) = (self.now, self.connections[id.0].clone());
        let mut any = false;
        for end in [End::Worker, End::Shard] {
            if !self.holds(id, end) || self.is_still(&wire, end) {
                any |= self.holds(id, end);
                continue;
            }
            any = true;
            let open_way = self.link(wire.worker, wire.shard).towards(end).blocked <= now;
            if open_way && self.holds(id, end.peer()) && !self.is_still(&wire, end.peer()) {
                self.connections[id.0].heard[end as usize] = now;
            }
            if now.saturating_sub(self.connections[id.0].heard[end as usize]) < IDLE_TIMEOUT {
                continue;
            }
            self.coverage.count("idle timeouts");
            match end {
                End::Worker => self.worker_lost(id, "nothing was heard for 3 s")?,
                End::Shard => self.shard_lost(id, "nothing was heard for 3 s", false)?,
            }
        }
        if any {
            self.schedule(KEEP_ALIVE, Happening::KeepAlive(id));
        }
        Ok(())
    }

    /// Whether the process at an end stands still.
    fn is_still(&self, wire: &Connection, end: End) -> bool {
        match end {
            End::Shard => self.shards[wire.shard].frozen_until.is_some(),
            End::Worker => self.workers[wire.worker].frozen_until.is_some(),
        }
    }

    /// An end closes in order: the peer is told.
    pub(super) fn close(&mut self, connection: ConnectionId, end: End, reason: &str) {
        let close = Packet::Close {
            reason: reason.to_owned(),
        };
        self.send(connection, end.peer(), Stream::Control, close);
        self.connections[connection.0].close(end);
    }
}
