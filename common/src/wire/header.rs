//! The 32 bytes in front of every round body.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | kind, [`FrameKind`] |
//! | 1 | 1 | flags: bit 0 `non_finite`, bit 1 `counted`, bit 2 `absent`, bit 3 `held`, others zero |
//! | 2 | 2 | bucket |
//! | 4 | 4 | epoch |
//! | 8 | 8 | step |
//! | 16 | 8 | update |
//! | 24 | 4 | body bytes, at most [`MAX_BODY_BYTES`]; zero if `non_finite` or `absent` |
//! | 28 | 2 | roster bytes, at most the body's |
//! | 30 | 2 | lead |

use super::codec::{Reader, Writer};
use super::{FrameFlags, FrameHeader, FrameKind, HEADER_BYTES, MAX_BODY_BYTES, WireError};
use crate::ids::{BucketId, Epoch, Step};

const NON_FINITE: u8 = 1;
const COUNTED: u8 = 2;
const ABSENT: u8 = 4;
const HELD: u8 = 8;

impl FrameFlags {
    fn bits(self) -> u8 {
        let bit = |set, bit| if set { bit } else { 0 };
        bit(self.non_finite, NON_FINITE)
            | bit(self.counted, COUNTED)
            | bit(self.absent, ABSENT)
            | bit(self.held, HELD)
    }
}

impl FrameKind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Sketch,
        Self::Selection,
        Self::Values,
        Self::Mean,
        Self::Dense,
        Self::DenseMean,
        Self::Sparse,
        Self::SparseMean,
        Self::Estimates,
        Self::Restore,
        Self::EstimatesMean,
    ];

    /// Whether shards send it (false: workers do).
    #[must_use]
    pub fn is_down(self) -> bool {
        (self as u8).is_multiple_of(2)
    }

    /// Whether the round goes on after an answer of this kind, unless it says that all skip.
    #[must_use]
    pub fn goes_on(self) -> bool {
        matches!(self, Self::Selection | Self::Restore)
    }

    fn from_wire(value: u8) -> Result<Self, WireError> {
        let known = Self::ALL.into_iter().find(|kind| *kind as u8 == value);
        known.ok_or(WireError::Unknown {
            what: "frame kind",
            value: u64::from(value),
        })
    }
}

impl FrameHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        let mut w = Writer(&mut bytes);
        w.u8(self.kind as u8);
        w.u8(self.flags.bits());
        w.u16(self.bucket.0);
        w.u32(self.epoch.0);
        w.u64(self.step.0);
        w.u64(self.update);
        w.u32(self.body_bytes);
        w.u16(self.roster_bytes);
        w.u16(self.lead);
        bytes
            .try_into()
            .expect("the fields above add up to HEADER_BYTES")
    }

    /// Reads a header.
    ///
    /// # Errors
    /// An unknown kind or flag, a body above [`MAX_BODY_BYTES`], a roster longer than the body, or a body announced
    /// together with `non_finite` or `absent`.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let mut r = Reader(bytes);
        let kind = FrameKind::from_wire(r.u8("frame kind")?)?;
        let flags = r.u8("frame flags")?;
        if flags & !(NON_FINITE | COUNTED | ABSENT | HELD) != 0 {
            return Err(WireError::Unknown {
                what: "frame flags",
                value: u64::from(flags),
            });
        }
        let flags = FrameFlags {
            non_finite: flags & NON_FINITE != 0,
            counted: flags & COUNTED != 0,
            absent: flags & ABSENT != 0,
            held: flags & HELD != 0,
        };
        let bucket = BucketId(r.u16("bucket")?);
        let epoch = Epoch(r.u32("epoch")?);
        let step = Step(r.u64("step")?);
        let update = r.u64("update")?;
        let body_bytes = r.u32("body bytes")?;
        let roster_bytes = r.u16("roster bytes")?;
        let lead = r.u16("lead")?;
        r.finish("frame header")?;
        if body_bytes as usize > MAX_BODY_BYTES {
            return Err(WireError::TooLong {
                what: "body bytes",
                value: u64::from(body_bytes),
                limit: MAX_BODY_BYTES as u64,
            });
        }
        if (flags.non_finite || flags.absent) && body_bytes != 0 {
            return Err(WireError::Invalid {
                what: "body bytes",
                rule: "a non-finite or absent frame has no body",
            });
        }
        if u32::from(roster_bytes) > body_bytes {
            return Err(WireError::Invalid {
                what: "roster bytes",
                rule: "the roster is a part of the body",
            });
        }
        Ok(Self {
            kind,
            flags,
            bucket,
            epoch,
            step,
            update,
            body_bytes,
            roster_bytes,
            lead,
        })
    }
}
