//! Tests of the crate from outside. One program: each more would link all of the crate, and QUIC, once again.
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    reason = "tests; modules share what is in net"
)]

mod command;
mod fuzz_corpus;
mod hostile;
mod net;
mod rotation;
mod server;
mod store;
