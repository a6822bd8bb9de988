//! What one call sends to the device: arrays, one after the other, some of which hold addresses of others.

use bytemuck::NoUninit;

/// Arrays begin at multiples of this.
const ALIGNMENT: usize = 16;

/// Where an array of the block begins, from the block's start on.
#[derive(Clone, Copy, Debug)]
pub(super) struct At(usize);

impl At {
    /// Its address, in a block that begins at `base`.
    pub(super) fn address(self, base: u64) -> u64 {
        base + self.0 as u64
    }
}

/// The bytes. Sizes come first, since addresses are known only when the block's size is.
#[derive(Debug, Default)]
pub(super) struct Block {
    bytes: Vec<u8>,
}

impl Block {
    /// Empties it and keeps its memory.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Adds an array.
    pub(super) fn push<T: NoUninit>(&mut self, values: &[T]) -> At {
        let at = self.next();
        self.bytes.extend_from_slice(bytemuck::cast_slice(values));
        at
    }

    /// Room for an array that is [written](Block::write) later.
    pub(super) fn reserve<T>(&mut self, count: usize) -> At {
        let at = self.next();
        self.bytes.resize(at.0 + count * size_of::<T>(), 0);
        at
    }

    /// Fills an array that was reserved.
    ///
    /// # Panics
    /// If it leaves the block.
    pub(super) fn write<T: NoUninit>(&mut self, at: At, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.bytes[at.0..at.0 + bytes.len()].copy_from_slice(bytes);
    }

    fn next(&mut self) -> At {
        let at = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(at, 0);
        At(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_aligned_and_keep_what_is_written() {
        let mut block = Block::default();
        let first = block.push(&[1u8, 2, 3]);
        let later = block.reserve::<u32>(2);
        let last = block.push(&[7.0f32]);
        block.write(later, &[5u32, 6]);
        assert_eq!(
            [first, later, last].map(|at| at.address(1024)),
            [1024, 1040, 1056]
        );
        assert_eq!(&block.bytes()[..3], &[1, 2, 3]);
        assert_eq!(
            &block.bytes()[16..24],
            bytemuck::cast_slice::<u32, u8>(&[5, 6])
        );
        assert_eq!(&block.bytes()[32..36], &7.0f32.to_ne_bytes());
    }
}
