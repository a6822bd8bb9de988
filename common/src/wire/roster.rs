//! Whose contributions an answer holds: the last bytes of its body.
//!
//! The ranks are coded as a [selection](super::encode_selection) among all that a `u16` can name, so that a roster has one
//! encoding: a handful of ranks takes a byte or two each, whichever numbers a long run has come to.

use super::selection::{append_selection, decode_selection};
use super::{MAX_WORLD, WireError};
use crate::ids::Rank;
use std::collections::BTreeSet;

const RANKS: usize = 1 << 16;
/// Most bytes of a roster: a bitmap of all ranks.
pub const MAX_ROSTER_BYTES: usize = 1 + RANKS / 8;

/// The roster's bytes.
#[must_use]
pub fn encode_roster(ranks: &BTreeSet<Rank>) -> Vec<u8> {
    let rows: Vec<u32> = ranks.iter().map(|rank| u32::from(rank.0)).collect();
    let mut out = Vec::new();
    append_selection(RANKS, &rows, &mut out);
    out
}

/// Reads a roster that fills `bytes`. No bytes are nobody.
///
/// # Errors
/// Anything but the one encoding of at most [`MAX_WORLD`] ranks.
pub fn decode_roster(bytes: &[u8]) -> Result<BTreeSet<Rank>, WireError> {
    if bytes.is_empty() {
        return Ok(BTreeSet::new());
    }
    let mut rest = bytes;
    let rows = decode_selection(&mut rest, RANKS)?;
    if !rest.is_empty() {
        return Err(WireError::Invalid {
            what: "roster",
            rule: "it ends where the body ends",
        });
    }
    if rows.len() > MAX_WORLD {
        return Err(WireError::TooLong {
            what: "roster",
            value: rows.len() as u64,
            limit: MAX_WORLD as u64,
        });
    }
    Ok(rows.into_iter().map(|row| Rank(row as u16)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rosters_come_back(ranks in prop::collection::btree_set(any::<u16>(), 0..300)) {
            let ranks: BTreeSet<Rank> = ranks.into_iter().map(Rank).collect();
            let bytes = encode_roster(&ranks);
            prop_assert!(bytes.len() <= MAX_ROSTER_BYTES);
            prop_assert_eq!(decode_roster(&bytes).unwrap(), ranks);
        }
    }

    #[test]
    fn four_workers_take_six_bytes() {
        let ranks = (0..4).map(Rank).collect();
        assert_eq!(encode_roster(&ranks), [1, 4, 0, 0, 0, 0]);
    }

    #[test]
    fn more_bytes_than_the_roster_are_refused() {
        assert!(decode_roster(&[1, 1, 0, 0]).is_err());
    }
}
