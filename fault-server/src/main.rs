//! `fault-server`: attaches to a VMM's guest and serves its memory to a destination
//! until the destination has it all. For scripts and supervisors: one status line a
//! second on standard output, nothing that redraws; exit codes as of `postcopy migrate`.

mod status;

use clap::{Parser, ValueEnum};
use postcopy::fault_server::arguments::ServeArgs;
use postcopy::fault_server::keeper;
use postcopy::program::{exit, signals};
use status::{Format, Status};
use std::process::ExitCode;

/// Serves a guest's memory from the source host of a post-copy migration.
///
/// Attaches to the VMM behind a control socket, has it pause its guest, sends the
/// machine state to the destination that printed the ticket, tells the VMM that it may go
/// once the guest runs there, and answers that destination's page faults until it has every
/// page. A keeper, a process of its own, holds the memory meanwhile: if this one dies in the
/// middle, it starts another one, which goes on.
///
/// Exit codes: 0 done; 1 failed before anything moved; 2 wrong arguments; 3 the
/// migration was aborted and the guest runs on in its VMM; 4 the guest was lost: the link
/// did not come back after the commit, or the guest of an aborted migration does not run
/// on; 5 the report does not add up; 6 done, but the report
/// could not be written.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    serve: ServeArgs,
    /// What a status line is made of.
    #[arg(long, value_enum, default_value = "text")]
    status: Format,
    /// What to log to standard error, as a tracing filter such as `info` or
    /// `postcopy::engine=debug`.
    #[arg(long, env = "POSTCOPY_LOG", default_value = "warn", value_name = "FILTER")]
    log: String,
    /// End as soon as the parent process does.
    #[arg(long, hide = true)]
    die_with_parent: bool,
}

fn main() -> ExitCode {
    if let Some(ended) = keeper::run_if_asked() {
        return ended;
    }
    let arguments = Arguments::parse();
    signals::log_to_stderr("fault-server", &arguments.log);
    if arguments.die_with_parent {
        signals::die_with_parent();
    }
    let format = arguments.status;
    let mut status = Status::new(format);
    let watch = move |event| status.update(event);
    let shown = format.to_possible_value().map(|value| value.get_name().to_owned());
    let again = ["--log".to_owned(), arguments.log, "--status".to_owned()];
    let again = again.into_iter().chain(shown).map(Into::into).collect();
    let show = move |report: &_| status::end(format, report);
    exit::ended("fault-server", &arguments.serve.run("fault-server", again, watch, show))
}
