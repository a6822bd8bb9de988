//! `arc-ps`: one shard of the parameter server, and what belongs to running it.

use std::process::ExitCode;

fn main() -> ExitCode {
    arc_topk_ps::cli::run(std::env::args_os())
}
