//! [`Display`]: how a migration goes on, shown to people by a thread of its own. The thread that
//! serves faults hands its events over, and never waits for a terminal or a pipe.

use crate::engine::event::Event;
use crate::program::output::FAREWELL;
use crate::program::voice::{Room, Said, Say, Voice};
use crate::report::schema::Report;
use std::io;
use tracing::warn;

/// Events that wait to be shown. How far it is matters less than what has happened.
const ROOM: Room = Room { minor: 64, all: 1024 };

enum Shown {
    Event(Event),
    /// The end.
    Over(Box<Report>),
}

impl Say for Shown {
    fn size(&self) -> usize {
        match self {
            Shown::Event(_) => 1,
            // There is one, and there is always room for it.
            Shown::Over(_) => 0,
        }
    }

    fn is_minor(&self) -> bool {
        matches!(self, Shown::Event(Event::Progress(_)))
    }

    /// Only the newest figures are worth anything; but each phase is shown.
    fn replaces(&self, older: &Self) -> bool {
        match (self, older) {
            (Shown::Event(Event::Progress(new)), Shown::Event(Event::Progress(old))) => {
                new.phase == old.phase
            }
            _ => false,
        }
    }
}

/// What is shown of one migration.
pub(super) struct Display(Voice<Shown>);

impl Display {
    /// One that calls `watch` with each event and `show` with the report. Both may block.
    pub fn start(
        watch: impl FnMut(Event) + Send + 'static,
        show: impl FnOnce(&Report) + Send + 'static,
    ) -> io::Result<Self> {
        let mut parts = Some((watch, show));
        let voice = Voice::start("display", ROOM, move |said| match said {
            Said::This(Shown::Event(event)) => {
                if let Some((watch, _)) = &mut parts {
                    watch(event);
                }
            }
            Said::This(Shown::Over(report)) => {
                if let Some((watch, show)) = parts.take() {
                    // A line that it redraws is gone then.
                    drop(watch);
                    show(&report);
                }
            }
            Said::LeftOut(events) => {
                warn!(events, "some of what happened was not shown: nobody read for too long");
            }
        })?;
        Ok(Self(voice))
    }

    /// What takes the events. It never waits.
    pub fn watch(&self) -> impl FnMut(Event) + Send + 'static {
        let voice = self.0.clone();
        move |event| {
            voice.say(Shown::Event(event));
        }
    }

    /// Shows how it ended, after all else.
    pub fn end(&self, report: &Report) {
        self.0.say(Shown::Over(Box::new(report.clone())));
    }

    /// Waits a moment for whoever reads it.
    pub fn finish(&self) {
        self.0.finish(FAREWELL);
    }
}
