//! The `postcopy` command: parse, call, print.

mod cli;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(ended) = postcopy::fault_server::keeper::run_if_asked() {
        return ended;
    }
    cli::run(cli::Arguments::parse())
}
