//! Who is in the job, and shard 0's other messages.

use super::{Member, Notice, Output};
use crate::reducer::ReduceError;
use arc_topk_common::ids::{Epoch, Rank, ShardId};
use arc_topk_common::wire::{Control, Place, RefusalCode};
use core::time::Duration;

impl Member {
    /// Its place, with the newest membership that it knows of.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Members whose connection with shard 0 is gone, as far as is known.
    #[must_use]
    pub fn away(&self) -> &[Rank] {
        &self.gone
    }

    /// The lowest member that is not away: the one that writes what is written once per job.
    #[must_use]
    pub fn leader(&self) -> Rank {
        let here = |rank: &&Rank| **rank == self.place.rank || !self.gone.contains(rank);
        let members = self.place.members.iter();
        members
            .copied()
            .filter(|rank| here(&rank))
            .min()
            .unwrap_or(self.place.rank)
    }

    pub(super) fn control(
        &mut self,
        now: Duration,
        shard: ShardId,
        message: Control,
        out: &mut Vec<Output>,
    ) {
        match message {
            // It will be back; what it knew is here.
            Control::Refused {
                code: RefusalCode::Shutdown,
                detail,
            } => self.link_down(now, shard, detail, out),
            Control::Refused { code, detail } => self.refused(shard, code, detail, out),
            // Links that are down have nothing else to say, and shard 0 alone coordinates.
            _ if !self.is_up(shard) || shard != ShardId(0) => {}
            Control::Membership {
                epoch,
                next_rank,
                members,
                away,
                reason,
            } => {
                let place = Place {
                    epoch,
                    next_rank,
                    members,
                    ..self.place.clone()
                };
                self.membership_came(place, away, &reason, out);
            }
            // A copy that is on its way serves those that ask meanwhile, too.
            Control::Donate if !self.donation_due && !self.donates => {
                self.donation_due = true;
                out.push(Output::Notice(Notice::DonationAsked));
            }
            Control::DigestsDiffer { step, ranks } => {
                out.push(Output::Notice(Notice::DigestsDiffer { step, ranks }));
            }
            _ => {}
        }
    }

    fn refused(
        &mut self,
        shard: ShardId,
        code: RefusalCode,
        detail: String,
        out: &mut Vec<Output>,
    ) {
        let shard = shard.0;
        let error = if code == RefusalCode::Superseded {
            ReduceError::Superseded { shard, detail }
        } else {
            let code = format!("{code:?}");
            ReduceError::Refused {
                shard,
                code,
                detail,
            }
        };
        self.fail(error, out);
    }

    /// Shard 0's word. An older one than known comes from a coordinator that has not heard everything yet.
    fn membership_came(
        &mut self,
        place: Place,
        gone: Vec<Rank>,
        reason: &str,
        out: &mut Vec<Output>,
    ) {
        if place.epoch < self.place.epoch {
            return;
        }
        let changed = place.epoch > self.place.epoch || gone != self.gone;
        let epoch = place.epoch;
        self.gone = gone;
        self.adopt(place, reason, out);
        if self.failed || !changed {
            return;
        }
        out.push(Output::Notice(Notice::Membership {
            place: self.place.clone(),
            away: self.gone.clone(),
            reason: reason.to_owned(),
        }));
        let message = self.membership(reason);
        for (shard, link) in (0u16..).map(ShardId).zip(&mut self.links).skip(1) {
            if link.up_and_told(epoch) {
                out.push(Output::Control {
                    shard,
                    message: message.clone(),
                });
            }
        }
    }

    /// Takes over a newer membership.
    pub(super) fn adopt(&mut self, place: Place, reason: &str, out: &mut Vec<Output>) {
        if place.epoch <= self.place.epoch {
            return;
        }
        self.machine.set_epoch(place.epoch);
        self.gone.retain(|rank| place.members.contains(rank));
        self.place = place;
        if !self.place.members.contains(&self.place.rank) && !self.left {
            let detail = format!(
                "epoch {} has no rank {} any more ({reason})",
                self.place.epoch, self.place.rank
            );
            self.fail(ReduceError::Superseded { shard: 0, detail }, out);
        }
    }

    /// The newest membership as a message.
    pub(super) fn membership(&self, reason: &str) -> Control {
        Control::Membership {
            epoch: self.place.epoch,
            next_rank: self.place.next_rank,
            members: self.place.members.clone(),
            away: self.gone.clone(),
            reason: reason.to_owned(),
        }
    }
}

impl super::Link {
    /// Whether it is up; then it is told of this epoch.
    fn up_and_told(&mut self, epoch: Epoch) -> bool {
        let up = self.is_up();
        if up {
            self.tell(epoch);
        }
        up
    }
}
