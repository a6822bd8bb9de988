//! A device that runs the kernels on the CPU, as late as it may: what is launched waits until somebody must know.

#![allow(unsafe_code, reason = "launches take addresses")]

use arc_topk_kernels::emulator::Emulator;
use arc_topk_worker::backend::device::{DeviceBackend, DeviceSeconds, Driver};
use arc_topk_worker::backend::{DeviceFault, MakeBackend};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};

/// The kernels, compiled once.
static EMULATOR: LazyLock<Emulator> = LazyLock::new(|| {
    Emulator::load(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|error| panic!("{error}"))
});

/// What lies around every piece of memory.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
/// What lies in memory that nobody may read any more: NaN as f32, bf16 and f16, and no address.
const POISON: u8 = 0xff;

/// Workers' backends, whose threads run in an order that `seed` permutes.
pub fn backend(seed: u64) -> MakeBackend {
    with_memory(seed, usize::MAX)
}

/// The same on a device with so many bytes of memory.
pub fn with_memory(seed: u64, bytes: usize) -> MakeBackend {
    Arc::new(move |plan| {
        let driver = EmulatedDriver::new(seed, bytes);
        Ok(Box::new(DeviceBackend::new(plan, driver)?))
    })
}

type Launch = Box<dyn FnOnce(&Emulator) + Send>;

pub struct EmulatedDriver {
    seed: u64,
    memory: HashMap<u64, Memory>,
    left: usize,
    /// In order.
    queue: Vec<Launch>,
    slots: [Option<(u64, usize)>; 2],
    staged: usize,
}

/// Bytes with guards on both sides.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize, fill: u8) -> Self {
        let mut bytes = vec![GUARD_BYTE; len + 3 * GUARD];
        let address = bytes.as_ptr() as usize + GUARD;
        let start = GUARD + address.next_multiple_of(256) - address;
        bytes[start..start + len].fill(fill);
        Self { bytes, start, len }
    }

    fn address(&mut self) -> u64 {
        self.bytes[self.start..].as_mut_ptr() as u64
    }

    fn check(&self) {
        let guards = self.bytes[..self.start]
            .iter()
            .chain(&self.bytes[self.start + self.len..]);
        assert!(
            guards.into_iter().all(|byte| *byte == GUARD_BYTE),
            "a kernel wrote beside its memory"
        );
    }
}

impl EmulatedDriver {
    pub fn new(seed: u64, bytes: usize) -> Self {
        Self {
            seed,
            memory: HashMap::new(),
            left: bytes,
            queue: Vec::new(),
            slots: [None; 2],
            staged: 0,
        }
    }

    fn run(&mut self) {
        for launch in self.queue.drain(..) {
            launch(&EMULATOR);
        }
        self.memory.values().for_each(Memory::check);
    }

    /// Writes at once: the copies' own stream may be ahead of the launches.
    fn write(to: u64, bytes: &[u8]) {
        // SAFETY: `to` is memory of this driver, or of the test, that holds so many bytes.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
    }
}

impl Drop for EmulatedDriver {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.run();
        }
    }
}

impl Driver for EmulatedDriver {
    fn allocate(&mut self, bytes: usize) -> Result<u64, DeviceFault> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            DeviceFault(format!("the device has no {bytes} bytes left: it is small"))
        })?;
        let mut memory = Memory::new(bytes, 0);
        let address = memory.address();
        self.memory.insert(address, memory);
        Ok(address)
    }

    fn free(&mut self, address: u64, bytes: usize) {
        self.run();
        let memory = self.memory.remove(&address).expect("it was allocated");
        assert_eq!(memory.len, bytes);
        self.left += bytes;
    }

    fn stage(&mut self, bytes: usize) -> Result<u64, DeviceFault> {
        // Nothing that is waiting may need this slot any longer.
        self.run();
        self.staged = 1 - self.staged;
        if let Some((address, bytes)) = self.slots[self.staged].take() {
            self.free(address, bytes);
        }
        let address = self.allocate(bytes.max(1))?;
        self.slots[self.staged] = Some((address, bytes.max(1)));
        Self::write(address, &vec![POISON; bytes]);
        Ok(address)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), DeviceFault> {
        let (address, room) = self.slots[self.staged].expect("stage came before");
        assert!(bytes.len() <= room);
        Self::write(address, bytes);
        Ok(())
    }

    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), DeviceFault> {
        let bytes = bytes.to_vec();
        self.queue.push(Box::new(move |_| Self::write(to, &bytes)));
        Ok(())
    }

    fn clear(&mut self, at: u64, bytes: usize) -> Result<(), DeviceFault> {
        let zeros = vec![0; bytes];
        self.queue.push(Box::new(move |_| Self::write(at, &zeros)));
        Ok(())
    }

    fn fetch(&mut self, from: u64, out: &mut [u8]) -> Result<(), DeviceFault> {
        self.run();
        // SAFETY: `from` is memory of this driver that holds so many bytes.
        unsafe { core::ptr::copy_nonoverlapping(from as *const u8, out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    fn wait_for(&mut self, _: u64) -> Result<(), DeviceFault> {
        Ok(())
    }

    fn finished(&mut self) -> Result<u64, DeviceFault> {
        self.run();
        Ok(0)
    }

    unsafe fn launch<T: Copy + Send + 'static>(
        &mut self,
        kernel: &'static str,
        blocks: u32,
        arguments: &T,
    ) -> Result<(), DeviceFault> {
        let (arguments, seed) = (*arguments, self.seed);
        self.queue.push(Box::new(move |emulator| {
            // SAFETY: the caller's promise, and memory stays until the queue has run.
            unsafe { emulator.launch(kernel, blocks, &arguments, seed) }.unwrap();
        }));
        Ok(())
    }

    fn own_bytes(&self) -> u64 {
        self.slots.iter().flatten().map(|slot| slot.1 as u64).sum()
    }

    fn seconds(&self) -> DeviceSeconds {
        DeviceSeconds::default()
    }
}
