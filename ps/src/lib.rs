//! The sharded parameter server of arc-topk.
//!
//! | module | room for |
//! |---|---|
//! | [`shard`] | the deterministic machine: membership, rounds, selection, aggregation |
//! | [`server`] | QUIC sessions and admin HTTP around it |
//! | [`store`] | the snapshot store: what is kept, and its files |
//! | [`cli`] | `arc-ps`, callable from other binaries |

pub mod cli;
pub mod server;
pub mod shard;
pub mod store;
