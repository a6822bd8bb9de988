//! What [`any_bytes`] asserts, for many sequences.

use super::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_keeps_the_bounds_and_the_deadlines(bytes in prop::collection::vec(any::<u8>(), 8..800)) {
        any_bytes::operations(&bytes);
    }
}
