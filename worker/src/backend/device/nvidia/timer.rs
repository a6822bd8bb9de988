//! Time of launches, by events around them.

use crate::backend::device::DeviceSeconds;
use arc_topk_kernels::names;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUstream};

/// Launches whose time is not read yet, and events to be used again.
#[derive(Default)]
pub(super) struct Timers {
    running: Vec<Timer>,
    spare: Vec<(CUevent, CUevent)>,
    seconds: DeviceSeconds,
}

struct Timer {
    kernel: &'static str,
    begin: CUevent,
    end: CUevent,
}

/// Launches that are timed at once; those beyond are not, in a job that reads nothing back for so long.
const MOST: usize = 4096;

impl Timers {
    /// Launches, with an event before and one after.
    pub(super) fn time(
        &mut self,
        kernel: &'static str,
        stream: CUstream,
        launch: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        if self.running.len() >= MOST {
            return launch();
        }
        let timing = CUevent_flags::CU_EVENT_DEFAULT;
        let (begin, end) = match self.spare.pop() {
            Some(pair) => pair,
            None => (
                result::event::create(timing)?,
                result::event::create(timing)?,
            ),
        };
        self.running.push(Timer { kernel, begin, end });
        // SAFETY: events and stream are the driver's.
        unsafe { result::event::record(begin, stream) }?;
        launch()?;
        // SAFETY: as above.
        unsafe { result::event::record(end, stream) }
    }

    /// All launches have ended: adds their times up.
    pub(super) fn read(&mut self) -> Result<(), DriverError> {
        for timer in self.running.drain(..) {
            // SAFETY: both were recorded on one stream, and have happened.
            let milliseconds = unsafe { result::event::elapsed(timer.begin, timer.end) }?;
            let seconds = f64::from(milliseconds) / 1e3;
            match timer.kernel {
                names::GATHER => self.seconds.gather += seconds,
                names::COMMIT => self.seconds.commit += seconds,
                names::ENERGY => self.seconds.energy += seconds,
                _ => self.seconds.sketch += seconds,
            }
            self.spare.push((timer.begin, timer.end));
        }
        Ok(())
    }

    pub(super) fn seconds(&self) -> DeviceSeconds {
        self.seconds
    }

    pub(super) fn release(&mut self) {
        let running = self.running.drain(..).map(|timer| (timer.begin, timer.end));
        for (begin, end) in running.chain(self.spare.drain(..)) {
            // SAFETY: they were made here, and nobody else has them.
            unsafe {
                let _ = result::event::destroy(begin);
                let _ = result::event::destroy(end);
            }
        }
    }
}
