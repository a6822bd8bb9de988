//! The sharded parameter server of arc-topk.
//!
//! [`shard`] is the deterministic machine: what is computed and who takes part. Everything async around it moves bytes.

pub mod shard;
