//! Memory for kernels, with guards: what lies around it reads as NaN and must not be written.

use bytemuck::Pod;

/// Bytes before and after.
const GUARD: usize = 256;
const POISON: u8 = 0xff;

/// An array of plain values at a chosen alignment.
#[derive(Debug)]
pub(crate) struct Memory {
    /// 16-byte units, so that the start is aligned.
    units: Vec<u128>,
    start: usize,
    bytes: usize,
}

impl Memory {
    /// Holds `values`, `shift` bytes past a 16-byte boundary.
    pub(crate) fn new<T: Pod>(values: &[T], shift: usize) -> Self {
        let content: &[u8] = bytemuck::cast_slice(values);
        let start = GUARD + shift;
        let units = (start + content.len() + GUARD).div_ceil(16);
        let mut memory = Self {
            units: vec![u128::from_ne_bytes([POISON; 16]); units],
            start,
            bytes: content.len(),
        };
        memory.all_mut()[start..start + content.len()].copy_from_slice(content);
        memory
    }

    pub(crate) fn zeros<T: Pod>(count: usize) -> Self {
        Self::new(&vec![T::zeroed(); count], 0)
    }

    /// Full of what must be overwritten.
    pub(crate) fn poisoned(bytes: usize, shift: usize) -> Self {
        Self::new(&vec![POISON; bytes], shift)
    }

    fn all_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.units)
    }

    /// For kernels; it stays while nothing is moved.
    pub(crate) fn address(&mut self) -> u64 {
        let start = self.start;
        self.all_mut()[start..].as_mut_ptr() as u64
    }

    pub(crate) fn read<T: Pod>(&self) -> Vec<T> {
        let all: &[u8] = bytemuck::cast_slice(&self.units);
        values_of(&all[self.start..self.start + self.bytes])
    }

    pub(crate) fn write<T: Pod>(&mut self, values: &[T]) {
        let content: &[u8] = bytemuck::cast_slice(values);
        assert_eq!(content.len(), self.bytes);
        let start = self.start;
        self.all_mut()[start..start + content.len()].copy_from_slice(content);
    }
}

/// Bytes as values, wherever they lie.
pub(crate) fn values_of<T: Pod>(bytes: &[u8]) -> Vec<T> {
    let mut values = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
    values
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (start, end) = (self.start, self.start + self.bytes);
        let all = self.all_mut();
        let whole = all[..start].iter().chain(&all[end..]).all(|b| *b == POISON);
        assert!(
            whole || std::thread::panicking(),
            "a kernel wrote beside an array"
        );
    }
}
