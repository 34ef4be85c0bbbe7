//! `postcopy run`: a guest with a control socket.

use super::guest_args::GuestArgs;
use anyhow::Context;
use clap::Args;
use postcopy::attach::server::{ServeEnd, Server};
use postcopy::host::departure::Departure;
use postcopy::program::output;
use postcopy::program::units::parse_time;
use postcopy::vmm::guest::DirtyLogChoice;
use std::path::PathBuf;
use std::time::Duration;

/// Starts a reference guest and serves its control socket, until the guest has left
/// or was stopped.
#[derive(Debug, Args)]
pub struct Run {
    /// Where to make the control socket (mode 0600).
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    #[command(flatten)]
    guest: GuestArgs,
    /// How it is noticed which pages the guest writes, once a client asks for that. auto: for a
    /// KVM guest manual where KVM has it, else bitmap; a process guest has one log only, the
    /// kernel's of a mapping (Linux 6.7).
    #[arg(long, value_enum, default_value = "auto", value_name = "LOG")]
    dirty_log: DirtyLogChoice,
    /// Pause the guest when it has run for so long, before anybody is served: it is moved as it is,
    /// and arrives paused.
    #[arg(long, value_parser = parse_time, value_name = "TIME")]
    pause_after: Option<Duration>,
}

impl Run {
    /// Runs the guest.
    pub fn run(self) -> anyhow::Result<()> {
        let server = Server::bind(&self.control).with_context(|| {
            format!("cannot make the control socket {}", self.control.display())
        })?;
        let mut guest = self.guest.create(self.dirty_log)?;
        guest.resume()?;
        // The guest runs: nobody waits for whoever reads this.
        output::out(&format!(
            "{} guest of {} MiB runs as process {}; control socket {}",
            guest.kind().name(),
            self.guest.memory >> 20,
            std::process::id(),
            self.control.display()
        ));
        let mut departure = Departure::new(guest)?;
        if let Some(after) = self.pause_after {
            std::thread::sleep(after);
            departure.hold()?;
            output::out("the guest is paused");
        }
        let end = server.serve(&mut departure)?;
        output::out(match end {
            ServeEnd::Released => "the guest has left",
            ServeEnd::Stopped => "the guest was stopped",
            // Only a keeper ends so.
            ServeEnd::GivenBack => "the guest was given back",
        });
        Ok(())
    }
}
