//! `arc-worker`: trains, alone or as one worker of a job, and starts whole jobs on one machine.

use std::process::ExitCode;

fn main() -> ExitCode {
    arc_topk_worker::cli::run(std::env::args_os())
}
