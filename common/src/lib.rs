//! Pure parts of arc-topk: no sockets, no clocks, no threads of its own beyond
//! rayon in [`compress::fast`].
//!
//! | module | room for |
//! |---|---|
//! | [`ids`] | newtypes for ranks, shards, steps, … |
//! | [`config`] | the algorithm's settings and how flags, environment and TOML are read |
//! | [`plan`] | tensors → rows → buckets → shard ranges, its hash and differences |
//! | [`compress`] | projections, sketches, selection, value codecs, feedback rules |
//! | [`optim`] | SGD, AdamW and catch-up AdamW on rows |
//! | [`wire`] | the only place that knows byte layout, limits and versions |
//! | [`metrics`] | every metric's name, labels, help and buckets |
//! | [`any_bytes`] | how fuzz targets read choices from bytes |

pub mod any_bytes;
pub mod compress;
pub mod config;
mod elementary;
pub mod ids;
pub mod metrics;
pub mod optim;
pub mod plan;
pub mod wire;
