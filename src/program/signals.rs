//! What a program says and hears beside its work: the log on standard error, and
//! interrupts.

use nix::sys::{prctl, signal::Signal};
use tracing_subscriber::EnvFilter;

/// Logs to standard error what `filter` lets through, such as `info` or
/// `postcopy::engine=debug`; warnings, if it is no filter.
pub fn log_to_stderr(program: &str, filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|error| {
        eprintln!("{program}: --log: {error}; logging warnings");
        EnvFilter::new("warn")
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
}

/// Has the kernel end this process as soon as its parent ends.
pub fn die_with_parent() {
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGKILL) {
        tracing::warn!(%error, "this process may outlive its parent");
    }
}

/// Calls `stop` on the first SIGINT or SIGTERM; a second one ends the process at once,
/// with exit code 130.
pub fn on_interrupt(program: &'static str, stop: impl Fn() + Send + 'static) {
    let mut asked = false;
    let handler = move || {
        if std::mem::replace(&mut asked, true) {
            eprintln!("{program}: interrupted twice");
            std::process::exit(130);
        }
        eprintln!("{program}: interrupted; a migration is only stopped before its commit");
        stop();
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!(%error, "interrupts are not handled");
    }
}
