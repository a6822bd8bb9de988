//! Connections: lost, found again, and what a shard must be told then.

use super::{Input, Member, Notice, Output};
use crate::reducer::ReduceError;
use arc_topk_common::ids::{Epoch, ShardId};
use arc_topk_common::wire::{Control, Intent, RefusalCode, Welcome};
use core::time::Duration;

/// The connection with one shard.
#[derive(Debug)]
pub(super) struct Link {
    up: bool,
    /// Incarnation that was welcomed last.
    incarnation: Option<u64>,
    /// Down since then; `None` while it is up or was never up.
    lost_since: Option<Duration>,
    /// The shard's rounds wait for this worker, by what it was told (while down: what the last Hello says).
    waits: bool,
    /// Newest membership that it was told.
    epoch: Epoch,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            up: false,
            incarnation: None,
            lost_since: None,
            waits: false,
            epoch: Epoch(0),
        }
    }

    pub(super) fn welcomed(&mut self, incarnation: u64, waits: bool, epoch: Epoch) {
        self.up = true;
        self.incarnation = Some(incarnation);
        self.lost_since = None;
        self.waits = waits;
        self.epoch = epoch;
    }

    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    pub(super) fn tell(&mut self, epoch: Epoch) {
        self.epoch = epoch;
    }

    pub(super) fn lost_since(&self) -> Option<Duration> {
        self.lost_since
    }
}

impl Member {
    /// What to say in a Hello to this shard now. Asked for each attempt.
    #[must_use]
    pub fn intent(&mut self, shard: ShardId) -> Intent {
        let waited = self.waited && !self.away;
        if let Some(link) = self.links.get_mut(shard.index()) {
            link.waits = waited;
            link.epoch = self.place.epoch;
        }
        Intent::Member {
            place: self.place.clone(),
            step: self.machine.step(),
            waited,
        }
    }

    /// Whether the connection with this shard is up.
    #[must_use]
    pub fn is_up(&self, shard: ShardId) -> bool {
        self.links.get(shard.index()).is_some_and(|link| link.up)
    }

    /// Whether the connections with all shards are up.
    #[must_use]
    pub fn all_up(&self) -> bool {
        self.links.iter().all(|link| link.up)
    }

    pub(super) fn link_up(
        &mut self,
        now: Duration,
        shard: ShardId,
        welcome: Welcome,
        out: &mut Vec<Output>,
    ) {
        let Some(link) = self.links.get_mut(shard.index()) else {
            return;
        };
        let (run, rank) = (welcome.place.run, welcome.place.rank);
        if (run, rank) != (self.place.run, self.place.rank) {
            let detail = format!(
                "it welcomed rank {rank} of run {run}, but this is rank {} of run {}: two jobs share an address",
                self.place.rank, self.place.run
            );
            let error = ReduceError::Refused {
                shard: shard.0,
                code: format!("{:?}", RefusalCode::Protocol),
                detail,
            };
            return self.fail(error, out);
        }
        let gone = link.lost_since.map(|since| now.saturating_sub(since));
        let restarted = link
            .incarnation
            .is_some_and(|old| old != welcome.shard_incarnation);
        link.welcomed(welcome.shard_incarnation, link.waits, link.epoch);
        self.machine.met(shard, welcome.step, restarted);
        if restarted && shard == ShardId(0) {
            // A new coordinator knows of no joiner; it asks again.
            self.donation_due = false;
            self.donates = false;
            self.donated = None;
        }
        self.adopt(welcome.place, "told by a Welcome", out);
        if self.failed {
            return;
        }
        self.pass_on_to(shard, "passed on", out);
        let told = if welcome.retell {
            self.retell(shard, out)
        } else {
            0
        };
        self.frames = self.machine.outstanding(shard);
        let again = self.send_frames(out);
        if let Some(after) = gone {
            out.push(Output::Notice(Notice::ShardBack {
                shard,
                after,
                restarted,
                told,
                again,
            }));
        }
        if shard == ShardId(0)
            && let Some(step) = self.donated.take()
        {
            self.send(shard, Control::Donated { step }, out);
        }
        self.tell_readiness(out);
    }

    /// Tells a shard everything that it may have forgotten. Returns how many answers that are.
    fn retell(&mut self, shard: ShardId, out: &mut Vec<Output>) -> usize {
        let held = self.machine.held(shard);
        let frames = u32::try_from(held.len()).unwrap_or(u32::MAX);
        // It need not wait for those that are away.
        if !self.gone.is_empty() {
            let membership = self.membership("told to a shard that was restarted");
            self.send(shard, membership, out);
        }
        self.send(shard, Control::Retelling { frames }, out);
        self.frames = held;
        self.send_frames(out)
    }

    pub(super) fn link_down(
        &mut self,
        now: Duration,
        shard: ShardId,
        reason: String,
        out: &mut Vec<Output>,
    ) {
        let Some(link) = self.links.get_mut(shard.index()).filter(|link| link.up) else {
            return;
        };
        link.up = false;
        if self.left {
            return;
        }
        link.lost_since = Some(now);
        out.push(Output::Notice(Notice::ShardLost { shard, reason }));
        out.push(Output::Dial { shard });
    }

    /// Every shard is told whether to wait for this worker, if it believes otherwise.
    pub(super) fn tell_readiness(&mut self, out: &mut Vec<Output>) {
        if self.away && self.all_up() {
            self.away = false;
        }
        let step = self.machine.step();
        let wait = self.waited && !self.away;
        let mut told = false;
        for (shard, link) in (0u16..).map(ShardId).zip(&mut self.links) {
            if !link.up || link.waits == wait {
                continue;
            }
            link.waits = wait;
            told |= wait;
            let message = if wait {
                Control::Ready { step }
            } else {
                Control::Away
            };
            out.push(Output::Control { shard, message });
        }
        if told {
            out.push(Output::Notice(Notice::Ready { step }));
        }
    }

    /// The shard is told of the newest membership, if it was told of an older one.
    pub(super) fn pass_on_to(&mut self, shard: ShardId, reason: &str, out: &mut Vec<Output>) {
        let newest = self.place.epoch;
        let Some(link) = self.links.get_mut(shard.index()) else {
            return;
        };
        // Shard 0 is where it comes from.
        if shard == ShardId(0) || !link.up || link.epoch >= newest {
            return;
        }
        link.epoch = newest;
        let message = self.membership(reason);
        out.push(Output::Control { shard, message });
    }
}

impl Input {
    /// The shard that it is about.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        match self {
            Self::LinkUp { shard, .. }
            | Self::LinkDown { shard, .. }
            | Self::Control { shard, .. }
            | Self::Frame { shard, .. } => *shard,
        }
    }
}
