//! Pinned memory, and the two places that blocks are sent to.

use super::{error, wait};
use crate::backend::DeviceFault;
use core::ffi::c_void;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUevent, CUstream};
use error::Gpu;

/// Memory of the host that the GPU copies to and from by itself.
pub(super) struct Pinned {
    address: *mut u8,
    bytes: usize,
}

impl Default for Pinned {
    fn default() -> Self {
        Self {
            address: core::ptr::null_mut(),
            bytes: 0,
        }
    }
}

impl Pinned {
    /// Holds so many bytes at least. What was in it is lost.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<(), DriverError> {
        if self.bytes >= bytes {
            return Ok(());
        }
        self.release();
        let bytes = bytes.next_power_of_two();
        // SAFETY: it is written before it is read.
        let address = unsafe { result::malloc_host(bytes, 0) }?;
        // SAFETY: it was allocated a moment ago, with this size; zeroed, so that it may be seen as bytes.
        unsafe { core::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        (self.address, self.bytes) = (address.cast(), bytes);
        Ok(())
    }

    /// The first `len` bytes.
    ///
    /// # Panics
    /// If there are not so many.
    pub(super) fn bytes_mut(&mut self, len: usize) -> &'static mut [u8] {
        assert!(len <= self.bytes);
        if len == 0 {
            return &mut [];
        }
        // SAFETY: so many bytes are there and initialised. The slice is used within the call that asked for it, which does not
        // move or free the memory.
        unsafe { core::slice::from_raw_parts_mut(self.address, len) }
    }

    /// Frees it. The GPU must not be using it.
    pub(super) fn release(&mut self) {
        if !self.address.is_null() {
            // SAFETY: it came from `malloc_host`, and is forgotten.
            let _freed = unsafe { result::free_host(self.address.cast::<c_void>()) };
            *self = Self::default();
        }
    }
}

/// Where a block is sent to: memory of the device, and the pinned memory that it is copied from.
pub(super) struct Slot {
    device: u64,
    bytes: usize,
    host: Pinned,
    /// The last launch that used it has ended.
    free: CUevent,
    /// The copy has ended.
    sent: CUevent,
}

impl Slot {
    pub(super) fn new(free: CUevent, sent: CUevent) -> Self {
        Self {
            device: 0,
            bytes: 0,
            host: Pinned::default(),
            free,
            sent,
        }
    }

    /// Bytes of the device that it holds.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// All launches that use it have been made.
    pub(super) fn leave(&mut self, kernels: CUstream) -> Result<(), DriverError> {
        // SAFETY: event and stream are the driver's.
        unsafe { result::event::record(self.free, kernels) }
    }

    /// Has room for so many bytes, and nobody reads its pinned memory any more. Returns the address on the device.
    pub(super) fn reserve(&mut self, bytes: usize, gpu: &Gpu) -> Result<u64, DeviceFault> {
        let waiting = |cause: DriverError| error::failed(gpu, "copying to it", &cause);
        // SAFETY: the event is this slot's. One that was never recorded has happened.
        unsafe { result::event::synchronize(self.sent) }.map_err(waiting)?;
        self.host.reserve(bytes).map_err(waiting)?;
        if self.bytes < bytes {
            // SAFETY: as above.
            unsafe { result::event::synchronize(self.free) }.map_err(waiting)?;
            self.release_device();
            let bytes = bytes.next_power_of_two();
            // SAFETY: it is written before launches read it.
            let address = unsafe { result::malloc_sync(bytes) };
            self.device = address.map_err(|cause| error::no_memory(gpu, bytes, &cause))?;
            self.bytes = bytes;
        }
        Ok(self.device)
    }

    /// Copies a block once the slot is free; kernels that are launched later wait for the copy.
    pub(super) fn send(
        &mut self,
        bytes: &[u8],
        copies: CUstream,
        kernels: CUstream,
    ) -> Result<(), DriverError> {
        let pinned = self.host.bytes_mut(bytes.len());
        pinned.copy_from_slice(bytes);
        // SAFETY: `reserve` made room on both sides and saw that the pinned memory is not being read; it is not written again
        // before `sent` has happened. Events and streams are the driver's.
        unsafe {
            wait(copies, self.free)?;
            result::memcpy_htod_async(self.device, pinned, copies)?;
            result::event::record(self.sent, copies)?;
            wait(kernels, self.sent)
        }
    }

    /// Frees everything. The GPU must not be using it.
    pub(super) fn release(&mut self) {
        self.release_device();
        self.host.release();
        // SAFETY: both were made for this slot, and are not used any more.
        unsafe {
            let _ = result::event::destroy(self.free);
            let _ = result::event::destroy(self.sent);
        }
    }

    fn release_device(&mut self) {
        if self.device != 0 {
            // SAFETY: it came from `malloc_sync`, and no launch uses it any more.
            let _freed = unsafe { result::free_sync(self.device) };
            (self.device, self.bytes) = (0, 0);
        }
    }
}
