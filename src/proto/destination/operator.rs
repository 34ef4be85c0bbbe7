//! What an operator may have done to the destination's session, and what it does there.

use super::{DestinationSession, DestinationState};
use crate::proto::operator::{Command, Consequence, Risk, Whereabouts};
use std::time::Duration;

impl DestinationSession {
    /// What follows from `command` now.
    ///
    /// # Errors
    /// Why it is not possible.
    pub fn consequence(&self, command: Command) -> Result<Consequence, &'static str> {
        match command {
            Command::Switch | Command::Hold | Command::GoOn | Command::Limit => {
                Err("the source copies and pushes: say it there")
            }
            Command::Redirect => Err("the source connects: redirect it there"),
            Command::TakeBack => {
                Err("only the source can take its guest back: here its memory is \
                                      missing")
            }
            Command::GiveUp => self.give_up_costs(),
        }
    }

    /// Where the guest is.
    pub fn whereabouts(&self) -> Whereabouts {
        use DestinationState as S;
        match self.state {
            S::Waiting | S::Preparing | S::Agreed => Whereabouts::Source,
            S::Restoring | S::Failed => Whereabouts::Nowhere,
            S::InDoubt => Whereabouts::InDoubt,
            S::Starting | S::Running | S::Full => Whereabouts::Destination,
            S::Over => Whereabouts::InDoubt,
        }
    }

    fn give_up_costs(&self) -> Result<Consequence, &'static str> {
        use DestinationState as S;
        match self.state {
            S::Waiting | S::Preparing | S::Agreed | S::Restoring => Ok(Consequence::harmless(
                "the migration is aborted, and the guest runs on at the source",
            )),
            S::InDoubt => Ok(Consequence::risky(
                Risk::LoseTheGuest,
                "the guest did not run here and will not: what came of it is dropped. If the source \
                 has committed it, it is nowhere then, until the source's operator takes it back",
            )),
            S::Starting | S::Running => Ok(Consequence::risky(
                Risk::LoseTheGuest,
                "the guest, which runs here, ends, with all that it did since the switchover. What \
                 the source still holds is only a part of it: it is lost",
            )),
            S::Failed => Ok(Consequence::harmless(
                "the guest cannot go on here anyhow; the source is not told why",
            )),
            S::Full => Err("no page is missing: the guest is whole here, and its VMM's"),
            S::Over => Err("the session is over"),
        }
    }

    pub(super) fn given_up(&mut self, now: Duration, why: String) {
        use DestinationState as S;
        match self.state {
            S::Waiting | S::Preparing | S::Agreed | S::Restoring => self.abort(now, why),
            S::InDoubt => {
                self.failure = format!("{why}, in doubt: the guest did not run here and will not");
                self.lost(now);
            }
            S::Starting | S::Running => {
                self.failure = format!("{why}, while the guest ran here with pages missing");
                self.lost(now);
            }
            S::Failed => self.lost(now),
            S::Full | S::Over => {}
        }
    }

    /// The source has no commit any more: its operator took the guest back, while it was
    /// his word that this one does not run. It ends, so that there are not two for longer.
    pub(super) fn revoked(&mut self, now: Duration) {
        self.failure = "the source's operator took the guest back, and it ran here, too: for a \
                        time there may have been two running guests; this one has ended"
            .into();
        self.lost(now);
    }
}
