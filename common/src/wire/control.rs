//! Bytes of [`Control`] messages.
//!
//! On the control stream each message is preceded by its length (u32, at most [`MAX_CONTROL_BYTES`]); this
//! module makes and reads what follows it: a tag byte, then the fields in the order of their declaration, little
//! endian. Texts and lists are preceded by a u32 count; an absent option is one zero byte.

use super::codec::{Reader, Writer};
use super::plan_spec::{read_plan_spec, write_plan_spec};
use super::{
    Control, Hello, Intent, JoinWhen, MAX_CONTROL_BYTES, Place, RefusalCode, Welcome, WireError,
};
use crate::ids::{Epoch, Rank, RunId, Step};

/// Longest job name, bytes.
pub const MAX_JOB_BYTES: usize = 128;
/// Longest host description, bytes; longer ones are cut by the sender.
pub const MAX_HOST_BYTES: usize = 256;
/// Longest text for people (details, reasons), bytes; longer ones are cut by the sender.
pub const MAX_DETAIL_BYTES: usize = 4096;
/// Most workers of a job.
pub const MAX_WORLD: usize = 4096;

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const WAITING: u8 = 3;
const REFUSED: u8 = 4;
const MEMBERSHIP: u8 = 5;
const LEAVE: u8 = 6;
const REPORT: u8 = 7;
const RETELLING: u8 = 8;
const AWAY: u8 = 9;
const READY: u8 = 10;
const DIGEST: u8 = 11;
const DIGESTS_DIFFER: u8 = 12;
const DONATE: u8 = 13;
const DONATED: u8 = 14;
const DONATING: u8 = 15;

const JOIN: u8 = 0;
const MEMBER: u8 = 1;

impl RefusalCode {
    /// All codes, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Version,
        Self::Job,
        Self::Plan,
        Self::Rank,
        Self::World,
        Self::Step,
        Self::Protocol,
        Self::TooFewWorkers,
        Self::Shutdown,
        Self::Shard,
        Self::Superseded,
    ];

    /// The code as a word, for metrics and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Version => "version",
            Self::Job => "job",
            Self::Plan => "plan",
            Self::Rank => "rank",
            Self::World => "world",
            Self::Step => "step",
            Self::Protocol => "protocol",
            Self::TooFewWorkers => "too_few_workers",
            Self::Shutdown => "shutdown",
            Self::Shard => "shard",
            Self::Superseded => "superseded",
        }
    }

    /// The code with this number (it is also the QUIC close code).
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|code| *code as u64 == number)
    }
}

/// Bytes of the length that goes in front of a control message (u32, little endian).
pub const CONTROL_LENGTH_BYTES: usize = size_of::<u32>();

impl Control {
    /// Bytes of the message on its stream, its length in front included. Encodes it for that: messages are few, and all
    /// but the Hello short.
    #[must_use]
    pub fn framed_bytes(&self) -> u64 {
        (CONTROL_LENGTH_BYTES + self.encode().len()) as u64
    }

    /// The message's name, for errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Welcome(_) => "Welcome",
            Self::Waiting { .. } => "Waiting",
            Self::Refused { .. } => "Refused",
            Self::Membership { .. } => "Membership",
            Self::Leave => "Leave",
            Self::Report { .. } => "Report",
            Self::Retelling { .. } => "Retelling",
            Self::Away => "Away",
            Self::Ready { .. } => "Ready",
            Self::Digest { .. } => "Digest",
            Self::DigestsDiffer { .. } => "DigestsDiffer",
            Self::Donate => "Donate",
            Self::Donating { .. } => "Donating",
            Self::Donated { .. } => "Donated",
        }
    }

    /// The message's bytes, without the length in front. Texts for people are cut to their limits.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let mut w = Writer(&mut out);
        match self {
            Self::Hello(hello) => write_hello(&mut w, hello),
            Self::Welcome(welcome) => {
                w.u8(WELCOME);
                w.u64(welcome.shard_incarnation);
                w.u8(u8::from(welcome.retell));
                write_place(&mut w, &welcome.place);
                w.u64(welcome.step.0);
                w.u8(u8::from(welcome.snapshot));
            }
            Self::Waiting { joined, world } => {
                w.u8(WAITING);
                w.u16(*joined);
                w.u16(*world);
            }
            Self::Refused { code, detail } => {
                w.u8(REFUSED);
                w.u16(*code as u16);
                w.text_cut(detail, MAX_DETAIL_BYTES);
            }
            Self::Membership {
                epoch,
                next_rank,
                members,
                away,
                reason,
            } => {
                w.u8(MEMBERSHIP);
                w.u32(epoch.0);
                w.u16(*next_rank);
                write_ranks(&mut w, members);
                write_ranks(&mut w, away);
                w.text_cut(reason, MAX_DETAIL_BYTES);
            }
            Self::Retelling { frames } => {
                w.u8(RETELLING);
                w.u32(*frames);
            }
            Self::Away => w.u8(AWAY),
            Self::Ready { step } => {
                w.u8(READY);
                w.u64(step.0);
            }
            Self::Digest { step, digest } => {
                w.u8(DIGEST);
                w.u64(step.0);
                w.bytes(digest);
            }
            Self::DigestsDiffer { step, ranks } => {
                w.u8(DIGESTS_DIFFER);
                w.u64(step.0);
                write_ranks(&mut w, ranks);
            }
            Self::Donate => w.u8(DONATE),
            Self::Donating { step } => {
                w.u8(DONATING);
                w.u64(step.0);
            }
            Self::Donated { step } => {
                w.u8(DONATED);
                w.u64(step.0);
            }
            Self::Leave => w.u8(LEAVE),
            Self::Report {
                step,
                loss,
                step_seconds,
                wait_seconds,
                bytes_sent,
                bytes_received,
                bytes_dense_equivalent,
                captured_energy,
                residual_ratio,
            } => {
                w.u8(REPORT);
                w.u64(step.0);
                [loss, step_seconds, wait_seconds]
                    .into_iter()
                    .for_each(|v| w.f32(*v));
                [bytes_sent, bytes_received, bytes_dense_equivalent]
                    .into_iter()
                    .for_each(|v| w.u64(*v));
                [captured_energy, residual_ratio]
                    .into_iter()
                    .for_each(|v| w.f32(*v));
            }
        }
        out
    }

    /// Reads one message that fills `bytes`.
    ///
    /// # Errors
    /// A message above [`MAX_CONTROL_BYTES`], cut short or followed by more bytes; an unknown tag or
    /// choice; a text or list above its limit; text that is not UTF-8; members that do not ascend.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > MAX_CONTROL_BYTES {
            let (value, limit) = (bytes.len() as u64, MAX_CONTROL_BYTES as u64);
            return Err(WireError::TooLong {
                what: "control message",
                value,
                limit,
            });
        }
        let mut r = Reader(bytes);
        let message = match r.u8("control tag")? {
            HELLO => Self::Hello(Box::new(read_hello(&mut r)?)),
            WELCOME => Self::Welcome(Welcome {
                shard_incarnation: r.u64("shard incarnation")?,
                retell: read_flag(&mut r, "retell")?,
                place: read_place(&mut r)?,
                step: Step(r.u64("step")?),
                snapshot: read_flag(&mut r, "snapshot")?,
            }),
            WAITING => Self::Waiting {
                joined: r.u16("joined")?,
                world: r.u16("world")?,
            },
            REFUSED => Self::Refused {
                code: read_code(&mut r)?,
                detail: r.text("detail", MAX_DETAIL_BYTES)?,
            },
            MEMBERSHIP => Self::Membership {
                epoch: Epoch(r.u32("epoch")?),
                next_rank: r.u16("next rank")?,
                members: read_ranks(&mut r)?,
                away: read_ranks(&mut r)?,
                reason: r.text("reason", MAX_DETAIL_BYTES)?,
            },
            RETELLING => Self::Retelling {
                frames: r.u32("frames")?,
            },
            AWAY => Self::Away,
            READY => Self::Ready {
                step: Step(r.u64("step")?),
            },
            DIGEST => Self::Digest {
                step: Step(r.u64("step")?),
                digest: r.array("digest")?,
            },
            DIGESTS_DIFFER => Self::DigestsDiffer {
                step: Step(r.u64("step")?),
                ranks: read_ranks(&mut r)?,
            },
            DONATE => Self::Donate,
            DONATING => Self::Donating {
                step: Step(r.u64("step")?),
            },
            DONATED => Self::Donated {
                step: Step(r.u64("step")?),
            },
            LEAVE => Self::Leave,
            REPORT => Self::Report {
                step: Step(r.u64("step")?),
                loss: r.f32("loss")?,
                step_seconds: r.f32("step seconds")?,
                wait_seconds: r.f32("wait seconds")?,
                bytes_sent: r.u64("bytes sent")?,
                bytes_received: r.u64("bytes received")?,
                bytes_dense_equivalent: r.u64("dense equivalent")?,
                captured_energy: r.f32("captured energy")?,
                residual_ratio: r.f32("residual ratio")?,
            },
            value => {
                return Err(WireError::Unknown {
                    what: "control tag",
                    value: u64::from(value),
                });
            }
        };
        r.finish("control message")?;
        Ok(message)
    }
}

fn write_hello(w: &mut Writer<'_>, hello: &Hello) {
    w.u8(HELLO);
    w.u16(hello.protocol);
    w.text(&hello.job);
    w.bytes(&hello.incarnation);
    w.u16(hello.shard);
    w.text_cut(&hello.host, MAX_HOST_BYTES);
    write_intent(w, &hello.intent);
    write_plan_spec(w, &hello.plan);
}

fn read_hello(r: &mut Reader<'_>) -> Result<Hello, WireError> {
    Ok(Hello {
        protocol: r.u16("protocol version")?,
        job: r.text("job name", MAX_JOB_BYTES)?,
        incarnation: r.array("incarnation")?,
        shard: r.u16("shard")?,
        host: r.text("host", MAX_HOST_BYTES)?,
        intent: read_intent(r)?,
        plan: read_plan_spec(r)?,
    })
}

fn write_intent(w: &mut Writer<'_>, intent: &Intent) {
    match intent {
        Intent::Join {
            rank,
            world,
            start_step,
            when,
        } => {
            w.u8(JOIN);
            w.option(*rank, |w, rank| w.u16(rank.0));
            w.option(*world, Writer::u16);
            w.u64(start_step.0);
            w.u8(*when as u8);
        }
        Intent::Member {
            place,
            step,
            waited,
        } => {
            w.u8(MEMBER);
            write_place(w, place);
            w.u64(step.0);
            w.u8(u8::from(*waited));
        }
    }
}

fn read_intent(r: &mut Reader<'_>) -> Result<Intent, WireError> {
    match r.u8("intent")? {
        JOIN => Ok(Intent::Join {
            rank: r.option("rank option", |r| r.u16("rank").map(Rank))?,
            world: r.option("world option", |r| r.u16("world"))?,
            start_step: Step(r.u64("start step")?),
            when: read_when(r)?,
        }),
        MEMBER => Ok(Intent::Member {
            place: read_place(r)?,
            step: Step(r.u64("step")?),
            waited: read_flag(r, "waited")?,
        }),
        value => Err(WireError::Unknown {
            what: "intent",
            value: u64::from(value),
        }),
    }
}

fn write_place(w: &mut Writer<'_>, place: &Place) {
    w.bytes(&place.run.0);
    w.u16(place.rank.0);
    w.u32(place.epoch.0);
    w.u16(place.next_rank);
    write_ranks(w, &place.members);
}

fn read_place(r: &mut Reader<'_>) -> Result<Place, WireError> {
    Ok(Place {
        run: RunId(r.array("run")?),
        rank: Rank(r.u16("rank")?),
        epoch: Epoch(r.u32("epoch")?),
        next_rank: r.u16("next rank")?,
        members: read_ranks(r)?,
    })
}

fn read_when(r: &mut Reader<'_>) -> Result<JoinWhen, WireError> {
    match r.u8("join when")? {
        0 => Ok(JoinWhen::Start),
        1 => Ok(JoinWhen::Any),
        2 => Ok(JoinWhen::Running),
        value => Err(WireError::Unknown {
            what: "join when",
            value: u64::from(value),
        }),
    }
}

fn read_flag(r: &mut Reader<'_>, what: &'static str) -> Result<bool, WireError> {
    match r.u8(what)? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(WireError::Unknown {
            what,
            value: u64::from(value),
        }),
    }
}

fn read_code(r: &mut Reader<'_>) -> Result<RefusalCode, WireError> {
    let value = u64::from(r.u16("refusal code")?);
    RefusalCode::from_number(value).ok_or(WireError::Unknown {
        what: "refusal code",
        value,
    })
}

fn write_ranks(w: &mut Writer<'_>, ranks: &[Rank]) {
    w.count(ranks.len());
    ranks.iter().for_each(|rank| w.u16(rank.0));
}

fn read_ranks(r: &mut Reader<'_>) -> Result<Vec<Rank>, WireError> {
    let count = r.count("members", MAX_WORLD, 2)?;
    let members = (0..count)
        .map(|_| r.u16("member").map(Rank))
        .collect::<Result<Vec<_>, _>>()?;
    if !members.is_sorted_by(|a, b| a < b) {
        return Err(WireError::Invalid {
            what: "members",
            rule: "ranks must ascend",
        });
    }
    Ok(members)
}
