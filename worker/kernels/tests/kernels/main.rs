//! Kernel logic on the CPU emulator against the scalar reference and the golden vectors: to the bit wherever the reference defines
//! bits, which is everywhere but in the sums of a sketch. Every launch runs with two orders of threads and blocks.
#![allow(clippy::unwrap_used, reason = "tests")]

mod adamw;
mod device;
mod fatbin;
mod memory;
mod projection;
mod round;
mod rounds;
mod vectors;
