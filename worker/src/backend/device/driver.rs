//! What the backend needs of a device: memory, copies and launches, all in one order.

use crate::backend::DeviceFault;
use core::ops::{AddAssign, Sub};

/// A device that runs the kernels of `arc-topk-kernels`.
///
/// Copies and launches happen in the order of their calls, unless a method says otherwise; only [`fetch`](Driver::fetch) waits for
/// them. After an error the device is not used any more.
pub trait Driver: Send {
    /// Memory, all zeros. Its address is a multiple of 256.
    ///
    /// # Errors
    /// If there is not enough.
    fn allocate(&mut self, bytes: usize) -> Result<u64, DeviceFault>;

    /// Gives memory back, once what was launched so far no longer needs it.
    fn free(&mut self, address: u64, bytes: usize);

    /// Where the next [`send`](Driver::send), of so many bytes, will put them: memory of the driver's own (address: a multiple of
    /// 256). Launches until the next call of `stage` find them there.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn stage(&mut self, bytes: usize) -> Result<u64, DeviceFault>;

    /// Copies to where [`stage`](Driver::stage) said. Launches that follow find the bytes there; those before need not have ended.
    ///
    /// # Errors
    /// Of the device.
    fn send(&mut self, bytes: &[u8]) -> Result<(), DeviceFault>;

    /// Copies to the device: for what is rare, or no hurry.
    ///
    /// # Errors
    /// Of the device.
    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), DeviceFault>;

    /// Zeros.
    ///
    /// # Errors
    /// Of the device.
    fn clear(&mut self, at: u64, bytes: usize) -> Result<(), DeviceFault>;

    /// Copies from the device, after all that came before, and waits for it.
    ///
    /// # Errors
    /// Of the device, or of a launch before.
    fn fetch(&mut self, from: u64, out: &mut [u8]) -> Result<(), DeviceFault>;

    /// What follows waits for an event of the trainer's ([`DeviceGradient`](crate::backend::DeviceGradient)).
    ///
    /// # Errors
    /// Of the device.
    fn wait_for(&mut self, event: u64) -> Result<(), DeviceFault>;

    /// An event (a `CUevent`) that happens once everything so far has ended; 0 if it has.
    ///
    /// # Errors
    /// Of the device.
    fn finished(&mut self) -> Result<u64, DeviceFault>;

    /// Runs a kernel with one block of [`THREADS`](arc_topk_kernels::THREADS) threads per tile.
    ///
    /// # Errors
    /// If it cannot be launched.
    ///
    /// # Safety
    /// `arguments` are the kernel's, and every address in it is that of memory as the kernel reads and writes it.
    unsafe fn launch<T: Copy + Send + 'static>(
        &mut self,
        kernel: &'static str,
        blocks: u32,
        arguments: &T,
    ) -> Result<(), DeviceFault>;

    /// Device memory that the driver holds for itself: what [`stage`](Driver::stage) gives.
    fn own_bytes(&self) -> u64;

    /// Time on the device so far, as far as it is known: of launches that ended before the last [`fetch`](Driver::fetch).
    fn seconds(&self) -> DeviceSeconds;
}

/// Time on the device, by kernel.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct DeviceSeconds {
    /// U, sketch, and whether it is finite (and Gaussian projections).
    pub sketch: f64,
    /// Encoding.
    pub gather: f64,
    /// Feedback state and results.
    pub commit: f64,
    /// Energies of rows, in steps that measure.
    pub energy: f64,
}

/// What a device did, or what lies on it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct DeviceStats {
    /// Time.
    pub seconds: DeviceSeconds,
    /// Bytes copied to the device.
    pub bytes_in: u64,
    /// Bytes copied from it.
    pub bytes_out: u64,
    /// Bytes of its memory that are held for feedback state.
    pub state_bytes: u64,
    /// Bytes that are held besides.
    pub scratch_bytes: u64,
}

impl AddAssign for DeviceSeconds {
    fn add_assign(&mut self, other: Self) {
        self.sketch += other.sketch;
        self.gather += other.gather;
        self.commit += other.commit;
        self.energy += other.energy;
    }
}

impl Sub for DeviceSeconds {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            sketch: self.sketch - other.sketch,
            gather: self.gather - other.gather,
            commit: self.commit - other.commit,
            energy: self.energy - other.energy,
        }
    }
}

impl DeviceStats {
    /// What was done since `earlier`; memory is that of now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            seconds: self.seconds - earlier.seconds,
            bytes_in: self.bytes_in - earlier.bytes_in,
            bytes_out: self.bytes_out - earlier.bytes_out,
            ..*self
        }
    }
}

/// Bytes of state or results that are copied from the device at a time.
const FETCH_BYTES: usize = 16 << 20;

/// A driver whose first fault is kept: nothing is done after it.
pub(super) struct Device<D> {
    driver: D,
    fault: Option<DeviceFault>,
    stats: DeviceStats,
}

impl<D: Driver> Device<D> {
    pub(super) fn new(driver: D) -> Self {
        Self {
            driver,
            fault: None,
            stats: DeviceStats::default(),
        }
    }

    pub(super) fn fault(&self) -> Option<&DeviceFault> {
        self.fault.as_ref()
    }

    pub(super) fn fail(&mut self, fault: DeviceFault) {
        self.fault.get_or_insert(fault);
    }

    pub(super) fn stats(&self) -> DeviceStats {
        DeviceStats {
            seconds: self.driver.seconds(),
            scratch_bytes: self.stats.scratch_bytes + self.driver.own_bytes(),
            ..self.stats
        }
    }

    /// `what` of the driver, or the default if it, or something before, failed.
    fn try_to<T: Default>(&mut self, what: impl FnOnce(&mut D) -> Result<T, DeviceFault>) -> T {
        if self.fault.is_some() {
            return T::default();
        }
        what(&mut self.driver).unwrap_or_else(|fault| {
            self.fault = Some(fault);
            T::default()
        })
    }

    /// Zeros for feedback state; 0 for none.
    pub(super) fn allocate_state(&mut self, floats: usize) -> u64 {
        let bytes = floats * 4;
        if bytes == 0 {
            return 0;
        }
        self.stats.state_bytes += bytes as u64;
        self.try_to(|driver| driver.allocate(bytes))
    }

    pub(super) fn free_state(&mut self, address: u64, floats: usize) {
        self.stats.state_bytes -= (floats * 4) as u64;
        self.driver.free(address, floats * 4);
    }

    pub(super) fn allocate_scratch(&mut self, bytes: usize) -> u64 {
        if bytes == 0 {
            return 0;
        }
        self.stats.scratch_bytes += bytes as u64;
        self.try_to(|driver| driver.allocate(bytes))
    }

    /// Memory of another size; what was in it is lost.
    pub(super) fn replace_scratch(&mut self, address: &mut u64, from: usize, to: usize) {
        if *address != 0 {
            self.driver.free(*address, from);
            self.stats.scratch_bytes -= from as u64;
        }
        *address = self.allocate_scratch(to);
    }

    pub(super) fn finished(&mut self) -> Option<u64> {
        let event = self.try_to(Driver::finished);
        (event != 0).then_some(event)
    }

    pub(super) fn stage(&mut self, bytes: usize) -> u64 {
        self.try_to(|driver| driver.stage(bytes))
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.stats.bytes_in += bytes.len() as u64;
        self.try_to(|driver| driver.send(bytes));
    }

    pub(super) fn upload(&mut self, to: u64, values: &[f32]) {
        self.upload_bytes(to, bytemuck::cast_slice(values));
    }

    pub(super) fn upload_bytes(&mut self, to: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.stats.bytes_in += bytes.len() as u64;
        self.try_to(|driver| driver.upload(to, bytes));
    }

    pub(super) fn clear(&mut self, at: u64, bytes: usize) {
        self.try_to(|driver| driver.clear(at, bytes));
    }

    pub(super) fn fetch(&mut self, from: u64, out: &mut [u8]) {
        if out.is_empty() {
            return;
        }
        self.stats.bytes_out += out.len() as u64;
        self.try_to(|driver| driver.fetch(from, out));
    }

    /// Zeros after a fault: whoever reads looks whether there is one.
    pub(super) fn fetch_floats(&mut self, from: u64, floats: usize) -> Vec<f32> {
        let mut values = vec![0.0f32; floats];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        // In pieces, since the driver keeps as much pinned memory as the largest takes.
        for (number, piece) in bytes.chunks_mut(FETCH_BYTES).enumerate() {
            self.fetch(from + (number * FETCH_BYTES) as u64, piece);
        }
        values
    }

    pub(super) fn wait_for(&mut self, event: u64) {
        if event != 0 {
            self.try_to(|driver| driver.wait_for(event));
        }
    }

    /// # Safety
    /// As [`Driver::launch`].
    #[allow(unsafe_code, reason = "the contract is the caller's")]
    pub(super) unsafe fn launch<T: Copy + Send + 'static>(
        &mut self,
        kernel: &'static str,
        blocks: usize,
        arguments: &T,
    ) {
        if blocks == 0 {
            return;
        }
        let Ok(blocks) = u32::try_from(blocks) else {
            return self.fail(DeviceFault(format!(
                "{blocks} blocks are too many for a launch of {kernel}: use smaller buckets"
            )));
        };
        // SAFETY: the caller's promise.
        self.try_to(|driver| unsafe { driver.launch(kernel, blocks, arguments) });
    }
}
