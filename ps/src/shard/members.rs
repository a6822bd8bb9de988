//! Who is in the job, as this shard sees it: a table without decisions.

use super::event::{Action, Report, SessionId};
use super::stragglers::Lateness;
use arc_topk_common::ids::{Epoch, Rank, Step};
use arc_topk_common::wire::{Control, FrameHeader, Place};
use bytes::Bytes;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

/// How long rounds still wait for a member whose connection is lost. With the idle timeout of a connection (3 s) it is
/// below the 5 s that a lost worker may cost.
pub const RETURN_GRACE: Duration = Duration::from_secs(1);

/// Changes of the membership that a restarted coordinator may not have been told.
const EPOCHS_MISSED: u32 = 1024;

/// Ranks that a restarted coordinator's predecessor may have given unheard.
const RANKS_MISSED: u16 = 64;

/// Changes of the membership that a coordinator may have made without any member that comes to its successor hearing of
/// them. Far below [`EPOCHS_MISSED`], so that some restarts in a row are not taken for a lie.
const EPOCHS_UNHEARD: u32 = 16;

/// How a member is connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Link {
    /// By this session.
    Connected(SessionId),
    /// Not, since then.
    Away {
        since: Duration,
        /// Rounds may wait a moment for its return.
        grace: bool,
    },
}

/// Whether rounds wait for a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Waited {
    /// From this step on.
    From(Step),
    /// It replays what came before it joined, and will say when it is ready.
    Joining,
    /// It cannot reach another shard, and said so.
    CutOff,
}

/// What a member has told of the answers that it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Told {
    /// So many frames, of as many as it announced (`None`: not yet).
    Partly { got: u32, of: Option<u32> },
    /// All.
    All,
}

/// A worker that is in the job.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) host: String,
    /// `None` of one that others named and that has not come.
    pub(super) incarnation: Option<[u8; 16]>,
    pub(super) link: Link,
    pub(super) waited: Waited,
    /// The highest step that it is known to have come to.
    pub(super) step: Step,
    pub(super) told: Told,
    /// Frames that came while it was still telling.
    pub(super) early: Vec<(FrameHeader, Bytes)>,
    pub(super) since: Duration,
    pub(super) report: Option<Report>,
    /// Seconds for which the others waited for it, all phases together.
    pub(super) waited_for_seconds: f64,
    pub(super) lateness: Lateness,
}

impl Member {
    pub(super) fn session(&self) -> Option<SessionId> {
        match self.link {
            Link::Connected(session) => Some(session),
            Link::Away { .. } => None,
        }
    }

    /// One that others have named and that has not come.
    pub(super) fn missing(now: Duration) -> Self {
        Self {
            host: "never seen".to_owned(),
            incarnation: None,
            link: Link::Away {
                since: now,
                grace: false,
            },
            waited: Waited::Joining,
            step: Step(0),
            told: Told::Partly { got: 0, of: None },
            early: Vec::new(),
            since: now,
            report: None,
            waited_for_seconds: 0.0,
            lateness: Lateness::default(),
        }
    }

    /// Whether rounds of `step` wait for it now; `forgiving`: for one that is cut off, too.
    fn is_live(&self, now: Duration, step: Step, forgiving: bool) -> bool {
        let there = match self.link {
            Link::Connected(_) => true,
            Link::Away { since, grace } => grace && now.saturating_sub(since) < RETURN_GRACE,
        };
        let wanted = match self.waited {
            Waited::From(from) => from <= step,
            Waited::CutOff => forgiving,
            Waited::Joining => false,
        };
        there && wanted
    }
}

/// The members.
#[derive(Debug, Default)]
pub(super) struct Members {
    pub(super) epoch: Epoch,
    pub(super) next_rank: u16,
    /// All ranks by the newest list of shard 0.
    pub(super) listed: BTreeSet<Rank>,
    /// Those of them that were away by the newest word.
    pub(super) gone: BTreeSet<Rank>,
    /// Until then rounds wait for members that are cut off, too.
    forgiving_until: Duration,
    table: BTreeMap<Rank, Member>,
    seats: BTreeMap<SessionId, Rank>,
}

impl Members {
    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    pub(super) fn count(&self) -> usize {
        self.table.len()
    }

    pub(super) fn connected_count(&self) -> usize {
        self.seats.len()
    }

    pub(super) fn rank(&self, session: SessionId) -> Option<Rank> {
        self.seats.get(&session).copied()
    }

    pub(super) fn get(&self, rank: Rank) -> Option<&Member> {
        self.table.get(&rank)
    }

    pub(super) fn get_mut(&mut self, rank: Rank) -> Option<&mut Member> {
        self.table.get_mut(&rank)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Rank, &Member)> {
        self.table.iter().map(|(rank, member)| (*rank, member))
    }

    pub(super) fn session(&self, rank: Rank) -> Option<SessionId> {
        self.get(rank)?.session()
    }

    /// Sessions of connected members, by rank.
    pub(super) fn sessions(&self) -> impl Iterator<Item = (Rank, SessionId)> {
        self.iter()
            .filter_map(|(rank, member)| Some((rank, member.session()?)))
    }

    /// Sends all connected members the same.
    pub(super) fn broadcast(&self, message: &Control, out: &mut Vec<Action>) {
        out.extend(self.sessions().map(|(_, session)| Action::Control {
            session,
            message: message.clone(),
        }));
    }

    /// Ranks for which rounds of `step` wait. Where rounds wait for nobody, those that are connected and do not say that
    /// they are cut off: a worker that joined while the last of the others died must not wait for them for ever.
    pub(super) fn live(&self, now: Duration, step: Step) -> BTreeSet<Rank> {
        let forgiving = now < self.forgiving_until;
        let live: BTreeSet<Rank> = self
            .iter()
            .filter(|(_, member)| member.is_live(now, step, forgiving))
            .map(|(rank, _)| rank)
            .collect();
        if !live.is_empty() {
            return live;
        }
        self.iter()
            .filter(|(_, m)| m.session().is_some() && m.waited != Waited::CutOff)
            .map(|(rank, _)| rank)
            .collect()
    }

    /// A member can reach all shards again. When a shard comes back that all had lost, the others will say the same in a
    /// moment: rounds must not close without them before that.
    pub(super) fn one_is_back(&mut self, now: Duration) {
        let others = self
            .iter()
            .any(|(_, member)| member.session().is_some() && member.waited == Waited::CutOff);
        if others && self.forgiving_until + RETURN_GRACE <= now {
            self.forgiving_until = now + RETURN_GRACE;
        }
    }

    /// Takes a member in.
    pub(super) fn insert(&mut self, rank: Rank, member: Member) {
        if let Some(session) = member.session() {
            self.seats.insert(session, rank);
        }
        self.table.insert(rank, member);
    }

    /// Connects a member that is there by `session`; the session that it had is given back.
    pub(super) fn attach(&mut self, rank: Rank, session: SessionId) -> Option<SessionId> {
        let member = self.table.get_mut(&rank)?;
        let old = member.session();
        member.link = Link::Connected(session);
        if let Some(old) = old {
            self.seats.remove(&old);
        }
        self.seats.insert(session, rank);
        old
    }

    /// The member of a session that is gone.
    pub(super) fn detach(
        &mut self,
        now: Duration,
        session: SessionId,
        grace: bool,
    ) -> Option<Rank> {
        let rank = self.seats.remove(&session)?;
        if let Some(member) = self.table.get_mut(&rank) {
            member.link = Link::Away { since: now, grace };
        }
        Some(rank)
    }

    pub(super) fn remove(&mut self, rank: Rank) -> Option<Member> {
        let member = self.table.remove(&rank)?;
        if let Some(session) = member.session() {
            self.seats.remove(&session);
        }
        self.listed.remove(&rank);
        Some(member)
    }

    /// Takes over what a worker or shard 0 says of the members, if it is newer. Members that are not on a newer list and
    /// not connected are forgotten.
    pub(super) fn learn(&mut self, epoch: Epoch, next_rank: u16, listed: &[Rank]) {
        self.next_rank = self.next_rank.max(next_rank);
        if epoch <= self.epoch {
            return;
        }
        self.epoch = epoch;
        self.listed = listed.iter().copied().collect();
        let listed = &self.listed;
        self.table
            .retain(|rank, member| listed.contains(rank) || member.session().is_some());
    }

    /// The coordinator was restarted. Its predecessor may have made lists of which only some members know: the new one
    /// gets a number that none of those has.
    pub(super) fn outnumber_forgotten_lists(&mut self) {
        self.epoch = Epoch(self.epoch.0.saturating_add(EPOCHS_UNHEARD));
    }

    /// Somebody knows that ranks before this one were given, by a coordinator that is gone. One far ahead is a lie.
    pub(super) fn avoid_ranks_before(&mut self, next_rank: u16) {
        if next_rank.saturating_sub(self.next_rank) <= RANKS_MISSED {
            self.next_rank = self.next_rank.max(next_rank);
        }
    }

    /// Others know of a newer list than shard 0, which was restarted and told too little: its own gets the higher number.
    /// A number far ahead is a lie.
    pub(super) fn outgrow(&mut self, epoch: Epoch, next_rank: u16) {
        if epoch > self.epoch && epoch.0 - self.epoch.0 <= EPOCHS_MISSED {
            self.epoch = Epoch(epoch.0.saturating_add(1));
            self.next_rank = self.next_rank.max(next_rank);
        }
    }

    /// The place of `rank`, as far as this shard knows.
    pub(super) fn place(&self, run: arc_topk_common::ids::RunId, rank: Rank) -> Place {
        Place {
            run,
            rank,
            epoch: self.epoch,
            next_rank: self.next_rank,
            members: self.listed.iter().copied().collect(),
        }
    }

    /// Members that are not connected, ascending.
    pub(super) fn away(&self) -> impl Iterator<Item = (Rank, Duration)> {
        self.iter().filter_map(|(rank, member)| match member.link {
            Link::Away { since, .. } => Some((rank, since)),
            Link::Connected(_) => None,
        })
    }

    /// Whether all that are listed have come and told what they hold. Those of whom shard 0 says that they are away are not
    /// waited for: until they come back they are not among those that go on.
    pub(super) fn all_told(&self) -> bool {
        let told = |rank: &Rank| match self.get(*rank) {
            Some(member) => member.told == Told::All,
            None => self.gone.contains(rank),
        };
        self.listed.iter().all(told)
    }

    /// Whether somebody is connected who has not told everything.
    pub(super) fn some_tell(&self) -> bool {
        self.iter()
            .any(|(_, member)| member.session().is_some() && member.told != Told::All)
    }

    /// When the next member stops being waited for.
    pub(super) fn next_grace_end(&self, now: Duration) -> Option<Duration> {
        self.iter()
            .filter_map(|(_, member)| match member.link {
                Link::Away { since, grace: true } => Some(since + RETURN_GRACE),
                _ => None,
            })
            .chain([self.forgiving_until])
            .filter(|end| *end > now)
            .min()
    }
}
