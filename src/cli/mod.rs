//! The command line: one file a subcommand.

mod check;
mod demo;
mod exit;
mod guest_args;
mod migrate;
mod receive;
mod run;
mod units;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Post-copy live migration of virtual machines.
///
/// Exit codes: 0 done; 1 failed before anything moved; 2 wrong arguments; 3 the
/// migration was aborted and the guest runs on at the source; 4 the link was lost
/// after the commit and did not come back; 5 the memory is not what it should be; 6 done,
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
    /// Start a guest that can be migrated away.
    Run(run::Run),
    /// Wait for a guest: print a ticket, take the guest in, go on running it.
    Receive(receive::Receive),
    /// Move a running guest to whoever printed the ticket.
    Migrate(migrate::Migrate),
    /// Recompute a reference guest's memory and compare it with standard input.
    Check(check::Check),
}

/// Runs the command and says how it went.
pub fn run(arguments: Arguments) -> ExitCode {
    let filter = EnvFilter::try_new(&arguments.log).unwrap_or_else(|error| {
        eprintln!("postcopy: --log: {error}; logging warnings");
        EnvFilter::new("warn")
    });
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    if arguments.die_with_parent {
        let kill = nix::sys::signal::Signal::SIGKILL;
        if let Err(error) = nix::sys::prctl::set_pdeathsig(kill) {
            tracing::warn!(%error, "this process may outlive its parent");
        }
    }
    let done = match arguments.command {
        Command::Demo(demo) => demo.run(),
        Command::Run(run) => run.run(),
        Command::Receive(receive) => receive.run(),
        Command::Migrate(migrate) => migrate.run(),
        Command::Check(check) => check.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error),
    }
}

/// Calls `stop` on the first SIGINT or SIGTERM; a second one ends the process at once.
fn on_interrupt(stop: impl Fn() + Send + 'static) {
    let mut asked = false;
    let handler = move || {
        if std::mem::replace(&mut asked, true) {
            eprintln!("postcopy: interrupted twice");
            std::process::exit(130);
        }
        eprintln!("postcopy: interrupted; a migration is only stopped before its commit");
        stop();
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!(%error, "interrupts are not handled");
    }
}
