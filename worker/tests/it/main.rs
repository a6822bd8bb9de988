//! Tests of the crate from outside. One program: each more would link all of the crate, and QUIC, once again.
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    reason = "tests; modules share what is in net and support"
)]

mod bad_peers;
#[cfg(feature = "train")]
mod command;
mod determinism;
mod device;
mod elastic;
mod fuzz_corpus;
#[cfg(feature = "cuda")]
mod gpu;
mod lent;
mod machine;
mod member;
mod memory;
mod memory_selection;
mod net;
mod reconnect;
mod session;
mod store;
mod support;
#[cfg(feature = "train")]
mod threads;
mod undo;
mod vectors;
