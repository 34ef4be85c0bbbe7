//! The command line: one file a subcommand.

mod bench;
mod check;
mod cut;
mod demo;
mod guest_args;
mod migrate;
mod receive;
mod run;
mod session;

use clap::{Parser, Subcommand};
use postcopy::program::{exit, signals};
use std::process::ExitCode;

/// Post-copy live migration of virtual machines.
///
/// Exit codes: 0 done; 1 failed before anything moved; 2 wrong arguments; 3 the
/// migration was aborted and the guest runs on at the source; 4 the guest was lost:
/// the link did not come back after the commit, or the guest of an aborted migration does
/// not run on; 5 the memory is not what it should be; 6 done,
/// but the report could not be written.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Arguments {
    /// What to log to standard error, as a tracing filter such as `info` or
    /// `postcopy::engine=debug`.
    #[arg(
        long,
        global = true,
        env = "POSTCOPY_LOG",
        default_value = "warn",
        value_name = "FILTER"
    )]
    log: String,
    /// End as soon as the parent process does.
    #[arg(long, global = true, hide = true)]
    die_with_parent: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Migrate a guest under load between processes of this machine, and verify it.
    Demo(demo::Demo),
    /// Measure migrations: workloads, modes, policies, sizes, backings and links, beside floors.
    Bench(bench::Bench),
    /// Start a guest that can be migrated away.
    Run(run::Run),
    /// Wait for a guest: print a ticket, take the guest in, go on running it.
    Receive(receive::Receive),
    /// Move a running guest to whoever printed the ticket.
    Migrate(migrate::Migrate),
    /// Look at a running migration, redirect it, give it up, or take its guest back.
    Session(session::Session),
    /// Recompute a reference guest's memory and compare it with standard input.
    Check(check::Check),
}

/// Runs the command and says how it went.
pub fn run(arguments: Arguments) -> ExitCode {
    signals::log_to_stderr("postcopy", &arguments.log);
    if arguments.die_with_parent {
        signals::die_with_parent();
    }
    let done = match arguments.command {
        Command::Demo(demo) => demo.run(),
        Command::Bench(bench) => bench.run(),
        Command::Run(run) => run.run(),
        Command::Receive(receive) => receive.run(),
        Command::Migrate(migrate) => migrate.run(arguments.log),
        Command::Session(session) => session.run(),
        Command::Check(check) => check.run(),
    };
    exit::ended("postcopy", &done)
}
