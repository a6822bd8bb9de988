//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a counter-based
//! generator. Every peer computes the same word from (seed, tensor, step, position) without communication,
//! in any order, and the host program's own generators are never touched.
//!
//! Counter spaces of a (seed, tensor, step), told apart by the highest bit of the first counter word:
//! `0` the projection V (see [`mod@super::projection`]), `1` randk's row keys (see [`super::select`]).

use super::ProjectionKey;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// First counter word's bit that sets randk's space apart from V's, whose block numbers stay below 2³¹.
pub const ROW_KEY_SPACE: u32 = 1 << 31;

/// One 128-bit block.
#[must_use]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..ROUNDS {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) = (
            (p1 >> 32) as u32 ^ c1 ^ k0,
            p1 as u32,
            (p0 >> 32) as u32 ^ c3 ^ k1,
            p0 as u32,
        );
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// Block number `block` of the stream of a tensor and step.
#[must_use]
pub fn block(key: ProjectionKey, block: u32) -> [u32; 4] {
    let counter = [block, key.tensor, key.step as u32, (key.step >> 32) as u32];
    philox4x32_10(counter, [key.seed as u32, (key.seed >> 32) as u32])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the generator's authors; the golden vectors hold the same.
    #[test]
    fn known_answers() {
        let all = u32::MAX;
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([all; 4], [all; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn the_counter_holds_block_tensor_and_step_low_word_first() {
        let key = ProjectionKey {
            seed: 0x1111_2222_3333_4444,
            tensor: 7,
            step: 0x5555_6666_7777_8888,
        };
        let expected = philox4x32_10([9, 7, 0x7777_8888, 0x5555_6666], [0x3333_4444, 0x1111_2222]);
        assert_eq!(block(key, 9), expected);
    }
}
