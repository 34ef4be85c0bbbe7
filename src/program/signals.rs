//! What a program says and hears beside its work: the log on standard error, and
//! interrupts.

use super::output;
use nix::sys::{prctl, signal::Signal};
use tracing_subscriber::EnvFilter;

/// Logs to standard error what `filter` lets through, such as `info` or
/// `postcopy::engine=debug`; warnings, if it is no filter. Panics are said there, too. Nobody
/// waits for whoever reads it: see [`output`].
pub fn log_to_stderr(program: &str, filter: &str) {
    output::open();
    output::take_panics();
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|error| {
        complain(program, &format!("--log: {error}; logging warnings"));
        EnvFilter::new("warn")
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(output::Log)
        // It would be said on standard error at once, with a panic if nobody reads there.
        .log_internal_errors(false)
        .init();
}

/// Says one line on standard error. Whoever read there may be gone, or may have stopped, which
/// is nothing to the guest: unlike `eprintln`, this neither panics nor waits.
pub fn complain(program: &str, what: &str) {
    output::err(&format!("{program}: {what}"));
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
            output::farewell();
            std::process::exit(130);
        }
        complain(program, "interrupted; a migration is only stopped before its commit");
        stop();
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!(%error, "interrupts are not handled");
    }
}
