//! `postcopy migrate`: attach to a guest and move it.

use clap::Args;
use postcopy::Event;
use postcopy::fault_server::arguments::ServeArgs;
use postcopy::report::human::render;
use postcopy::report::progress::{Progress, ProgressMode, Snapshot};
use std::io::Write;

/// Attaches to a running guest and moves it: this process is the fault server, and
/// holds the guest's memory until the destination has it all.
#[derive(Debug, Args)]
pub struct Migrate {
    #[command(flatten)]
    serve: ServeArgs,
    /// No progress display, no report for people.
    #[arg(long)]
    quiet: bool,
}

impl Migrate {
    /// Migrates, and logs what `log` lets through.
    pub fn run(self, log: String) -> anyhow::Result<()> {
        let mode = if self.quiet { ProgressMode::Quiet } else { ProgressMode::Auto };
        let mut display = Progress::new(mode);
        let watch = move |event: Event| {
            let now = match event {
                Event::Progress(now) => now,
                Event::Paused { why } => {
                    return display.note(&format!("the link is lost: {why}; connecting again"));
                }
                Event::LinkUp { epoch: 1.. } => return display.note("the link is back"),
                _ => return,
            };
            display.update(Snapshot {
                phase: now.phase.name(),
                pages_done: now.settled,
                pages_total: now.pages,
                bytes: now.wire_bytes,
                network_faults: now.network_faults,
                elapsed: now.elapsed,
                paused: now.paused.map(|pause| (pause.lasts, pause.attempts)),
            });
        };
        // Nobody looks at the display of a process that was started in this one's place.
        let again = ["--log", &log, "migrate", "--quiet"].map(Into::into).to_vec();
        self.serve.run("postcopy", again, watch, move |report| {
            if !self.quiet {
                // On the display's thread, which may wait; nobody may read there any more.
                let _ = writeln!(std::io::stdout(), "{}", render(report));
            }
        })
    }
}
