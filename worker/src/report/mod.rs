//! What runs came to: a closing table for the terminal and one self-contained HTML page.
//!
//! Everything here is computed from the records that a run leaves behind ([`crate::record`]), so a finished run can
//! be reported again at any time, and two machines' runs side by side.
//!
//! | module | room for |
//! |---|---|
//! | [`run`] | reading a run's directory, merging its workers, derived figures |
//! | [`table`] | the closing table |
//! | [`plot`] | one SVG plot from series of points |
//! | [`html`] | the page |
//! | [`mod@format`] | bytes, seconds and ratios for people |

pub mod format;
pub mod html;
pub mod plot;
pub mod run;
pub mod table;

pub use html::write_report;
pub use run::Run;
pub use table::closing_table;

use crate::record::RecordError;
use std::path::PathBuf;

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A run's records could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The directory holds no records at all.
    #[error(
        "{} holds no run: neither steps.jsonl, nor worker-0/steps.jsonl; give a directory that `arc-worker local --run-dir` \
         or `arc-worker train --run-dir` wrote", .0.display()
    )]
    NoRun(PathBuf),
    /// The page could not be written.
    #[error("cannot write the report {}: {source}; check that its directory exists and is writable", path.display())]
    Write {
        /// File.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A plot could not be drawn.
    #[error(
        "cannot draw the plot {plot:?}: {detail}; this is a defect, please report it with the run's records"
    )]
    Plot {
        /// Its title.
        plot: String,
        /// Cause.
        detail: String,
    },
}
