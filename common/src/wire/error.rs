//! What can be wrong with received bytes, by who has to act.

use super::FrameKind;

/// Who has to act on a [`WireError`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Blame {
    /// The bytes are damaged or were made by something else.
    Bytes,
    /// The peer understands the format but breaks its rules.
    Peer,
    /// The peer speaks a version that this program does not know.
    Incompatible,
}

/// Received bytes that were refused. Nothing was allocated beyond the bytes that were there.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// The message ended too early.
    #[error("{what} needs {needed} bytes, but only {left} are left: the message was cut short")]
    Truncated {
        /// Field.
        what: &'static str,
        /// Bytes that it needs.
        needed: usize,
        /// Bytes that were there.
        left: usize,
    },
    /// Bytes follow the end of the message.
    #[error("{bytes} bytes follow the end of {what}")]
    Trailing {
        /// Message.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
    /// A length or count is above its limit.
    #[error("{what} is {value}, above its limit of {limit}")]
    TooLong {
        /// Field.
        what: &'static str,
        /// Received.
        value: u64,
        /// Largest accepted.
        limit: u64,
    },
    /// A kind, flag or choice that this version does not know.
    #[error(
        "{what} {value} is unknown here: the peer is newer, or not arc-topk; run the same release everywhere"
    )]
    Unknown {
        /// Field.
        what: &'static str,
        /// Received.
        value: u64,
    },
    /// Text that is not UTF-8.
    #[error("{what} is not UTF-8")]
    NotUtf8 {
        /// Field.
        what: &'static str,
    },
    /// A rule of the format is broken.
    #[error("{what}: {rule}")]
    Invalid {
        /// Field.
        what: &'static str,
        /// The rule.
        rule: &'static str,
    },
    /// A body does not have the length that the plan gives it.
    #[error(
        "a {kind:?} body of this round has {expected} bytes, but {actual} came: the peers' plans differ"
    )]
    BodyLength {
        /// Kind of the frame.
        kind: FrameKind,
        /// By the plan.
        expected: usize,
        /// Received.
        actual: usize,
    },
    /// A selection holds another number of rows than the round allows.
    #[error("segment {segment} selects {rows} rows where the round allows {allowed}")]
    RowCount {
        /// Position of the segment among the sparse ones.
        segment: usize,
        /// Received.
        rows: usize,
        /// By the plan; where it has an `energy` below 1, the most, and one the fewest.
        allowed: usize,
    },
}

impl WireError {
    /// Who has to act.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            Self::Truncated { .. }
            | Self::Trailing { .. }
            | Self::NotUtf8 { .. }
            | Self::Invalid { .. } => Blame::Bytes,
            Self::TooLong { .. } | Self::BodyLength { .. } | Self::RowCount { .. } => Blame::Peer,
            Self::Unknown { .. } => Blame::Incompatible,
        }
    }
}
