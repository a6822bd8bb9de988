//! CUDA kernels of the worker's hot path: sketch, gather, commit, row energies and catch-up AdamW.
//!
//! The kernels lie beside this crate's manifest as `.cu` files and are compiled ahead of time (`build.py`) into a fatbin that is
//! embedded here, so that neither a build nor a run needs a CUDA toolkit. This crate knows what a launch takes (`abi`, mirrored
//! from `arc.cuh`) and how it is cut into blocks (`geometry`); it calls no driver. `README.md` describes every kernel.
//!
//! The feature `emulator` runs the same sources on a CPU, for tests.

mod abi;
mod adam;
#[cfg(feature = "emulator")]
pub mod emulator;
mod geometry;

pub use abi::{
    AdamArgs, AdamTau, AdamTensor, Commit, CommitArgs, CommitFlags, Element, EnergyArgs,
    EnergySource, GatherArgs, GaussianArgs, Piece, PieceSource, Projection, Segment, SketchArgs,
    Tile, Wire,
};
pub use geometry::{
    GATHER_VALUES, MAX_TILE_ROWS, SegmentShape, THREADS, adam_tiles, gather_tiles, gaussian_tiles,
    segment_tiles,
};

/// Machine code for sm_80, sm_90 and sm_100, and PTX for what comes after.
pub const FATBIN: &[u8] = include_bytes!("../arc.fatbin");

/// Names of the kernels in [`FATBIN`].
pub mod names {
    /// Finiteness and ‖g‖² alone: rounds without a sketch.
    pub const INSPECT: &str = "arc_inspect";
    /// Gaussian V of some tensors.
    pub const GAUSSIAN: &str = "arc_gaussian";
    /// Encodes values.
    pub const GATHER: &str = "arc_gather";
    /// Ends a round.
    pub const COMMIT: &str = "arc_commit";
    /// ‖A_j‖² of rows.
    pub const ENERGY: &str = "arc_energy";
    /// Catch-up AdamW.
    pub const ADAMW: &str = "arc_adamw";

    /// The sketch of this rank, with signs or with Gaussian entries that [`GAUSSIAN`] has written.
    #[must_use]
    pub fn sketch(rank: u32, gaussian: bool) -> &'static str {
        match (rank, gaussian) {
            (_, true) => "arc_sketch_gaussian",
            (1, _) => "arc_sketch_1",
            (2, _) => "arc_sketch_2",
            (4, _) => "arc_sketch_4",
            (8, _) => "arc_sketch_8",
            _ => "arc_sketch_any",
        }
    }

    /// All of them.
    pub const ALL: [&str; 12] = [
        INSPECT,
        GAUSSIAN,
        GATHER,
        COMMIT,
        ENERGY,
        ADAMW,
        "arc_sketch_1",
        "arc_sketch_2",
        "arc_sketch_4",
        "arc_sketch_8",
        "arc_sketch_any",
        "arc_sketch_gaussian",
    ];
}
