//! Bytes of [`Control`] messages.
//!
//! On the control stream each message is preceded by its length (u32, at most [`MAX_CONTROL_BYTES`]); this
//! module makes and reads what follows it: a tag byte, then the fields in the order of their declaration, little
//! endian. Texts and lists are preceded by a u32 count; an absent option is one zero byte.

use super::codec::{Reader, Writer};
use super::plan_spec::{read_plan_spec, write_plan_spec};
use super::{Control, Hello, MAX_CONTROL_BYTES, RefusalCode, Welcome, WireError};
use crate::ids::{Epoch, Rank, Step};

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

impl RefusalCode {
    /// All codes, in the order of their numbers.
    pub const ALL: [Self; 10] = [
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

    /// The message's bytes, without the length in front. Texts for people are cut to their limits.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let mut w = Writer(&mut out);
        match self {
            Self::Hello(hello) => write_hello(&mut w, hello),
            Self::Welcome(welcome) => {
                w.u8(WELCOME);
                w.u32(welcome.epoch.0);
                w.u16(welcome.rank.0);
                w.u16(welcome.world);
                w.u64(welcome.start_step.0);
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
                members,
                reason,
            } => {
                w.u8(MEMBERSHIP);
                w.u32(epoch.0);
                w.count(members.len());
                members.iter().for_each(|rank| w.u16(rank.0));
                w.text_cut(reason, MAX_DETAIL_BYTES);
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
                epoch: Epoch(r.u32("epoch")?),
                rank: Rank(r.u16("rank")?),
                world: r.u16("world")?,
                start_step: Step(r.u64("start step")?),
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
                members: read_members(&mut r)?,
                reason: r.text("reason", MAX_DETAIL_BYTES)?,
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
    w.option(hello.rank, |w, rank| w.u16(rank.0));
    w.option(hello.world, Writer::u16);
    w.u64(hello.start_step.0);
    w.u16(hello.shard);
    w.text_cut(&hello.host, MAX_HOST_BYTES);
    write_plan_spec(w, &hello.plan);
}

fn read_hello(r: &mut Reader<'_>) -> Result<Hello, WireError> {
    Ok(Hello {
        protocol: r.u16("protocol version")?,
        job: r.text("job name", MAX_JOB_BYTES)?,
        incarnation: r.array("incarnation")?,
        rank: r.option("rank option", |r| r.u16("rank").map(Rank))?,
        world: r.option("world option", |r| r.u16("world"))?,
        start_step: Step(r.u64("start step")?),
        shard: r.u16("shard")?,
        host: r.text("host", MAX_HOST_BYTES)?,
        plan: read_plan_spec(r)?,
    })
}

fn read_code(r: &mut Reader<'_>) -> Result<RefusalCode, WireError> {
    let value = u64::from(r.u16("refusal code")?);
    RefusalCode::from_number(value).ok_or(WireError::Unknown {
        what: "refusal code",
        value,
    })
}

fn read_members(r: &mut Reader<'_>) -> Result<Vec<Rank>, WireError> {
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
