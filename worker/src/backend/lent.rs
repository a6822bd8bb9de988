//! Gradients that stay where they are: while a step is open, what must be kept of the feedback state lies in their memory, and then
//! the result does.
#![allow(
    unsafe_code,
    reason = "memory of another owner, for longer than a call"
)]

use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

/// Gradient memory that its owner has lent until [`Reducer::give_back`](crate::reducer::Reducer::give_back).
#[derive(Clone, Copy, Debug)]
pub struct Lent {
    address: NonNull<f32>,
    elements: usize,
}

// SAFETY: it is memory that only the borrower uses (the contract of `new`), on whichever thread.
unsafe impl Send for Lent {}

impl Lent {
    /// Lends `elements` values from `address` on.
    ///
    /// # Safety
    /// The memory must be there, aligned, initialised and used by nobody else from the call that hands it over until
    /// `give_back` of the reducer that got it has returned true, or that reducer was dropped. Who writes there before writes to the
    /// feedback state that a step which does not end falls back on.
    #[must_use]
    pub unsafe fn new(address: NonNull<f32>, elements: usize) -> Self {
        Self { address, elements }
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// The values.
    pub(crate) fn values(&self) -> &[f32] {
        // SAFETY: by the contract of `new`.
        unsafe { core::slice::from_raw_parts(self.address.as_ptr(), self.elements) }
    }

    fn values_mut(&mut self) -> &mut [f32] {
        // SAFETY: by the contract of `new`; the backend holds each memory once, and hands out one slice of it at a time.
        unsafe { core::slice::from_raw_parts_mut(self.address.as_ptr(), self.elements) }
    }
}

/// One tensor's gradient, what the open step keeps beside the state, and the result.
#[derive(Debug)]
pub(super) enum Buffer {
    /// The backend's own memory; empty until it is needed.
    Own(Vec<f32>),
    /// The trainer's.
    Lent(Lent),
}

impl Buffer {
    /// Has memory for `elements`: what was lent, or its own.
    pub(super) fn ensure(&mut self, elements: usize) {
        if self.len() != elements {
            *self = Self::Own(vec![0.0; elements]);
        }
    }

    /// From here on memory of its own is used; what was lent is forgotten.
    pub(super) fn give_back(&mut self) {
        if matches!(self, Self::Lent(_)) {
            *self = Self::Own(Vec::new());
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Own(values) => values,
            Self::Lent(lent) => lent.values(),
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Own(values) => values,
            Self::Lent(lent) => lent.values_mut(),
        }
    }
}
