//! Optimizers on rows.
