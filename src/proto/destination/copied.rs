//! Pages that come before the machine state: how long they are waited for, and the source's
//! word on which of them are valid.

use super::{DestinationAction, DestinationSession, DestinationState};
use crate::proto::message::{FEATURE_COPY, Hello};
use crate::proto::placed::PlacedPages;
use std::time::Duration;

/// What the source has said of them.
#[derive(Debug)]
pub(super) enum Copied {
    /// So much of the set of valid pages.
    Telling(PlacedPages),
    /// All of it.
    Told,
}

impl Copied {
    /// Nothing yet, if the proposal says that pages come.
    pub(super) fn of(hello: &Hello) -> Option<Self> {
        let comes = hello.features & FEATURE_COPY != 0;
        comes.then(|| Self::Telling(PlacedPages::new(hello.layout.pages())))
    }

    pub(super) fn is_told(&self) -> bool {
        matches!(self, Self::Told)
    }
}

impl DestinationSession {
    /// A source that copies may take its time, as long as it is there.
    pub(super) fn copies_on(&mut self, now: Duration) {
        if self.state == DestinationState::Agreed && self.copied.is_some() {
            self.deadline = Some(now + self.limits.restore);
        }
    }

    pub(super) fn valid_part(&mut self, now: Duration, part: &[u8], last: bool) {
        let Some(Copied::Telling(valid)) = &mut self.copied else {
            return self.violated(now, "Valid comes unasked".into());
        };
        let taken = valid.take(part).and_then(|()| if last { valid.complete() } else { Ok(()) });
        if let Err(error) = taken {
            return self.violated(now, format!("its set of valid pages: {error}"));
        }
        if last && let Some(Copied::Telling(valid)) = self.copied.replace(Copied::Told) {
            self.push(DestinationAction::TakeValid(valid));
        }
    }
}
