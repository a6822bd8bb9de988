//! Workers of the next start of the job, at a shard that still has members of the last one.
//!
//! Workers that die are noticed by silence, at every shard for itself. Shard 0 gives ranks again once all are gone there;
//! at the other shards some may be connected for a second more. A member of another run is of that next start: shard 0
//! has admitted it. It waits until nobody of the last start is connected, and no longer than [`JOIN_GRACE`]. So a restart
//! does not fail by its timing, and nobody who still lives is removed on another's word.

use super::event::{Action, SessionId};
use super::hello::Refusal;
use super::{JOIN_GRACE, Shard, refuse};
use arc_topk_common::ids::ShardId;
use arc_topk_common::wire::{Hello, Intent, MAX_WORLD, RefusalCode};
use core::time::Duration;

/// A worker that waits for the last start of the job to be over.
#[derive(Debug)]
pub(super) struct Successor {
    hello: Hello,
    since: Duration,
}

impl Shard {
    /// Lets a Hello that was not admitted wait, if it may be of the next start of the job; else gives the refusal back.
    pub(super) fn put_off(
        &mut self,
        now: Duration,
        session: SessionId,
        hello: Hello,
        refusal: Refusal,
    ) -> Result<(), Refusal> {
        let Intent::Member { place, .. } = &hello.intent else {
            return Err(refusal);
        };
        let another = self
            .job
            .as_ref()
            .is_some_and(|job| job.run != place.run && job.members.connected_count() > 0);
        let waits = self.config.shard != ShardId(0)
            && another
            && self.check_identity(&hello).is_ok()
            && self.successors.len() < MAX_WORLD;
        if !waits {
            return Err(refusal);
        }
        self.successors
            .insert(session, Successor { hello, since: now });
        Ok(())
    }

    /// Admits those that waited once the last start is over, and refuses those that have waited too long.
    pub(super) fn attend_successors(&mut self, now: Duration, out: &mut Vec<Action>) {
        if self.connected() == 0 {
            for (session, successor) in core::mem::take(&mut self.successors) {
                self.hello(now, session, successor.hello, out);
            }
            return;
        }
        let waited = |successor: &mut Successor| now.saturating_sub(successor.since) >= JOIN_GRACE;
        let late: Vec<_> = self
            .successors
            .extract_if(.., |_, successor| waited(successor))
            .collect();
        for (session, _) in late {
            let detail = format!(
                "workers of an earlier start are still connected to shard {} after {} s: end them first",
                self.config.shard,
                JOIN_GRACE.as_secs()
            );
            refuse(session, RefusalCode::World, &detail, out);
        }
    }

    pub(super) fn successors_deadline(&self) -> Option<Duration> {
        let waits = self.successors.values().map(|s| s.since + JOIN_GRACE);
        waits.min()
    }
}
