//! The worker of arc-topk: compresses, pushes and applies gradients; a library for any trainer and a trainer of its own.
//!
//! | module | room for |
//! |---|---|
//! | [`backend`] | buffers, feedback state and the passes over them, on a CPU or a device |
//! | `cli` | `arc-worker`'s commands (feature `train`) |
//! | [`member`] | a worker's place in an elastic job: one step machine and the links to all shards, without sockets |
//! | [`memory`] | a whole job in one process, without sockets |
//! | [`record`] | what a run leaves behind: `steps.jsonl` and `summary.json` |
//! | `report` | the closing table and the HTML page, from records (feature `train`) |
//! | [`step`] | one training step as a machine without sockets |
//! | [`reducer`] | what a trainer sees |
//! | [`session`] | a reducer over QUIC |
//! | `train` | the built-in trainer (feature `train`): models, data, loop, checkpoints |

pub mod backend;
#[cfg(feature = "train")]
pub mod cli;
pub mod member;
pub mod memory;
pub mod record;
pub mod reducer;
#[cfg(feature = "train")]
pub mod report;
pub mod session;
pub mod step;
#[cfg(feature = "train")]
pub mod train;
