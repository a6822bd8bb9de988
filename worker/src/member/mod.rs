//! A worker's place in an elastic job, as a machine without sockets and clocks: one [`StepMachine`] and the links to all
//! shards.
//!
//! The shell (a QUIC session, a simulator) hands over what happens as [`Input`]s with the time since any fixed moment,
//! and does what the [`Output`]s say, in their order. The trainer's calls ([`Member::begin`], [`Member::fill`], …,
//! [`Member::commit`]) push outputs, too.
//!
//! # Links
//!
//! | state | event | next | out |
//! |---|---|---|---|
//! | down | `LinkUp` | up | newest Membership if the Hello told an older one; if the Welcome asks for it Retelling and all held answers; then every unanswered frame of the open step |
//! | up | `LinkDown` | down | Dial |
//! | down | frames, control messages to it | down | nothing: what still matters is made again at `LinkUp` |
//! | all up | (after Away) | all up | Ready to every shard that does not wait for this worker |
//! | one down for `away_after` | tick | same | Away to all shards that wait for this worker |
//! | up | Refused (the shard shuts down) | down | Dial: the job goes on once the shard is back |
//! | any | Refused (any other reason), a frame that breaks the protocol, a membership without this worker | failed | Fail, and nothing ever after |
//!
//! A link that was never up starts no Away timer: a job that starts is not in a hurry.
//!
//! # What the shell owes
//!
//! - Frames and control messages of a connection come between its `LinkUp` and its `LinkDown`, never later: an answer of an
//!   earlier incarnation that is heard after the retelling would be missing in it.
//! - [`Output::Dial`] means: try until `LinkUp`, asking [`Member::intent`] anew for each attempt.
//! - A refusal is handed over as [`Control::Refused`], also when it answers a Hello. If no Fail follows (the shard shuts
//!   down), the dialling goes on.
//! - Frames flagged `held` go on streams of their own, without an answer. All others go on the stream of their
//!   (step, bucket) with this shard on the *present* connection; it is opened where there is none.
//! - [`Member::tick`] at [`Member::next_deadline`] at the latest.

pub mod any_bytes;
mod links;
mod membership;
mod training;

use crate::reducer::ReduceError;
use crate::step::{Outgoing, StepMachine};
use arc_topk_common::ids::{Rank, ShardId, Step};
use arc_topk_common::wire::{Control, FrameHeader, Place, Welcome};
use bytes::Bytes;
use core::time::Duration;
use links::Link;

/// How long a lost shard may be away until the others are told not to wait for this worker.
pub const AWAY_AFTER: Duration = Duration::from_secs(1);

/// What a member knows when shard 0 has given it a place.
#[derive(Clone, PartialEq, Debug)]
pub struct MemberConfig {
    /// That place.
    pub place: Place,
    /// Incarnation of shard 0 ([`Welcome::shard_incarnation`]).
    pub coordinator: u64,
    /// Whether rounds wait for this worker from its first step on. One that joins a running job ([`Welcome::snapshot`])
    /// first replays what it has missed; it says by itself when it is there.
    pub waited: bool,
    /// See [`AWAY_AFTER`].
    pub away_after: Duration,
}

impl MemberConfig {
    /// From the Welcome that answered a Join.
    #[must_use]
    pub fn new(welcome: &Welcome) -> Self {
        Self {
            place: welcome.place.clone(),
            coordinator: welcome.shard_incarnation,
            waited: !welcome.snapshot,
            away_after: AWAY_AFTER,
        }
    }
}

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Input {
    /// A shard has answered the Hello of a new connection.
    LinkUp {
        /// Shard.
        shard: ShardId,
        /// Its answer.
        welcome: Welcome,
    },
    /// A connection that was up is lost.
    LinkDown {
        /// Shard.
        shard: ShardId,
        /// Why, for people.
        reason: String,
    },
    /// A control message of a shard, other than Welcome.
    Control {
        /// Shard.
        shard: ShardId,
        /// Message.
        message: Control,
    },
    /// An answer of a shard.
    Frame {
        /// Shard.
        shard: ShardId,
        /// Header.
        header: FrameHeader,
        /// Body, roster included.
        body: Bytes,
    },
}

/// What to do, in order.
#[derive(Clone, PartialEq, Debug)]
pub enum Output {
    /// Connect, with the intent of [`Member::intent`], until it is done or refused.
    Dial {
        /// Shard.
        shard: ShardId,
    },
    /// Send on the control stream.
    Control {
        /// Shard.
        shard: ShardId,
        /// Message.
        message: Control,
    },
    /// Send a frame: if it is flagged `held` on a stream of its own, else on its round's.
    Frame(Outgoing),
    /// The session has ended. Nothing follows.
    Fail(ReduceError),
    /// For people.
    Notice(Notice),
}

/// What people may want to know.
#[derive(Clone, PartialEq, Debug)]
pub enum Notice {
    /// A connection is lost.
    ShardLost {
        /// Shard.
        shard: ShardId,
        /// Why.
        reason: String,
    },
    /// A lost shard is there again.
    ShardBack {
        /// Shard.
        shard: ShardId,
        /// How long it was gone.
        after: Duration,
        /// It is another process than before.
        restarted: bool,
        /// Answers that it is told again.
        told: usize,
        /// Frames that were sent again.
        again: usize,
    },
    /// The others were told not to wait for this worker.
    Away,
    /// The others were told to wait for it from this step on: it has come back, or caught up with the job that it joined.
    Ready {
        /// First step.
        step: Step,
    },
    /// Members have changed, or their connections.
    Membership {
        /// As known now.
        place: Place,
        /// Members whose connection is gone.
        away: Vec<Rank>,
        /// What happened.
        reason: String,
    },
    /// A step begins that the job has left behind: this worker only takes its results.
    Behind {
        /// The step.
        step: Step,
        /// The lowest that any shard still works on.
        job: Step,
    },
    /// A snapshot of the replica is wanted ([`Member::donation_due`]).
    DonationAsked,
    /// Workers' parameters are not the same.
    DigestsDiffer {
        /// Step.
        step: Step,
        /// Those that differ from the most.
        ranks: Vec<Rank>,
    },
}

/// The machine. One per worker and run.
pub struct Member {
    machine: StepMachine,
    place: Place,
    /// Members without a connection, by shard 0's word.
    gone: Vec<Rank>,
    links: Vec<Link>,
    away_after: Duration,
    /// Rounds may wait for this worker.
    waited: bool,
    /// Told the shards not to.
    away: bool,
    donation_due: bool,
    /// A copy of the replica is on its way to the store.
    donates: bool,
    /// To be told to shard 0.
    donated: Option<Step>,
    left: bool,
    failed: bool,
    /// Scratch.
    frames: Vec<Outgoing>,
}

impl Member {
    /// A member whose connection with shard 0 is up. `machine` is about to begin its first step. Dials of all other shards
    /// are pushed onto `out`.
    #[must_use]
    pub fn new(mut machine: StepMachine, config: MemberConfig, out: &mut Vec<Output>) -> Self {
        let shards = machine.plan().spec.shards;
        machine.set_epoch(config.place.epoch);
        machine.set_rank(config.place.rank);
        let mut links: Vec<Link> = (0..shards).map(|_| Link::new()).collect();
        if let Some(first) = links.first_mut() {
            first.welcomed(config.coordinator, config.waited, config.place.epoch);
        }
        out.extend((1..shards).map(|shard| Output::Dial {
            shard: ShardId(shard),
        }));
        Self {
            machine,
            place: config.place,
            gone: Vec::new(),
            links,
            away_after: config.away_after,
            waited: config.waited,
            away: false,
            donation_due: false,
            donates: false,
            donated: None,
            left: false,
            failed: false,
            frames: Vec::new(),
        }
    }

    /// Something happened.
    pub fn handle(&mut self, now: Duration, input: Input, out: &mut Vec<Output>) {
        if self.failed {
            return;
        }
        match input {
            Input::LinkUp { shard, welcome } => self.link_up(now, shard, welcome, out),
            Input::LinkDown { shard, reason } => self.link_down(now, shard, reason, out),
            Input::Control { shard, message } => self.control(now, shard, message, out),
            Input::Frame {
                shard,
                header,
                body,
            } => self.frame(shard, header, body, out),
        }
    }

    /// Time has gone by.
    pub fn tick(&mut self, now: Duration, out: &mut Vec<Output>) {
        if self.next_deadline().is_some_and(|deadline| deadline <= now) {
            self.away = true;
            out.push(Output::Notice(Notice::Away));
            self.tell_readiness(out);
        }
    }

    /// When [`Member::tick`] is needed at the latest; `None`: not for now.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.failed || self.left || self.away || !self.waited {
            return None;
        }
        let lost = self.links.iter().filter_map(Link::lost_since).min()?;
        Some(lost.saturating_add(self.away_after))
    }

    /// Whether the session has ended ([`Output::Fail`]).
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    fn fail(&mut self, error: ReduceError, out: &mut Vec<Output>) {
        self.failed = true;
        out.push(Output::Fail(error));
    }

    /// Sends on a control stream, if there is one.
    fn send(&self, shard: ShardId, message: Control, out: &mut Vec<Output>) {
        if self.is_up(shard) {
            out.push(Output::Control { shard, message });
        }
    }

    /// Sends the machine's frames over the links that are up.
    fn send_frames(&mut self, out: &mut Vec<Output>) -> usize {
        let mut frames = std::mem::take(&mut self.frames);
        let before = out.len();
        out.extend(
            frames
                .drain(..)
                .filter(|frame| !self.failed && self.is_up(frame.shard))
                .map(Output::Frame),
        );
        self.frames = frames;
        out.len() - before
    }
}
