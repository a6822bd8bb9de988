//! NVIDIA GPUs, through the driver's library, which is looked for when the first one is opened: neither a build nor a run without
//! a GPU needs it.
//!
//! Two streams: kernels run on one; copies of blocks to the device and of frames from it, through pinned memory, on the other,
//! which an event ties to the first where the order matters. The host waits in `fetch` alone. The context is the primary one,
//! which PyTorch and candle use as well, so that their pointers and events are good here.

mod error;
mod memory;
mod timer;

use super::{DeviceSeconds, Driver, Ready};
use crate::backend::{DeviceFault, MakeBackend};
use arc_topk_kernels::{FATBIN, THREADS, names};
use core::ffi::c_void;
use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUcontext, CUdevice_attribute, CUevent, CUevent_flags, CUevent_wait_flags, CUfunction,
    CUmodule, CUstream,
};
use error::{Gpu, failed};
use memory::{Pinned, Slot};
use std::ffi::CString;
use std::sync::Arc;
use timer::Timers;

/// Drivers of CUDA 13.0 and later know how to read the kernels.
const LEAST_DRIVER: i32 = 13_000;
/// What the kernels are compiled for, at least.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Workers' backends on GPU number `ordinal` of those that are visible.
#[must_use]
pub fn on_gpu(ordinal: usize) -> MakeBackend {
    Arc::new(move |plan| {
        let driver = NvidiaDriver::open(ordinal)?;
        Ok(Box::new(super::DeviceBackend::new(plan, driver)?))
    })
}

/// The GPU's primary context.
struct Context {
    gpu: Gpu,
    context: CUcontext,
    device: sys::CUdevice,
}

// SAFETY: a context may be current in any thread, and is a name only.
unsafe impl Send for Context {}
// SAFETY: as above; the driver's functions may be called from any thread.
unsafe impl Sync for Context {}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained in `open`, once.
        let _released = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Context {
    fn open(ordinal: usize) -> Result<Self, DeviceFault> {
        // SAFETY: it only looks for a library, whose initialisers are the driver's.
        if !unsafe { sys::is_culib_present() } {
            return Err(error::no_driver());
        }
        let mut version = 0;
        // SAFETY: every driver has it, and it writes a number.
        let told = unsafe { sys::cuDriverGetVersion(&raw mut version) }.result();
        told.map_err(|cause| error::no_gpu(&cause))?;
        if version < LEAST_DRIVER {
            return Err(error::old_driver(version));
        }
        result::init().map_err(|cause| error::no_gpu(&cause))?;
        let count = result::device::get_count().map_err(|cause| error::no_gpu(&cause))?;
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        if number >= count {
            return Err(error::no_such_gpu(ordinal, count));
        }
        let device = result::device::get(number).map_err(|cause| error::no_gpu(&cause))?;
        let name = result::device::get_name(device).map_err(|cause| error::no_gpu(&cause))?;
        let gpu = Gpu::new(ordinal, &name);
        let capability =
            capability(device).map_err(|cause| failed(&gpu, "its attributes", &cause))?;
        if capability < LEAST_CAPABILITY {
            return Err(error::old_gpu(&gpu, capability));
        }
        // SAFETY: the device is there.
        let context = unsafe { result::primary_ctx::retain(device) };
        let context = context.map_err(|cause| failed(&gpu, "its context", &cause))?;
        Ok(Self {
            gpu,
            context,
            device,
        })
    }

    /// Makes it this thread's, as every call needs, until the guard is dropped: the thread may be the trainer's, whose current
    /// device must stay what it is.
    fn enter(&self) -> Result<Entered, DeviceFault> {
        let lost = |cause: result::DriverError| failed(&self.gpu, "its context", &cause);
        let before = result::ctx::get_current().map_err(lost)?;
        if before != Some(self.context) {
            // SAFETY: it is retained until `self` is dropped.
            unsafe { result::ctx::set_current(self.context) }.map_err(lost)?;
        }
        Ok(Entered {
            back: (before != Some(self.context)).then_some(before),
        })
    }
}

/// A context is this thread's while it lives.
struct Entered {
    /// What was the thread's before, if it was another.
    back: Option<Option<CUcontext>>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.back {
            // SAFETY: it was current before, or there was none.
            let _set = unsafe { result::ctx::set_current(before.unwrap_or(core::ptr::null_mut())) };
        }
    }
}

fn capability(device: sys::CUdevice) -> Result<(i32, i32), result::DriverError> {
    use CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: the device is there.
    unsafe {
        Ok((
            result::device::get_attribute(device, MAJOR)?,
            result::device::get_attribute(device, MINOR)?,
        ))
    }
}

/// What a trainer does on its own stream: events that tell when gradients are there, and waiting for results.
pub struct TrainerStream {
    context: Arc<Context>,
    /// Used again once nobody else has them.
    events: Vec<Arc<TrainerEvent>>,
}

/// An event of the trainer's stream.
struct TrainerEvent {
    context: Arc<Context>,
    event: CUevent,
}

// SAFETY: events may be used from any thread, and the context is entered for each use.
unsafe impl Send for TrainerEvent {}
// SAFETY: as above; the driver's functions may be called at once from several.
unsafe impl Sync for TrainerEvent {}

impl Ready for TrainerEvent {
    fn event(&self) -> u64 {
        self.event as u64
    }

    fn has_happened(&self) -> bool {
        let Ok(_entered) = self.context.enter() else {
            // The backend's next call will say why.
            return true;
        };
        // SAFETY: it was created, and is destroyed with `self`.
        let asked = unsafe { result::event::query(self.event) };
        asked
            .err()
            .is_none_or(|cause| cause.0 != sys::CUresult::CUDA_ERROR_NOT_READY)
    }
}

impl Drop for TrainerEvent {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            // SAFETY: it was created for this, and nobody else has it.
            let _destroyed = unsafe { result::event::destroy(self.event) };
        }
    }
}

impl TrainerStream {
    /// On GPU number `ordinal` of those that are visible.
    ///
    /// # Errors
    /// If there is no such GPU, or it cannot be used.
    pub fn open(ordinal: usize) -> Result<Self, DeviceFault> {
        Ok(Self {
            context: Arc::new(Context::open(ordinal)?),
            events: Vec::new(),
        })
    }

    /// Happens once everything so far on `stream` (a `CUstream`) has ended.
    ///
    /// # Errors
    /// Of the device.
    ///
    /// # Safety
    /// The stream must be one of this GPU's.
    pub unsafe fn record(&mut self, stream: u64) -> Result<Arc<dyn Ready>, DeviceFault> {
        let _entered = self.context.enter()?;
        let failed = |cause: result::DriverError| failed(&self.context.gpu, "an event", &cause);
        let free = self
            .events
            .iter()
            .find(|event| Arc::strong_count(event) == 1);
        let event = match free {
            Some(event) => Arc::clone(event),
            None => {
                let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
                let event = Arc::new(TrainerEvent {
                    context: Arc::clone(&self.context),
                    event: event.map_err(failed)?,
                });
                self.events.push(Arc::clone(&event));
                event
            }
        };
        // SAFETY: the event was created, and the stream is there by the caller's promise.
        unsafe { result::event::record(event.event, stream as CUstream) }.map_err(failed)?;
        Ok(event)
    }

    /// What follows on `stream` waits for an event, that of [`Backend::finished`](crate::backend::Backend::finished).
    ///
    /// # Errors
    /// Of the device.
    ///
    /// # Safety
    /// The stream must be one of this GPU's, the event one that is not destroyed yet.
    pub unsafe fn wait(&self, stream: u64, event: u64) -> Result<(), DeviceFault> {
        let _entered = self.context.enter()?;
        // SAFETY: the caller's promise.
        unsafe { wait(stream as CUstream, event as CUevent) }
            .map_err(|cause| failed(&self.context.gpu, "waiting for results", &cause))
    }
}

/// # Safety
/// Both must be there.
unsafe fn wait(stream: CUstream, event: CUevent) -> Result<(), result::DriverError> {
    let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    // SAFETY: the caller's promise.
    unsafe { result::stream::wait_event(stream, event, flags) }
}

/// Kernels by name.
type Functions = Vec<(&'static str, CUfunction)>;

/// A GPU. Fields are dropped in order: memory before the context.
pub struct NvidiaDriver {
    functions: Functions,
    module: CUmodule,
    kernels: CUstream,
    copies: CUstream,
    slots: [Slot; 2],
    staged: usize,
    inbox: Pinned,
    /// Ties the copies to the kernels.
    reached: CUevent,
    /// For [`Driver::finished`].
    done: CUevent,
    timers: Timers,
    /// Memory that is not freed yet.
    allocated: Vec<u64>,
    context: Context,
}

// SAFETY: every call makes the context current in its thread first; handles are names only.
unsafe impl Send for NvidiaDriver {}

impl NvidiaDriver {
    /// GPU number `ordinal` of those that are visible.
    ///
    /// # Errors
    /// If there is no driver, or an old one, no such GPU, or one that the kernels were not made for.
    pub fn open(ordinal: usize) -> Result<Self, DeviceFault> {
        let context = Context::open(ordinal)?;
        let _entered = context.enter()?;
        let gpu = context.gpu.clone();
        let (module, functions) = load(&gpu)?;
        let stream = || {
            result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|cause| failed(&gpu, "a stream", &cause))
        };
        let event = || {
            result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(|cause| failed(&gpu, "an event", &cause))
        };
        Ok(Self {
            functions,
            module,
            kernels: stream()?,
            copies: stream()?,
            slots: [Slot::new(event()?, event()?), Slot::new(event()?, event()?)],
            staged: 0,
            inbox: Pinned::default(),
            reached: event()?,
            done: event()?,
            timers: Timers::default(),
            allocated: Vec::new(),
            context,
        })
    }

    /// Name of the GPU.
    #[must_use]
    pub fn name(&self) -> &str {
        self.context.gpu.name()
    }

    /// The stream (a `CUstream`) that kernels and copies of this driver wait on each other in.
    #[must_use]
    pub fn stream(&self) -> u64 {
        self.kernels as u64
    }

    /// Seconds that a copy of so many bytes from this device's memory to itself takes, by its own clock: the mean of `times`, after
    /// one that is not counted. What kernels are measured against.
    ///
    /// # Errors
    /// Of the device.
    pub fn copy_seconds(&mut self, bytes: usize, times: u32) -> Result<f64, DeviceFault> {
        let (from, to) = (self.allocate(bytes)?, self.allocate(bytes)?);
        let (stream, before) = (self.kernels, self.timers.seconds().commit);
        for time in 0..=times {
            let copy = || {
                // SAFETY: both were allocated a moment ago with this size.
                unsafe { result::memcpy_dtod_async(to, from, bytes, stream) }
            };
            let copied = if time == 0 {
                copy()
            } else {
                self.timers.time(names::COMMIT, stream, copy)
            };
            copied.map_err(self.failed("copying its memory"))?;
        }
        self.fetch(to, &mut [0])?;
        self.free(from, bytes);
        self.free(to, bytes);
        Ok((self.timers.seconds().commit - before) / f64::from(times.max(1)))
    }

    fn gpu(&self) -> &Gpu {
        &self.context.gpu
    }

    fn failed(&self, what: &'static str) -> impl Fn(result::DriverError) -> DeviceFault + use<> {
        let gpu = self.context.gpu.clone();
        move |cause| failed(&gpu, what, &cause)
    }

    /// Waits until all kernels so far have ended.
    fn drain(&self) -> Result<(), DeviceFault> {
        // SAFETY: the stream is this driver's.
        unsafe { result::stream::synchronize(self.kernels) }.map_err(self.failed("its kernels"))
    }
}

/// The kernels' code for this GPU.
fn load(gpu: &Gpu) -> Result<(CUmodule, Functions), DeviceFault> {
    // The driver reads headers of 8-byte numbers.
    let mut aligned = vec![0u64; FATBIN.len().div_ceil(8)];
    bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..FATBIN.len()].copy_from_slice(FATBIN);
    // SAFETY: it is a whole fatbin, and is copied by the driver.
    let module = unsafe { result::module::load_data(aligned.as_ptr().cast::<c_void>()) };
    let module = module.map_err(|cause| failed(gpu, "loading the kernels", &cause))?;
    let function = |name: &&'static str| {
        let text = CString::new(*name).expect("names hold no zeros");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module, text) };
        let function = function.map_err(|cause| failed(gpu, name, &cause))?;
        Ok((*name, function))
    };
    let functions: Result<Functions, DeviceFault> = names::ALL.iter().map(function).collect();
    Ok((module, functions?))
}

impl Driver for NvidiaDriver {
    fn allocate(&mut self, bytes: usize) -> Result<u64, DeviceFault> {
        let _entered = self.context.enter()?;
        // SAFETY: it is zeroed before anybody reads it, in the order of the kernels' stream.
        let address = unsafe { result::malloc_sync(bytes) };
        let address = address.map_err(|cause| error::no_memory(self.gpu(), bytes, &cause))?;
        self.allocated.push(address);
        self.clear(address, bytes)?;
        Ok(address)
    }

    fn free(&mut self, address: u64, _: usize) {
        let entered = self.context.enter();
        if entered.is_ok() && self.drain().is_ok() {
            // SAFETY: it came from `allocate`, and no kernel uses it any more.
            let _freed = unsafe { result::free_sync(address) };
            self.allocated.retain(|known| *known != address);
        }
    }

    fn stage(&mut self, bytes: usize) -> Result<u64, DeviceFault> {
        let _entered = self.context.enter()?;
        // Launches that use the present slot have all been made.
        self.slots[self.staged]
            .leave(self.kernels)
            .map_err(self.failed("an event"))?;
        self.staged = 1 - self.staged;
        self.slots[self.staged].reserve(bytes, &self.context.gpu)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), DeviceFault> {
        let _entered = self.context.enter()?;
        let failed = self.failed("copying to it");
        self.slots[self.staged]
            .send(bytes, self.copies, self.kernels)
            .map_err(failed)
    }

    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), DeviceFault> {
        let _entered = self.context.enter()?;
        // SAFETY: `to` is memory from `allocate` that holds so many bytes, and they stay until the copy has ended, below.
        unsafe { result::memcpy_htod_async(to, bytes, self.kernels) }
            .map_err(self.failed("copying to it"))?;
        self.drain()
    }

    fn clear(&mut self, at: u64, bytes: usize) -> Result<(), DeviceFault> {
        let _entered = self.context.enter()?;
        // SAFETY: `at` is memory from `allocate` that holds so many bytes.
        unsafe { result::memset_d8_async(at, 0, bytes, self.kernels) }
            .map_err(self.failed("clearing its memory"))
    }

    fn fetch(&mut self, from: u64, out: &mut [u8]) -> Result<(), DeviceFault> {
        let _entered = self.context.enter()?;
        let failed = self.failed("copying from it");
        self.inbox.reserve(out.len()).map_err(&failed)?;
        let inbox = self.inbox.bytes_mut(out.len());
        // SAFETY: events and streams are this driver's; `from` holds so many bytes; the inbox is read after the copy ended.
        unsafe {
            result::event::record(self.reached, self.kernels)
                .and_then(|()| wait(self.copies, self.reached))
                .and_then(|()| result::memcpy_dtoh_async(inbox, from, self.copies))
                .and_then(|()| result::event::record(self.reached, self.copies))
                .and_then(|()| result::event::synchronize(self.reached))
                .map_err(&failed)?;
        }
        out.copy_from_slice(inbox);
        self.timers.read().map_err(self.failed("its clock"))
    }

    fn wait_for(&mut self, event: u64) -> Result<(), DeviceFault> {
        let _entered = self.context.enter()?;
        // SAFETY: whoever lent the gradient keeps the event until it is given back.
        unsafe { wait(self.kernels, event as CUevent) }
            .map_err(self.failed("waiting for gradients"))
    }

    fn finished(&mut self) -> Result<u64, DeviceFault> {
        let _entered = self.context.enter()?;
        // SAFETY: both are this driver's.
        unsafe { result::event::record(self.done, self.kernels) }
            .map_err(self.failed("an event"))?;
        Ok(self.done as u64)
    }

    unsafe fn launch<T: Copy + Send + 'static>(
        &mut self,
        kernel: &'static str,
        blocks: u32,
        arguments: &T,
    ) -> Result<(), DeviceFault> {
        let _entered = self.context.enter()?;
        let known = self.functions.iter().find(|(name, _)| *name == kernel);
        let (_, function) = known.expect("a kernel of names::ALL");
        let (function, stream) = (*function, self.kernels);
        let failed = self.failed(kernel);
        let mut parameters = [core::ptr::from_ref(arguments).cast_mut().cast::<c_void>()];
        let launch = || {
            // SAFETY: the arguments are the kernel's by the caller's promise, and are copied before the call returns.
            unsafe {
                result::launch_kernel(
                    function,
                    (blocks, 1, 1),
                    (THREADS, 1, 1),
                    0,
                    stream,
                    &mut parameters,
                )
            }
        };
        self.timers.time(kernel, stream, launch).map_err(failed)
    }

    fn own_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.bytes() as u64).sum()
    }

    fn seconds(&self) -> DeviceSeconds {
        self.timers.seconds()
    }
}

impl Drop for NvidiaDriver {
    fn drop(&mut self) {
        let entered = self.context.enter();
        if entered.is_err() || self.drain().is_err() {
            // The device is lost, and with it all that was on it.
            return;
        }
        self.slots.iter_mut().for_each(Slot::release);
        self.inbox.release();
        self.timers.release();
        // SAFETY: all were created or allocated by this driver, and nothing uses them any more. The context may stay, if the
        // trainer uses it as well, so that nothing is left to it.
        unsafe {
            for address in self.allocated.drain(..) {
                let _ = result::free_sync(address);
            }
            let _ = result::event::destroy(self.reached);
            let _ = result::event::destroy(self.done);
            let _ = result::stream::destroy(self.kernels);
            let _ = result::stream::destroy(self.copies);
            let _ = result::module::unload(self.module);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_not_there_is_an_error_with_its_remedy() {
        // Wherever this runs, there are not so many.
        let text = NvidiaDriver::open(4096)
            .err()
            .map(|fault| fault.to_string());
        let text = text.expect("no such GPU");
        assert!(text.contains(':') && text.contains("CPU"), "{text}");
    }
}
