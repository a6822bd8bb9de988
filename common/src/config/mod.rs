//! Settings. [`algorithm`] is what every peer of a job must agree on (it is part of the plan's hash).

pub mod algorithm;

pub use algorithm::AlgorithmConfig;
