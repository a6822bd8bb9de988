//! Tests of the crate from outside, in one program.
#![allow(clippy::unwrap_used, reason = "tests")]

mod files;
mod frames;
mod handshake;
mod rotation;
