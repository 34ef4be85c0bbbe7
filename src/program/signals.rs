//! What a program says and hears beside its work: the log on standard error, and
//! interrupts.

use nix::sys::{prctl, signal::Signal};
use std::io::Write;
use tracing_subscriber::EnvFilter;

/// Logs to standard error what `filter` lets through, such as `info` or
/// `postcopy::engine=debug`; warnings, if it is no filter.
pub fn log_to_stderr(program: &str, filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|error| {
        complain(program, &format!("--log: {error}; logging warnings"));
        EnvFilter::new("warn")
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        // It would be said on standard error, with a panic if that cannot be written to.
        .log_internal_errors(false)
        .init();
}

/// Says one line on standard error. Whoever read there may be gone, which is nothing to the
/// guest: unlike `eprintln`, this does not panic then.
pub fn complain(program: &str, what: &str) {
    let _ = writeln!(std::io::stderr(), "{program}: {what}");
}

/// Has the kernel end this process as soon as its parent ends.
pub fn die_with_parent() {
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGKILL) {
        tracing::warn!(%error, "this process may outlive its parent");
    }
}

/// Calls `stop` on the first SIGINT or SIGTERM; a second one ends the process at once,
/// with exit code 130, after `leave`.
pub fn on_interrupt(
    program: &'static str,
    stop: impl Fn() + Send + 'static,
    leave: impl Fn() + Send + 'static,
) {
    let mut asked = false;
    let handler = move || {
        if std::mem::replace(&mut asked, true) {
            complain(program, "interrupted twice");
            leave();
            std::process::exit(130);
        }
        complain(program, "interrupted; a migration is only stopped before its commit");
        stop();
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!(%error, "interrupts are not handled");
    }
}
