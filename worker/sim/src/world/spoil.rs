//! Where bugs on purpose sit ([`Sabotage`]).

use super::World;
use crate::check::{AnswerKey, LifeId};
use crate::random::mix;
use crate::sabotage::Sabotage;
use arc_topk_common::ids::{Epoch, Rank};
use arc_topk_common::wire::{
    Control, FrameHeader, FrameKind, Intent, decode_roster, encode_roster,
};
use arc_topk_ps::shard::{Event, RECOVERY_GRACE};
use bytes::Bytes;
use std::collections::BTreeSet;

/// Answers as they were made wrong: the same for everybody.
pub(super) type Spoiled = std::collections::BTreeMap<(usize, u64, AnswerKey), Option<Vec<u8>>>;

impl World<'_> {
    /// Before a shard's machine gets an event; `None`: it never does.
    pub(super) fn spoil_event(&mut self, shard: usize, mut event: Event) -> Option<Event> {
        match (self.sabotage?, &mut event) {
            (Sabotage::ForgetHeld, Event::Round { header, .. }) if header.flags.held => {
                return None;
            }
            (Sabotage::ForgetHeld, Event::Control { message, .. }) => forget(message),
            (Sabotage::NoRetelling, Event::Hello { .. }) => {
                self.shards[shard].clock.jump(RECOVERY_GRACE);
                self.shards[shard].rearm();
            }
            (Sabotage::TakeStale, Event::Hello { hello, .. }) => {
                if let Intent::Member { place, .. } = &mut hello.intent {
                    place.epoch = Epoch(self.answers as u32 + 1000);
                }
            }
            (Sabotage::LoseFrame, Event::Round { header, .. }) => {
                let draw = mix(header.step.0 ^ (u64::from(header.bucket.0) << 20) ^ self.events);
                if draw.is_multiple_of(200) {
                    return None;
                }
            }
            (Sabotage::WaitForEver, Event::Closed { .. }) => return None,
            _ => {}
        }
        Some(event)
    }

    /// Before a shard's answer is sent.
    pub(super) fn spoil_answer(
        &mut self,
        shard: usize,
        life: LifeId,
        header: &mut FrameHeader,
        body: &mut Bytes,
    ) {
        let (Some(sabotage), Some(rank)) = (self.sabotage, self.rank_of(life)) else {
            return;
        };
        if header.flags.non_finite {
            return;
        }
        let (payload, roster) = body.split_at(header.payload_bytes());
        let ranks = decode_roster(roster).unwrap_or_default();
        match sabotage {
            Sabotage::CountLate => header.flags.counted = true,
            Sabotage::TwoAnswers if rank.0 == 1 && header.step.0 == 5 => {
                let mut other = body.to_vec();
                if let Some(byte) = other
                    .first_mut()
                    .filter(|_| header.kind == FrameKind::DenseMean)
                {
                    *byte ^= 1;
                }
                *body = other.into();
            }
            Sabotage::WrongRoster if ranks.len() > 1 && header.step.0 % 4 == 3 => {
                let kept: BTreeSet<Rank> = ranks.iter().copied().skip(1).collect();
                header.flags.counted = kept.contains(&rank);
                let payload = payload.to_vec();
                replace(header, body, payload, &encode_roster(&kept));
            }
            Sabotage::AddTwice
            | Sabotage::CountAgain
            | Sabotage::DivideByMembers
            | Sabotage::ArrivalOrder => {
                if header.kind.goes_on() {
                    return;
                }
                let roster = roster.to_vec();
                let key: AnswerKey = (header.step, header.bucket, header.kind.into());
                let generation = self.shards[shard].generation;
                let members = self
                    .workers
                    .iter()
                    .filter(|worker| worker.is_training())
                    .count();
                let checker = &self.checker;
                let spoiled = self
                    .spoiled
                    .entry((shard, generation, key))
                    .or_insert_with(|| {
                        checker.spoiled(sabotage, shard, life, header, &ranks, members)
                    });
                if let Some(payload) = spoiled.clone() {
                    replace(header, body, payload, &roster);
                }
            }
            _ => {}
        }
    }

    /// Before a worker's message is sent; true: it is not.
    pub(super) fn spoils_saying(&mut self, shard: usize, message: &mut Control) -> bool {
        match (self.sabotage, &message) {
            (Some(Sabotage::KeepNothing), _) => {
                forget(message);
                false
            }
            (Some(Sabotage::SkipRelays), Control::Membership { .. }) => shard != 0,
            (Some(Sabotage::SkipAway), Control::Away) => true,
            _ => false,
        }
    }

    /// Whether a worker's frame is not sent.
    pub(super) fn spoils_sending(&self, header: &FrameHeader) -> bool {
        self.sabotage == Some(Sabotage::KeepNothing) && header.flags.held
    }

    /// Before a worker's machine gets an answer.
    pub(super) fn spoil_receipt(&self, life: LifeId, header: &mut FrameHeader, body: &mut Bytes) {
        if self.sabotage != Some(Sabotage::CommitUncounted) || header.flags.non_finite {
            return;
        }
        header.flags.counted = true;
        let (payload, roster) = body.split_at(header.payload_bytes());
        let mut ranks = decode_roster(roster).unwrap_or_default();
        ranks.extend(self.rank_of(life));
        let payload = payload.to_vec();
        replace(header, body, payload, &encode_roster(&ranks));
    }
}

fn replace(header: &mut FrameHeader, body: &mut Bytes, mut payload: Vec<u8>, roster: &[u8]) {
    payload.extend_from_slice(roster);
    header.body_bytes = payload.len() as u32;
    header.roster_bytes = roster.len() as u16;
    *body = payload.into();
}

/// Nothing to tell.
fn forget(message: &mut Control) {
    if let Control::Retelling { frames } = message {
        *frames = 0;
    }
}
