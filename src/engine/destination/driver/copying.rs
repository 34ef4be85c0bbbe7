//! The driver's part in pages that come before the machine state.

use super::{Driver, Input};
use crate::engine::destination::copied::CopiedPages;
use crate::proto::destination::DestinationState;
use crate::proto::message::FEATURE_COPY;
use crate::proto::placed::PlacedPages;

impl Driver {
    /// The place for them, if the source has said that they come.
    pub(super) fn copied(&self) -> Option<CopiedPages> {
        let hello = self.hello.as_ref().filter(|hello| hello.features & FEATURE_COPY != 0)?;
        let input = self.input.clone();
        Some(CopiedPages::new(hello.layout.pages(), move |pages| {
            let _ = input.send(Input::Landed { pages });
        }))
    }

    pub(super) fn await_copied(&self, pages: u64) {
        if let Some(copied) = self.installer.as_ref().and_then(|of| of.copied.as_ref()) {
            copied.wait_for(pages);
        }
    }

    pub(super) fn take_valid(&mut self, valid: &PlacedPages) {
        let Some(installer) = &self.installer else { return };
        match installer.take_valid(valid) {
            Ok(data) => self.data = Some(data),
            Err(error) => self.link_ended(error),
        }
    }

    /// Has those with content mapped, now that the guest runs.
    pub(super) fn map_copied(&mut self) {
        if let Some((installer, data)) = self.installer.clone().zip(self.data.take()) {
            installer.map_copied(data, self.mapped.clone());
        }
    }

    /// Whether pages come, before the machine state or after it.
    pub(super) fn takes_pages(&self) -> bool {
        let copied = || self.installer.as_ref().is_some_and(|of| of.copied.is_some());
        match self.state() {
            Some(DestinationState::Running) => true,
            Some(DestinationState::Agreed) => copied(),
            _ => false,
        }
    }
}
